"""Building an index: entries in, blocks out, then rows, pages, root.

Blocks are kept in memory up to 8 MiB and then in an unnamed file of the spool directory,
so that the index of a disk of any size can be built and read back for merging.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import zstandard

from vdiskfs.delta.blocks import BLOCK_RAW, DATA, PAGE, ROW, ZEROS, Rows, Sealed, seal_block
from vdiskfs.delta.columns import (
    ENTRY_RAW,
    OBJECTS_PER_BLOCK,
    SUM_RAW,
    ZEROS_PER_BLOCK,
    decode_data,
    seal_data,
    seal_objects,
    seal_zeros,
)
from vdiskfs.delta.digest import ContentHasher
from vdiskfs.delta.entries import I64, NO_EXTENTS, Entries, Extents, concat_entries, distinct
from vdiskfs.delta.index import DIRECT_ROWS, ROWS_PER_PAGE
from vdiskfs.delta.points import POINTS_PER_BLOCK, PointTable, seal_points
from vdiskfs.delta.refs import ObjectTable

_MEMORY = 8 << 20


class IndexBuilder:
    """The index of one delta while it is made. Entries arrive sorted, chunks whole."""

    def __init__(self, directory: Path) -> None:
        """Start empty; ``directory`` takes what does not fit in memory."""
        self._blocks: IO[bytes] = tempfile.SpooledTemporaryFile(_MEMORY, dir=str(directory))  # noqa: SIM115
        self._rows: list[Rows] = []
        self._pending: list[Entries] = []
        self._pending_raw = 0
        self._hasher = ContentHasher()
        self.zeros: Extents = NO_EXTENTS
        self.size = 0
        self.data_pages = 0
        self.last_page = -1

    def add(self, entries: Entries) -> None:
        """Add entries: of chunks after all added before."""
        if not len(entries):
            return
        self._pending.append(entries)
        self._pending_raw += len(entries) * ENTRY_RAW + len(entries.sums) * SUM_RAW
        self.data_pages += len(entries.sums)
        if self._pending_raw >= 4 * BLOCK_RAW:
            self._cut(final=False)

    def set_zeros(self, zeros: Extents) -> None:
        """Say which pages became zero: once, before ``finish``."""
        self.zeros = zeros

    def finish(self) -> bytes:
        """Seal what is pending and the zeros; return the content digest."""
        self._cut(final=True)
        for start in range(0, len(self.zeros), ZEROS_PER_BLOCK):
            stop = start + ZEROS_PER_BLOCK
            part = Extents(self.zeros.start[start:stop], self.zeros.end[start:stop])
            self._put(seal_zeros(part))
        self._hasher.add_zeros(self.zeros)
        return self._hasher.digest()

    def add_points(self, table: PointTable) -> None:
        """Add the table of points; after ``finish``."""
        for start in range(0, len(table), POINTS_PER_BLOCK):
            self._put(seal_points(table.part(start, start + POINTS_PER_BLOCK)))

    def add_objects(self, table: ObjectTable) -> None:
        """Add the table of objects; after ``add_points``."""
        for start in range(0, len(table), OBJECTS_PER_BLOCK):
            self._put(seal_objects(table.part(start, start + OBJECTS_PER_BLOCK), start + 1))

    def rows(self) -> Rows:
        """Return the rows; their offsets are into what ``read`` reads."""
        return np.concatenate(self._rows) if self._rows else np.zeros(0, ROW)

    def read(self, offset: int, length: int) -> bytes:
        """Return stored bytes of the blocks."""
        self._blocks.seek(offset)
        return self._blocks.read(length)

    def data_blocks(self) -> Iterator[Entries]:
        """Decode the blocks of entries again, in order."""
        for row in self.rows():
            if int(row["kind"]) == DATA:
                stored = self.read(int(row["offset"]), int(row["length"]))
                yield decode_data(row, stored, where="the spool")

    def close(self) -> None:
        """Free the blocks."""
        self._blocks.close()

    def _put(self, sealed: Sealed) -> None:
        sealed.row["offset"] = self.size
        self._rows.append(sealed.row)
        self._blocks.seek(0, 2)
        self._blocks.write(sealed.data)
        self.size += len(sealed.data)

    def _cut(self, *, final: bool) -> None:
        if not self._pending:
            return
        entries = concat_entries(self._pending)
        cuts, starts = _cuts(entries, final=final), entries.sum_starts()
        for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            part = entries.slice(start, stop, starts)
            self._put(seal_data(part))
            pageno, _ = part.pages()
            order = np.argsort(pageno, kind="stable")
            self._hasher.add_pages(pageno[order], part.sums[order])
            self.last_page = int(pageno[order[-1]])
        rest = entries.slice(int(cuts[-1]), len(entries), starts)
        self._pending = [rest] if len(rest) else []
        self._pending_raw = len(rest) * ENTRY_RAW + len(rest.sums) * SUM_RAW


def _cuts(entries: Entries, *, final: bool) -> I64:
    """Return where blocks begin; the last number is where what is kept back begins.

    Blocks have at most BLOCK_RAW bytes and end where a chunk ends.
    """
    cost = np.cumsum(ENTRY_RAW + SUM_RAW * np.bitwise_count(entries.mask).astype(np.int64))
    ends = np.flatnonzero(np.r_[entries.chunkno[1:] != entries.chunkno[:-1], True]) + 1
    budget = BLOCK_RAW - 8
    cuts = [0]
    while True:
        spent = int(cost[cuts[-1] - 1]) if cuts[-1] else 0
        stop = int(np.searchsorted(cost[ends - 1], spent + budget, side="right"))
        if stop == len(ends):
            break
        cuts.append(int(ends[stop - 1]))
    if final:
        cuts.append(len(entries))
    return np.array(cuts, np.int64)


def build_root(rows: Rows) -> tuple[list[Sealed], Rows]:
    """Return the pages, and the rows of the root.

    Rows have their final places. The rows of pages have offsets that count from the
    first page.
    """
    pages: list[Sealed] = []
    root: list[Rows] = []
    at = 0
    for kind in distinct(rows["kind"]).tolist():
        mine = rows[rows["kind"] == kind]
        if len(mine) <= DIRECT_ROWS:
            root.append(mine)
            continue
        for start in range(0, len(mine), ROWS_PER_PAGE):
            part = mine[start : start + ROWS_PER_PAGE]
            first, last = int(part["first"][0]), int(part["last"][-1])
            sealed = seal_block(kind | PAGE, first, last, len(part), part.tobytes())
            sealed.row["offset"] = at
            at += len(sealed.data)
            pages.append(sealed)
            root.append(sealed.row)
    return pages, np.concatenate(root) if root else np.zeros(0, ROW)


def seal_root(rows: Rows) -> tuple[bytes, int]:
    """Return the stored bytes of the root, and their length before compression."""
    raw = rows.tobytes()
    stored = zstandard.ZstdCompressor(level=3).compress(raw)
    return (stored, len(raw)) if len(stored) < len(raw) else (raw, len(raw))


def is_movable(rows: Rows) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which rows' blocks may lie in segments."""
    return np.asarray((rows["kind"] == DATA) | (rows["kind"] == ZEROS))
