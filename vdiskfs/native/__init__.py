"""The C core for Python: the only module that touches cffi.

Typed classes over native/include/vdf.h, one for each of its objects. They decide nothing:
an error number becomes ``OSError`` (or the event, count or seal that was asked for). Calls
release Python's lock; those that may wait (syncs, seals, captures) belong into a thread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from vdiskfs._native import ffi, lib
from vdiskfs.native.copies import (
    commit_presence,
    complete_presence,
    create_presence,
    next_absent,
    next_unmapped,
    open_presence,
    presence_counts,
)
from vdiskfs.native.flags import CoreFlags, EventKind, ImageFlags, MountFlags
from vdiskfs.native.host import (
    UnreadableError,
    background,
    check,
    crash_arm,
    file_identity,
    mount,
    punch,
    rename,
    unmount,
)
from vdiskfs.native.intent import (
    INTENT_REGION,
    begin_intent,
    intent_counts,
    intent_slots,
    recover_track,
    settle_track,
    sync_track,
)
from vdiskfs.native.pages import (
    Buffer,
    as_u8,
    as_u64,
    pages_sum,
    pages_verify,
    pages_zero,
)
from vdiskfs.native.records import (
    Batch,
    BoolArray,
    CoreCounts,
    FileIdentity,
    IntentCounts,
    PresenceCounts,
    Recovery,
    Seal,
    TrackCounts,
    U64Array,
)
from vdiskfs.units import PAGE_SIZE, PAGES_PER_REGION

__all__ = [
    "INTENT_REGION", "Batch", "BoolArray", "Buffer", "Core", "CoreCounts", "CoreFlags", "Event",
    "EventKind", "FileIdentity", "Image", "ImageFlags", "IntentCounts", "MountFlags", "PageReader",
    "PresenceCounts", "Recovery", "Seal", "Track", "TrackCounts", "U64Array", "UnreadableError",
    "background", "begin_intent", "commit_presence", "complete_presence", "crash_arm",
    "create_presence", "file_identity", "intent_counts", "mount", "next_absent", "next_unmapped",
    "open_presence", "pages_sum", "pages_verify", "pages_zero", "presence_counts", "punch",
    "recover_track", "rename", "seal", "settle_track", "sync_track", "unmount",
]  # fmt: skip


REQUEST_MAX: int = lib.VDF_REQUEST_MAX
_NO_PAGE = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Event:
    """One event; ``cookie`` is the image's, ``error`` an errno or 0, offsets are bytes.

    Of a NODE event ``offset`` is the node's id.
    """

    kind: EventKind
    error: int
    cookie: int
    offset: int
    length: int


# ---- objects ------------------------------------------------------------------------


class _Closing:
    """Something that holds C memory until close(); a context manager."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Core(_Closing):
    """One FUSE connection and its threads; with ``fuse_fd`` -1 only images and events."""

    def __init__(
        self, fuse_fd: int = -1, workers: int = 8, flags: CoreFlags = CoreFlags.NONE
    ) -> None:
        """Take the connection's descriptor; it is closed by close()."""
        out = ffi.new("vdf_core **")
        check(lib.vdf_core_create(fuse_fd, workers, flags, out), "core")
        self._core = out[0]
        self.fuse_fd = fuse_fd
        self._event = ffi.new("vdf_event *")

    @property
    def handle(self) -> Any:
        """The C object, for the other classes of this module."""
        if self._core == ffi.NULL:
            raise ValueError("the core is closed")
        return self._core

    @property
    def names_fd(self) -> int:
        """The descriptor that libfuse takes as ``/dev/fd/N``."""
        return int(lib.vdf_core_names_fd(self.handle))

    @property
    def event_fd(self) -> int:
        """Readable while events wait."""
        return int(lib.vdf_core_event_fd(self.handle))

    def start(self) -> None:
        """Start the threads."""
        check(lib.vdf_core_start(self.handle), "core")

    def resume(self, init: bytes) -> None:
        """Take a predecessor's connection over; before `start`, when that one is reaped.

        ``init`` is its `init_request`. From `start` on requests that it left open come again, and
        those for nodes without an image wait, each with a NODE event, for `retry`.
        """
        data = ffi.from_buffer("uint8_t[]", init)
        check(lib.vdf_core_resume(self.handle, data, len(init)), "resume")

    @property
    def init_request(self) -> bytes:
        """The FUSE_INIT request of the kernel; empty while none came."""
        data = ffi.new("uint8_t[]", 256)
        length = check(lib.vdf_core_init_request(self.handle, data, 256), "init")
        return bytes(ffi.buffer(data, length))

    @property
    def can_resend(self) -> bool:
        """Whether the kernel gives a successor what was read and not answered (6.9 and later)."""
        return bool(lib.vdf_core_can_resend(self.handle))

    def retry(self, node: int, error: int = 0) -> None:
        """Run the requests that wait for the node's image again, or answer them with an errno."""
        check(lib.vdf_core_retry(self.handle, node, error), "retry")

    def pause(self, limit_ms: int) -> int:
        """Read nothing more; return how many names are unanswered after the limit at most."""
        return check(lib.vdf_core_pause(self.handle, limit_ms), "pause")

    def try_again(self) -> None:
        """Run what waits for space (NO_ROOM) once more; it may wait for the disk."""
        check(lib.vdf_core_try_again(self.handle), "try again")

    def next_event(self) -> Event | None:
        """Take the oldest event, or None."""
        event = self._event
        if lib.vdf_core_next_event(self.handle, event) == 0:
            return None
        return Event(EventKind(event.kind), event.error, event.cookie, event.offset, event.length)

    def attach(self, nodeid: int, image: Image) -> None:
        """Let the image answer for the node. Call it before the reply that opens it."""
        check(lib.vdf_core_attach(self.handle, nodeid, image.handle), "attach")

    def detach(self, nodeid: int) -> None:
        """End that; a node without an image is left alone."""
        result = lib.vdf_core_detach(self.handle, nodeid)
        if result != -errno.ENOENT:
            check(result, "detach")

    def counts(self) -> CoreCounts:
        """Return what was done so far."""
        out = ffi.new("vdf_core_counts *")
        lib.vdf_core_counts_get(self.handle, out)
        return CoreCounts(
            out.reads, out.writes, out.syncs, out.discards, out.seeks,
            out.names, out.parked, out.read_bytes, out.write_bytes,
        )  # fmt: skip

    def stop(self) -> None:
        """End the threads and close the way to libfuse; parked requests get EIO. Idempotent."""
        lib.vdf_core_stop(self.handle)

    def close(self) -> None:
        """Stop, and free everything. Images may outlive it only unused."""
        if self._core != ffi.NULL:
            lib.vdf_core_stop(self._core)
            lib.vdf_core_free(self._core)
            self._core = ffi.NULL


