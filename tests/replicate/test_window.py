"""When a resynchronization runs: in its window, or when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import trio
from trio.testing import MockClock

from tests.replicate.rig import Rig, page_of
from tests.replicate.test_resync import SIZE, settled
from vdiskfs.health import State
from vdiskfs.stride import Pace
from vdiskfs.units import PAGE_SIZE
from vdiskfs.window import DAY_S, Window


def clock_from(rig: Rig, start: str) -> None:
    """Let the disk's time of day be this one now, and pass with trio's clock."""
    began, base = trio.current_time(), datetime.fromisoformat(f"2026-11-21T{start}:00+00:00")
    rig.replicator.resync.now = lambda: base + timedelta(seconds=trio.current_time() - began)


async def test_it_waits_for_its_window(tmp_path: Path, autojump_clock: MockClock) -> None:
    pace = Pace(1.0, 64 << 20, 1, 0.5, Window.parse("22:00-06:00"))
    async with Rig(tmp_path, SIZE, pace=pace) as rig:
        clock_from(rig, "20:00")
        async with rig.running():
            rig.write(0, page_of(1))
            await settled(rig)  # the first replication does not wait
            began = trio.current_time()
            await rig.replicator.start_resync(now=False)
            rig.write(PAGE_SIZE, page_of(2))
            await trio.sleep(3600)
            assert rig.health.state is State.RESYNC_REQUIRED
            assert rig.replicator.live.counts().changed
            await rig.wait(lambda: rig.is_settled, 30)
            # Threads take real time, in which the clock jumps on.
            assert 7200 - 120 <= trio.current_time() - began <= 7200 + 7200
            await rig.check()
            clock_from(rig, "12:00")
            began = trio.current_time()
            await rig.replicator.start_resync(now=True)
            await settled(rig)
            assert trio.current_time() - began < 9 * 3600


async def test_asked_for_outside_its_window_it_goes_on_there_after_a_restart(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Asked for again and for now, of one that waits; a daemon that is killed forgets nothing."""
    pace = Pace(1.0, 64 << 20, 1, 0.5, Window.parse("22:00-06:00"))
    async with Rig(tmp_path, SIZE, pace=pace) as rig:
        clock_from(rig, "12:00")
        async with rig.running():
            rig.write(0, page_of(1))
            await settled(rig)
            await rig.replicator.start_resync(now=False)
            await trio.sleep(600)
            assert rig.health.state is State.RESYNC_REQUIRED
            rig.memory.away = True
            rig.replicator.points.line.loaded = False
            await rig.replicator.start_resync(now=True)
            await rig.wait(lambda: rig.health.state is State.RESYNCING)
        rig.close()
        rig.memory.away = False
        await rig.open()
        clock_from(rig, "12:00")
        began = trio.current_time()
        async with rig.running():
            rig.write(PAGE_SIZE, page_of(2))
            await settled(rig)
            assert trio.current_time() - began < 9 * 3600
            await rig.check()
            await rig.replicator.start_resync(now=False)  # that was for once
            await trio.sleep(600)
            assert rig.health.state is State.RESYNC_REQUIRED


async def test_it_stops_when_its_window_closes_and_goes_on_in_the_next(
    tmp_path: Path, autojump_clock: MockClock, expect_log: Callable[[str], None]
) -> None:
    expect_log("the memory store is away")
    pace = Pace(1.0, 64 << 20, 1, 0.5, Window.parse("06:40-06:00"))
    async with Rig(tmp_path, SIZE, pace=pace) as rig:
        clock_from(rig, "05:30")
        async with rig.running():
            rig.write(0, page_of(1))
            await settled(rig)
            rig.replicator.points.line.loaded = False
            rig.memory.away = True
            await rig.replicator.start_resync(now=False)
            await rig.wait(lambda: rig.health.state is State.RESYNCING)
            await rig.wait(lambda: rig.health.state is State.RESYNC_REQUIRED, 30)
            # It is 6 o'clock.
            assert abs(rig.replicator.resync.now().timestamp() % DAY_S - 6 * 3600) < 120
            rig.memory.away = False
            await trio.sleep(1800)
            assert rig.health.state is State.RESYNC_REQUIRED
            await rig.wait(lambda: rig.is_settled, 30)
            at_s = rig.replicator.resync.now().timestamp() % DAY_S
            assert 6 * 3600 + 2400 <= at_s < 7 * 3600
