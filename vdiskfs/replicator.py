"""One disk's way to the vault: when to seal, when a pass runs, what is given back.

A replicator owns three tasks. *Sealing* waits until the disk is dirty, lets the epoch
interval pass, seals and captures into the spool; while pages are suspect it runs a pass
first. *Shipping* (`vdiskfs.shipping`) publishes the spool in order. Sealing never waits for
the vault: what cannot be shipped stays in the spool, and when that is full the epochs merge
by themselves, because nothing is sealed. *Bounding* looks whether even that grows beyond a
part of the disk: then the spool is given back, and the disk is resynchronized later
(`vdiskfs.resync`). An idle disk costs nothing. A disk of a consistency group is sealed by
`vdiskfs.together` while it can be; what remains here then is the pass.
"""

from __future__ import annotations

import logging
import math
import shlex
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from vdiskfs import native
from vdiskfs.catalog import DiskLog
from vdiskfs.delta import Spooled
from vdiskfs.delta.layout import NO_ID
from vdiskfs.errors import LocalError, PassStoppedError, StateError
from vdiskfs.health import Health, State
from vdiskfs.image import ChainEnd, EpochGivenUpError, EpochOutrunError, LiveImage
from vdiskfs.ownership import DiskLine
from vdiskfs.passes import MakeWriter, SuspectPass
from vdiskfs.shipping import Shipper
from vdiskfs.spool import Spool
from vdiskfs.state import sync_directory
from vdiskfs.stride import Pace, Stride
from vdiskfs.suspects import Suspects
from vdiskfs.units import NS, PAGE_SIZE, format_size

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""How often what grows without an event (dirty pages, a full spool) is looked at."""


class Joint(Protocol):
    """What seals a disk together with others: a group, of this name."""

    name: str

    def touched(self) -> None:
        """One of the disks has changed since its last seal, or can be sealed again."""


@dataclass(frozen=True, slots=True)
class Flip:
    """The end of one disk's epoch. Disks that were sealed together have the same ``group_id``."""

    seal: native.Seal
    group_id: str = NO_ID
    application: bool = False


