"""A writable copy becomes whole behind its machine's back, whatever comes between."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import trio

from tests.catalog.harness import Bench, bench
from tests.catalog.memory import MemoryStore
from tests.delta.model import PAGE
from tests.point.test_reader import Sparse
from tests.vaults import newcomer
from vdiskfs import native
from vdiskfs.errors import DamagedError, VaultUnreachableError
from vdiskfs.failover import background as module
from vdiskfs.failover.background import BackgroundHydration
from vdiskfs.failover.bootblocks import read_boot, write_boot
from vdiskfs.failover.copy import WritableCopy, make_files
from vdiskfs.failover.record import Member
from vdiskfs.native import Event, EventKind
from vdiskfs.point import PointReader
from vdiskfs.point.reader import REQUESTS_AT_ONCE
from vdiskfs.ratelimit import RateLimiter
from vdiskfs.sealed import SealedStore
from vdiskfs.units import CHUNK_SIZE, PAGES_PER_REGION

PUNCH = 0x02 | 0x01


class Copied:
    """A copy of the newest point of a bench's disk."""

    def __init__(self, test: Bench, directory: Path, size: int) -> None:
        self.test = test
        self.directory = directory / "copy"
        self.epoch = test.model.epoch
        self.member = Member("web01", test.record.id, "web01.img", 1, self.epoch, 0, size)
        make_files(self.directory, self.member)
        self.core = native.Core()
        self.boot = 0
        self.copy = self.open()

    def open(self) -> WritableCopy:
        return WritableCopy(
            self.core, self.directory, self.member, 7, self._read, is_away=self._is_away,
            boot_id=f"boot-{self.boot}",
        )  # fmt: skip

    async def _is_away(self) -> bool:
        return False

    async def _read(self) -> PointReader:
        return (
            await newcomer(self.test.vault, self.test.store).log(self.test.record).open(self.epoch)
        )

    async def kill(self, *, host: bool) -> None:
        """End the process without a word; perhaps the host, too."""
        await self.copy.discard()
        if host:
            self.boot += 1
        self.copy = self.open()

    def content(self) -> bytes:
        return (self.directory / "image").read_bytes()


@asynccontextmanager
async def copied(directory: Path, build: Callable[[Bench], None]) -> AsyncIterator[Copied]:
    """Give a copy of a disk of one point."""
    async with bench() as test:
        build(test)
        await test.publish()
        one = Copied(test, directory, len(test.model.data))
        try:
            yield one
        finally:
            await one.copy.discard()
            one.core.close()


def some_data(test: Bench) -> None:
    """Build three regions: data, holes, a page here and there, an end inside a page."""
    rng = random.Random(1)
    test.model.write(0, rng.randbytes(700 * PAGE))
    test.model.discard(100 * PAGE, 50 * PAGE)
    for _ in range(100):
        test.model.write(rng.randrange(2 * PAGES_PER_REGION) * PAGE, rng.randbytes(PAGE))
    test.model.truncate(3 * PAGES_PER_REGION * PAGE + 100)
    test.model.write(3 * PAGES_PER_REGION * PAGE, rng.randbytes(100))


async def test_all_of_it_comes_and_holes_stay_holes(tmp_path: Path) -> None:
    """Then it is complete: nothing is asked for again, by another process, on another host."""
    async with copied(tmp_path, some_data) as one:
        task = BackgroundHydration(one.copy, RateLimiter())
        assert not task.progress().done
        await task.run()
        wanted = bytes(one.test.model.data)
        assert one.content() == wanted
        assert (one.directory / "image").stat().st_blocks * 512 < 900 * PAGE
        progress = task.progress()
        assert progress.done
        assert progress.mapped
        assert progress.absent_bytes == 0
        assert 700 * PAGE < progress.present_bytes < 900 * PAGE
        assert 700 * PAGE < progress.fetched_bytes < 800 * PAGE
        await one.kill(host=True)
        before = one.test.store.requests
        await BackgroundHydration(one.copy, RateLimiter()).run()
        assert one.test.store.requests == before
        assert one.copy.image.read(0, len(wanted)) == wanted