class Image(_Closing):
    """One file's bytes: live, or lazy (a recovery point, or a writable copy of one)."""

    def __init__(self, core: Core, fd: int, flags: ImageFlags, cookie: int) -> None:
        """Make an image over the open file; the descriptor stays the caller's."""
        out = ffi.new("vdf_image **")
        check(lib.vdf_image_create(core.handle, fd, flags, cookie, out), "image")
        self._image = out[0]
        self.cookie = cookie
        self.flags = flags
        self.refuses = False
        self.track: Track | None = None

    @property
    def handle(self) -> Any:
        """The C object, for the other classes of this module."""
        if self._image == ffi.NULL:
            raise ValueError("the image is closed")
        return self._image

    def close(self) -> None:
        """Drop our reference; nodes that it is attached to keep theirs."""
        if self._image != ffi.NULL:
            lib.vdf_image_unref(self._image)
            self._image = ffi.NULL

    def size(self) -> int:
        """Return the size in bytes."""
        out = ffi.new("uint64_t *")
        lib.vdf_image_size(self.handle, out)
        return int(out[0])

    def refuse_writes(self, refuse: bool) -> None:
        """Let every write from now on fail with EROFS, or no longer."""
        lib.vdf_image_refuse_writes(self.handle, refuse)
        self.refuses = refuse

    def read(self, offset: int, length: int) -> bytes | None:
        """Return bytes (short only at the end), or None when some are absent."""
        data = bytearray(length)
        got = lib.vdf_image_read(
            self.handle, offset, length, ffi.cast("uint8_t *", ffi.from_buffer(data))
        )
        if got == -errno.EAGAIN:
            return None
        return bytes(data[: check(got, "read")])

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of it. Not durable until sync()."""
        # Given back before anything is raised: the buffer of a traceback that the collector
        # takes apart would be freed while it is lent.
        with ffi.from_buffer(data) as source:
            done = lib.vdf_image_write(
                self.handle, offset, len(source), ffi.cast("uint8_t *", source)
            )
        check(done, "write")

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """Do what fallocate(2) does, for the modes that FUSE knows."""
        check(lib.vdf_image_allocate(self.handle, mode, offset, length), "fallocate")

    def truncate(self, size: int) -> None:
        """Set the size in bytes."""
        check(lib.vdf_image_truncate(self.handle, size), "truncate")

    def seek(self, offset: int, whence: int) -> int | None:
        """Do what lseek(2) does for SEEK_DATA and SEEK_HOLE; None: not known yet."""
        at = lib.vdf_image_seek(self.handle, offset, whence)
        return None if at == -errno.EAGAIN else check(at, "lseek")

    def sync(self, *, datasync: bool = True) -> None:
        """Sync as the guest does: a failure stays until the image is opened anew."""
        check(lib.vdf_image_sync(self.handle, int(datasync)), "fsync")

    def sync_internal(self) -> None:
        """Sync on a descriptor of our own."""
        check(lib.vdf_image_sync_internal(self.handle), "fsync")

    # lazy images

    def map(self, first_region: int, count: int, data: BoolArray | None) -> None:
        """Say which pages of the regions have data; None: none has.

        Args:
            first_region: regions are 16 MiB.
            count: how many.
            data: count * 4096 truth values, one a page.
        """
        if data is None:
            check(lib.vdf_image_map(self.handle, first_region, count, ffi.NULL), "map")
            return
        if len(data) != count * PAGES_PER_REGION:
            raise ValueError(f"{len(data)} pages for {count} regions")
        words = np.packbits(data, bitorder="little").view(np.uint64)
        check(lib.vdf_image_map(self.handle, first_region, count, as_u64(words)), "map")

    def is_mapped(self, region: int) -> bool:
        """Say whether it is known what the region holds."""
        return bool(lib.vdf_image_is_mapped(self.handle, region))

    def fill(self, offset: int, data: Buffer) -> int:
        """Fill absent pages, and return how many bytes were absent. No change to a track."""
        filled = ffi.new("uint64_t *")
        with ffi.from_buffer(data) as source:
            done = lib.vdf_image_fill(
                self.handle, offset, len(source), ffi.cast("uint8_t *", source), filled
            )
        check(done, "fill")
        return int(filled[0])

    def is_present(self, offset: int, length: int) -> bool:
        """Say whether every page of the range is here."""
        return bool(lib.vdf_image_is_present(self.handle, offset, length))

    def answer(self, offset: int, length: int, error: int = 0) -> None:
        """Let requests parked on the range run again, or give them an errno."""
        lib.vdf_image_answer(self.handle, offset, length, error)

    def evict(self, first_region: int, count: int) -> None:
        """Give the regions' bytes back to the file system; not those of a writable image."""
        check(lib.vdf_image_evict(self.handle, first_region, count), "evict")

    # tracking

    def set_track(self, track: Track | None) -> None:
        """Start, or with None end, tracking; waits for writes under way."""
        handle = ffi.NULL if track is None else track.handle
        check(lib.vdf_image_set_track(self.handle, handle), "track")
        self.track = track

    def forget(self) -> None:
        """The frozen epoch is safe elsewhere: free what it holds."""
        check(lib.vdf_capture_forget(self.handle), "forget")

    def abandon(self) -> None:
        """Give the frozen epoch up: its pages count as changed in the running one."""
        check(lib.vdf_capture_abandon(self.handle), "abandon")

    def mark(self, offset: int, length: int) -> None:
        """Mark the range changed without writing."""
        check(lib.vdf_track_mark(self.handle, offset, length), "mark")

    def is_changed(self, pageno: int) -> bool:
        """Say whether the page is marked in the running or the frozen epoch."""
        return bool(lib.vdf_track_is_changed(self.handle, pageno))

    def suspect_mark(self, offset: int, length: int) -> None:
        """Mark the range suspect."""
        check(lib.vdf_suspect_mark(self.handle, offset, length), "suspect")

    def suspect_mark_allocated(self, start: int = 0, end: int = 2**63) -> None:
        """Mark everything suspect in [start, end) that the file system has allocated."""
        check(lib.vdf_suspect_mark_allocated_in(self.handle, start, end), "suspect")

    def suspect_clear(self, pages: U64Array) -> None:
        """Take the suspect marks of these pages away."""
        wanted = np.ascontiguousarray(pages, np.uint64)
        check(lib.vdf_suspect_clear(self.handle, as_u64(wanted), len(wanted)), "suspect")

    def suspect_clear_from(self, page: int) -> None:
        """Take the suspect marks of all pages from this one on away."""
        check(lib.vdf_suspect_clear_from(self.handle, page), "suspect")


