"""together: one instant for all that can be sealed, and none of them waits for the others."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.catalog.memory import MemoryStore
from tests.replicate.rig import Rig, page_of
from tests.vaults import given
from vdiskfs import native
from vdiskfs.catalog import Vault, group_points, shared_points
from vdiskfs.delta.layout import NO_ID
from vdiskfs.errors import StateError
from vdiskfs.health import Level
from vdiskfs.image import ChainEnd, EpochOutrunError
from vdiskfs.replicator import Replicator
from vdiskfs.spool import Spool
from vdiskfs.store.retry import RetryingStore
from vdiskfs.stride import Pace
from vdiskfs.together import PATIENCE_S, GroupSealer, seal_together
from vdiskfs.units import NS, PAGE_SIZE

MIB = 1 << 20
PACE = Pace(1.0, 4 * MIB, 1)


class Site:
    """Some disks of one vault, and the group that seals those of them that are members."""

    def __init__(self, directory: Path, names: str) -> None:
        self.memory = MemoryStore()
        store = RetryingStore(self.memory)
        self.rigs = [Rig(directory, MIB, store=store, pace=PACE, name=name) for name in names]
        self.sealer = GroupSealer("shop", self.members, PACE.epoch_interval_s)
        for rig in self.rigs:
            rig.joint = self.sealer

    def members(self) -> list[Replicator]:
        return [rig.replicator for rig in self.rigs if rig.joint is not None]

    async def write(self, *rigs: Rig, seed: int = 1) -> None:
        for rig in rigs:
            rig.write(PAGE_SIZE * (seed % 16), page_of(seed))
            await trio.lowlevel.checkpoint()

    async def settle(self, *rigs: Rig) -> None:
        for rig in rigs:
            await rig.wait(lambda rig=rig: rig.is_settled)  # type: ignore[misc]

    async def shared(self, *rigs: Rig) -> list[tuple[int, ...]]:
        """Return the epochs of each instant that disks share in the vault."""
        vault = await Vault.open(self.memory, given())
        found = await shared_points(vault.find_log, [rig.name for rig in rigs])
        return [tuple(point.epoch for point in points) for points in found]


@contextlib.asynccontextmanager
async def site_of(directory: Path, names: str) -> AsyncIterator[Site]:
    """Run the disks and their group; each has a first point of its own."""
    site = Site(directory, names)
    async with contextlib.AsyncExitStack() as stack:
        for rig in site.rigs:
            await stack.enter_async_context(rig)
        async with trio.open_nursery() as nursery:
            for rig in site.rigs:
                nursery.start_soon(rig.replicator.run)
            nursery.start_soon(site.sealer.run)
            await site.settle(*site.rigs)
            yield site
            nursery.cancel_scope.cancel()


async def test_all_are_sealed_at_one_instant_if_one_has_changed(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """One time, one number; an idle group is not sealed."""
    async with site_of(tmp_path, "abc") as site:
        a, b, c = site.rigs
        await site.write(b)
        await site.settle(a, b, c)
        assert await site.shared(a, b, c) == [(2, 2, 2)]
        await trio.sleep(1000)
        assert [rig.replicator.end.epoch for rig in site.rigs] == [2, 2, 2]
        await site.write(a, c, seed=2)
        await site.settle(a, b, c)
        assert await site.shared(a, b, c) == [(2, 2, 2), (3, 3, 3)]
        for rig in site.rigs:
            await rig.check()


async def test_a_disk_that_leaves_is_sealed_by_itself_and_back_in_when_it_joins(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with site_of(tmp_path, "ab") as site:
        a, b = site.rigs
        a.joint = None
        a.replicator.look_again()
        await site.write(a, b)
        await site.settle(a, b)
        assert [rig.replicator.end.epoch for rig in site.rigs] == [2, 2]
        assert await site.shared(a, b) == []
        await site.write(a)
        a.joint = site.sealer  # it has changed while nobody was told
        a.replicator.look_again()
        await site.settle(a, b)
        assert await site.shared(a, b) == [(3, 3)]


async def test_one_that_is_paused_waits_alone(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with site_of(tmp_path, "abc") as site:
        a, b, c = site.rigs
        await b.replicator.pause()
        for seed in range(3):
            await site.write(a, b, c, seed=seed)
            await site.settle(a, c)
        assert await site.shared(a, c) == [(2, 2), (3, 3), (4, 4)]
        assert b.replicator.end.epoch == 1
        await b.replicator.resume()
        await site.settle(a, b, c)
        assert await site.shared(a, b, c) == [(5, 2, 5)]
        assert await site.shared(a, c) == [(2, 2), (3, 3), (4, 4), (5, 5)]
        await b.check()


async def test_one_in_a_pass_keeps_no_other_and_comes_back(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """The point that ends its pass is its own; the next one is the group's."""
    async with site_of(tmp_path, "ab") as site:
        a, b = site.rigs
        await b.replicator.start_resync(now=True)
        await b.replicator.cancel_resync()
        for seed in range(3):
            await site.write(a, b, seed=seed)
            await site.settle(a)
        assert (a.replicator.end.epoch, b.replicator.end.epoch) == (4, 1)
        await b.replicator.start_resync(now=True)
        await site.settle(a, b)
        assert await site.shared(a, b) == []
        await site.write(a, seed=3)
        await site.settle(a, b)
        assert await site.shared(a, b) == [(5, b.replicator.end.epoch)]
        await b.check()