async def test_what_is_to_come_is_known_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once mapped, present and absent make up the same sum until the end."""
    monkeypatch.setattr(module, "PIECE", 32)
    async with copied(tmp_path, some_data) as one:
        task = BackgroundHydration(one.copy, RateLimiter())
        seen: list[tuple[int, int]] = []

        def look(name: str) -> None:
            if name == "hydration.filled":
                progress = task.progress()
                assert progress.mapped
                seen.append((progress.present_bytes, progress.absent_bytes))

        with mock.patch.object(module, "hook", look):
            await task.run()
        pages = np.frombuffer(bytes(one.test.model.data).ljust(-(-len(one.test.model.data) // PAGE)
                              * PAGE, b"\0"), np.uint8).reshape(-1, PAGE).any(axis=1)  # fmt: skip
        assert {present + absent for present, absent in seen} == {int(pages.sum()) * PAGE}
        assert len(seen) > 10
        assert seen[-1][1] == 0


async def test_the_machine_changes_the_copy_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes, discards and sizes come between any two pieces; they stay, the rest comes."""
    monkeypatch.setattr(module, "PIECE", 16)
    async with copied(tmp_path, some_data) as one:
        rng = random.Random(2)
        wanted = bytearray(one.test.model.data)

        def change(_: str) -> None:
            image, page = one.copy.image, rng.randrange(len(wanted) // PAGE)
            kind = rng.random()
            if kind < 0.7:
                data = rng.randbytes(PAGE)
                image.write(page * PAGE, data)
                wanted[page * PAGE : (page + 1) * PAGE] = data
            elif kind < 0.9:
                end = min(page + 20, len(wanted) // PAGE)
                image.allocate(PUNCH, page * PAGE, (end - page) * PAGE)
                wanted[page * PAGE : end * PAGE] = bytes((end - page) * PAGE)
            else:
                size = (2 * PAGES_PER_REGION + rng.randrange(2 * PAGES_PER_REGION)) * PAGE
                image.truncate(size)
                del wanted[size:]
                wanted.extend(bytes(size - len(wanted)))

        with mock.patch.object(module, "hook", change):
            await BackgroundHydration(one.copy, RateLimiter()).run()
        assert one.content() == bytes(wanted)
        assert native.presence_counts(one.copy.image).complete


async def until_filled(task: BackgroundHydration, count: int) -> None:
    """Run it until so many pieces are here, then cancel it."""
    with trio.CancelScope() as scope:

        def look(name: str) -> None:
            nonlocal count
            count -= name == "hydration.filled"
            if count <= 0:
                scope.cancel()

        with mock.patch.object(module, "hook", look):
            await task.run()


@pytest.mark.parametrize("host", [False, True])
async def test_a_restart_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: bool
) -> None:
    """What the process had is still there; of a host that died, what was committed."""
    monkeypatch.setattr(module, "PIECE", 16)
    monkeypatch.setattr(module, "COMMIT_PIECES", 4)
    async with copied(tmp_path, some_data) as one:
        await until_filled(BackgroundHydration(one.copy, RateLimiter()), 30)
        before = one.copy.present_bytes
        assert before > 20 * 16 * PAGE
        await one.kill(host=host)
        kept = one.copy.present_bytes
        assert kept == before if not host else kept >= before - 12 * 16 * PAGE
        task = BackgroundHydration(one.copy, RateLimiter())
        await task.run()
        assert one.content() == bytes(one.test.model.data)
        assert task.progress().fetched_bytes < 850 * PAGE - kept
        whole = one.copy.present_bytes
        await one.kill(host=host)
        assert abs(one.copy.present_bytes - whole) < 64 * PAGE


class Cut(MemoryStore):
    """A vault that can be cut off."""

    cut = False

    async def _request(self) -> None:
        if self.cut:
            raise VaultUnreachableError("memory: cut off")
        await super()._request()


async def test_a_vault_that_is_cut_off_is_waited_for(
    tmp_path: Path, autojump_clock: object
) -> None:
    """A minute without a vault: it says why it stands, and goes on."""
    async with copied(tmp_path, some_data) as one:
        store = Cut()
        store.objects = one.test.store.objects
        one.test.store = store
        task = BackgroundHydration(one.copy, RateLimiter(300 * PAGE))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task.run)
            await trio.sleep(1)
            store.cut = True
            await trio.sleep(10)
            assert task.progress().waiting == "memory: cut off"
            present = task.progress().present_bytes
            assert 0 < present < 700 * PAGE
            await trio.sleep(50)
            assert task.progress().present_bytes == present
            store.cut = False
        assert one.content() == bytes(one.test.model.data)
        assert task.progress().waiting == ""
        assert task.progress().done


class Slow(MemoryStore):
    """A vault that takes 50 ms for each answer, and counts what is under way."""

    under_way = most = 0

    async def _request(self) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await trio.sleep(0.05)
        self.under_way -= 1
        await super()._request()


async def test_what_a_machine_read_the_last_time_is_fetched_side_by_side(
    tmp_path: Path, autojump_clock: object
) -> None:
    """As many requests at once as a reader may make: 40 take as long as 5 do one by one."""

    def build(test: Bench) -> None:
        test.model.write(0, random.Random(2).randbytes(80 * CHUNK_SIZE))

    async with copied(tmp_path, build) as one:
        await write_boot(one.test.vault.store, "web01", [(2 * n, 1) for n in range(40)])
        runs = await read_boot(one.test.vault.store, "web01")
        await one.copy.fetch(CHUNK_SIZE, 1)  # the point is open, and mapped
        assert one.copy._reader is not None
        store = Slow()
        store.objects = one.test.store.objects
        below = one.copy._reader._store
        if isinstance(below, SealedStore):
            below.inner = store
        else:
            one.copy._reader._store = store
        began = trio.current_time()
        await one.copy.fetch_first(runs)
        assert store.requests == 40
        assert store.most == REQUESTS_AT_ONCE
        assert trio.current_time() - began < 40 * 0.05 / 4
        for first, _ in runs:
            assert one.copy.image.is_present(first * CHUNK_SIZE, CHUNK_SIZE)


