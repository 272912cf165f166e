"""A vault: made once, opened, its disks and names."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.catalog.memory import MemoryStore
from tests.vaults import edited
from vdiskfs.catalog import DiskRecord, SiteRecord, Vault
from vdiskfs.errors import (
    ConflictError,
    FormatError,
    NotFoundError,
    StateError,
    UsageError,
)


async def test_a_vault_is_made_once() -> None:
    store = MemoryStore()
    vault = await Vault.init(store)
    assert (await Vault.open(store)).vault_id == vault.vault_id
    with pytest.raises(StateError, match="holds a vault already"):
        await Vault.init(store)


async def test_where_no_vault_is_the_error_says_how_to_make_one() -> None:
    with pytest.raises(NotFoundError, match="no vault at memory.*vault init"):
        await Vault.open(MemoryStore())


def document(**changes: object) -> bytes:
    values = {"format": 1, "vault_id": "a" * 32, "created": "x", "encryption": {"scheme": "none"}}
    return json.dumps({**values, **changes}).encode()


async def test_a_newer_format_is_refused_by_name() -> None:
    store = MemoryStore()
    store.put("vault.json", document(format=3))
    with pytest.raises(FormatError, match="made by a newer vdiskfs"):
        await Vault.open(store)


async def test_an_unknown_encryption_is_refused_clearly() -> None:
    store = MemoryStore()
    store.put("vault.json", document(encryption={"scheme": "rot13"}))
    with pytest.raises(FormatError, match="unknown encryption scheme 'rot13'"):
        await Vault.open(store)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format":1,"format":1}',
        document(format="1"),
        document(format=-1),
        document(vault_id="../../etc"),
        document(vault_id=7),
        document(encryption=None),
        b'{"format": 1e999}',
    ],
)
async def test_a_broken_vault_document_is_one_clear_error(data: bytes) -> None:
    store = MemoryStore()
    store.put("vault.json", data)
    with pytest.raises((FormatError, UsageError)):
        await Vault.open(store)


async def test_a_name_that_is_taken_gets_a_suffix() -> None:
    vault = await Vault.init(MemoryStore())
    names = [
        (await vault.create_disk("web01", file="web01.img", size=1, site="s")).name
        for _ in range(3)
    ]
    assert names == ["web01", "web01-2", "web01-3"]
    assert [disk.name for disk in await vault.disks()] == names
    assert (await vault.find_disk("web01-2")).name == "web01-2"


async def test_creating_a_disk_again_after_a_crash_completes_it() -> None:
    """A name that was given to this id before its record was written is kept."""
    store = MemoryStore()
    vault = await Vault.init(store)
    first = await vault.create_disk("db", file="db.img", size=1, site="s", disk_id="d" * 32)
    del store.objects[f"disks/{'d' * 32}/disk.json"]
    assert await vault.disks() == []
    again = await vault.create_disk("db", file="db.img", size=1, site="s", disk_id="d" * 32)
    assert (again.name, again.id) == (first.name, first.id)
    assert (await vault.create_disk("db", file="x", size=9, site="s", disk_id="d" * 32)) == again


@pytest.mark.parametrize("name", ["Ünï côde", "../x", ".hidden", "A", "a b", "%41", "-", "x" * 240])
async def test_any_name_is_kept_and_no_name_reaches_an_objects_name(name: str) -> None:
    store = MemoryStore()
    vault = await Vault.init(store)
    if "/" in name:
        with pytest.raises(UsageError):
            await vault.create_disk(name, file="f", size=1, site="s")
        return
    record = await vault.create_disk(name, file="f", size=1, site="s")
    assert record.name == name
    assert (await vault.find_disk(name)).id == record.id
    objects = [entry for entry in store.objects if entry.startswith("names/")]
    assert len(objects) == 1
    assert not objects[0].startswith("names/.")
    assert set(objects[0]) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-%/")


async def test_names_that_differ_in_case_are_different() -> None:
    vault = await Vault.init(MemoryStore())
    upper = await vault.create_disk("DB", file="f", size=1, site="s")
    lower = await vault.create_disk("db", file="f", size=1, site="s")
    assert (upper.name, lower.name) == ("DB", "db")


async def test_a_disk_that_is_not_there_is_not_found() -> None:
    vault = await Vault.init(MemoryStore())
    for name in ("nobody", "e" * 32):
        with pytest.raises(NotFoundError, match="no disk"):
            await vault.find_disk(name)


async def test_a_record_is_changed_by_compare_and_swap() -> None:
    """A change that loses is made again on what won."""
    store = MemoryStore()
    vault = await Vault.init(store)
    disk = await vault.create_disk("a", file="f", size=1, site="s")
    tries = []

    def change(record: DiskRecord) -> DiskRecord:
        tries.append(record)
        if len(tries) == 1:
            # Somebody else is faster.
            name = f"disks/{disk.id}/disk.json"
            data, metadata, _ = store.objects[name]
            store.put(name, edited(data, site="t"), metadata)
        return replace(record, size=record.size + 5)

    changed = await vault.update_disk(disk.id, change)
    assert len(tries) == 2
    assert (changed.size, changed.site) == (6, "t")
    assert await vault.disk(disk.id) == changed


async def test_parents_survive_the_document() -> None:
    vault = await Vault.init(MemoryStore())
    disk = await vault.create_disk("a", file="f", size=1, site="s")
    parents = {1: None, 2: (1, 17), 3: (2, 20), 4: (1, 5)}
    await vault.update_disk(disk.id, lambda record: replace(record, parents=parents, generation=3))
    record = await vault.disk(disk.id)
    assert record.parents == parents
    assert record.lineage(3) == [(1, 17), (2, 20)]
    assert record.lineage(4) == [(1, 5)]


@pytest.mark.parametrize(
    "parents",
    [{"1": {"generation": 1, "epoch": 0}}, {"1": {"generation": 2, "epoch": 0}, "2": None},
     {"x": None}, {"1": 5}, {"99999999999": None}, {"1": None, "2": {"generation": 1, "epoch": -1}}],
)  # fmt: skip
async def test_parents_that_run_in_a_circle_are_refused(parents: dict[str, object]) -> None:
    store = MemoryStore()
    vault = await Vault.init(store)
    disk = await vault.create_disk("a", file="f", size=1, site="s")
    name = f"disks/{disk.id}/disk.json"
    store.put(name, edited(store.objects[name][0], parents=parents))
    with pytest.raises(FormatError):
        await vault.disk(disk.id)


async def test_a_heartbeat_costs_one_request() -> None:
    store = MemoryStore()
    vault = await Vault.init(store)
    record = SiteRecord("berlin", "h1", "t", "1", ("a" * 32,), 7, "t0")
    await vault.write_site(record)
    before = store.requests
    await vault.write_site(replace(record, time="t2"))
    assert store.requests - before == 1
    assert await vault.sites() == [replace(record, time="t2")]


async def test_a_heartbeat_written_by_another_process_is_taken_over() -> None:
    store = MemoryStore()
    one, two = await Vault.init(store), await Vault.open(store)
    record = SiteRecord("berlin", "h1", "t", "1", (), 7, "t0")
    await one.write_site(record)
    await two.write_site(replace(record, pid=8))
    await one.write_site(replace(record, pid=9))
    assert (await two.sites())[0].pid == 9


async def test_a_swap_that_always_loses_ends() -> None:
    store = MemoryStore()
    vault = await Vault.init(store)
    disk = await vault.create_disk("a", file="f", size=1, site="s")

    def change(record: DiskRecord) -> DiskRecord:
        name = f"disks/{disk.id}/disk.json"
        store.put(name, store.objects[name][0])
        return replace(record, size=record.size + 1)

    with pytest.raises(ConflictError):
        await vault.update_disk(disk.id, change)
