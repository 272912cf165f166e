"""One disk's way to the vault: when to seal, what waits in the spool, what was shipped.

A replicator owns two tasks. *Sealing* waits until the disk is dirty, lets the epoch
interval pass, seals and captures into the spool; while pages are suspect it runs a pass
first. *Shipping* publishes the spool in order. Sealing never waits for the vault: what
cannot be shipped stays in the spool, and when that is full the epochs merge by themselves,
because nothing is sealed. An idle disk costs nothing.

What waits, and how long until the next try, is `vdiskfs.health`'s; that a point exists is
the catalog's.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from vdiskfs import native
from vdiskfs.catalog import DiskLog
from vdiskfs.catalog.publish import upload_segments
from vdiskfs.delta import Spooled, open_spooled, remove_spooled
from vdiskfs.errors import FormatError, LocalError, StateError
from vdiskfs.health import Health, State
from vdiskfs.image import ChainEnd, EpochGivenUpError, EpochOutrunError, LiveImage
from vdiskfs.ownership import DiskLine, spooled_deltas
from vdiskfs.passes import MakeWriter, SuspectPass
from vdiskfs.point import PointReader
from vdiskfs.state import DISK_END, DistrustNote, Stretch
from vdiskfs.stride import Stride
from vdiskfs.units import NS, PAGE_SIZE, REGION_SIZE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """How a disk is replicated. Sizes are bytes."""

    epoch_interval_s: float
    spool_limit: int
    compression_level: int


class Replicator:
    """Replicates one disk as long as its `run` runs."""

    def __init__(
        self, *, name: str, live: LiveImage, line: DiskLine, end: ChainEnd, directory: Path,
        make_writer: MakeWriter, pace: Pace, health: Health,
        published: Callable[[Spooled], None],
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
        """
        self.name = name
        self.live = live
        self.line = line
        self.stored = end
        self.end = end
        self.pace = pace
        self.stride = Stride(pace.epoch_interval_s)
        self.health = health
        self.pass_ = SuspectPass(live, directory / "pass", make_writer, self._upload_part)
        self._spool = directory / "spool"
        self._distrusted = DistrustNote(directory / "distrusted")
        self._make_writer = make_writer
        self._published = published
        self._waiting: deque[Spooled] = deque()
        self.spooled_bytes = 0
        self._dirty = trio.Event()
        self._sealing = trio.Lock()
        self._moved = trio.Event()
        self._dirty_since_ns: int | None = None

    @property
    def points(self) -> DiskLog:
        """The line that is written, with its ancestors."""
        return self.line.points

    # ---- start -----------------------------------------------------------------------

    def load(self) -> None:
        """Take up the spool and the pass of an earlier run; in a thread, before `run`.

        Deltas that the vault holds already are removed; one that is damaged, or does not
        follow, is dropped with all after it, and what they held becomes suspect.
        """
        self._spool.mkdir(mode=0o700, exist_ok=True)
        for path in sorted(self._spool.glob("*.delta")):
            if not self._load_delta(path):
                self.pass_.drop()
                break
        self.pass_.load(self.end)

    @property
    def distrusted(self) -> bool:
        """Whether what the vault holds is still to be compared with what is here."""
        return self._distrusted.exists()

    def distrust(self, stretches: Sequence[Stretch] = ((0, DISK_END),)) -> None:
        """Nothing is known of any page there: all that is allocated is suspect; in a thread.

        So is all that has data in the vault; that is marked when the pass begins, and noted
        durably until then. What was distrusted before is marked again.
        """
        if stretches:
            self._distrusted.add(list(stretches))
        for start, end in self._distrusted.stretches():
            self.live.image.suspect_mark_allocated(start, end)

    def doubt(self, stretches: Sequence[Stretch], spans: Sequence[Stretch]) -> None:
        """The host died: nothing is believed of ``stretches``; in a thread, after `load`.

        The track has made suspect what is in the log's regions, but not what is in ``spans``.
        """
        self.pass_.doubt(stretches)
        if spans or self.distrusted:
            self.distrust(spans)

    def _load_delta(self, path: Path) -> bool:
        try:
            spooled = open_spooled(path)
        except FormatError as error:
            log.warning("%s: dropped, all pages are looked at again: %s", path, error)
            self.distrust()
            path.unlink()
            return False
        head = spooled.head
        if head.to_epoch <= self.end.epoch:
            remove_spooled(spooled)
            return True
        # One captured for an older generation is moved into ours before it is published.
        same = head.from_digest == self.end.digest or head.generation != self.points.generation
        if head.from_epoch != self.end.epoch or not same:
            log.warning("%s: does not follow epoch %d, dropped", path, self.end.epoch)
            self.distrust()
            remove_spooled(spooled)
            return False
        self._enqueue(spooled)
        return True

    # ---- sealing ---------------------------------------------------------------------

    def touched(self) -> None:
        """The disk has changed since the last seal. From the trio thread."""
        if self._dirty_since_ns is None:
            self._dirty_since_ns = time.monotonic_ns()
        self._dirty.set()

    async def run(self) -> None:
        """Seal and ship until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._seal_loop)
            nursery.start_soon(self._ship_loop)

    async def _seal_loop(self) -> None:
        while True:
            await self._dirty.wait()
            if not self.live.counts().suspect_pages:
                await trio.sleep(self.stride.interval_s)
            await self._wait_room()
            try:
                await self._seal_in_stride()
            except EpochOutrunError as error:
                self.stride.outrun()
                log.info("disk %s: %s; next in %.0f s", self.name, error, self.stride.interval_s)
                self._dirty.set()
            except (LocalError, OSError) as error:
                # The local disk failed or is full: nothing is lost, the pages stay marked.
                self.health.local_failed(str(error))
                self._dirty.set()
                await trio.sleep(max(1.0, self.pace.epoch_interval_s))

    async def _seal_in_stride(self) -> None:
        track = self.live.track
        track.set_budget(self.stride.budget_pages)
        try:
            await self.seal_if_changed()
        finally:
            # Points that somebody asked for are made whatever they cost.
            track.set_budget(None)
        self.stride.kept()

    async def _wait_room(self) -> None:
        """Wait until the spool takes another epoch; meanwhile epochs merge."""
        while self.spooled_bytes >= self.pace.spool_limit:
            await self._moved.wait()

    async def seal_if_changed(self) -> None:
        """Run the pass where pages are suspect, then seal and capture what changed."""
        async with self._sealing:
            self._dirty = trio.Event()
            await self._run_pass()
            if self.live.counts().changed or self.pass_.parts or self.end.epoch == 0:
                await seal_together([self], locked=True)
            elif self.health.state in (State.ENABLING, State.RESYNCING):
                # The pass found what the vault holds: its newest point is this disk.
                self.health.pass_finished()
            self.health.local_works()

    async def _run_pass(self) -> None:
        if not self._needs_pass():
            return
        self.health.pass_started(first=self.stored.epoch == 0)
        if self._waiting:
            # What is compared with must hold all that was captured before.
            await self.wait_shipped()
        while self._needs_pass():
            if self.stored.epoch == 0:
                await self._trust()
                await self.pass_.run(None, self.stored)
                continue
            reader = await self.health.until_done(
                "reading the newest point", partial(self.points.open, self.stored.epoch)
            )
            async with reader:
                if self.distrusted:
                    for start, end in self._distrusted.stretches():
                        await self._suspect_stored(reader, start, end)
                    await self._trust()
                await self.pass_.run(reader, self.stored)

    def _needs_pass(self) -> bool:
        """Whether pages are not known, or parts of a pass were read and are not stored."""
        unknown = self.live.counts().suspect_pages or self.distrusted
        return bool(unknown) or self.pass_.is_unsent

    async def _trust(self) -> None:
        """All that is distrusted is marked suspect: once that is durable, the note goes."""
        await trio.to_thread.run_sync(native.sync_track, self.live.track)
        await trio.to_thread.run_sync(self._distrusted.clear)

    async def _suspect_stored(self, reader: PointReader, start: int, end: int) -> None:
        """Mark what has data in the vault: here it may have become a hole."""
        size = min(reader.size, self.live.image.size(), end)
        offset = await self.health.until_done("reading", partial(reader.next_data, start))
        while offset is not None and offset < size:
            region = offset // REGION_SIZE
            first, last = max(start, region * REGION_SIZE), min(size, (region + 1) * REGION_SIZE)
            self.live.image.suspect_mark(first, last - first)
            offset = await self.health.until_done(
                "reading", partial(reader.next_data, (region + 1) * REGION_SIZE)
            )

    async def _upload_part(self, part: Spooled) -> None:
        points = self.points
        await self.health.until_done(
            "uploading",
            partial(upload_segments, points.store, points.record.id, part.segments),
        )
        for segment in part.segments:
            segment.path.unlink(missing_ok=True)

    def hold(self) -> trio.Lock:
        """The lock that a seal needs; `seal_together` takes several in the order of names."""
        return self._sealing

    async def seal_captured(self, seal: native.Seal, label: str) -> Spooled:
        """Capture what `seal_together` has sealed, into the spool."""
        make_writer = partial(self._make_writer, self._spool, inside=True)
        parts = list(self.pass_.parts)
        spooled = await trio.to_thread.run_sync(
            lambda: self.live.capture(seal, self.end, make_writer, label, parts, self.pass_.drop)
        )
        self._dirty_since_ns = None if not self._dirty.is_set() else time.monotonic_ns()
        self.health.pass_finished()
        self._enqueue(spooled)
        self._announce()
        return spooled

    def _enqueue(self, spooled: Spooled) -> None:
        head = spooled.head
        self._waiting.append(spooled)
        self.spooled_bytes += head.stored_bytes
        self.end = ChainEnd.of(head)

    def _announce(self) -> None:
        """The spool has gained or lost a delta: whoever waits looks again."""
        self._moved.set()
        self._moved = trio.Event()

    # ---- shipping --------------------------------------------------------------------

    async def _ship_loop(self) -> None:
        while True:
            while not self._waiting:
                await self._moved.wait()
            spooled = await self.health.until_done("uploading", self._publish)
            await self._shipped(spooled)
            await self.health.until_done("joining", self.points.publish_joins)

    async def _publish(self) -> Spooled:
        captured = self._waiting[0]
        spooled = await self.line.publish(captured)
        if self.end == ChainEnd.of(captured.head):
            self.end = ChainEnd.of(spooled.head)
        self._waiting[0] = spooled
        return spooled

    async def _shipped(self, spooled: Spooled) -> None:
        head = spooled.head
        self.stored = ChainEnd.of(head)
        # Known durably before the spool lets go of it. A cancel must not come in between.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._published, spooled)
            await trio.to_thread.run_sync(remove_spooled, spooled)
        self._waiting.popleft()
        self.spooled_bytes -= head.stored_bytes
        self._announce()

    async def wait_shipped(self) -> None:
        """Wait until the spool is empty."""
        while self._waiting:
            await self._moved.wait()

    # ---- what others ask ---------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Deltas in the spool: points that exist here and not yet in the vault."""
        return len(self._waiting)

    def lag_s(self) -> float:
        """Return how far the vault is behind, in seconds: 0 when nothing waits."""
        if self._waiting:
            # Before the first stored epoch the lag counts from the oldest that waits.
            since = self.stored.time_ns or self._waiting[0].head.time_ns
            return max(0.0, (time.time_ns() - since) / NS)
        if self._dirty_since_ns is not None and self.live.counts().changed:
            return (time.monotonic_ns() - self._dirty_since_ns) / NS
        return 0.0

    def dirty_bytes(self) -> int:
        """Return how much changed since the last capture."""
        counts = self.live.counts()
        return (counts.dirty_pages + counts.frozen_pages) * PAGE_SIZE