async def test_one_whose_spool_is_full_keeps_no_other(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with site_of(tmp_path, "ab") as site:
        a, b = site.rigs
        b.replicator.shipper.stop()
        b.replicator.pace = Pace(1.0, 5000, 1)  # one page fits; with its delta it is full
        for _ in range(4):
            await site.write(a, b)
            await trio.sleep(3)
        assert a.replicator.end.epoch == 5
        assert b.replicator.end.epoch == 2, "its epochs merge"
        b.replicator.shipper.go()
        b.replicator.pace = PACE
        await site.settle(a, b)
        assert await site.shared(a, b) == [(2, 2), (6, 3)]
        await b.check()


def outrun(rig: Rig, times: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the next captures of a disk be outrun; return when they were."""
    seen: list[float] = []
    capture = rig.replicator.live.capture

    def fail(seal: native.Seal, *arguments: object, **more: object) -> object:
        if len(seen) < times:
            seen.append(time.monotonic())
            rig.image.abandon()
            raise EpochOutrunError(f"epoch {seal.epoch} was given up: changes outran its capture")
        return capture(seal, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(rig.replicator.live, "capture", fail)
    return seen


async def test_one_that_is_outrun_gets_longer_epochs_and_the_others_do_not(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site_of(tmp_path, "abc") as site:
        a, b, c = site.rigs
        seen = outrun(b, 3, monkeypatch)
        for seed in range(15):
            await site.write(a, b, c, seed=seed)
            await trio.sleep(1)
        await site.settle(a, b, c)
        assert len(seen) == 3
        assert b.replicator.stride.interval_s == pytest.approx(4)
        others, shared = await site.shared(a, c), await site.shared(a, b, c)
        assert len(others) > 2 * len(shared) > 0
        assert {one[0] for one in others} >= {one[0] for one in shared}
        await b.check()


async def test_two_that_are_outrun_have_points_together_as_often_as_the_slower(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site_of(tmp_path, "abc") as site:
        a, b, c = site.rigs
        outrun(b, 2, monkeypatch)
        outrun(c, 4, monkeypatch)
        for rig in (b, c):  # changes go on outrunning: epochs get no shorter
            monkeypatch.setattr(rig.replicator.stride, "kept", lambda: None)
        for seed in range(100):
            await site.write(a, b, c, seed=seed)
            await trio.sleep(1)
        await site.settle(a, b, c)
        assert (b.replicator.stride.interval_s, c.replicator.stride.interval_s) == (4, 16)
        shared = await site.shared(a, b, c)
        assert [one[2] for one in shared] == [one[0] for one in await site.shared(c)][1:]
        assert len(shared) > 3
        assert len(await site.shared(a, b)) > 15


async def test_one_that_is_captured_for_long_is_waited_for_once(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Then the others go on at their pace; it is in again as soon as it can be."""
    async with site_of(tmp_path, "ab") as site:
        a, b = site.rigs
        await b.replicator.hold().acquire()
        start = trio.current_time()
        await site.write(a, b)
        await trio.lowlevel.checkpoint()
        await site.settle(a)
        assert PATIENCE_S <= trio.current_time() - start <= PATIENCE_S + 3
        start = trio.current_time()
        await site.write(a, seed=2)
        await site.settle(a)
        assert trio.current_time() - start <= 3
        assert (a.replicator.end.epoch, b.replicator.end.epoch) == (3, 1)
        b.replicator.hold().release()
        await site.settle(a, b)
        assert await site.shared(a, b) == [(4, 2)]


async def test_one_that_cannot_be_sealed_lets_the_others_be_sealed_by_themselves(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    expect_log("sealed one by one")
    expect_log("No space left")
    async with site_of(tmp_path, "abc") as site:
        a, b, c = site.rigs
        real = native.seal
        refused: list[int] = []

        def seal(images: list[native.Image]) -> list[native.Seal]:
            if b.image in images and len(refused) < 4:
                refused.append(len(images))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(images)

        monkeypatch.setattr(native, "seal", seal)
        await site.write(a, b, c)
        await a.wait(lambda: a.replicator.end.epoch == 2, 0.1)
        assert await site.shared(a, b, c) == []
        assert b.health.level is not Level.NORMAL
        await site.settle(a, b, c)
        assert refused == [3, 1, 3, 1]
        assert len(await site.shared(a, b, c)) == 1
        for rig in site.rigs:
            await rig.check()


async def test_a_group_that_is_ended_captures_what_it_has_sealed(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """And the disks go on by themselves."""
    async with site_of(tmp_path, "ab") as site:
        a, b = site.rigs
        await site.write(a, b)
        await site.sealer.seal_changed()
        site.sealer.scope.cancel()
        for rig in site.rigs:
            rig.joint = None
            rig.replicator.look_again()
        await site.write(a, seed=2)
        await site.settle(a, b)
        assert await site.shared(a, b) == [(2, 2)]
        assert (a.replicator.end.epoch, b.replicator.end.epoch) == (3, 2)
        for rig in site.rigs:
            await rig.check()


async def test_a_disk_that_ends_is_not_sealed_any_more(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with site_of(tmp_path, "ab") as site:
        a, b = site.rigs
        await b.replicator.finish()
        await site.write(a, b)
        await site.settle(a)
        assert (a.replicator.end.epoch, b.replicator.end.epoch) == (2, 1)
        with pytest.raises(StateError, match="disk b: its protection ends"):
            await seal_together([a.replicator, b.replicator])
        assert a.replicator.hold().value == 1


async def test_times_are_equal_and_later_than_all_before_whatever_the_clock_does(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site_of(tmp_path, "ab") as site:
        a, b = site.rigs
        real, offset_s = native.seal, 0

        def seal(images: list[native.Image]) -> list[native.Seal]:
            return [replace(one, time_ns=one.time_ns + offset_s * NS) for one in real(images)]

        monkeypatch.setattr(native, "seal", seal)
        times = []
        for seed, offset_s in enumerate([0, 600, -600, 0]):  # noqa: B007 (`seal` reads it)
            sealed = await seal_together([a.replicator, b.replicator])
            heads = [one.head for one in sealed]
            assert len({(head.time_ns, head.group_id) for head in heads}) == 1
            assert heads[0].group_id != NO_ID
            times.append(heads[0].time_ns)
            await site.write(b, seed=seed)
            await site.settle(a, b)  # that of the group
        assert times == sorted(set(times))
        assert times[1] - times[0] > 500 * NS
        vault = await Vault.open(site.memory, given())
        found = await group_points(vault.find_log, ["a", "b"], "latest", 0)
        assert [one.epoch for one in found] == [rig.replicator.end.epoch for rig in site.rigs]


async def test_a_point_by_hand_of_one_disk_is_no_group_point(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with site_of(tmp_path, "ab") as site:
        a, b = site.rigs
        (spooled,) = await seal_together([a.replicator], "by hand")
        assert (spooled.head.group_id, spooled.head.label) == (NO_ID, "by hand")
        await site.settle(a, b)
        assert await site.shared(a, b) == []


async def test_what_a_delta_follows_is_looked_up_where_it_cannot_move(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread it could be read while a delta leaves the spool, and be the one before."""
    end, seen = Spool.end.fget, []  # type: ignore[attr-defined]

    def watched(spool: Spool) -> ChainEnd:
        seen.append(threading.current_thread() is threading.main_thread())
        found: ChainEnd = end(spool)
        return found

    async with site_of(tmp_path, "ab") as site:
        monkeypatch.setattr(Spool, "end", property(watched))
        for seed in range(3):
            await site.write(*site.rigs, seed=seed)
            await site.settle(*site.rigs)
        assert len(seen) > 3
        assert all(seen)
