"""The pass: finding out what suspect pages hold, and storing what the vault lacks.

Initial replication, resynchronization and recovery are one mechanism. A pass reads suspect
pages as they are now, while the guest writes on; nothing is frozen. What it reads may be
torn or old a moment later, but then the write has marked the page, and the seal that ends
the pass captures it again. Frames go into *parts*: durable on the local disk first, then
their segments are uploaded, and only then the room is given back.

A pass resumes: parts that are finished stay, and pages leave `suspect` only when their
part is durable. A page that becomes suspect again after a part has read it is stored again
whatever the vault holds: the part would win over the vault.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import trio

from vdiskfs import native
from vdiskfs.crash import hook
from vdiskfs.delta import (
    DeltaWriter,
    PageBatch,
    Spooled,
    open_file,
    open_spooled,
    remove_spooled,
)
from vdiskfs.delta.entries import NO_EXTENTS, U8, U64, distinct, unite_extents
from vdiskfs.delta.segments import is_batch, new_batch
from vdiskfs.errors import FormatError, ImageReadError
from vdiskfs.image import OVERWRITE, ChainEnd, LiveImage, unreadable
from vdiskfs.point.fetch import first_error
from vdiskfs.spool import bytes_here, changed_runs
from vdiskfs.state import Stretch, write_file
from vdiskfs.units import PAGE_SIZE, PAGES_PER_REGION, pages_of

log = logging.getLogger(__name__)

PART_SIZE = 256 * 1024 * 1024
"""Bytes of pages in one part: what a kill at the wrong moment costs to read again."""

PART_MIN = 4 * 1024 * 1024
"""Bytes of pages in a part where the local disk has hardly any room."""

READ_PAGES = 1024
"""Pages in one batch: 4 MiB."""

_DATA = 2

# sums(first page, count): XXH3-64 and kind of pages of the vault's newest epoch.
Sums = Callable[[int, int], Awaitable[tuple[U64, U8]]]


class MakeWriter(Protocol):
    """Makes a writer of this disk's deltas."""

    def __call__(self, directory: Path, *, inside: bool, batch: str = "") -> DeltaWriter:
        """Write into a directory; ``inside``: small ones hold their frames themselves.

        ``batch`` is that of the segments; "": one of their own.
        """


