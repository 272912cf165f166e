"""A vault in two containers whose making failed halfway is made by giving it again."""

from __future__ import annotations

import pytest

from tests.catalog.test_split import both
from tests.store.memory import MemoryStore
from vdiskfs.catalog import Vault
from vdiskfs.crypto import Secrets
from vdiskfs.errors import RefusedError, StateError
from vdiskfs.store import DATA_MARK
from vdiskfs.store.retry import RetryingStore


@pytest.mark.parametrize(
    ("failing", "after"),
    [(DATA_MARK, False), (DATA_MARK, True), ("vault.json", False)],
    ids=["before", "marked", "not named"],
)
async def test_an_init_that_failed_halfway_is_given_again(failing: str, after: bool) -> None:
    """By whichever half it failed, and with another key: the first one opens nothing."""
    data, control = MemoryStore("data"), MemoryStore("control")
    fault = (data if failing == DATA_MARK else control).fail(
        "create", RefusedError("not now"), prefix=failing, after=after
    )
    with pytest.raises(RefusedError):
        await Vault.init(both(data, control), Secrets(file_key=b"1" * 32))
    assert fault.fired == 1
    given = Secrets(file_key=b"2" * 32)
    made = await Vault.init(both(data, control), given)
    assert (await Vault.open(both(data, control), given)).vault_id == made.vault_id
    with pytest.raises(StateError, match="holds a vault already"):
        await Vault.init(both(data, control), given)


async def test_a_half_is_ended_only_by_its_other_half_and_while_nothing_is_in_it() -> None:
    data, control = MemoryStore("data"), MemoryStore("control")
    control.fail("create", RefusedError("not now"), prefix="vault.json")
    with pytest.raises(RefusedError):
        await Vault.init(both(data, control))
    for other in (both(data, MemoryStore("other")), RetryingStore(data)):
        with pytest.raises(StateError, match="is the data of vault"):
            await Vault.init(other)
    used = f"disks/{'a' * 32}/g1/x"
    await data.create(used, b"")
    with pytest.raises(StateError, match="is the data of vault"):
        await Vault.init(both(data, control))
    del data.objects[used]
    await Vault.init(both(data, control))


async def test_an_init_that_is_refused_marks_nothing() -> None:
    control, fresh = MemoryStore("control"), MemoryStore("fresh")
    await Vault.init(both(MemoryStore("data"), control))
    with pytest.raises(StateError, match="holds a vault already"):
        await Vault.init(both(fresh, control))
    assert not fresh.objects
