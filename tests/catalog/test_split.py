"""The two containers of a vault belong together, and say so."""

from __future__ import annotations

import pytest

from tests.store.memory import MemoryStore
from tests.vaults import given
from vdiskfs.catalog import Vault
from vdiskfs.crypto import Secrets
from vdiskfs.errors import StateError, WrongVaultError
from vdiskfs.store import DATA_MARK
from vdiskfs.store.retry import RetryingStore
from vdiskfs.store.split import SplitStore


def both(data: MemoryStore, control: MemoryStore) -> RetryingStore:
    return RetryingStore(SplitStore(data, control))


@pytest.mark.parametrize("secrets", [None, given()])
async def test_a_vault_is_not_opened_with_the_data_of_another_one(secrets: Secrets | None) -> None:
    (data, control), (other_data, other_control) = [(MemoryStore(), MemoryStore()) for _ in "ab"]
    vault = await Vault.init(both(data, control), secrets)
    other = await Vault.init(both(other_data, other_control), secrets)
    await vault.check_identity()
    again = await Vault.open(both(data, control), secrets)
    assert again.vault_id == vault.vault_id
    crossed = f"control is vault {other.vault_id[:8]}'s, the data is that of vault "
    with pytest.raises(WrongVaultError, match=crossed + vault.vault_id[:8]):
        await Vault.open(both(data, other_control), secrets)
    # While it is open, too.
    data.objects[DATA_MARK] = other_data.objects[DATA_MARK]
    with pytest.raises(WrongVaultError, match=f"that of vault {other.vault_id[:8]}"):
        await vault.check_identity()
    del data.objects[DATA_MARK]
    with pytest.raises(WrongVaultError, match="the data is no vault's"):
        await vault.check_identity()


async def test_no_vault_is_made_in_the_data_of_another_one() -> None:
    data, control = MemoryStore(), MemoryStore()
    vault = await Vault.init(both(data, control))
    for store in (both(data, MemoryStore("other")), RetryingStore(data)):
        with pytest.raises(StateError, match=f"is the data of vault {vault.vault_id}") as raised:
            await Vault.init(store)
        assert "?control=" in str(raised.value.hint)
    with pytest.raises(StateError, match="holds a vault already"):
        await Vault.init(both(data, control))
    assert set(data.objects) == {DATA_MARK}
