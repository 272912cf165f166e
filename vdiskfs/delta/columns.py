"""The blocks that say where pages are: entries, runs of zeros, objects referred to.

Each ``decode`` checks what can be checked within a block; ``index.check_entries`` checks
it against the head.
"""

from __future__ import annotations

import numpy as np

from vdiskfs.delta.blocks import (
    CHECKS,
    COUNTS,
    DATA,
    OBJECTS,
    ZEROS,
    Cursor,
    Sealed,
    open_block,
    planes,
    seal_block,
)
from vdiskfs.delta.entries import CHECKED, ZSTD, Entries, Extents, distinct
from vdiskfs.delta.layout import LIMIT
from vdiskfs.delta.refs import ObjectTable
from vdiskfs.errors import FormatError
from vdiskfs.units import PAGES_PER_CHUNK

# Raw bytes of an entry without its sums, and of a sum.
ENTRY_RAW = 33
SUM_RAW = 8
OBJECTS_PER_BLOCK = 2048
ZEROS_PER_BLOCK = 2048

_MAX_STEP = np.uint64(1 << 47)
_MAX_PAGES = np.uint64(1 << 51)


def seal_data(entries: Entries) -> Sealed:
    """Make the block of some entries (not none; chunks whole)."""
    previous_end = entries.offset + entries.length.astype(np.uint64)
    offset = entries.offset.copy()
    offset[1:] -= previous_end[:-1]
    chunkno = entries.chunkno.copy()
    chunkno[1:] -= entries.chunkno[:-1]
    raw = b"".join((
        COUNTS.pack(len(entries), len(entries.sums)),
        planes(chunkno), planes(entries.mask), planes(entries.mask ^ entries.frame_mask),
        planes(entries.object), planes(offset), planes(entries.length),
        entries.flags.tobytes(), entries.check.tobytes(), entries.sums.tobytes(),
    ))  # fmt: skip
    first = int(entries.chunkno[0]) * PAGES_PER_CHUNK
    last = int(entries.chunkno[-1]) * PAGES_PER_CHUNK + PAGES_PER_CHUNK - 1
    return seal_block(DATA, first, last, len(entries), raw, flags=CHECKS)


def decode_data(row: np.void, stored: bytes, *, where: str) -> Entries:
    """Return the entries of a block, checked against each other and the row.

    Not checked here, for want of the head: that pages lie inside the disk and frames
    inside their objects (``index.check_entries``).
    """
    cursor = Cursor(open_block(row, stored, where=where), where)
    count, sums = cursor.counts()
    if count != int(row["count"]) or not count:
        raise FormatError("a block of the index has another count", where=where)
    chunkno, mask = cursor.u64(count), cursor.u16(count)
    frame_mask = cursor.u16(count) ^ mask
    objects, offset, length = cursor.u32(count), cursor.u64(count), cursor.u32(count)
    flags = cursor.u8(count)
    # Format version 1 had no checks.
    some = bool(int(row["flags"]) & CHECKS)
    check = cursor.plain_u32(count) if some else np.zeros(count, np.uint32)
    sum_column = cursor.plain_u64(sums)
    cursor.end()
    if (chunkno >= _MAX_STEP).any():
        raise FormatError("chunks are not in order", where=where)
    chunkno = np.cumsum(chunkno, dtype=np.uint64)
    # Differences are modulo 2**64; a lie shows as an offset beyond its object.
    steps = offset.copy()
    steps[1:] += length[:-1]
    offset = np.cumsum(steps, dtype=np.uint64)
    entries = Entries(
        chunkno, mask, frame_mask, objects, offset, length, flags, check, sum_column
    )  # fmt: skip
    problem = _entries_problem(entries, row)
    if problem:
        raise FormatError(problem, where=where)
    return entries


