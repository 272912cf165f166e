"""Index entries and extents as numpy columns, and the arithmetic on them.

An entry says where some pages of one chunk are stored: one frame, of which the entry
supplies the pages of ``mask``. An extent is a run of pages. Pure functions of memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from vdiskfs.units import PAGES_PER_CHUNK

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
U16 = npt.NDArray[np.uint16]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

ScalarT = TypeVar("ScalarT", bound=np.generic)

# Flags of an entry: the frame is compressed; the check of its stored bytes is known.
ZSTD, CHECKED = 1, 2
_SHIFT = np.uint64(4)
_LOW = np.uint64(PAGES_PER_CHUNK - 1)
_NO_END = (1 << 64) - 1


@dataclass(slots=True)
class Entries:
    """Columns of entries, sorted by chunk, then by the lowest page of the mask.

    ``object`` 0 is the delta itself, n > 0 the n-th of its object table. ``flags`` bit 0:
    the frame is compressed, bit 1: ``check`` is the CRC-32 of its stored bytes (deltas of
    format version 1 had none). ``sums`` has one XXH3-64 for each page of each mask, in order.
    """

    chunkno: U64
    mask: U16
    frame_mask: U16
    object: U32
    offset: U64
    length: U32
    flags: U8
    check: U32
    sums: U64

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.chunkno)

    @property
    def raw_length(self) -> U32:
        """Return the bytes of each frame before compression."""
        return np.bitwise_count(self.frame_mask).astype(np.uint32) << np.uint32(12)

    @property
    def packed(self) -> Bools:
        """Return which frames are compressed."""
        return np.asarray((self.flags & np.uint8(ZSTD)) != 0)

    @property
    def checked(self) -> Bools:
        """Return of which frames the check is known."""
        return np.asarray((self.flags & np.uint8(CHECKED)) != 0)

    def pages(self) -> tuple[U64, I64]:
        """Return the page number of each sum, and the entry it belongs to."""
        bits = np.unpackbits(
            self.mask.astype("<u2").view(np.uint8).reshape(-1, 2), axis=1, bitorder="little"
        )
        entry, bit = np.nonzero(bits)
        return (self.chunkno[entry] << _SHIFT) + bit.astype(np.uint64), entry

    def sum_starts(self) -> I64:
        """Return where the sums of each entry begin, and where the last ones end."""
        starts = np.zeros(len(self) + 1, np.int64)
        np.cumsum(np.bitwise_count(self.mask), out=starts[1:])
        return starts

    def slice(self, start: int, stop: int, sum_starts: I64 | None = None) -> Entries:
        """Return entries ``start`` to ``stop`` with their sums; views, not copies."""
        if sum_starts is None:
            sum_starts = self.sum_starts()
        part = slice(start, stop)
        return Entries(
            self.chunkno[part], self.mask[part], self.frame_mask[part], self.object[part],
            self.offset[part], self.length[part], self.flags[part], self.check[part],
            self.sums[int(sum_starts[start]) : int(sum_starts[stop])],
        )  # fmt: skip

    def rows(self, numbers: I64) -> Entries:
        """Return some entries with their sums."""
        starts = self.sum_starts()
        counts = starts[numbers + 1] - starts[numbers]
        base = np.repeat(starts[numbers] - np.r_[0, np.cumsum(counts)[:-1]], counts)
        return Entries(
            self.chunkno[numbers], self.mask[numbers], self.frame_mask[numbers],
            self.object[numbers], self.offset[numbers], self.length[numbers],
            self.flags[numbers], self.check[numbers], self.sums[base + np.arange(len(base))],
        )  # fmt: skip

    def within(self, first_page: int, end_page: int) -> Entries:
        """Return the entries of all chunks that meet pages [first_page, end_page)."""
        bounds = np.array(
            [first_page // PAGES_PER_CHUNK, -(-end_page // PAGES_PER_CHUNK)], np.uint64
        )
        low, high = np.searchsorted(self.chunkno, bounds).tolist()
        return self if (low, high) == (0, len(self)) else self.slice(low, high)

    def with_object(self, objects: U32) -> Entries:
        """Return the entries with another object column."""
        return replace(self, object=objects)


def distinct(values: npt.NDArray[ScalarT]) -> npt.NDArray[ScalarT]:
    """Return the values in order, each once.

    numpy's own way imports its masked arrays first: a third of the time of a short command.
    """
    ordered = np.sort(values)
    return ordered[_is_new(ordered)]


def first_of_each(values: npt.NDArray[ScalarT]) -> I64:
    """Return where each value is first, in the order of the values."""
    order = np.argsort(values, kind="stable")
    return order[_is_new(values[order])]


def _is_new(ordered: npt.NDArray[ScalarT]) -> Bools:
    new = np.ones(len(ordered), np.bool_)
    new[1:] = ordered[1:] != ordered[:-1]
    return new


def no_entries() -> Entries:
    """Return columns of length 0."""
    return Entries(
        np.empty(0, np.uint64), np.empty(0, np.uint16), np.empty(0, np.uint16),
        np.empty(0, np.uint32), np.empty(0, np.uint64), np.empty(0, np.uint32),
        np.empty(0, np.uint8), np.empty(0, np.uint32), np.empty(0, np.uint64),
    )  # fmt: skip


def concat_entries(parts: Sequence[Entries]) -> Entries:
    """Return the entries of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return no_entries()
    return Entries(
        np.concatenate([part.chunkno for part in parts]),
        np.concatenate([part.mask for part in parts]),
        np.concatenate([part.frame_mask for part in parts]),
        np.concatenate([part.object for part in parts]),
        np.concatenate([part.offset for part in parts]),
        np.concatenate([part.length for part in parts]),
        np.concatenate([part.flags for part in parts]),
        np.concatenate([part.check for part in parts]),
        np.concatenate([part.sums for part in parts]),
    )


