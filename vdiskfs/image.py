"""A live image: a protected disk's bytes, tracked, sealed and captured.

The order of one epoch is kept here: seal, capture into a spooled delta that is durable,
only then forget. Everything is synchronous and may wait for the local disk: call it from a
thread, one call at a time for one image (the replicator's task does).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vdiskfs import native
from vdiskfs.crash import hook
from vdiskfs.delta import DeltaHead, DeltaWriter, EpochFacts, Flags, PageBatch, Spooled
from vdiskfs.delta.entries import Extents, extents_of_pages
from vdiskfs.delta.layout import NO_ID
from vdiskfs.errors import NO_ROOM, DamagedError, ImageReadError, LocalError
from vdiskfs.state import DiskPaths, TrackSums
from vdiskfs.units import PAGE_SIZE

log = logging.getLogger(__name__)


OVERWRITE = "there is no new point until it can be, or the machine writes something else there"
"""What follows of a page that cannot be read."""


class EpochGivenUpError(LocalError):
    """The frozen epoch could not be kept; its pages count to the running one. No point."""


class EpochOutrunError(EpochGivenUpError):
    """The guest overwrote more of the frozen epoch than copying it is worth."""


class EpochUnreadableError(EpochGivenUpError, ImageReadError):
    """A page of the frozen epoch cannot be read."""


@dataclass(frozen=True, slots=True)
class ChainEnd:
    """The newest captured epoch of a disk: what the next delta starts from."""

    generation: int
    epoch: int
    digest: bytes
    size: int
    time_ns: int

    @staticmethod
    def of(head: DeltaHead) -> ChainEnd:
        """Return the end that a captured delta makes."""
        return ChainEnd(head.generation, head.to_epoch, head.to_digest, head.size, head.time_ns)


class LiveImage:
    """One tracked image. Close it before its core."""

    def __init__(self, image: native.Image, track: native.Track) -> None:
        """Start tracking; on return every later change is marked."""
        self.image = image
        self.track = track
        self.fetch: Callable[[int], Awaitable[None]] | None = None
        """Brings the chunk of a page that the image lacks, where it may lack some."""
        self._last: native.TrackCounts | None = None
        if image.track is not track:
            image.set_track(track)

    def end(self) -> None:
        """Count for the last time: `close` is next, and who asks meanwhile gets that."""
        self._last = self.track.counts()

    def close(self) -> None:
        """End tracking. The bitmaps stay on disk as they are."""
        self.image.set_track(None)
        self.track.close()

    def counts(self) -> native.TrackCounts:
        """Return what is marked now, in pages."""
        return self.track.counts() if self._last is None else self._last

    def suspect_pages(self, runs: Extents) -> None:
        """Mark pages suspect; those beyond the end are taken away again by the pass."""
        for start, end in zip(runs.start.tolist(), runs.end.tolist(), strict=True):
            self.image.suspect_mark(start * PAGE_SIZE, (end - start) * PAGE_SIZE)

    def suspect_changed(self, vault_size: int) -> native.Seal:
        """Make what changed since the last seal suspect instead, and return that seal.

        A pass compares it then with the vault, in parts, where a capture would need room for
        all of it at once. Waits for the local disk: changed pages are read once more. On any
        error they stay marked as changed, too.

        Args:
            vault_size: bytes of the disk in the vault: what was cut off meanwhile is suspect.
        """
        native.background()
        [seal] = native.seal([self.image])
        try:
            reader = native.PageReader(self.image)
            while (batch := reader.next()) is not None:
                self.suspect_pages(extents_of_pages(batch.pageno))
            low = min(seal.cut, seal.size) // PAGE_SIZE * PAGE_SIZE
            if low < vault_size:
                self.image.suspect_mark(low, vault_size - low)
                self.mark_end(seal.size)
        except BaseException as error:
            self.image.abandon()
            if isinstance(error, OSError):
                raise _given_up(seal, error) from error
            raise
        hook("changed.suspect")
        self.image.forget()
        return seal

    def mark_end(self, size: int) -> None:
        """Mark the page that a size lies inside of: the next delta may have to hold it.

        A delta that ends short of its predecessor says what its last page holds.
        """
        if size % PAGE_SIZE:
            self.image.mark(size // PAGE_SIZE * PAGE_SIZE, 1)

    def capture(
        self, seal: native.Seal, end: ChainEnd, make_writer: Callable[[], DeltaWriter],
        label: str = "", stored: Sequence[Spooled] = (), *,
        captured: Callable[[], None] = lambda: None, group_id: str = NO_ID,
        application: bool = False,
    ) -> Spooled:  # fmt: skip
        """Write the sealed epoch as one delta and forget what was frozen for it.

        Args:
            seal: as ``native.seal`` gave it for this image.
            end: the epoch that the delta starts from.
            make_writer: gives a fresh one, of this disk's spool; it may find that full.
            label: the point's label.
            stored: parts of a pass; what the epoch itself changed wins over them.
            captured: called when the delta is durable; ``stored`` must be gone on its return.
            group_id: of a seal of several disks; each of their deltas says it.
            application: what uses the disk was at rest when it was sealed.

        The delta is durable on return. On any error the epoch is given up: its pages count
        to the running epoch, and nothing is left in the spool.

        Raises:
            EpochOutrunError: the guest overwrote more of the epoch than may be preserved.
            EpochGivenUpError: a change of the guest's could not be preserved, or reading the
                image or writing the spool failed.
        """
        native.background()
        writer: DeltaWriter | None = None
        try:
            writer = make_writer()
            spooled = self._write(
                seal, end, writer, label, stored, group_id=group_id,
                flags=Flags.APPLICATION if application else Flags(0),
            )  # fmt: skip
        except BaseException as error:
            try:
                if writer is not None:
                    writer.abandon()
            finally:
                self.image.abandon()
            if not isinstance(error, OSError):
                raise
            raise _given_up(seal, error) from error
        hook("epoch.spooled")
        # Parts that outlived what the epoch changed would put old pages into the next delta.
        captured()
        hook("parts.dropped")
        self.image.forget()
        hook("epoch.forgotten")
        return spooled

    def _write(
        self, seal: native.Seal, end: ChainEnd, writer: DeltaWriter, label: str,
        stored: Sequence[Spooled], *, group_id: str, flags: Flags,
    ) -> Spooled:  # fmt: skip
        reader = native.PageReader(self.image)
        while (batch := reader.next()) is not None:
            writer.add(PageBatch(batch.pageno, batch.sum, batch.zero, batch.data))
        for part in stored:
            writer.add_stored(part, seal.low)
        return writer.finish(
            EpochFacts(
                generation=end.generation,
                from_epoch=end.epoch,
                to_epoch=seal.epoch,
                # A point's time is the wall clock but never before its predecessor's.
                time_ns=max(seal.time_ns, end.time_ns),
                size=seal.size,
                cut=min(seal.cut, end.size),
                from_size=end.size,
                from_digest=end.digest,
                flags=flags | (Flags.LABELLED if label else Flags(0)),
                label=label,
                group_id=group_id,
            )
        )


def _given_up(seal: native.Seal, error: OSError) -> EpochGivenUpError:
    given_up = f"epoch {seal.epoch} was given up"
    if error.errno == errno.EFBIG:
        return EpochOutrunError(f"{given_up}: changes outran its capture")
    if isinstance(error, native.UnreadableError):
        return EpochUnreadableError(f"{given_up}: {unreadable(error)}", hint=OVERWRITE)
    reason = (
        "what a request overwrote could not be preserved"
        if error.errno == errno.ECANCELED
        else f"{error.strerror or error}"
    )
    return EpochGivenUpError(f"{given_up}: {reason}")


def unreadable(error: native.UnreadableError) -> str:
    """Return what cannot be read, in words."""
    return f"the image cannot be read at byte {error.offset}: {error.strerror}"


def open_track(directory: Path, size: int) -> tuple[native.Track, bool]:
    """Open the track in a directory, or create it; True: it is new.

    Raises:
        DamagedError: they are not bitmaps, or their disk does not give them back.
        LocalError: the bitmaps cannot be read, or there is no room to preallocate them.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    new = not (directory / "track").exists()
    try:
        return native.Track(directory, size, new=new), new
    except OSError as error:
        if error.errno == errno.EBADMSG:
            raise DamagedError(f"{directory}: not the bitmaps of a disk") from error
        if error.errno == errno.EIO and not new:
            why = f"the bitmaps cannot be read: {error.strerror}"
            raise DamagedError(f"{directory}: {why}") from error
        hint = "free space in the state directory" if error.errno in NO_ROOM else ""
        if new:
            for path in directory.iterdir():
                path.unlink()
        raise LocalError(
            f"{directory}: the bitmaps cannot be opened: {error.strerror}", hint=hint
        ) from error


def make_track(paths: DiskPaths, size: int) -> None:
    """Make the bitmaps of a disk of which every page is known, as a clean end leaves them.

    Raises:
        LocalError, OSError: the disk refused.
    """
    track, _ = open_track(paths.track, size)
    try:
        native.sync_track(track)
    finally:
        track.close()
    paths.sums.write()


def end_image(image: native.Image, sums: TrackSums | None) -> None:
    """Close an image and its track, if any; with ``sums`` both are durable, and these noted.

    Nobody writes any more. Waits for the disk.

    Raises:
        LocalError, OSError: the disk refused.
    """
    track = image.track
    if sums is not None:
        image.sync_internal()
        if track is not None:
            native.sync_track(track)
    image.set_track(None)
    image.close()
    if track is not None:
        track.close()
        if sums is not None:
            sums.write()
