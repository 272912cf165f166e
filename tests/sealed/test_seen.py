"""What a site remembers of a vault, and where that must raise no false alarm."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.catalog.memory import MemoryStore
from vdiskfs.crypto import new_data_key
from vdiskfs.errors import WrongVaultError
from vdiskfs.sealed import SealedStore, Seen
from vdiskfs.sealed.names import stored_name
from vdiskfs.state.files import write_record
from vdiskfs.store import ObjectInfo

KEY = new_data_key("5" * 32)
NAME = "groups/shop.json"


class Clock:
    def __init__(self, now: int) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def store_at(memory: MemoryStore, now: int, path: Path | None = None) -> SealedStore:
    seen = Seen(path, vault_id="5" * 32, clock=Clock(now))
    seen.load()
    return SealedStore(memory, KEY, seen)


async def test_an_older_state_is_noticed_after_a_restart(tmp_path: Path) -> None:
    memory = MemoryStore()
    path = tmp_path / "seen"
    first = store_at(memory, 100, path)
    await first.create(NAME, b"one")
    old = memory.objects.copy()
    (stored,) = old
    etag = (await first.stat(NAME)).etag
    await first.replace(NAME, b"two", etag=etag)
    await first.aclose()
    memory.objects = old
    again = store_at(memory, 300, path)
    for look in (again.read, again.stat):
        with pytest.raises(WrongVaultError, match="gone back in time: groups/shop.json"):
            await look(NAME)
    again.seen.forget()
    assert (await again.read(NAME))[0] == b"one"
    assert not path.exists() or stored


async def test_clocks_that_differ_raise_no_alarm() -> None:
    """Who changes an object has seen it: its revision grows, whatever the clock says."""
    memory = MemoryStore()
    ahead, behind = store_at(memory, 10**18, None), store_at(memory, 5, None)
    await ahead.create(NAME, b"0")
    for turn in range(6):
        writer = (behind, ahead)[turn % 2]
        etag = (await writer.stat(NAME)).etag if turn % 3 else (await writer.read(NAME))[1].etag
        await writer.replace(NAME, b"%d" % turn, etag=etag)
        for reader in (ahead, behind):
            assert (await reader.read(NAME))[0] == b"%d" % turn


async def test_an_answer_that_comes_late_raises_no_alarm() -> None:
    """A read that began before a write of the same process may end after it, with what was."""
    memory = MemoryStore()
    store = store_at(memory, 100)
    await store.create(NAME, b"old")
    began, go_on = trio.Event(), trio.Event()
    plain_read = memory.read

    async def slow_read(name: str, *, limit: int = 64 << 20) -> object:
        answer = await plain_read(name, limit=limit)
        began.set()
        await go_on.wait()
        return answer

    found: list[bytes] = []

    async def read() -> None:
        found.append((await store.read(NAME))[0])

    async with trio.open_nursery() as nursery:
        memory.read = slow_read  # type: ignore[assignment,method-assign]
        nursery.start_soon(read)
        await began.wait()
        memory.read = plain_read  # type: ignore[method-assign]
        await store.replace(NAME, b"new", etag=memory.objects[next(iter(memory.objects))][2])
        go_on.set()
    assert found == [b"old"]


async def test_what_is_damaged_is_begun_anew_and_said(tmp_path: Path, expect_log: object) -> None:
    path = tmp_path / "seen"
    path.write_bytes(b"{")
    expect_log("what was seen of the vault is not known any more")  # type: ignore[operator]
    memory = MemoryStore()
    store = store_at(memory, 100, path)
    await store.create(NAME, b"one")
    assert store.seen.due or path.stat().st_size > 1


async def test_heartbeats_are_not_written_down(tmp_path: Path) -> None:
    path = tmp_path / "seen"
    store = store_at(MemoryStore(), 100, path)
    await store.create("sites/here.json", b"one")
    await store.aclose()
    assert not path.exists()


async def test_a_listing_that_is_late_raises_no_alarm() -> None:
    """Of what was changed since the listing began it says the name alone, and reading gives it."""
    memory = MemoryStore()
    here, there = store_at(memory, 100), store_at(memory, 200)
    name = f"disks/{'a' * 32}/proofs/1-1.json"
    await here.create(name, b"old", metadata={"passed": "hashed"})
    plain_list = memory.list

    async def late(prefix: str) -> AsyncIterator[ObjectInfo]:
        found = [info async for info in plain_list(prefix)]
        await here.replace(name, b"new", etag=found[0].etag, metadata={"failed": "hashed"})
        for info in found:
            yield info

    memory.list = late  # type: ignore[method-assign]
    assert [info.metadata async for info in here.list(f"disks/{'a' * 32}/")] == [{}]
    memory.list = plain_list  # type: ignore[method-assign]
    assert (await here.read(name))[0] == b"new"
    assert [info.metadata async for info in there.list("disks/")] == [{"failed": "hashed"}]


async def test_what_comes_and_goes_displaces_no_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do documents that are not used displace one that is, or the vault's keys."""
    monkeypatch.setattr("vdiskfs.sealed.seen._MOST", 50)
    memory = MemoryStore()
    store = store_at(memory, 100)
    store.seen.note("vault.json", 1)
    await store.create(NAME, b"one")
    stored, old = next(iter(memory.objects.items()))
    await store.replace(NAME, b"two", etag=old[2])
    for n in range(200):
        if n % 20 == 0:
            await store.read(NAME)
        names = (f"disks/{'a' * 32}/proofs/1-{n}.json", f"leases/{n:032x}.json", f"groups/{n}.json",
                 f"disks/{'a' * 32}/g00000001.ledger/{n:032x}")  # fmt: skip
        for name in names:
            await store.create(name, b"x")
        await store.delete(names[1])
        assert store.seen.get(stored)
    memory.objects[stored] = old
    with pytest.raises(WrongVaultError):
        await store.read(NAME)
    assert store.seen.get("vault.json") == 1
    assert not store.seen.get(names[3])
    assert not store.seen.get(stored_name(KEY, names[1]))


async def test_what_is_made_again_is_no_rollback(tmp_path: Path) -> None:
    """What was deleted here can be made again, here and by a site whose clock is behind."""
    memory = MemoryStore()
    here, behind = store_at(memory, 100, tmp_path / "seen"), store_at(memory, 5)
    await here.create(NAME, b"one")
    old = memory.objects.copy()
    await behind.read(NAME)
    await here.delete(NAME)
    await behind.create(NAME, b"two")
    assert (await here.read(NAME))[0] == b"two"
    await here.delete(NAME)
    await here.create(NAME, b"three")
    assert (await behind.read(NAME))[0] == b"three"
    await here.delete(NAME)
    await here.aclose()
    memory.objects = old
    with pytest.raises(WrongVaultError):
        await store_at(memory, 300, tmp_path / "seen").read(NAME)


def test_ledgers_that_were_noted_once_are_left_out(tmp_path: Path) -> None:
    ledger = f"disks/{'a' * 32}/g00000001.ledger/{'b' * 32}"
    body = {"vault_id": "5" * 32, "revisions": {ledger: 3, "groups/x": 4}}
    write_record(tmp_path / "seen", body)
    seen = Seen(tmp_path / "seen", vault_id="5" * 32)
    seen.load()
    assert (seen.get(ledger), seen.get("groups/x")) == (0, 4)