class SuspectPass:
    """One disk's pass, from its first suspect page to parts that only wait for the seal."""

    def __init__(
        self,
        live: LiveImage,
        directory: Path,
        make_writer: MakeWriter,
        upload: Callable[[Spooled], Awaitable[None]],
        claim: Callable[[str, Sequence[Spooled]], Awaitable[bool]],
    ) -> None:
        """Prepare.

        Args:
            live: the image.
            directory: of the parts.
            make_writer: makes writers of them.
            upload: stores a part's segments and returns when they are stored.
            claim: lets nobody collect the segments of a batch; says whether those that parts
                have given away are all there.
        """
        self._live = live
        self._directory = directory
        self._base = directory / "base"
        self._make_writer = make_writer
        self._upload = upload
        self._claim = claim
        self.batch = ""
        """What the ids of the parts' segments begin with, from the first part on."""
        self.parts: list[Spooled] = []
        self.done_pages = 0
        self.sent_pages = 0
        self._covered = NO_EXTENTS

    def load(self, end: ChainEnd) -> bool:
        """Take up the parts that an earlier run left; False: one is damaged, `drop` is due.

        Parts from before another epoch than ``end`` are part of a delta already, which the
        daemon, or the host, did not live to note: what they hold is older than that delta. So
        are those without a base.
        """
        self._directory.mkdir(mode=0o700, exist_ok=True)
        base = self._base.read_bytes().decode(errors="replace") if self._base.exists() else ""
        if not base.startswith(_base_of(end)):
            self.drop()
        elif not is_batch(batch := base.removeprefix(_base_of(end)).strip()):
            return False
        else:
            self.batch = batch
        for path in sorted(self._directory.glob("*.part"), key=lambda one: one.stat().st_mtime_ns):
            try:
                self._add(open_spooled(path))
            except FormatError as error:
                log.warning("%s: dropped, all pages are looked at again: %s", path, error)
                return False
        return True

    def _add(self, part: Spooled) -> None:
        self._covered = unite_extents([self._covered, *changed_runs([part])])
        self.parts.append(part)

    def begin(self) -> None:
        """A new pass: nothing is done yet."""
        self.done_pages = self.sent_pages = 0

    def give_up_parts(self) -> None:
        """Forget what was read so far: its pages are suspect again. Waits for the disk."""
        self._live.suspect_pages(self._covered)
        native.sync_track(self._live.track)
        self.drop()

    def give_up_unsent(self) -> int:
        """Forget parts that are not stored: their pages are suspect again. Waits for the disk.

        Returns:
            The bytes of their segments, which are deleted.
        """
        unsent = [part for part in self.parts if bytes_here(part)]
        given = sum(map(bytes_here, unsent))
        try:
            self._live.suspect_pages(unite_extents(changed_runs(unsent)))
        except FormatError as error:
            log.warning("%s: what was read is read again: %s", self._directory, error)
            self.give_up_parts()
            return given
        native.sync_track(self._live.track)
        for part in unsent:
            # Others may hold a page of it, too: what is covered stays, so that it is stored again.
            self.parts.remove(part)
            remove_spooled(part)
        return given

    def reads_beyond(self, size: int) -> bool:
        """Whether a part holds pages that begin at or beyond ``size`` bytes."""
        return bool(len(self._covered)) and int(self._covered.end[-1]) > pages_of(size)

    @property
    def is_unsent(self) -> bool:
        """Whether a part still has segments here: nothing says that they are stored."""
        return any(segment.path.exists() for part in self.parts for segment in part.segments)

    def doubt(self, stretches: Sequence[Stretch]) -> None:
        """What parts hold of these stretches (bytes) may be newer than the disk: it changed.

        Marked changed, so that the seal takes the pages from the disk, zeros included.
        """
        for part in self.parts:
            delta = open_file(part.path)
            for entries in delta.entries():
                pages, _ = entries.pages()
                for start, end in stretches:
                    inside = pages[(pages >= start // PAGE_SIZE) & (pages * PAGE_SIZE < end)]
                    for pageno in inside.tolist():
                        self._live.image.mark(pageno * PAGE_SIZE, PAGE_SIZE)

    def drop(self) -> None:
        """Forget the parts; their segments in the vault become garbage."""
        self.parts.clear()
        self._covered, self.batch = NO_EXTENTS, ""
        if self._directory.exists():
            # The base last: a part that a kill, or the host's death, leaves is of no use without.
            for path in sorted(self._directory.iterdir(), key=lambda one: one == self._base):
                path.unlink()
                hook("part.dropped")

    async def run(self, compare: Sums | None, end: ChainEnd) -> None:
        """Read until no page is suspect and all that differs is stored.

        Args:
            compare: gives what the vault's newest epoch holds, waiting for the vault where
                it has to; None where the vault has nothing.
            end: that epoch.

        Raises:
            ImageReadError: the image cannot be read.
            OSError: writing the parts failed. What is done stays done, when it is cancelled, too.
        """
        await self._own(end)
        try:
            await self._run(compare)
        except BaseExceptionGroup as group:
            if group.subgroup(trio.Cancelled) is not None:
                raise
            raise first_error(group) from None

    async def _own(self, end: ChainEnd) -> None:
        """Claim what the parts have stored, and will; where some of it is gone begin anew."""
        while True:
            self.batch = self.batch or new_batch()
            base = f"{_base_of(end)}{self.batch}\n"
            await trio.to_thread.run_sync(write_file, self._base, base.encode())
            if await self._claim(self.batch, self.parts):
                return
            log.warning("%s: what was stored is not there any more", self._directory)
            await trio.to_thread.run_sync(self.give_up_parts)

    async def _run(self, compare: Sums | None) -> None:
        async with trio.open_nursery() as nursery:
            # Two parts under way: one is written while the other travels.
            send, receive = trio.open_memory_channel[Spooled](0)
            nursery.start_soon(self._upload_all, receive)
            async with send:
                for part in list(self.parts):
                    await send.send(part)
                while self._live.counts().suspect_pages:
                    new = await self._next_part(compare)
                    if new is not None:
                        await send.send(new)

    async def _upload_all(self, receive: trio.MemoryReceiveChannel[Spooled]) -> None:
        async for part in receive:
            await self._upload(part)

    async def _next_part(self, compare: Sums | None) -> Spooled | None:
        """Read up to `part_limit` of suspect pages into a durable part; None: nothing differed."""
        reader = native.PageReader(self._live.image, suspect=True, pages=READ_PAGES)
        writer = self._make_writer(self._directory, inside=False, batch=self.batch)
        seen: list[native.U64Array] = []
        kept, limit = 0, part_limit(self._directory)
        try:
            while kept * PAGE_SIZE < limit and len(seen) < 4096:
                batch = await self._batch(reader)
                if batch is None:
                    break
                seen.append(batch.pageno.copy())
                wanted = await self._differing(batch, compare)
                kept += len(wanted.pageno)
                if len(wanted.pageno):
                    await trio.to_thread.run_sync(writer.add, wanted)
            part = await trio.to_thread.run_sync(writer.finish_part) if kept else None
        except BaseException:
            writer.abandon()
            raise
        if part is None:
            writer.abandon()
        else:
            hook("part.durable")
            self._add(part)
        self._settle(seen)
        hook("pass.settled")
        self.sent_pages += kept
        return part

    async def _batch(self, reader: native.PageReader) -> native.Batch | None:
        while True:
            try:
                return await trio.to_thread.run_sync(_read, reader)
            except BlockingIOError:
                if self._live.fetch is None:
                    raise
            # A copy that has not all of its bytes yet.
            await self._live.fetch(reader.cursor)

    async def _differing(self, batch: native.Batch, compare: Sums | None) -> PageBatch:
        """Return the pages of the batch that the vault does not hold as they are."""
        again = self._covered.contains(batch.pageno)
        if compare is None:
            # Before the first epoch everything is zero.
            return _select(batch, again | ~batch.zero)
        same = np.zeros(len(batch.pageno), np.bool_)
        regions = batch.pageno // np.uint64(PAGES_PER_REGION)
        for region in distinct(regions).tolist():
            inside = np.nonzero(regions == region)[0]
            first = int(batch.pageno[inside[0]])
            count = int(batch.pageno[inside[-1]]) - first + 1
            sums, kinds = await compare(first, count)
            at = (batch.pageno[inside] - np.uint64(first)).astype(np.int64)
            data = (kinds[at] == _DATA) & ~batch.zero[inside] & (sums[at] == batch.sum[inside])
            same[inside] = data | ((kinds[at] != _DATA) & batch.zero[inside])
        return _select(batch, again | ~same)

    def _settle(self, seen: list[native.U64Array]) -> None:
        """The pages are known now; those beyond the end of the image are none any more."""
        for pages in seen:
            self._live.image.suspect_clear(pages)
            self.done_pages += len(pages)
        self._live.image.suspect_clear_from(pages_of(self._live.image.size()))


def part_limit(directory: Path) -> int:
    """Return how many bytes of pages the next part may hold: it gives way on a full disk.

    Two parts are under way at once, and the spool needs room beside them.
    """
    status = os.statvfs(directory)
    return min(PART_SIZE, max(PART_MIN, status.f_bavail * status.f_frsize // 4))


def _base_of(end: ChainEnd) -> str:
    return f"{end.generation} {end.epoch} {end.digest.hex()}\n"


def _read(reader: native.PageReader) -> native.Batch | None:
    native.background()
    try:
        return reader.next()
    except native.UnreadableError as error:
        raise ImageReadError(unreadable(error), hint=OVERWRITE) from error


def _select(batch: native.Batch, wanted: native.BoolArray) -> PageBatch:
    """Return the wanted pages of a batch, their data back to back."""
    if wanted.all():
        return PageBatch(batch.pageno, batch.sum, batch.zero, batch.data)
    kept = wanted[~batch.zero]
    data = batch.data
    if not kept.all():
        pages = np.frombuffer(batch.data, np.uint8).reshape(-1, PAGE_SIZE)
        data = memoryview(pages[kept].reshape(-1).data)
    return PageBatch(batch.pageno[wanted], batch.sum[wanted], batch.zero[wanted], data)