class Track(_Closing):
    """The bitmaps of one disk, in a directory; they survive the process."""

    def __init__(self, directory: str | os.PathLike[str], size: int, *, new: bool = False) -> None:
        """Open the track of an image of ``size`` bytes, or with ``new`` create it."""
        out = ffi.new("vdf_track **")
        flags = lib.VDF_TRACK_NEW if new else 0
        where, slots = os.fspath(directory), intent_slots()
        check(lib.vdf_track_open_slots(os.fsencode(where), size, flags, slots, out), where)
        self._track = out[0]

    @property
    def handle(self) -> Any:
        """The C object, for the other classes of this module."""
        if self._track == ffi.NULL:
            raise ValueError("the track is closed")
        return self._track

    def close(self) -> None:
        """Unmap and close. Not while an image uses it."""
        if self._track != ffi.NULL:
            lib.vdf_track_close(self._track)
            self._track = ffi.NULL

    @property
    def epoch(self) -> int:
        """The number of the running epoch."""
        return int(lib.vdf_track_epoch(self.handle))

    def set_epoch(self, epoch: int, base_size: int) -> None:
        """Number the running epoch; ``base_size``: bytes of the disk at its start."""
        check(lib.vdf_track_set_epoch(self.handle, epoch, base_size), "epoch")

    def set_budget(self, pages: int | None) -> None:
        """Say how many pages a frozen epoch may have preserved before it is given up."""
        lib.vdf_track_set_budget(self.handle, 2**64 - 1 if pages is None else pages)

    def counts(self) -> TrackCounts:
        """Return what the track holds now."""
        out = ffi.new("vdf_track_counts *")
        lib.vdf_track_counts_get(self.handle, out)
        return TrackCounts(
            out.epoch, out.dirty_pages, out.frozen_pages, out.suspect_pages,
            out.preserved_pages, bool(out.frozen), bool(out.changed), bool(out.overflow),
            bool(out.abandoned), bool(out.lost), bool(out.detached),
        )  # fmt: skip


