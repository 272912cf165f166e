"""The suspect pages of one disk: of which it is not known whether the vault holds them.

They come from the first replication, from a host that died, from a change behind the
mount, from a spool that was given back, or because the user asks. One pass
(`vdiskfs.passes`) makes them known; here is what it is compared with, what is compared, and
the notes that make it survive the daemon and the host.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import trio

from vdiskfs import native
from vdiskfs.delta import Spooled
from vdiskfs.delta.entries import U8, U64
from vdiskfs.errors import (
    FormatError,
    LocalError,
    PassStoppedError,
    SegmentsGoneError,
    StateError,
)
from vdiskfs.health import Health
from vdiskfs.image import LiveImage
from vdiskfs.ownership import DiskLine
from vdiskfs.passes import SuspectPass
from vdiskfs.point import PointReader
from vdiskfs.resync import REGION_SIZE as RESYNC_REGION
from vdiskfs.resync import Resync
from vdiskfs.spool import Spool, changed_runs, remove_newest_first
from vdiskfs.state import DISK_END, DistrustNote, Stretch
from vdiskfs.units import PAGE_SIZE, REGION_SIZE, format_size
from vdiskfs.window import Window

log = logging.getLogger(__name__)


class Suspects:
    """One disk's suspect pages. The replicator calls it, one call at a time."""

    def __init__(
        self, *, name: str, live: LiveImage, spool: Spool, line: DiskLine, health: Health,
        directory: Path, window: Window | None, pass_: SuspectPass,
        wait_shipped: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        """Prepare; ``directory`` is the disk's, ``wait_shipped`` returns with an empty spool."""
        self.pass_ = pass_
        self.resync = Resync(directory / "resync.json", window)
        self._name = name
        self._live = live
        self._spool = spool
        self._line = line
        self._health = health
        self._note = DistrustNote(directory / "distrusted")
        self._track = directory / "track"
        self._wait_shipped = wait_shipped
        self._scope: trio.CancelScope | None = None
        self._stopped = False
        self._held_off = 0
        self._noting = trio.Lock()
        self._distrusted = self._note.exists()

    def load(self, *, host_died: bool) -> None:
        """Take up the pass and the marks of an earlier run; in a thread.

        Args:
            host_died: the bitmaps may lack marks; the record of what was given back has them.
        """
        # Whoever noted it may have been killed before it was marked, or marked bits that are gone.
        for start, end in self._note.stretches():
            self._live.image.suspect_mark_allocated(start, end)
        whole = self.pass_.load(self._spool.end)
        self.resync.keep_room(self._live.image.size())
        regions = self.resync.load()
        for region in regions or () if host_died else ():
            self._live.image.suspect_mark(region * RESYNC_REGION, RESYNC_REGION)
        if not whole or regions is None:
            self.distrust_all()

    @property
    def unknown(self) -> bool:
        """Whether there is a page that a pass has to look at."""
        marked = self._distrusted or self._live.counts().suspect_pages > 0
        return marked or self.pass_.is_unsent

    @property
    def needed(self) -> bool:
        """Whether a pass has to run before the next point."""
        return self.unknown or self.resync.reason is not None

    @property
    def reason(self) -> str:
        """Why a pass has to run, for people."""
        return self.resync.reason or "it is not known which pages the vault holds"

    @property
    def is_first(self) -> bool:
        """Whether the vault has no point of this disk yet: the pass is the first replication."""
        return self._spool.stored.epoch == 0

    def distrust(self, stretches: Sequence[Stretch] = ((0, DISK_END),)) -> None:
        """Nothing is known of any page there: all that is allocated is suspect; in a thread.

        So is all that has data in the vault; that is marked when the pass begins, and noted
        durably until then. What was distrusted before is marked again.
        """
        if stretches:
            self._note.add(list(stretches))
        self._distrusted = self._note.exists()
        for start, end in self._note.stretches():
            self._live.image.suspect_mark_allocated(start, end)

    def distrust_all(self) -> None:
        """Something that was kept is damaged: nothing is known, and no part is believed."""
        self.distrust()
        self.pass_.drop()

    def mend_marks(self) -> None:
        """Let nothing be believed once the disk of the bitmaps has failed; in a thread.

        Raises:
            LocalError: it fails still. Nothing can be sealed then.
        """
        counts = self._live.counts()
        if not counts.lost:
            return
        if counts.detached:
            raise LocalError(
                f"{self._track}: the file system cannot hold the bitmaps any more; changes are "
                "tracked in memory alone, no point can be made",
                hint="mend the disk, then unmount and mount again: all is compared",
            )
        self.distrust_all()
        try:
            native.settle_track(self._live.image)
        except OSError as error:
            raise LocalError(f"{self._track}: the bitmaps cannot be written: "
                             f"{error.strerror}") from error  # fmt: skip
        log.error("disk %s: writing the bitmaps had failed: all is compared", self._name)

    def doubt(self, stretches: Sequence[Stretch], spans: Sequence[Stretch]) -> None:
        """The host died: nothing is believed of ``stretches``; in a thread, after `load`.

        The track has made suspect what is in the log's regions, but not what is in ``spans``.
        """
        self.pass_.doubt(stretches)
        if spans or self._distrusted:
            self.distrust(spans)

    async def give_back(self, reason: str, keep: int) -> int:
        """Give back the spool but its ``keep`` oldest deltas, when nothing is sealed.

        What the others held is to be compared with the vault later.

        Returns:
            How many bytes they had.

        Raises:
            LocalError: the disk refused to note it; nothing is given back.
        """
        before, end = self._spool.bytes, self._spool.end
        taken = self._spool.take_newer(keep)
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(self.mark_given_back, taken, end.size, reason)
            except BaseException:
                for spooled in taken:
                    self._spool.add(spooled)
                raise
            freed = before - self._spool.bytes
            log.error("disk %s: is to be resynchronized: %s; %s of the spool and %d points are "
                      "given back", self._name, reason, format_size(freed), len(taken))  # fmt: skip
            self._health.resync_required(reason)
            await trio.to_thread.run_sync(remove_newest_first, taken)
        return freed

    def mark_given_back(self, deltas: Sequence[Spooled], size: int, reason: str) -> None:
        """Make what deltas hold suspect, before they go. Durable on return; in a thread.

        Args:
            deltas: the newest ones of the spool.
            size: bytes of the disk at the last of them.
            reason: why, for people.

        Raises:
            LocalError: the disk refused; then they must not go.
        """
        regions: set[int] = set()
        try:
            for runs in changed_runs(deltas):
                self._live.suspect_pages(runs)
                for start, end in zip(runs.start.tolist(), runs.end.tolist(), strict=True):
                    first = start * PAGE_SIZE // RESYNC_REGION
                    regions.update(range(first, (end * PAGE_SIZE - 1) // RESYNC_REGION + 1))
        except FormatError as error:
            log.warning("disk %s: all pages are looked at again: %s", self._name, error)
            self.distrust()
        self._live.mark_end(size)
        native.sync_track(self._live.track)
        self.resync.require(reason, regions)

    # ---- what the user asks ------------------------------------------------------------

    async def ask(self, *, now: bool) -> None:
        """Let a pass run: over what is marked, or else over all. ``now``: at any time of day.

        What was asked for outlives the daemon.

        Raises:
            StateError: the first replication is not finished.
        """
        if self.is_first:
            raise StateError(
                f"disk {self._name}: the first replication is not finished",
                hint="wait for it: vdiskfs status --watch",
            )
        async with self._noting:
            note = partial(self.resync.require, forced=now)
            if not self.needed:
                # The note first: what is marked only in its name must not be forgotten.
                await trio.to_thread.run_sync(note, "asked for")
                await trio.to_thread.run_sync(self.distrust)
            elif self.resync.cancelled or now:
                await trio.to_thread.run_sync(note, self.reason)

    async def cancel(self) -> None:
        """Stop the pass, or hold it back until it is asked for. The marks stay.

        Raises:
            StateError: none runs or waits, or it is the first replication.
        """
        if self.is_first:
            raise StateError(
                f"disk {self._name}: the first replication is no resynchronization",
                hint=f"vdiskfs disk pause {shlex.quote(self._name)}",
            )
        async with self._noting:
            if not self.needed or self.resync.cancelled:
                raise StateError(f"disk {self._name}: no resynchronization runs or waits")
            self.resync.cancelled = True  # at once: none begins while the record is written
            self.stop()
            await trio.to_thread.run_sync(self.resync.cancel, self.reason)
            self._health.resync_required(self.reason)

    # ---- the pass --------------------------------------------------------------------

    async def run(self, pass_s: float) -> None:
        """Run the pass, if one is needed, until no page is suspect.

        Raises:
            PassStoppedError: `stop` was called, or ``pass_s`` seconds were not enough. What
                is done stays done.
            OSError, LocalError: the local disk refused.
        """
        if not self.needed:
            return
        with trio.CancelScope() as scope:
            self._scope = scope
            if self._stopped or self._held_off:
                # It came before there was a pass, and after the seal was taken.
                scope.cancel()
                await trio.lowlevel.checkpoint()
            if len(self._spool):
                # What is compared with must hold all that was captured before.
                await self._wait_shipped()
            self._health.pass_started(first=self.is_first)
            if not self.pass_.parts:
                self.pass_.begin()
            scope.deadline = trio.current_time() + pass_s
            if self.resync.reason is not None and not self.is_first:
                await self.take_changed()
            while self.unknown:
                await self._pass_once()
        # Else a host that dies now finds the pages suspect that were compared already.
        await trio.to_thread.run_sync(native.sync_track, self._live.track)
        done, differed = self.pass_.done_pages, self.pass_.sent_pages
        log.info("disk %s: pages compared so far: %d, differing: %d", self._name, done, differed)
        if scope.cancelled_caught:
            raise PassStoppedError(f"disk {self._name}: the resynchronization was stopped")

    def arm(self) -> None:
        """The seal was taken: whoever holds it may run the pass, until `stop`."""
        self._stopped = False

    def stop(self) -> None:
        """Stop the pass, if one runs, waits for the spool to be empty, or is about to begin."""
        self._stopped = True
        if self._scope is not None:
            self._scope.cancel()

    async def renew(self) -> None:
        """Claim again what a pass has stored, where that is doubted: it takes its time."""
        claims, batch = self._line.points.claims, self.pass_.batch
        if self.pass_.parts and not claims.holds(batch):
            try:
                await claims.need([batch])
            except SegmentsGoneError:
                self.stop()  # one that runs begins anew: nothing that it stores would be named

    @contextlib.contextmanager
    def held_off(self) -> Iterator[None]:
        """Let no pass go on, or begin, inside: it holds the seal until the spool is shipped."""
        self._held_off += 1
        self.stop()
        try:
            yield
        finally:
            self._held_off -= 1

    async def take_changed(self) -> None:
        """Make what changed since the last seal suspect: the pass compares it, too."""
        if self.is_first or not self._live.counts().changed:
            return
        size = self._spool.stored.size
        with trio.CancelScope(shield=True):
            seal = await trio.to_thread.run_sync(self._live.suspect_changed, size)
            if self.pass_.reads_beyond(min(seal.low, seal.size)):
                await trio.to_thread.run_sync(self.pass_.give_up_parts)

    async def settle(self) -> None:
        """Take the notes away: what was found is durable in the spool."""
        async with self._noting:
            if self.resync.reason is not None and not self.unknown:
                await trio.to_thread.run_sync(self.resync.settle)
                self._health.pass_finished()

    async def _pass_once(self) -> None:
        if self.is_first:
            await self._trust()
            await self.pass_.run(None, self._spool.stored)
            return
        reader = await self._health.until_done(
            "reading the newest point", partial(self._line.points.open, self._spool.stored.epoch)
        )

        async def sums(first: int, count: int) -> tuple[U64, U8]:
            ask = partial(reader.sums, first, count)
            return await self._health.until_done("comparing with the vault", ask)

        async with reader:
            if self._distrusted:
                for start, end in self._note.stretches():
                    await self._suspect_stored(reader, start, end)
                await self._trust()
            await self.pass_.run(sums, self._spool.stored)

    async def _suspect_stored(self, reader: PointReader, start: int, end: int) -> None:
        """Mark what has data in the vault: here it may have become a hole."""
        size = min(reader.size, self._live.image.size(), end)
        offset = await self._health.until_done("reading", partial(reader.next_data, start))
        while offset is not None and offset < size:
            region = offset // REGION_SIZE
            first, last = max(start, region * REGION_SIZE), min(size, (region + 1) * REGION_SIZE)
            self._live.image.suspect_mark(first, last - first)
            offset = await self._health.until_done(
                "reading", partial(reader.next_data, (region + 1) * REGION_SIZE)
            )

    async def _trust(self) -> None:
        """All that is distrusted is marked suspect: once that is durable, the note goes."""
        if self._distrusted:
            await trio.to_thread.run_sync(native.sync_track, self._live.track)
            await trio.to_thread.run_sync(self._note.clear)
            self._distrusted = False