class Replicator:
    """Replicates one disk as long as its `run` runs."""

    def __init__(
        self, *, name: str, live: LiveImage, line: DiskLine, end: ChainEnd, directory: Path,
        make_writer: MakeWriter, pace: Pace, health: Health,
        published: Callable[[Spooled], None], joint: Callable[[], Joint | None] = lambda: None,
    ) -> None:  # fmt: skip
        """Prepare; no task runs yet.

        Args:
            name: the disk's, for messages.
            live: tracked already.
            line: where deltas are published.
            end: the newest epoch that the vault holds; deltas in the spool follow it.
            directory: holds ``spool/`` and ``pass/``.
            make_writer: makes writers of this disk's deltas.
            pace: how often, how much.
            health: is told of errors, and waits for the next try.
            published: is told of each delta that the vault holds, before it leaves the spool.
            joint: what seals the disk together with others now, or None.
        """
        self.name = name
        self.live = live
        self.line = line
        self.pace = pace
        self.stride = Stride(pace.epoch_interval_s)
        self.health = health
        self.spool = Spool(directory / "spool", end)
        self.shipper = Shipper(
            spool=self.spool, line=line, health=health, published=published,
            announce=self._announce,
        )  # fmt: skip
        self.suspects = Suspects(
            name=name, live=live, spool=self.spool, line=line, health=health,
            directory=directory, window=pace.resync_window,
            pass_=SuspectPass(live, directory / "pass", make_writer, self.shipper.upload_part,
                              self.shipper.claim_parts),
            wait_shipped=self.wait_shipped,
        )  # fmt: skip
        self.resync = self.suspects.resync
        self._paused = directory / "paused"
        self._make_writer = make_writer
        self._dirty = trio.Event()
        self._joint = joint
        self._sealing = trio.Semaphore(1, max_value=1)  # no Lock: taken and given by two tasks
        self._moved = trio.Event()
        self._dirty_since_ns: int | None = None
        self._behind_since_ns: int | None = None  # all that waited was given back
        self._captured = 0  # bytes of an epoch that the bitmaps may have forgotten already
        self.paused = False
        self.ended = False

    @property
    def pass_(self) -> SuspectPass:
        """The pass over suspect pages, which is empty while none runs."""
        return self.suspects.pass_

    @property
    def points(self) -> DiskLog:
        """The line that is written, with its ancestors."""
        return self.line.points

    @property
    def stored(self) -> ChainEnd:
        """The newest epoch that the vault holds."""
        return self.spool.stored

    @property
    def end(self) -> ChainEnd:
        """The newest captured epoch: what the next delta starts from."""
        return self.spool.end

    # ---- start -----------------------------------------------------------------------

    def load(self, *, host_died: bool = False) -> None:
        """Take up what an earlier run left: spool, pass, marks; in a thread, before `run`.

        Deltas that the vault holds already are removed; one that is damaged, or does not
        follow, is dropped with all after it, and what they held becomes suspect.

        Args:
            host_died: marks that were made last may be missing in the bitmaps.
        """
        self.spool.load(self.points.generation, self.suspects.distrust_all)
        self.shipper.loaded()
        self.suspects.load(host_died=host_died)
        self.paused = self._paused.exists()
        if self.paused:
            self.shipper.stop()

    # ---- sealing ---------------------------------------------------------------------

    def touched(self) -> None:
        """The disk has changed since the last seal. From the trio thread."""
        if self._dirty_since_ns is None:
            self._dirty_since_ns = time.monotonic_ns()
        self._dirty.set()
        if (joint := self._joint()) is not None:
            joint.touched()

    async def run(self) -> None:
        """Seal and ship until cancelled. What an earlier run was stopped in is begun again."""
        if self.suspects.needed or self.live.counts().changed:
            self.touched()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._seal_loop)
            nursery.start_soon(self._bound_loop)
            nursery.start_soon(self.shipper.run)

    async def _seal_loop(self) -> None:
        while True:
            await self._dirty.wait()
            if not self.suspects.needed:
                await trio.sleep(self.stride.interval_s)
            try:
                await self._wait_turn()
                await self._seal_in_stride()
            except EpochOutrunError as error:
                self.stride.outrun()
                log.info("disk %s: %s; next in %.0f s", self.name, error, self.stride.interval_s)
                self._dirty.set()
            except PassStoppedError:
                self._dirty.set()
                if not self.suspects.is_first:
                    self.health.resync_required(self.suspects.reason)
            except (LocalError, OSError) as error:
                # The local disk failed or is full: nothing is lost, the pages stay marked.
                self.health.local_failed(error)
                self._dirty.set()
                await trio.sleep(max(1.0, self.pace.epoch_interval_s))

    async def _seal_in_stride(self) -> None:
        track = self.live.track
        track.set_budget(self.stride.budget_pages)
        try:
            await self.seal_if_changed(by_itself=True)
        finally:
            # Points that somebody asked for are made whatever they cost.
            track.set_budget(None)
        self.stride.kept()

    async def _bound_loop(self) -> None:
        """Look at what waits, as long as something waits in the spool."""
        while True:
            while not len(self.spool):
                await self._moved.wait()
            try:
                if self.shipper.gone is not None or self._is_too_much():
                    await self._bound()
            except (LocalError, OSError) as error:
                self.health.local_failed(error)
            with trio.move_on_after(LOOK_S):
                await self._moved.wait()

    async def _wait_turn(self) -> None:
        """Wait until something may be sealed, or a pass may run."""
        while True:
            wait_s = self._obstacle_s()
            if wait_s is None:
                return
            with trio.move_on_after(wait_s):
                await self._moved.wait()

    def _obstacle_s(self) -> float | None:
        """Return when to look again whether something may be done, or None: it may be done."""
        if self.paused:
            return math.inf
        if not self.suspects.needed:
            if self._joint() is not None and self.end.epoch:
                return math.inf  # it is sealed with others, not here
            # A spool that is full takes nothing more: the epochs merge.
            return LOOK_S if self._is_full else None
        if self.suspects.is_first:
            return LOOK_S if len(self.spool) else None
        wait_s = self.resync.wait_s()
        if wait_s is None and len(self.spool):
            # What is compared with must hold all that was captured before.
            wait_s = LOOK_S
        if wait_s is None:
            return None
        self.health.resync_required(self.suspects.reason)
        return min(wait_s, LOOK_S) if len(self.spool) else wait_s

    @property
    def _is_full(self) -> bool:
        return self.spool.bytes >= self.pace.spool_limit

    def _is_too_much(self) -> bool:
        """Whether what waits for a vault that is away is beyond the threshold."""
        if not self.health.is_vault_away or not len(self.spool):
            return False
        if self.resync.reason is not None and len(self.spool) == 1:
            return False  # only the oldest is left: it was offered
        limit = self.pace.resync_threshold * self.live.image.size()
        return self.dirty_bytes() + self.spool.bytes >= limit

    async def _bound(self) -> None:
        with self.suspects.held_off():
            async with self._sealing:
                if self.shipper.gone is not None:
                    async with self.shipper.quiet(lambda: not (self.shipper.gone or self.paused)):
                        await self._give_back(self.shipper.gone.message, 0)
                        self.shipper.gone = None
                elif self._is_too_much():
                    waited = format_size(self.dirty_bytes() + self.spool.bytes)
                    await self._give_back(f"{waited} waited while the vault was away")

    async def give_room(self) -> int:
        """Give the spool back to guests whose images lack its room; return how many bytes."""
        if not len(self.spool) and not self.pass_.is_unsent and self._sealing.value:
            return 0
        with self.suspects.held_off():
            async with self._sealing, self.shipper.quiet(lambda: not self.paused):
                # What a capture or a part under way had taken is given back, or lies here.
                given = await trio.to_thread.run_sync(self.pass_.give_up_unsent)
                keep = int(self.shipper.is_offered or not self.stored.epoch)
                if len(self.spool) > keep:
                    given += await self._give_back("images needed the room of what waited", keep)
                if self.shipper.has_stored_first:
                    given += await trio.to_thread.run_sync(self.spool.drop_stored)
                return given

    async def _give_back(self, reason: str, keep: int = 1) -> int:
        behind_s = self.lag_s()
        freed = await self.suspects.give_back(reason, keep)
        if not len(self.spool):
            self._behind_since_ns = time.monotonic_ns() - int(behind_s * NS)
        self._dirty.set()
        self._announce()
        return freed

    async def seal_if_changed(self, *, by_itself: bool = False) -> None:
        """Run the pass where pages are suspect, then seal and capture what changed.

        Args:
            by_itself: nobody asked: a resynchronization runs in its window, unless held back.

        Raises:
            PassStoppedError: the pass was stopped, or its window closed; nothing was sealed.
        """
        async with self._sealing:
            if self.ended:
                return
            self.suspects.arm()
            await self.begin_seal()
            bounded = by_itself and not self.suspects.is_first
            await self.suspects.run(self.resync.left_s() if bounded else math.inf)
            if self.live.counts().changed or self.pass_.parts or self.end.epoch == 0:
                [flip] = await flip_held([self])
                # Once sealed, it must be captured or given up, whatever comes.
                with trio.CancelScope(shield=True):
                    await self.seal_captured(flip)
            elif self.health.state is not State.PROTECTED:
                # The pass found what the vault holds: its newest point is this disk.
                self.health.pass_finished()
            await self.suspects.settle()
            self.health.local_works()

    async def begin_seal(self) -> None:
        """Begin what ends in a seal, if no page is suspect afterwards; `hold` is held.

        Raises:
            LocalError, OSError: the local disk refused.
        """
        if self._dirty.is_set():  # else the loop waits for this very one
            self._dirty = trio.Event()
        await trio.to_thread.run_sync(self.suspects.mend_marks)
        if not self.suspects.needed and self.dirty_bytes() > self.spool.room(self.pace.spool_limit):
            # More than the spool takes goes the way of a pass: parts that leave one by one.
            await self.suspects.take_changed()

    @property
    def is_ready(self) -> bool:
        """Whether it can be sealed with others now: nothing stands still, nothing is suspect."""
        stands = self.ended or self.paused or self._is_full or self.suspects.needed
        return not stands and not self.line.is_elsewhere and self.end.epoch > 0

    @property
    def group(self) -> str | None:
        """The name of the group that the disk is sealed with, or None."""
        joint = self._joint()
        return None if joint is None else joint.name

    def hold(self) -> trio.Semaphore:
        """What a seal holds until it is captured; who needs several takes them by name."""
        return self._sealing

    async def seal_captured(self, flip: Flip, label: str = "") -> Spooled:
        """Capture what `flip_held` has sealed, into the spool. Do not cancel it: shield it.

        Raises:
            EpochGivenUpError: the epoch could not be kept.
        """
        make_writer = partial(self._make_writer, self.spool.directory, inside=True)
        # Looked up here, not in the thread: while a delta is shipped it would be the one before.
        end, parts = self.end, list(self.pass_.parts)
        capture = partial(
            self.live.capture, flip.seal, end, make_writer, label, parts,
            captured=self.pass_.drop, group_id=flip.group_id, application=flip.application,
        )  # fmt: skip
        # Invariant: what changed is counted as dirty until it is counted as spooled.
        self._captured = self.dirty_bytes()
        try:
            spooled = await trio.to_thread.run_sync(capture)
        except EpochGivenUpError:
            self.touched()
            raise
        finally:
            self._captured = 0  # no other task looks until it is in the spool
        since_ns, self._behind_since_ns = self._dirty_since_ns, None
        self._dirty_since_ns = None if not self._dirty.is_set() else time.monotonic_ns()
        self.health.pass_finished()
        self.spool.add(spooled, since_ns)
        self.shipper.wake()
        self._announce()
        return spooled

    def _announce(self) -> None:
        """Something has changed that tasks wait for: they look again."""
        self._moved.set()
        self._moved = trio.Event()

    def look_again(self) -> None:
        """Who seals it, or whether it can be sealed, has changed. From the trio thread."""
        if not self.ended and (self.suspects.needed or self.live.counts().changed):
            self.touched()
        self._announce()

    async def finish(self) -> None:
        """Let nothing be sealed any more, by whomever; a seal that is under way is waited for."""
        async with self._sealing:
            self.ended = True

    async def wait_shipped(self) -> None:
        """Wait until the spool is empty."""
        while len(self.spool):
            await self._moved.wait()

    # ---- what the user asks ------------------------------------------------------------

    async def pause(self) -> None:
        """Let replication stand still, over restarts, too. Every change is tracked on."""
        self._paused.touch(mode=0o600)
        await trio.to_thread.run_sync(sync_directory, self._paused.parent)
        self.paused = True
        self.shipper.stop()
        self.suspects.stop()
        self._announce()

    def check_not_paused(self) -> None:
        """Raise StateError if replication is paused: what is asked for would wait for ever."""
        if self.paused:
            raise StateError(f"disk {self.name}: replication is paused",
                             hint=f"vdiskfs disk resume {shlex.quote(self.name)}")  # fmt: skip

    async def resume(self) -> None:
        """End `pause`."""
        self._paused.unlink(missing_ok=True)
        await trio.to_thread.run_sync(sync_directory, self._paused.parent)
        self.paused = False
        self.shipper.go()
        self.look_again()

    async def start_resync(self, *, now: bool) -> None:
        """Compare the disk with the vault: what is marked already, or else all of it.

        Args:
            now: outside of its window, too.

        Raises:
            StateError: the disk is paused, or its first replication is not finished.
        """
        self.check_not_paused()
        await self.suspects.ask(now=now)
        self._dirty.set()
        self._announce()

    async def cancel_resync(self) -> None:
        """Stop a resynchronization, or hold it back. The marks stay, tracking goes on.

        Raises:
            StateError: there is none.
        """
        await self.suspects.cancel()
        self._announce()

    # ---- what others ask ---------------------------------------------------------------

    @property
    def spooled_bytes(self) -> int:
        """Bytes of the deltas in the spool."""
        return self.spool.bytes

    @property
    def waiting(self) -> int:
        """Deltas in the spool: points that exist here and not yet in the vault."""
        return len(self.spool)

    def lag_s(self) -> float:
        """Return how far the vault is behind, in seconds: 0 when nothing waits."""
        if len(self.spool):
            return self.spool.lag_s()
        if self._behind_since_ns is not None and self.suspects.needed:
            return (time.monotonic_ns() - self._behind_since_ns) / NS
        if self._dirty_since_ns is not None and self.dirty_bytes():
            return (time.monotonic_ns() - self._dirty_since_ns) / NS
        return 0.0

    def dirty_bytes(self) -> int:
        """Return how much changed since the last capture."""
        counts = self.live.counts()
        return max((counts.dirty_pages + counts.frozen_pages) * PAGE_SIZE, self._captured)


async def flip_held(ordered: Sequence[Replicator]) -> list[Flip]:
    """End the running epoch of disks, whose `hold` is held, at one instant.

    Each must be captured then, or given up. Points of several get one time of their own.

    Raises:
        OSError: one of them cannot be sealed; none is.
    """
    for one in ordered:
        if one.suspects.pass_.parts and (size := one.live.image.size()) < one.end.size:
            one.live.mark_end(size)
    images = [one.live.image for one in ordered]
    seals = await trio.to_thread.run_sync(native.seal, images)
    if len(seals) == 1:
        return [Flip(seals[0])]
    time_ns = max(seals[0].time_ns, *(one.end.time_ns + 1 for one in ordered))
    group_id = uuid.uuid4().hex
    return [Flip(replace(seal, time_ns=time_ns), group_id) for seal in seals]