def seal(images: Sequence[Image]) -> list[Seal]:
    """End the running epoch of each image at one instant; waits for the writes of that epoch.

    Raises:
        OSError: EBUSY, one still has a frozen epoch; EAGAIN, the state directory has no room
            for larger bitmaps. Nothing is sealed then.
    """
    handles = ffi.new("vdf_image *[]", [image.handle for image in images])
    out = ffi.new("vdf_seal[]", len(images))
    check(lib.vdf_seal_images(handles, len(images), out), "seal")
    return [Seal(one.epoch, one.time_ns, one.size, one.cut, one.low) for one in out]


class PageReader:
    """Reads frozen or suspect pages in batches, in order, into buffers that it keeps."""

    def __init__(self, image: Image, *, suspect: bool = False, pages: int = 1024) -> None:
        """Prepare for batches of up to ``pages`` pages (at least 16)."""
        self._image = image
        self._next = lib.vdf_suspect_next if suspect else lib.vdf_capture_next
        self._cursor = ffi.new("uint64_t *", 0)
        self._pageno = np.empty(pages, np.uint64)
        self._sum = np.empty(pages, np.uint64)
        self._zero = np.empty(pages, np.bool_)
        self._data = np.empty(pages * PAGE_SIZE, np.uint8)
        self._batch = ffi.new("vdf_batch *")
        self._batch.pageno = as_u64(self._pageno)
        self._batch.sum = as_u64(self._sum)
        self._batch.zero = as_u8(self._zero)
        self._batch.data = as_u8(self._data)
        self._batch.capacity = pages

    @property
    def cursor(self) -> int:
        """The page number from which the next batch starts."""
        return int(self._cursor[0])

    def next(self) -> Batch | None:
        """Return the next pages, or None at the end. Valid until the next call.

        Raises:
            OSError: ECANCELED, the epoch was given up; EFBIG, changes outran the capture; EAGAIN,
                the chunk at `cursor` (a page number) of a lazy image has to be fetched first; or
                reading what was preserved failed.
            UnreadableError: reading the image failed.
        """
        result = self._next(self._image.handle, self._cursor, self._batch)
        if result < 0 and (page := self._batch.unreadable) != _NO_PAGE:
            raise UnreadableError(-result, page * PAGE_SIZE)
        check(result, "capture")
        count = self._batch.count
        if count == 0:
            return None
        return Batch(
            self._pageno[:count],
            self._sum[:count],
            self._zero[:count],
            self._data.data[: self._batch.data_pages * PAGE_SIZE],
        )
