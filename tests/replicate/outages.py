"""A day of outages in minutes: one disk, a store that fails in every way, a fake clock.

    counts = outage_round(seed)

A machine writes all day. Each hour something is wrong with the vault, chosen by the seed:
away for up to three hours, throttling, refusing the key, losing answers, slow; or the user
pauses the disk, or the daemon dies. At the end all is well, or an AssertionError names the
seed.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import trio

import vdiskfs.replicator
from tests.clock import jumping_clock
from tests.replicate.rig import Rig, page_of
from tests.store.memory import Fault
from vdiskfs.errors import RefusedError, VaultUnreachableError
from vdiskfs.health import Level, State
from vdiskfs.stride import Pace
from vdiskfs.units import PAGE_SIZE

HOUR_S = 3600.0
SIZE = 2 << 20
PAGES = SIZE // PAGE_SIZE

KINDS = ("away", "throttled", "refused", "lost answers", "paused", "restarted", "fine")


class Day:
    """One simulated day."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.choice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.faults: list[tuple[str, Fault]] = []
        self.written = 0
        self.busy = 1

    async def run(self, hours: int) -> None:
        """Live through it, and let it converge."""
        kinds: list[str] = []
        while len(kinds) < hours:
            kinds += self.choice.sample(KINDS, len(KINDS))
        for hour in range(hours):
            async with self.rig.running(), trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                nursery.start_soon(self._beat)
                kind = kinds[hour]
                self.counts[kind] += 1
                await self._hour(kind)
                nursery.cancel_scope.cancel()
            if kind == "restarted":
                self.rig.close()
                self.rig.memory.away = False
                await self.rig.open()
        await self._converge()

    async def _hour(self, kind: str) -> None:
        rig, memory = self.rig, self.rig.memory
        self.busy = self.choice.choice((1, 1, 8))
        if kind == "away":
            memory.away = True
            await self._write_for(self.choice.uniform(0.2, 3) * HOUR_S)
            self.counts["unanswered"] += 1
            memory.away = False
        elif kind == "throttled":
            error = VaultUnreachableError("429 too many requests", retry_after_s=30)
            self._fault("throttled", memory.fail("create", error, count=12))
            await self._write_for(HOUR_S)
        elif kind == "refused":
            fault = memory.fail("create", RefusedError("403 the key is wrong"), count=1)
            self._fault("refused", fault)
            await self._write_for(HOUR_S)
            if rig.health.level is Level.CRITICAL:
                self.counts["critical"] += 1
                rig.health.retry_now()
        elif kind == "lost answers":
            for method in ("create", "replace"):
                self._fault("lost", memory.fail(method, after=True, count=3))
            await self._write_for(HOUR_S)
        elif kind == "paused":
            await rig.replicator.pause()
            await self._write_for(HOUR_S / 2)
            await rig.replicator.resume()
        else:
            await self._write_for(HOUR_S)

    def _fault(self, name: str, fault: Fault) -> None:
        self.faults.append((name, fault))

    async def _write_for(self, seconds: float) -> None:
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            for _ in range(self.busy):
                page = self.choice.randrange(PAGES)
                data = page_of(self.choice.getrandbits(60))
                kind = self.choice.randrange(12)
                if kind == 0:
                    data = bytes(PAGE_SIZE)
                elif kind == 1:
                    data = data[:512]
                if kind == 2:
                    size = self.choice.randrange(SIZE * 3 // 4, SIZE * 5 // 4)
                    self.rig.truncate(size)
                else:
                    self.rig.write(page * PAGE_SIZE, data)
                self.written += 1
            await trio.sleep(self.choice.uniform(30, 400))

    async def _beat(self) -> None:
        """Do as the heartbeat does."""
        while True:
            try:
                await self.rig.store.stat("vault.json")
            except VaultUnreachableError:
                self.rig.health.vault_is_silent()
            else:
                self.rig.health.vault_answers()
            await trio.sleep(60)

    async def _watch(self) -> None:
        """Count what is seen, and that what waits stays bounded."""
        before = None
        while True:
            rig = self.rig
            state = rig.health.state
            if state is not before and state is State.RESYNC_REQUIRED:
                self.counts["resyncs"] += 1
            before = state
            wait_s = rig.health.next_retry_s
            if wait_s is not None:
                self.counts["countdowns"] += 1
                assert wait_s <= 33 * 60
            # One epoch may be as large as the disk; what is spooled beyond it is not.
            assert rig.replicator.spooled_bytes <= rig.pace.spool_limit + 2 * SIZE
            await trio.sleep(60)

    async def _converge(self) -> None:
        rig = self.rig
        for name, fault in self.faults:
            self.counts[f"{name} fired"] += fault.fired
            fault.count = 0
        async with rig.running():
            with trio.fail_after(6 * HOUR_S):
                while not rig.is_settled:
                    rig.health.retry_now()
                    await trio.sleep(30)
        self.counts["writes"] = self.written
        self.counts["points"] = await rig.check()


def outage_round(seed: int, hours: int = 24) -> Counter[str]:
    """Live through a day of outages; return what happened, by count.

    Raises:
        AssertionError: a point is unreadable, wrong or out of order, or at the end the
            newest one is not the disk.
    """
    with tempfile.TemporaryDirectory() as directory:
        try:
            work = partial(_round, Path(directory), seed, hours)
            # Each jump of the clock takes real time: look less often.
            with mock.patch.object(vdiskfs.replicator, "LOOK_S", 60.0):
                return trio.run(work, clock=jumping_clock())
        except BaseException as error:
            error.add_note(f"to see it again: outage_round({seed}, {hours})")
            raise


async def _round(directory: Path, seed: int, hours: int) -> Counter[str]:
    pace = Pace(30.0, SIZE // 2, 1, 0.5)
    async with Rig(directory, SIZE, pace=pace) as rig:
        async with rig.running():
            while not rig.is_settled:
                rig.write(0, page_of(seed))
                await trio.sleep(60)
        day = Day(rig, seed)
        await day.run(hours)
        return day.counts