def select_pages(entries: Entries, pageno: U64, owner: I64, kept: I64) -> Entries:
    """Return the entries that supply only the pages kept, in the order of the format.

    ``pageno`` and ``owner`` are what ``pages()`` gave for ``entries`` (of any order);
    ``kept`` are rows of them, no page twice.
    """
    kept = kept[np.lexsort((pageno[kept], owner[kept]))]
    page, own = pageno[kept], owner[kept]
    if not len(page):
        return no_entries()
    starts = np.flatnonzero(np.r_[True, own[1:] != own[:-1]])
    # Groups are put in the order of their lowest page: by chunk, then by that page.
    order = np.argsort(page[starts], kind="stable")
    counts = np.diff(np.r_[starts, len(page)])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    rows = np.argsort(np.repeat(rank, counts), kind="stable")
    bits = np.left_shift(np.uint16(1), (page & _LOW).astype(np.uint16))
    mask = np.bitwise_or.reduceat(bits, starts)[order].astype(np.uint16)
    source = own[starts][order]
    return Entries(
        entries.chunkno[source], mask, entries.frame_mask[source], entries.object[source],
        entries.offset[source], entries.length[source], entries.flags[source],
        entries.check[source], entries.sums[kept[rows]],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Extents:
    """Runs of pages [start, end): sorted, disjoint, not touching."""

    start: U64
    end: U64

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.start)

    @property
    def page_count(self) -> int:
        """Return the number of pages in all runs."""
        return int((self.end - self.start).sum(dtype=np.uint64))

    def contains(self, pageno: U64) -> Bools:
        """Return for each page whether a run holds it."""
        if not len(self.start):
            return np.zeros(len(pageno), np.bool_)
        slot = np.searchsorted(self.start, pageno, side="right") - 1
        return (slot >= 0) & (pageno < self.end[np.maximum(slot, 0)])

    def clip(self, first: int, last: int) -> Extents:
        """Return what lies in pages [first, last)."""
        if last <= first:
            return NO_EXTENTS
        low = int(np.searchsorted(self.end, np.uint64(first), side="right"))
        high = int(np.searchsorted(self.start, np.uint64(last), side="left"))
        if high <= low:
            return NO_EXTENTS
        return Extents(
            np.maximum(self.start[low:high], np.uint64(first)),
            np.minimum(self.end[low:high], np.uint64(last)),
        )

    def without(self, other: Extents) -> Extents:
        """Return the runs without those of another."""
        if not len(self) or not len(other):
            return self
        # What is left lies between the other's runs: each gap is clipped against each run.
        gap_start = np.concatenate([np.zeros(1, np.uint64), other.end])
        gap_end = np.concatenate([other.start, np.array([_NO_END], np.uint64)])
        low = np.searchsorted(gap_end, self.start, side="right")
        high = np.searchsorted(gap_start, self.end, side="left")
        counts = np.maximum(high - low, 0)
        run = np.repeat(np.arange(len(self)), counts)
        gap = np.repeat(low - np.r_[0, np.cumsum(counts)[:-1]], counts) + np.arange(len(run))
        start = np.maximum(self.start[run], gap_start[gap])
        end = np.minimum(self.end[run], gap_end[gap])
        return make_extents(start, end)

    def without_pages(self, pageno: U64) -> Extents:
        """Return the runs without these pages (sorted)."""
        hit = pageno[self.contains(pageno)]
        if not len(hit):
            return self
        # A page p inside a run ends one piece at p and starts another at p + 1.
        start = np.sort(np.concatenate([self.start, hit + np.uint64(1)]))
        end = np.sort(np.concatenate([self.end, hit]))
        some = start < end
        return Extents(start[some], end[some])


NO_EXTENTS = Extents(np.empty(0, np.uint64), np.empty(0, np.uint64))


def make_extents(start: U64, end: U64) -> Extents:
    """Return runs in any order, overlapping or touching, as sorted disjoint ones."""
    some = start < end
    start, end = start[some], end[some]
    if not len(start):
        return NO_EXTENTS
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(end[order])
    fresh = np.r_[True, start[1:] > end[:-1]]
    heads = np.flatnonzero(fresh)
    tails = np.r_[heads[1:] - 1, len(start) - 1]
    return Extents(start[heads], end[tails])


def unite_extents(parts: Iterable[Extents]) -> Extents:
    """Return the pages that are in any of the parts."""
    filled = [part for part in parts if len(part)]
    if not filled:
        return NO_EXTENTS
    if len(filled) == 1:
        return filled[0]
    return make_extents(
        np.concatenate([part.start for part in filled]),
        np.concatenate([part.end for part in filled]),
    )


def extents_of_pages(pageno: U64) -> Extents:
    """Return sorted pages as runs."""
    return make_extents(pageno, pageno + np.uint64(1))
