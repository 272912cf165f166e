"""Sealing several disks at one instant: when somebody asks, or for a consistency group.

A group has one task, which seals all its disks together an interval after one of them has
changed. What cannot be sealed then (it is paused, in a pass, its spool is full, its last epoch
was outrun) is left out, and keeps nobody: the others get their points, which then are no
points of the whole group. Each disk is captured by a task of its own and free for the next
seal when that ends; one that takes long is waited for a few seconds once, then left out.

Which disks a group has is `vdiskfs.groups`'; what one disk needs, `vdiskfs.replicator`'s.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import trio

from vdiskfs.delta import Spooled
from vdiskfs.errors import LocalError, StateError
from vdiskfs.image import EpochGivenUpError, EpochOutrunError
from vdiskfs.replicator import LOOK_S, Flip, Replicator, flip_held

log = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""Seconds that a group waits for a disk that is still being captured, before it goes on without."""

CAPTURES = max(2, os.cpu_count() or 1)
"""Disks of a group that are captured at once: more would only take the processors from guests."""

AGAIN_S = 5.0
"""Seconds before a task that failed is begun again."""


class Quiet(Protocol):
    """Brings what uses the disks to rest around a seal. Neither method fails, or waits long."""

    async def freeze(self) -> None:
        """Bring it to rest."""

    async def thaw(self, points: Mapping[str, str]) -> bool:
        """Let it go on; True: it was at rest all the time since `freeze`."""


async def seal_together(
    replicators: Sequence[Replicator], label: str = "", quiet: Quiet | None = None
) -> list[Spooled]:
    """Seal disks at one instant, because somebody asks, and capture each into its spool.

    Nothing waits for the vault. The points exist locally on return, in the order of names; with
    ``quiet`` they are application-consistent if it says so, and frozen while no capture runs.

    Raises:
        StateError: a disk has suspect pages; it has no point to give before they are known.
        EpochGivenUpError: one of the disks could not keep its epoch.
    """
    ordered = sorted(replicators, key=lambda one: one.name)
    held: list[Replicator] = []
    try:
        for one in ordered:
            # Asked before it is held, too: a pass holds it for as long as it takes.
            check_known(one)
            await one.hold().acquire()
            held.append(one)
            check_known(one)
        if quiet is not None:
            await quiet.freeze()
        flips = await flip_held(ordered)
        spooled: dict[str, Spooled] = {}
        failed: list[EpochGivenUpError] = []
        limiter = trio.CapacityLimiter(CAPTURES)

        async def capture(one: Replicator, flip: Flip) -> None:
            try:
                async with limiter:
                    spooled[one.name] = await one.seal_captured(flip, label)
            except EpochGivenUpError as error:
                failed.append(error)

        # Once sealed, each must be captured or given up, whatever comes.
        with trio.CancelScope(shield=True):
            if quiet is not None:
                flips = await _thaw(quiet, ordered, flips)
            async with trio.open_nursery() as nursery:
                for one, flip in zip(ordered, flips, strict=True):
                    nursery.start_soon(capture, one, flip)
        if failed:
            raise failed[0]
        return [spooled[one.name] for one in ordered]
    finally:
        for one in held:
            one.hold().release()


async def _thaw(quiet: Quiet, ordered: Sequence[Replicator], flips: list[Flip]) -> list[Flip]:
    pairs = zip(ordered, flips, strict=True)
    points = {one.name: f"{one.name}@#{flip.seal.epoch}" for one, flip in pairs}
    application = await quiet.thaw(points)
    return [replace(flip, application=application) for flip in flips]


def check_known(one: Replicator) -> None:
    """Raise StateError if a disk has no point to give: it is paused, or pages are suspect."""
    if one.ended:
        raise StateError(f"disk {one.name}: its protection ends")
    if one.line.handed:
        raise StateError(f"disk {one.name}: was handed over to another site")
    one.check_not_paused()
    first = one.end.epoch == 0
    if first or one.suspects.needed:
        what = "first replication" if first else "resynchronization"
        raise StateError(
            f"disk {one.name}: the {what} is not finished",
            hint="wait for it: vdiskfs status --watch",
        )