def spool_end(spool: Path, end: ChainEnd | None) -> ChainEnd | None:
    """Return the newest epoch that the spool holds, ``end`` if that is newer; in a thread."""
    found = spooled_deltas(spool)
    newest = ChainEnd.of(found[-1].head) if found else None
    return end if newest is None or (end is not None and end.epoch >= newest.epoch) else newest


async def seal_together(
    replicators: Sequence[Replicator], label: str = "", *, locked: bool = False
) -> list[Spooled]:
    """Seal disks at one instant and capture each into its spool.

    Nothing waits for the vault. The points exist locally on return.

    Raises:
        StateError: a disk has suspect pages; it has no point to give before they are known.
        EpochGivenUpError: one of the disks could not keep its epoch.
    """
    ordered = sorted(replicators, key=lambda one: one.name)
    held: list[trio.Lock] = []
    try:
        if not locked:
            for one in ordered:
                await one.hold().acquire()
                held.append(one.hold())
                if one.live.counts().suspect_pages or one.end.epoch == 0:
                    raise StateError(
                        f"disk {one.name}: the first replication is not finished",
                        hint="wait for it: vdiskfs status --watch",
                    )
        images = [one.live.image for one in ordered]
        seals = await trio.to_thread.run_sync(native.seal, images)
        spooled: list[Spooled] = []
        failed: EpochGivenUpError | None = None
        # Once sealed, each must be captured or given up, whatever comes.
        with trio.CancelScope(shield=True):
            for one, seal in zip(ordered, seals, strict=True):
                try:
                    spooled.append(await one.seal_captured(seal, label))
                except EpochGivenUpError as error:
                    failed = error
                    one.touched()
        if failed is not None:
            raise failed
        return spooled
    finally:
        for lock in held:
            lock.release()
