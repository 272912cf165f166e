"""vaulted: machines in the vault, by compare-and-swap; damage hides nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.catalog.memory import MemoryStore
from vdiskfs.errors import ConflictError, FormatError, NotFoundError
from vdiskfs.machines import (
    Machine,
    MachineDisk,
    list_machines,
    machine_names,
    machine_of,
    read_machine,
    write_machine,
)
from vdiskfs.machines.vaulted import read_etag

WEB = Machine("web01", 1 << 30, (MachineDisk("web01"), MachineDisk("data")))


async def test_a_machine_is_read_back_and_replaced_by_its_etag() -> None:
    """An etag that is not the newest, or none where one is needed, is refused."""
    store = MemoryStore()
    first = await write_machine(store, WEB, etag=None)
    assert await read_machine(store, "web01") == (WEB, first)
    larger = replace(WEB, memory=2 << 30)
    with pytest.raises(ConflictError, match="changed by somebody else"):
        await write_machine(store, larger, etag=None)
    second = await write_machine(store, larger, etag=first)
    with pytest.raises(ConflictError):
        await write_machine(store, WEB, etag=first)
    assert await read_machine(store, "web01") == (larger, second)
    assert await read_etag(store, "web01") == second
    assert await read_etag(store, "web02") is None


@pytest.mark.parametrize("name", ["web01", ".hidden", "..", "Größe 1", "%41", "a@b", "a" * 240])
async def test_any_name_of_a_machine_is_found_again(name: str) -> None:
    """The name of the object says the machine's, whatever characters it has."""
    store = MemoryStore()
    await write_machine(store, replace(WEB, name=name), etag=None)
    assert await machine_names(store) == [name]
    assert (await read_machine(store, name))[0].name == name
    assert all(part not in (".", "..") for part in next(iter(store.objects)).split("/"))


async def test_a_machine_that_is_not_there_is_exit_3() -> None:
    with pytest.raises(NotFoundError, match="no machine 'web01'; see `vdiskfs machine list`"):
        await read_machine(MemoryStore(), "web01")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"format": 1}, "'machine' is missing"),
        ({"format": 3, "machine": {}}, "newer vdiskfs"),
        ({"format": 1, "machine": {"name": "web01"}}, "memory: is missing"),
        ({"format": 1, "machine": {"name": "web02", "memory": 1 << 30,
                                   "disks": [{"disk": "a"}]}}, "document of another machine"),
        ({"format": 1, "machine": {"name": "web01", "memory": 1 << 30, "disks": [{"disk": "a"}],
                                   "boot": {"kernel": "../../etc/shadow"}}}, "boot.kernel: must"),
        (b"\x00", "not a document"),
        (b"[" * 100_000, "not a document"),
    ],
    ids=["empty", "newer", "part", "other", "path", "bytes", "deep"],
)  # fmt: skip
async def test_a_hostile_document_is_damage_and_hides_no_other(
    document: object, message: str
) -> None:
    """Reading it is exit 6 and names the object; the others are listed all the same."""
    store = MemoryStore()
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    store.put("machines/web01.json", data)
    store.put("machines/%ff.json", b"{}")
    store.put("machines/not a name", b"{}")
    await write_machine(store, replace(WEB, name="zoo"), etag=None)
    with pytest.raises(FormatError, match=message) as caught:
        await read_machine(store, "web01")
    assert "machines/web01.json" in str(caught.value)
    listed = await list_machines(store)
    assert [item.name for item in listed] == ["web01", "zoo"]
    assert isinstance(listed[0].error, FormatError)
    assert listed[1].machine == replace(WEB, name="zoo")
    # A damaged one can be replaced.
    await write_machine(store, WEB, etag=await read_etag(store, "web01"))
    assert (await read_machine(store, "web01"))[0] == WEB


async def test_the_machine_of_a_disk_is_found_or_its_absence_is_not_guessed() -> None:
    """Where a definition cannot be read, that no machine has the disk is not known."""
    store = MemoryStore()
    await write_machine(store, WEB, etag=None)
    assert await machine_of(store, "data") == WEB
    assert await machine_of(store, "other") is None
    store.put("machines/broken.json", b"")
    assert await machine_of(store, "data") == WEB
    with pytest.raises(FormatError, match="broken"):
        await machine_of(store, "other")