class GroupSealer:
    """The sealing of one group's disks while its `run` runs. Trio thread only."""

    def __init__(
        self, name: str, members: Callable[[], Sequence[Replicator]], interval_s: float
    ) -> None:
        """Prepare.

        Args:
            name: the group's, for messages.
            members: gives its disks that are protected here now.
            interval_s: of epochs.
        """
        self.name = name
        self.scope = trio.CancelScope()
        self._members = members
        self._interval_s = interval_s
        self._dirty = trio.Event()
        self._sealing = trio.Lock()
        self._due: dict[str, float] = {}
        self._retry: dict[str, float] = {}
        self._slow: set[str] = set()
        self._captures = trio.CapacityLimiter(CAPTURES)
        self._nursery: trio.Nursery | None = None

    def touched(self) -> None:
        """One of the disks has changed, or can be sealed again."""
        self._dirty.set()

    async def run(self) -> None:
        """Seal until ``scope`` is cancelled; what is sealed then is captured before it returns."""
        with self.scope:
            while True:
                try:
                    async with trio.open_nursery() as self._nursery:
                        await self._seal_loop()
                except Exception:
                    # The guests write on, tracked.
                    log.exception("group %s: sealing failed; it is begun again", self.name)
                    await trio.sleep(AGAIN_S)

    async def _seal_loop(self) -> None:
        again_s = 0.0
        while True:
            with trio.move_on_after(again_s):
                await self._dirty.wait()
                again_s = math.inf
            if again_s == math.inf:
                await trio.sleep(self._interval_s)
            again_s = await self.seal_changed()

    async def seal_changed(self, *, last: bool = False) -> float:
        """Seal the disks that can be sealed, if one of them has changed.

        Returns in how many seconds it is to be looked at again what was left out: inf where
        nothing was. What is sealed is captured by other tasks, each with its disk's `hold`.

        Args:
            last: nobody writes any more: what was outrun is sealed, too.
        """
        async with self._sealing:
            if self._nursery is None:
                return math.inf  # it has not begun
            self._dirty = trio.Event()
            members = sorted(self._members(), key=lambda one: one.name)
            chosen = self._ready(members, last=last)
            if any(_is_changed(one) for one in chosen):
                await self._seal(chosen)
            return self._look_again_s(members)

    def _ready(self, members: Sequence[Replicator], *, last: bool) -> list[Replicator]:
        """Return the disks that can be sealed now, and are due.

        When that of the longest epochs is due all are: so the group has points as often as it.
        """
        now = trio.current_time()
        ready = [one for one in members if one.is_ready and self._retry.get(one.name, now) <= now]
        slowest = max(ready, key=lambda one: one.stride.interval_s, default=None)
        if last or slowest is None or self._due.get(slowest.name, now) <= now:
            return ready
        return [one for one in ready if self._due.get(one.name, now) <= now]

    def _look_again_s(self, members: Sequence[Replicator]) -> float:
        """Return when to look again at disks that have changed and were left out."""
        now = trio.current_time()
        waits = [
            max(self._due.get(one.name, 0) - now, self._retry.get(one.name, 0) - now, 0) or LOOK_S
            for one in members
            if _is_changed(one) and not one.suspects.needed
        ]
        return min(waits, default=math.inf)

    async def _seal(self, chosen: Sequence[Replicator]) -> None:
        held: list[Replicator] = []
        try:
            await self._take(chosen, held)
            await self._begin(held)
            if any(_is_changed(one) for one in held):
                await self._flip(held)
        finally:
            # What was sealed is let go of by the task that captures it.
            while held:
                _let_go(held, held[-1])

    async def _take(self, chosen: Sequence[Replicator], held: list[Replicator]) -> None:
        """Hold the disks, in the order of names as everybody does."""
        deadline = trio.current_time() + PATIENCE_S
        for one in chosen:
            try:
                one.hold().acquire_nowait()
            except trio.WouldBlock:
                if one.name in self._slow:
                    continue
                with trio.CancelScope(deadline=deadline) as scope:
                    await one.hold().acquire()
                if scope.cancelled_caught:
                    log.info("group %s: goes on without disk %s, which is not captured yet",
                             self.name, one.name)  # fmt: skip
                    self._slow.add(one.name)
                    continue
            self._slow.discard(one.name)
            held.append(one)

    async def _begin(self, held: list[Replicator]) -> None:
        """Let go of disks that cannot be sealed after all: a pass comes first, say."""
        for one in list(held):
            try:
                if one.is_ready:
                    await one.begin_seal()
            except (LocalError, OSError) as error:
                self._failed(one, error)
                _let_go(held, one)
                continue
            if one.is_ready:
                one.live.track.set_budget(one.stride.budget_pages)
            else:
                _let_go(held, one)
                one.look_again()

    async def _flip(self, held: list[Replicator]) -> None:
        try:
            flips = await flip_held(held)
        except OSError as error:
            await self._flip_apart(held, error)
            return
        for one, flip in zip(list(held), flips, strict=True):
            self._start_capture(held, one, flip)

    async def _flip_apart(self, held: list[Replicator], error: OSError) -> None:
        """One disk keeps all from being sealed: each by itself, so that it keeps itself only."""
        if len(held) > 1:
            log.warning("group %s: its disks are sealed one by one: %s", self.name, error)
        for one in list(held):
            try:
                [flip] = await flip_held([one])
            except OSError as own:
                self._failed(one, own)
            else:
                self._start_capture(held, one, flip)

    def _start_capture(self, held: list[Replicator], one: Replicator, flip: Flip) -> None:
        # No wait between the seal and this: what is sealed must be captured or given up.
        assert self._nursery is not None
        held.remove(one)
        self._nursery.start_soon(self._capture, one, flip)

    async def _capture(self, one: Replicator, flip: Flip) -> None:
        with trio.CancelScope(shield=True):
            try:
                async with self._captures:
                    await one.seal_captured(flip)
                one.stride.kept()
                one.health.local_works()
                self._retry.pop(one.name, None)
                self._note_due(one)
            except EpochOutrunError as error:
                one.stride.outrun()
                self._note_due(one)
                log.info("disk %s: %s; next in %.0f s", one.name, error, one.stride.interval_s)
            except (LocalError, OSError) as error:
                self._failed(one, error)
            finally:
                one.live.track.set_budget(None)
                one.hold().release()

    def _failed(self, one: Replicator, error: Exception) -> None:
        # The local disk failed or is full: nothing is lost, the pages stay marked.
        one.health.local_failed(error)
        self._retry[one.name] = trio.current_time() + max(1.0, self._interval_s)
        one.look_again()

    def _note_due(self, one: Replicator) -> None:
        if one.stride.interval_s > self._interval_s:
            self._due[one.name] = trio.current_time() + one.stride.interval_s
        else:
            self._due.pop(one.name, None)


def _let_go(held: list[Replicator], one: Replicator) -> None:
    held.remove(one)
    one.live.track.set_budget(None)
    one.hold().release()


def _is_changed(one: Replicator) -> bool:
    return not one.ended and one.live.counts().changed
