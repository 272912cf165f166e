"""Writing deltas to the spool: captured pages in, one file (and segments) out.

Synchronous; runs in a thread. Nothing but local files is touched.
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from vdiskfs.crash import hook
from vdiskfs.delta.blocks import Rows
from vdiskfs.delta.builder import IndexBuilder
from vdiskfs.delta.entries import Entries, Extents, make_extents, unite_extents
from vdiskfs.delta.frames import DEFAULT_LEVEL, FrameEncoder, Frames, PageBatch
from vdiskfs.delta.index import has_page
from vdiskfs.delta.layout import (
    HASH_SIZE,
    HEAD_SIZE,
    LABEL_MAX,
    NO_FLAGS,
    NO_ID,
    DeltaHead,
    Flags,
    Kind,
    head_problem,
)
from vdiskfs.delta.local import open_file
from vdiskfs.delta.merge import INVALID, THIS, ObjectNumbers, builder_source, merge_into, source_of
from vdiskfs.delta.refs import ObjectRef, ObjectTable, make_table
from vdiskfs.delta.segments import SEGMENT_LIMIT, SegmentFile, SpooledSegment, new_batch
from vdiskfs.delta.tail import settle, write_tail
from vdiskfs.units import CHUNK_SIZE, PAGE_SIZE, pages_of


@dataclass(frozen=True, slots=True)
class EpochFacts:
    """What a seal says of an epoch, and where it hangs in the chain.

    ``from_size`` is the disk's size at ``from_epoch`` (0 for epoch 0), ``from_digest``
    that epoch's digest, ``cut`` the smallest size since (the head keeps the smallest of
    the three). A fence has ``to_epoch == from_epoch`` and the flag. ``to_digest`` is only
    for a delta merged of several epochs; else it follows.
    """

    generation: int
    from_epoch: int
    to_epoch: int
    time_ns: int
    size: int
    cut: int
    from_size: int
    from_digest: bytes
    flags: Flags = NO_FLAGS
    label: str = ""
    group_id: str = NO_ID
    to_digest: bytes = bytes(HASH_SIZE)


@dataclass(frozen=True, slots=True)
class Spooled:
    """A complete delta in the spool: its file, its head, the segments that go with it."""

    path: Path
    head: DeltaHead
    segments: list[SpooledSegment]


class DeltaWriter:
    """Writes one delta (``finish``) or a part of a pass (``finish_part``), then is done.

    Frames lie in the delta up to ``inline_limit`` bytes, then in segments of about
    ``segment_limit`` bytes. Files have names that end in .tmp until they are complete.
    """

    def __init__(
        self,
        directory: Path,
        *,
        vault_id: str,
        disk_id: str,
        writer_id: str,
        level: int = DEFAULT_LEVEL,
        segment_limit: int = SEGMENT_LIMIT,
        inline_limit: int | None = None,
        batch: str = "",
    ) -> None:
        """Create the files in ``directory``, which must exist.

        ``batch`` is that of its segments, for a part of a pass; else they are one of their own.
        """
        self._directory = directory
        self._batch = batch or new_batch()
        self._ids = (vault_id, disk_id, writer_id)
        self._encoder = FrameEncoder(level)
        self._segment_limit = segment_limit
        self._inline_limit = segment_limit if inline_limit is None else inline_limit
        self._temporary = directory / f"{uuid.uuid4().hex}.tmp"
        self._file: IO[bytes] = self._temporary.open("xb")
        self._builder = IndexBuilder(directory)
        self._file.write(bytes(HEAD_SIZE))
        self._inline = HEAD_SIZE
        self._segment: SegmentFile | None = None
        self._segments: list[SpooledSegment] = []
        self._taken = 0
        self._last_chunk = -1
        self._zeros: list[Extents] = []
        self._zero_pages: list[tuple[int, int]] = []
        self._parts: list[tuple[Spooled, int]] = []

    def add(self, batch: PageBatch) -> None:
        """Add captured pages, in ascending order over all calls, a chunk in one call.

        Raises:
            ValueError: they are not in order.
            OSError: the spool is full or broken; ``abandon`` then.
        """
        if not len(batch.pageno):
            return
        pageno = batch.pageno
        if int(pageno[0]) >> 4 <= self._last_chunk or (pageno[1:] <= pageno[:-1]).any():
            raise ValueError("pages are not in ascending order, or a chunk is split")
        self._last_chunk = int(pageno[-1]) >> 4
        zero = pageno[batch.zero.astype(np.bool_)]
        if len(zero):
            self._zeros.append(make_extents(zero, zero + np.uint64(1)))
        frames = self._encoder.encode(batch)
        if frames is not None:
            self._store(frames)

    def add_zeros(self, first_page: int, count: int) -> None:
        """Say that pages hold zeros now; in any order, not pages given to ``add``."""
        if count > 0:
            self._zero_pages.append((first_page, first_page + count))

    def add_stored(self, part: Spooled, size: int) -> None:
        """Take what a pass stored, for pages that nothing else here (or later) says.

        ``size`` (bytes) is the smallest that the disk had since the pass began to read:
        what it read beyond that is void.

        Of two parts the one added later wins. The part's segments must be in the vault,
        or be uploaded, before the delta is.
        """
        self._parts.append((part, size))

    def take_segments(self) -> list[SpooledSegment]:
        """Return the segments completed since the last call: whole and synced."""
        fresh = self._segments[self._taken :]
        self._taken = len(self._segments)
        return fresh

    def finish(self, facts: EpochFacts) -> Spooled:
        """Complete the delta. On return files and directory are synced.

        Raises:
            ValueError: the facts contradict themselves or what was added.
            OSError: the spool is full or broken.

        After an error nothing is left in the spool but segments already taken.
        """
        try:
            head = self._slot_head(facts)
            path = self._directory / f"{facts.from_epoch:016x}.delta"
            return self._complete(head, path)
        except BaseException:
            self.abandon()
            raise

    def finish_part(self) -> Spooled:
        """Complete a part of a pass: an index that stays in the spool, and segments.

        Raises as ``finish`` does.
        """
        zeros_end = max((end for _, end in self._zero_pages), default=0) * PAGE_SIZE
        size = max((self._last_chunk + 1) * CHUNK_SIZE, zeros_end)
        head = DeltaHead(
            Kind.PART, *self._ids, generation=0, from_epoch=0, to_epoch=0, time_ns=0,
            first_time_ns=0, size=size, cut=0, from_size=0, from_digest=bytes(HASH_SIZE),
            to_digest=bytes(HASH_SIZE), content_digest=bytes(HASH_SIZE),
        )  # fmt: skip
        try:
            if self._inline != HEAD_SIZE:
                raise ValueError("a part of a pass has all its frames in segments: inline_limit=0")
            return self._complete(head, self._directory / f"{uuid.uuid4().hex}.part")
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Delete everything written, but for segments already taken."""
        # Closing writes what is buffered; that the disk is full is known.
        for file in (self._file, self._builder):
            with contextlib.suppress(OSError):
                file.close()
        self._temporary.unlink(missing_ok=True)
        if self._segment is not None:
            self._segment.abandon()
        for segment in self._segments[self._taken :]:
            segment.path.unlink(missing_ok=True)

    def _store(self, frames: Frames) -> None:
        lengths = frames.length.astype(np.uint64)
        total = int(lengths.sum())
        if self._segment is None and self._inline + total <= HEAD_SIZE + self._inline_limit:
            number, start = 0, self._inline
            self._file.writelines(frames.parts)
            self._inline += total
        else:
            segment = self._open_segment(total)
            number = len(self._segments) + 1
            start = segment.append(frames.parts, total)
        offset = np.cumsum(lengths, dtype=np.uint64) - lengths + np.uint64(start)
        count = len(frames.chunkno)
        self._builder.add(
            Entries(frames.chunkno, frames.mask, frames.mask, np.full(count, number, np.uint32),
                    offset, frames.length, frames.flags, frames.check, frames.sums)
        )  # fmt: skip

    def _open_segment(self, length: int) -> SegmentFile:
        if self._segment is not None and self._segment.size + length > self._segment_limit:
            self._close_segment()
        if self._segment is None:
            self._segment = SegmentFile(self._directory, *self._ids, self._batch)
        return self._segment

    def _close_segment(self) -> None:
        if self._segment is not None:
            self._segments.append(self._segment.finish())
            self._segment = None

    def _all_zeros(self) -> Extents:
        runs = np.array(self._zero_pages, np.uint64).reshape(-1, 2)
        return unite_extents([*self._zeros, make_extents(runs[:, 0], runs[:, 1])])

    def _slot_head(self, facts: EpochFacts) -> DeltaHead:
        if len(facts.label.encode()) > LABEL_MAX:
            raise ValueError(f"a label longer than {LABEL_MAX} bytes")
        head = DeltaHead(
            Kind.SLOT, *self._ids, facts.generation, facts.from_epoch, facts.to_epoch,
            facts.time_ns, facts.time_ns, facts.size, min(facts.cut, facts.size, facts.from_size),
            facts.from_size, facts.from_digest, facts.to_digest, bytes(HASH_SIZE), facts.flags,
            facts.label, facts.group_id,
        )  # fmt: skip
        empty = replace(
            head, tail_offset=HEAD_SIZE, root_offset=HEAD_SIZE, object_size=2 * HEAD_SIZE
        )
        if problem := head_problem(empty):
            raise ValueError(problem)
        return head

    def _complete(self, head: DeltaHead, path: Path) -> Spooled:
        self._close_segment()
        refs = [ObjectRef(segment_id=item.id, size=item.size) for item in self._segments]
        self._builder.set_zeros(self._all_zeros())
        content = self._builder.finish()
        self._check_zeros()
        table = make_table(refs)
        if self._parts:
            content, table = self._merge_parts(refs)
        builder = self._builder
        pages = builder.data_pages + builder.zeros.page_count
        head = replace(head, content_digest=content, changed_bytes=pages * PAGE_SIZE)
        self._check_pages(head)
        return self._write(head, table, path)

    def _check_zeros(self) -> None:
        """Check that add_zeros() named no page with data; those of add() cannot."""
        if self._zero_pages:
            for entries in self._builder.data_blocks():
                if self._builder.zeros.contains(entries.pages()[0]).any():
                    raise ValueError("a page is both zero and data")

    def _check_pages(self, head: DeltaHead) -> None:
        builder = self._builder
        zeros_end = int(builder.zeros.end[-1]) if len(builder.zeros) else 0
        if max(builder.last_page + 1, zeros_end) > head.pages:
            raise ValueError("a page lies beyond the disk")
        if head.torn_page is not None and not has_page(
            head.torn_page, builder.data_blocks(), builder.zeros
        ):
            raise ValueError(f"page {head.torn_page}, which the cut tears, is missing")

    def _merge_parts(self, refs: list[ObjectRef]) -> tuple[bytes, ObjectTable]:
        """Replace the builder by one that has the parts' frames too."""
        own = self._builder
        deltas = [(open_file(part.path), pages_of(size)) for part, size in reversed(self._parts)]
        sources = [
            builder_source(own, [THIS, *refs]),
            *(source_of(delta, INVALID, limit) for delta, limit in deltas),
        ]
        numbers = ObjectNumbers(sources)
        numbers.keep(refs)
        merged = IndexBuilder(self._directory)
        content = merge_into(merged, sources, numbers)
        self._builder = merged
        own.close()
        return content, numbers.table()

    def _write(self, head: DeltaHead, table: ObjectTable, path: Path) -> Spooled:
        builder, skip = self._builder, 0
        rows = builder.rows()
        if builder.size > self._segment_limit:
            rows, skip, table = self._move_blocks(rows, table)
        known = len(rows)
        builder.add_objects(table)
        rows = np.concatenate([rows, builder.rows()[known:]])
        head = replace(head, stored_bytes=int(table.size.sum(dtype=np.uint64)))
        head = write_tail(self._file, self._inline, head, builder, rows=rows, skip=skip)
        builder.close()
        settle(self._file, self._temporary, path)
        return Spooled(path, head, list(self._segments))

    def _move_blocks(self, rows: Rows, table: ObjectTable) -> tuple[Rows, int, ObjectTable]:
        """Put the blocks into segments; return the rows, the bytes moved, all objects."""
        rows = rows.copy()
        refs = [table.ref(index) for index in range(len(table))]
        before = len(self._segments)
        for index in range(len(rows)):
            length = int(rows["length"][index])
            segment = self._open_segment(length)
            stored = self._builder.read(int(rows["offset"][index]), length)
            rows["offset"][index] = segment.append([stored], length)
            rows["object"][index] = len(refs) + len(self._segments) - before + 1
        self._close_segment()
        fresh = self._segments[before:]
        refs += [ObjectRef(segment_id=item.id, size=item.size) for item in fresh]
        return rows, self._builder.size, make_table(refs)


def open_spooled(path: Path) -> Spooled:
    """Return a delta or a part that lies in the spool, with those segments still beside it.

    Raises:
        FormatError: it is damaged.
        LocalError: it cannot be read.
    """
    delta = open_file(path)
    table = delta.objects()
    segments = []
    for index in range(len(table)):
        ref = table.ref(index)
        beside = path.with_name(f"{ref.segment_id}.segment")
        if ref.segment_id and beside.exists():
            segments.append(SpooledSegment(ref.segment_id, beside, ref.size))
    return Spooled(path, delta.head, segments)


def remove_spooled(spooled: Spooled) -> None:
    """Delete a delta of the spool and its segments: the segments last."""
    spooled.path.unlink(missing_ok=True)
    hook("spool.removed")
    for segment in spooled.segments:
        segment.path.unlink(missing_ok=True)
        hook("segment.removed")
