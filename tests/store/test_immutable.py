"""A container that keeps what is in it, by a policy or because the credential may only create."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.azurite import AzureVault
from tests.store.memory import MemoryStore
from tests.store.proxy import Fault, FaultProxy, Worm
from vdiskfs.catalog.enforced import ALLOWED, CREDENTIAL, POLICY, probe_enforced
from vdiskfs.errors import AlreadyExistsError, RefusedError, UsageError
from vdiskfs.store import Store, open_store
from vdiskfs.store.split import SplitStore
from vdiskfs_tools.doctor import _enforced_findings
from vdiskfs_tools.vaults import with_control

KINDS = {
    "policy": (409, "BlobImmutableDueToPolicy", POLICY),
    "credential": (403, "AuthorizationPermissionMismatch", CREDENTIAL),
}
DISK = "disks/" + "a" * 32


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def kept(kind: str, azure_vault: AzureVault) -> AsyncIterator[tuple[Store, Worm, FaultProxy]]:
    status, code, _ = KINDS[kind]
    worm = Worm(azure_vault.container, status, code)
    with FaultProxy(azure_vault.azurite.port, worm) as proxy:
        url = f"{azure_vault.url}?control={azure_vault.container}-control"
        store = open_store(url, environ=azure_vault.azurite.environ(proxy.port))
        await store.prepare()
        yield store, worm, proxy
        await store.aclose()


@pytest.mark.azurite
async def test_what_is_enforced_is_found_out_and_leaves_one_object(
    kind: str, kept: tuple[Store, Worm, FaultProxy]
) -> None:
    store, worm, _ = kept
    for _ in range(3):
        found = await probe_enforced(store)
        assert (found.overwrite, found.delete, found.documents) == (
            KINDS[kind][2], KINDS[kind][2], ALLOWED)  # fmt: skip
    assert len([path for path in worm.made if "/probes/" in path]) == 1
    [finding] = _enforced_findings(found)
    assert (finding.status, "can take points away" in finding.detail) == ("ok", False)
    # That it was so once is not believed: nothing is left, and it is allowed.
    worm.ended = True
    found = await probe_enforced(store)
    assert (found.overwrite, found.delete) == (ALLOWED, ALLOWED)
    assert "can take points away" in _enforced_findings(found)[0].detail
    assert [info async for info in store.list("probes/")] == []


@pytest.mark.azurite
async def test_a_slot_is_filled_once_and_its_own_writer_knows_it(
    kept: tuple[Store, Worm, FaultProxy],
) -> None:
    store, worm, proxy = kept
    lost = proxy.add(Fault("drop-reply", "PUT", path="/g00000001/"))
    name = f"{DISK}/g00000001/{0:016x}"
    etag = await store.create(name, b"mine")
    assert lost.fired
    assert len(worm.refused) == 1  # it was tried again, and refused: it landed already
    assert (await store.stat(name)).etag == etag
    with pytest.raises(AlreadyExistsError):
        await store.create(name, b"another's")
    with pytest.raises(RefusedError):
        await store.delete(name)
    # What changes changes.
    etag = await store.create(f"{DISK}/disk.json", b"{}")
    await store.replace(f"{DISK}/disk.json", b"{ }", etag=etag)


async def test_what_is_created_once_lies_in_one_store_and_what_changes_in_the_other() -> None:
    data, control = MemoryStore(), MemoryStore()
    store = SplitStore(data, control)
    names = [
        f"{DISK}/g00000001/{0:016x}", f"{DISK}/g00000001.1/0-1.0", f"{DISK}/g00000001.ledger/x",
        f"segments/{'a' * 32}/0", "probes/0", "data/vault.json", "vault.json", f"{DISK}/disk.json",
        f"{DISK}/proofs/1-1.json", "names/web01.json", "sites/a.json",
    ]  # fmt: skip
    for name in names:
        await store.create(name, b"")
    assert sorted(data.objects) == sorted(names[:6])
    assert sorted(control.objects) == sorted(names[6:])
    prefixes = (
        "",
        "d",
        "disks/",
        f"{DISK}/",
        f"{DISK}/g",
        "segments/",
        "data/",
        "names/",
        "probes/",
    )
    for prefix in prefixes:
        listed = [info.name async for info in store.list(prefix)]
        assert listed == sorted(name for name in names if name.startswith(prefix)), prefix


async def test_one_container_that_keeps_all_is_of_no_use_and_doctor_says_so() -> None:
    store = MemoryStore()

    async def refuse(*_: object, **__: object) -> str:
        raise RefusedError("the vault refused: BlobImmutableDueToPolicy")

    store.replace = refuse  # type: ignore[method-assign]
    [_, documents] = _enforced_findings(await probe_enforced(store))
    assert (documents.name, documents.status) == ("vault documents", "missing")
    assert "?control=CONTAINER" in documents.fix


def test_the_second_container_is_named_in_the_url_and_may_have_its_own_token() -> None:
    secret = "sv=1&sig=c2VjcmV0"
    environ = {"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_SAS_TOKEN": "sig=ZGF0YQ",
               "AZURE_STORAGE_CONTROL_SAS_TOKEN": secret}  # fmt: skip
    store = open_store("azure://data/p?control=ctl", environ=environ)
    assert "azure://data/p" in store.describe()
    assert "azure://ctl/p" in store.describe()
    assert "sig" not in store.describe()
    inner: Any = store
    both = inner._store._data, inner._store._control
    tokens = [one._account.credential.signature for one in both]
    assert tokens == ["sig=ZGF0YQ", secret]
    for url in ("azure://data/p?control=data", "azure://data?control=x&sig=SECRET", "azure://data?sig=1",
                "file:///srv?control=ctl"):  # fmt: skip
        with pytest.raises(UsageError) as raised:
            open_store(url, environ=environ)
        assert "SECRET" not in str(raised.value)
    assert with_control("azure://data/p", "azure://ctl") == "azure://data/p?control=ctl"
    for wrong in (
        ("file:///srv", "azure://ctl"),
        ("azure://data", "azure://ctl/p"),
        ("azure://data?control=c", "d"),
    ):
        with pytest.raises(UsageError):
            with_control(*wrong)
