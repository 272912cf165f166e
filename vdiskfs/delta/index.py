"""The index of a delta: blocks, the rows that find them, the root that finds the rows.

Up to 256 rows of a kind stand in the root; above that the root has one row for each
page of 512. So a reader of any delta needs the root, at most one page and one block to
know where a page of the disk is. vdiskfs-format(5), "Index".
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vdiskfs.delta.blocks import (
    BLOCK_RAW_MAX,
    CHECKS,
    DATA,
    OBJECTS,
    PACKED,
    PAGE,
    POINTS,
    ROW,
    ZEROS,
    Rows,
    inflate,
    open_block,
)
from vdiskfs.delta.entries import Entries, Extents
from vdiskfs.delta.layout import HEAD_SIZE, LIMIT, DeltaHead, hash_bytes
from vdiskfs.delta.refs import ObjectTable
from vdiskfs.errors import FormatError
from vdiskfs.units import PAGES_PER_CHUNK

ROWS_PER_PAGE = 512
DIRECT_ROWS = 256
# 64 TiB need 2.6 million rows: 5,200 pages, 416 KiB of root.
ROOT_MAX = 4 << 20


def decode_root(head: DeltaHead, stored: bytes, *, where: str) -> Rows:
    """Return the rows of the root, checked.

    Raises:
        FormatError: the root is damaged, or its rows contradict each other or the head.
    """
    if len(stored) != head.root_length or hash_bytes(stored) != head.root_hash:
        raise FormatError("the root of the index is damaged", where=where)
    compressed = head.root_length < head.root_raw
    raw = inflate(stored, head.root_raw, compressed=compressed, limit=ROOT_MAX, where=where)
    return _decode_rows(raw, head, where=where)


def decode_page(row: np.void, stored: bytes, head: DeltaHead, *, where: str) -> Rows:
    """Return the rows of a page, checked against the row that names it."""
    rows = _decode_rows(open_block(row, stored, where=where), head, where=where)
    kind = int(row["kind"]) & ~PAGE
    if len(rows) != int(row["count"]) or not 0 < len(rows) <= ROWS_PER_PAGE:
        raise FormatError("a page of the index has another count", where=where)
    if (rows["kind"] != kind).any():
        raise FormatError("a page of the index has rows of another kind", where=where)
    if int(rows["first"][0]) != int(row["first"]) or int(rows["last"][-1]) != int(row["last"]):
        raise FormatError("a page covers other keys than said", where=where)
    return rows


def _decode_rows(raw: bytes, head: DeltaHead, *, where: str) -> Rows:
    if len(raw) % ROW.itemsize:
        raise FormatError("rows of the index end early", where=where)
    rows = np.frombuffer(raw, ROW)
    if len(rows) and (problem := _rows_problem(rows, head)):
        raise FormatError(problem, where=where)
    return rows


def _rows_problem(rows: Rows, head: DeltaHead) -> str:
    kind = rows["kind"] & np.uint8(0x7F)
    if not np.isin(kind, (DATA, ZEROS, POINTS, OBJECTS)).all():
        return "a row of the index has an unknown kind"
    # All blocks of entries have checks since format version 2, and none had before.
    checks = (rows["kind"] == DATA) & (head.version > 1)
    unknown = (rows["flags"] & ~np.uint8(PACKED)) != np.where(checks, CHECKS, 0)
    if unknown.any() or rows["reserved"].any() or rows["reserved2"].any():
        return "a row of the index has unknown values"
    if (rows["length"] > rows["raw"]).any() or (rows["raw"] > BLOCK_RAW_MAX).any():
        return "a block is larger than the format allows"
    first, last, limit = rows["first"], rows["last"], np.uint64(LIMIT)
    if (first > last).any() or (last >= limit).any() or (rows["offset"] >= limit).any():
        return "a row of the index has impossible numbers"
    same = kind[1:] == kind[:-1]
    if (kind[1:] < kind[:-1]).any() or (same & (first[1:] <= last[:-1])).any():
        return "rows of the index overlap or are not in order"
    own = rows["object"] == 0
    end = rows["offset"] + rows["length"]
    inside = (rows["offset"] >= np.uint64(head.tail_offset)) & (end <= np.uint64(head.root_offset))
    movable = (rows["kind"] == DATA) | (rows["kind"] == ZEROS)
    if not np.where(own, inside, movable).all():
        return "a row of the index points outside its object"
    if (last[kind == DATA] >= np.uint64(head.chunks * PAGES_PER_CHUNK)).any() or (
        last[kind == ZEROS] >= np.uint64(head.pages)
    ).any():
        return "the index names pages beyond the disk"
    return ""


def find_rows(rows: Rows, kind: int, first: int, last: int) -> Rows:
    """Return the rows of a kind, pages of it included, whose keys meet [first, last]."""
    mine = rows[(rows["kind"] & np.uint8(0x7F)) == kind]
    low = int(np.searchsorted(mine["last"], np.uint64(first), side="left"))
    high = int(np.searchsorted(mine["first"], np.uint64(last), side="right"))
    found: Rows = mine[low:high]
    return found


def object_count(rows: Rows) -> int:
    """Return how many objects the root says are referred to."""
    mine = rows[(rows["kind"] & np.uint8(0x7F)) == OBJECTS]
    return int(mine["last"][-1]) if len(mine) else 0


def check_entries(entries: Entries, head: DeltaHead, objects: int, *, where: str) -> None:
    """Check a block's entries against the head.

    Raises:
        FormatError: a page beyond the disk, or a frame outside this object.
    """
    last_mask = int(np.bitwise_or.reduce(entries.mask[entries.chunkno == entries.chunkno[-1]]))
    last_page = int(entries.chunkno[-1]) * PAGES_PER_CHUNK + last_mask.bit_length() - 1
    if last_page >= head.pages:
        raise FormatError("the index names pages beyond the disk", where=where)
    if (entries.object > objects).any():
        raise FormatError("an entry refers to no object", where=where)
    own = entries.object == 0
    end = entries.offset + entries.length
    low, high = np.uint64(HEAD_SIZE), np.uint64(head.tail_offset)
    if (own & ((entries.offset < low) | (end > high))).any():
        raise FormatError("a frame lies outside its object", where=where)


def check_frames(entries: Entries, objects: ObjectTable, *, where: str) -> None:
    """Check that the frames of entries lie inside the objects; the whole table is given.

    Raises:
        FormatError: a frame ends beyond its object.
    """
    if not len(objects):
        return
    other = entries.object > 0
    size = objects.size[np.maximum(entries.object.astype(np.int64) - 1, 0)]
    if (other & (entries.offset + entries.length > size)).any():
        raise FormatError("a frame lies outside its object", where=where)


def has_page(page: int, blocks: Iterable[Entries], zeros: Extents) -> bool:
    """Return whether entries or zeros supply a page."""
    if zeros.contains(np.array([page], np.uint64))[0]:
        return True
    chunkno, bit = divmod(page, PAGES_PER_CHUNK)
    return any(
        bool((part.mask[part.chunkno == np.uint64(chunkno)] & np.uint16(1 << bit)).any())
        for part in blocks
    )