async def test_the_machine_does_not_wait_for_the_limit(
    tmp_path: Path, autojump_clock: object
) -> None:
    """At one byte a second in the background, what the machine asks for comes at once."""
    async with copied(tmp_path, some_data) as one:
        task = BackgroundHydration(one.copy, RateLimiter(1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task.run)
            await trio.sleep(100)
            began = trio.current_time()
            for page in (300, 0, 650):
                event = Event(EventKind.WANT, 0, 7, page * PAGE, 16 * PAGE)
                await one.copy.answer(event)
                wanted = bytes(one.test.model.data[page * PAGE : (page + 16) * PAGE])
                assert one.copy.image.read(page * PAGE, 16 * PAGE) == wanted
            assert trio.current_time() - began < 1
            assert not task.progress().done
            nursery.cancel_scope.cancel()


async def test_while_the_machine_waits_pieces_go_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 16)
    async with copied(tmp_path, some_data) as one:
        under_way = [0, 0]
        bring = BackgroundHydration._bring

        async def counted(self: BackgroundHydration, pages: object) -> None:
            under_way[0] += 1
            under_way[1] = max(under_way)
            await bring(self, pages)  # type: ignore[arg-type]
            under_way[0] -= 1

        for asked, most in ((1, 1), (0, module.AT_ONCE)):
            one.copy.asked, under_way[:] = asked, [0, 0]
            with mock.patch.object(BackgroundHydration, "_bring", counted):
                await until_filled(BackgroundHydration(one.copy, RateLimiter()), 20)
            assert under_way[1] == most


async def test_a_full_disk_is_waited_out(
    tmp_path: Path, autojump_clock: object, expect_log: Callable[[str], None]
) -> None:
    expect_log("waiting for the local disk: No space left")
    async with copied(tmp_path, some_data) as one:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fill = native.Image.fill
        failed: list[int] = []

        def refuse(self: native.Image, offset: int, data: memoryview) -> int:
            if len(failed) < 3:
                failed.append(offset)
                raise full
            return fill(self, offset, data)

        with mock.patch.object(native.Image, "fill", refuse):
            task = BackgroundHydration(one.copy, RateLimiter())
            await task.run()
        assert len(failed) == 3
        assert task.progress().waiting == ""
        assert one.content() == bytes(one.test.model.data)


async def test_damage_ends_it_and_is_named(tmp_path: Path) -> None:
    async with copied(tmp_path, some_data) as one:
        one.test.model.writer_options = {}
        name = next(name for name in one.test.store.objects if name.startswith("disks/")
                    and not name.endswith(".json"))  # fmt: skip
        data, metadata, _ = one.test.store.objects[name]
        middle = len(data) // 2
        one.test.store.put(name, data[:middle] + b"damage" + data[middle + 6 :], metadata)
        with pytest.raises(DamagedError, match="web01@1"):
            await BackgroundHydration(one.copy, RateLimiter()).run()


async def test_closing_the_copy_ends_it(tmp_path: Path, autojump_clock: object) -> None:
    async with copied(tmp_path, some_data) as one, trio.open_nursery() as nursery:
        nursery.start_soon(BackgroundHydration(one.copy, RateLimiter(1)).run)
        await trio.sleep(10)
        await one.kill(host=False)


async def cost(directory: Path, size: int, step: int) -> tuple[int, float, int]:
    """Hydrate 2,000 pages of a sparse disk; return requests, processor seconds, bytes."""
    directory.mkdir()
    rng = random.Random(1)

    def build(test: Bench) -> None:
        data = Sparse(size)
        test.model.data = data  # type: ignore[assignment]
        for number in range(2000):
            # Half of it together, half of it everywhere.
            page = number if number < 1000 else number * step
            data.pages[page] = rng.randbytes(PAGE)
        test.model.dirty = set(data.pages)

    async with copied(directory, build) as one:
        before, began = one.test.store.requests, time.process_time()
        task = BackgroundHydration(one.copy, RateLimiter())
        await task.run()
        took = time.process_time() - began
        assert task.progress().done
        data = one.test.model.data
        with (directory / "copy" / "image").open("rb") as image:
            for page, wanted in data.pages.items():  # type: ignore[attr-defined]
                assert os.pread(image.fileno(), PAGE, page * PAGE) == wanted
        assert (directory / "copy" / "image").stat().st_blocks * 512 < 2100 * PAGE
        return one.test.store.requests - before, took, task.progress().fetched_bytes


async def test_a_sparse_copy_of_4_tib_costs_what_its_data_cost(tmp_path: Path) -> None:
    """The same pages spread over 1 GiB and over 4 TiB: the same requests, the same bytes."""
    small = await cost(tmp_path / "small", 1 << 30, (1 << 18) // 2000)
    large = await cost(tmp_path / "large", 1 << 42, (1 << 30) // 2000)
    print(f"1 GiB {small}, 4 TiB {large}")
    assert abs(large[0] - small[0]) <= small[0] * 0.2 + 2
    assert large[2] <= small[2] * 1.2