def _entries_problem(entries: Entries, row: np.void) -> str:
    raw_length = entries.raw_length
    packed = entries.packed
    if int(np.bitwise_count(entries.mask).sum(dtype=np.int64)) != len(entries.sums):
        return "a block has another number of sums than pages"
    if (entries.mask == 0).any() or (entries.mask & ~entries.frame_mask).any():
        return "an entry supplies pages that its frame does not hold"
    most = ZSTD | CHECKED if int(row["flags"]) & CHECKS else ZSTD
    if (entries.flags > most).any() or (entries.length == 0).any():
        return "an entry has unknown values"
    if not np.where(packed, entries.length < raw_length, entries.length == raw_length).all():
        return "an entry has an impossible length"
    if (entries.offset >= np.uint64(LIMIT)).any():
        return "an offset is too large"
    first = int(entries.chunkno[0]) * PAGES_PER_CHUNK
    last = int(entries.chunkno[-1]) * PAGES_PER_CHUNK + PAGES_PER_CHUNK - 1
    if first != int(row["first"]) or last != int(row["last"]):
        return "a block covers other chunks than said"
    if len(entries) > 1:
        same = entries.chunkno[1:] == entries.chunkno[:-1]
        if same.any():
            pageno, _ = entries.pages()
            low = entries.mask & (~entries.mask + np.uint16(1))
            if len(distinct(pageno)) != len(pageno) or (same & (low[1:] < low[:-1])).any():
                return "entries of one chunk overlap or are not in order"
    return ""


def seal_zeros(zeros: Extents) -> Sealed:
    """Make the block of some extents (not none)."""
    gap = zeros.start.copy()
    gap[1:] -= zeros.end[:-1]
    raw = COUNTS.pack(len(zeros), 0) + planes(gap) + planes(zeros.end - zeros.start)
    return seal_block(ZEROS, int(zeros.start[0]), int(zeros.end[-1]) - 1, len(zeros), raw)


def decode_zeros(row: np.void, stored: bytes, *, where: str) -> Extents:
    """Return the extents of a block: sorted, disjoint, not touching, below 2**60 pages."""
    cursor = Cursor(open_block(row, stored, where=where), where)
    count, other = cursor.counts()
    if count != int(row["count"]) or not count or other:
        raise FormatError("a block of the index has another count", where=where)
    gap, length = cursor.u64(count), cursor.u64(count)
    cursor.end()
    # 2**51 pages are 2**63 bytes; with at most 2**12 runs no sum leaves 64 bits.
    if (gap >= _MAX_PAGES).any() or (length >= _MAX_PAGES).any() or (length == 0).any():
        raise FormatError("a run of zeros is impossible", where=where)
    if count > ZEROS_PER_BLOCK or (gap[1:] == 0).any():
        raise FormatError("runs of zeros touch or overlap", where=where)
    end = np.cumsum(gap + length, dtype=np.uint64)
    start = end - length
    if int(start[0]) != int(row["first"]) or int(end[-1]) - 1 != int(row["last"]):
        raise FormatError("a block covers other pages than said", where=where)
    return Extents(start, end)


def seal_objects(table: ObjectTable, first: int) -> Sealed:
    """Make the block of some objects, the first of which has number ``first``."""
    segment = table.kind == 1
    raw = b"".join((
        COUNTS.pack(len(table), int(segment.sum())),
        table.kind.tobytes(), planes(table.generation), planes(table.from_epoch),
        planes(table.size), table.segment[segment].tobytes(),
    ))  # fmt: skip
    return seal_block(OBJECTS, first, first + len(table) - 1, len(table), raw)


def decode_objects(row: np.void, stored: bytes, *, where: str) -> ObjectTable:
    """Return the objects of a block."""
    cursor = Cursor(open_block(row, stored, where=where), where)
    count, segments = cursor.counts()
    span = int(row["last"]) - int(row["first"]) + 1
    if count != int(row["count"]) or not count or span != count:
        raise FormatError("a table of objects has another count", where=where)
    kind, generation = cursor.u8(count), cursor.u32(count)
    from_epoch, size = cursor.u64(count), cursor.u64(count)
    segment = np.zeros(count, "V16")
    chosen = kind == 1
    if (kind > 1).any() or int(chosen.sum()) != segments:
        raise FormatError("a table of objects has unknown values", where=where)
    segment[chosen] = np.frombuffer(cursor.take(16 * segments), "V16")
    cursor.end()
    if (from_epoch >= np.uint64(LIMIT)).any() or (size >= np.uint64(LIMIT)).any():
        raise FormatError("a number in the table of objects is too large", where=where)
    return ObjectTable(kind, generation, from_epoch, size, segment)
