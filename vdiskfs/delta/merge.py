"""Merging the indexes of deltas that follow each other into one index.

A sweep over the disk in windows: the newest delta that says something of a page decides,
and what a later cut removed is gone. No frame is read or moved. The order is "newest
first" everywhere here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from vdiskfs.delta.blocks import DATA, ZEROS
from vdiskfs.delta.builder import IndexBuilder
from vdiskfs.delta.columns import decode_data, decode_zeros
from vdiskfs.delta.entries import (
    I64,
    NO_EXTENTS,
    U32,
    U64,
    Bools,
    Entries,
    Extents,
    concat_entries,
    distinct,
    first_of_each,
    select_pages,
    unite_extents,
)
from vdiskfs.delta.local import LocalDelta
from vdiskfs.delta.refs import ObjectRef, ObjectTable, make_table
from vdiskfs.errors import FormatError
from vdiskfs.units import PAGES_PER_CHUNK, pages_of

# What stands for "the delta that is being made" among the objects of a source.
THIS = ObjectRef()
# What stands for object 0 of an index that has no frames of its own.
INVALID = ObjectRef(generation=-1)
_ZERO_PARTS = 1024


@dataclass(slots=True)
class Source:
    """One index to merge: its blocks (kind, first and last page), a way to load them.

    ``objects[n]`` is what object number n means in the result; pages at or beyond
    ``page_limit`` were cut away later.
    """

    kind: U32
    first: U64
    last: U64
    load: Callable[[int], Entries | Extents]
    objects: Sequence[ObjectRef]
    page_limit: int = 1 << 62
    where: str = ""


@dataclass(slots=True)
class _Active:
    order: int
    last: int
    block: Entries | Extents


@dataclass(slots=True)
class _Window:
    """What the sources say of a stretch: entries, their pages, which of them are alive."""

    parts: list[Entries]
    pageno: list[U64]
    owner: list[I64]
    keep: list[Bools]
    zeros: list[Extents]


def source_of(delta: LocalDelta, self_ref: ObjectRef, page_limit: int) -> Source:
    """Return a delta as a source; ``self_ref`` is what its object 0 means in the result."""
    rows = np.concatenate([delta.rows(DATA), delta.rows(ZEROS)])
    table = delta.objects()

    def load(index: int) -> Entries | Extents:
        row = rows[index]
        if int(row["kind"]) == ZEROS:
            return delta.zero_block(row)
        return delta.block(row, table)

    objects = [self_ref, *(table.ref(index) for index in range(len(table)))]
    return Source(rows["kind"].astype(np.uint32), rows["first"], rows["last"], load, objects,
                  page_limit, delta.where)  # fmt: skip


def builder_source(builder: IndexBuilder, objects: Sequence[ObjectRef]) -> Source:
    """Return a finished builder as a source: the newest of all."""
    rows = builder.rows()

    def load(index: int) -> Entries | Extents:
        row = rows[index]
        stored = builder.read(int(row["offset"]), int(row["length"]))
        if int(row["kind"]) == ZEROS:
            return decode_zeros(row, stored, where="the spool")
        return decode_data(row, stored, where="the spool")

    return Source(rows["kind"].astype(np.uint32), rows["first"], rows["last"], load, objects)


def merge_into(builder: IndexBuilder, sources: Sequence[Source], numbers: ObjectNumbers) -> bytes:
    """Merge into an empty builder and finish it; return the content digest."""
    zeros: list[Extents] = []
    for entries, runs in merge(sources, numbers):
        builder.add(entries)
        if len(runs):
            zeros.append(runs)
        if len(zeros) >= _ZERO_PARTS:
            zeros = [unite_extents(zeros)]
    builder.set_zeros(unite_extents(zeros))
    return builder.finish()


def page_limits(cuts: Sequence[int]) -> list[int]:
    """Return for each delta (newest first) the page at which what it says ends."""
    limits, limit = [], 1 << 62
    for cut in cuts:
        limits.append(limit)
        limit = min(limit, pages_of(cut))
    return limits


class ObjectNumbers:
    """Numbers the objects of the result in the order of their first use."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Know what the objects of the sources mean."""
        counts = [len(source.objects) for source in sources]
        self.bases = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._sources = sources
        self._numbers: dict[ObjectRef, int] = {THIS: 0}
        self._known = np.full(int(self.bases[-1]), -1, np.int64)

    def keep(self, refs: Sequence[ObjectRef]) -> None:
        """Give these objects the next numbers, used or not."""
        for ref in refs:
            self._numbers.setdefault(ref, len(self._numbers))

    def renumber(self, objects: U32) -> U32:
        """Return the result's numbers for sources' numbers (base added)."""
        for number in distinct(objects).tolist():
            if self._known[number] < 0:
                order = int(np.searchsorted(self.bases, number, side="right")) - 1
                ref = self._sources[order].objects[number - int(self.bases[order])]
                if ref is INVALID:
                    raise FormatError("an entry refers to no object")
                self._known[number] = self._numbers.setdefault(ref, len(self._numbers))
        return self._known[objects].astype(np.uint32)

    def table(self) -> ObjectTable:
        """Return the result's table of objects."""
        return make_table(list(self._numbers)[1:])


def merge(sources: Sequence[Source], numbers: ObjectNumbers) -> Iterator[tuple[Entries, Extents]]:
    """Yield the merged entries and runs of zeros, in order, chunks whole.

    Runs of neighbouring windows may touch. Memory: one block of each source that has one
    at the place.
    """
    for window in _windows(sources, numbers):
        entries = _newest(window)
        zeros = unite_extents(window.zeros)
        if len(entries):
            entries = entries.with_object(numbers.renumber(entries.object))
        yield entries, zeros


def _windows(sources: Sequence[Source], numbers: ObjectNumbers) -> Iterator[_Window]:
    first = np.concatenate([source.first for source in sources])
    last = np.concatenate([source.last for source in sources])
    order = np.repeat(np.arange(len(sources)), [len(source.first) for source in sources])
    index = np.concatenate([np.arange(len(source.first)) for source in sources])
    by_first = np.argsort(first, kind="stable").tolist()
    active: list[_Active] = []
    waiting = 0
    position = 0
    while active or waiting < len(by_first):
        if not active:
            position = int(first[by_first[waiting]]) // PAGES_PER_CHUNK * PAGES_PER_CHUNK
        end = min((block.last for block in active), default=(1 << 62) - 1) | 15
        while waiting < len(by_first) and int(first[by_first[waiting]]) <= end:
            block = by_first[waiting]
            source = int(order[block])
            loaded = sources[source].load(int(index[block]))
            active.append(_Active(source, int(last[block]), loaded))
            end = min(end, int(last[block]) | 15)
            waiting += 1
        active.sort(key=lambda block: block.order)
        yield _window(sources, numbers, active, position, end + 1)
        active = [block for block in active if block.last > end]
        position = end + 1


def _window(
    sources: Sequence[Source],
    numbers: ObjectNumbers,
    active: Sequence[_Active],
    first: int,
    end: int,
) -> _Window:
    """Collect what the active blocks (newest first) say of pages [first, end)."""
    window = _Window([], [], [], [], [])
    newer_zeros = NO_EXTENTS
    owners = 0
    for order, blocks in groupby(active, key=lambda block: block.order):
        limit = min(end, sources[order].page_limit)
        newer_pages = list(window.pageno)
        zeros: list[Extents] = []
        for block in (item.block for item in blocks):
            if isinstance(block, Extents):
                zeros.append(block.clip(first, limit))
                continue
            part = block.within(first, end)
            pageno, owner = part.pages()
            window.keep.append((pageno < np.uint64(limit)) & ~newer_zeros.contains(pageno))
            window.pageno.append(pageno)
            window.owner.append(owner + owners)
            base = np.uint32(int(numbers.bases[order]))
            window.parts.append(part.with_object(part.object + base))
            owners += len(part)
        own = unite_extents(zeros)
        if len(own):
            for pageno in window.pageno[len(newer_pages) :]:
                if own.contains(pageno).any():
                    raise FormatError("a page is both zero and data", where=sources[order].where)
            window.zeros.append(own.without_pages(_sorted_pages(newer_pages)))
            newer_zeros = unite_extents([newer_zeros, own])
    return window


def _sorted_pages(parts: Sequence[U64]) -> U64:
    return distinct(np.concatenate(parts)) if parts else np.empty(0, np.uint64)


def _newest(window: _Window) -> Entries:
    """Return the entries of the window with the newest page of each number only."""
    entries = concat_entries(window.parts)
    if not len(entries):
        return entries
    pageno, owner = np.concatenate(window.pageno), np.concatenate(window.owner)
    rows = np.flatnonzero(np.concatenate(window.keep))
    # Of equal numbers the first is the newest.
    return select_pages(entries, pageno, owner, rows[first_of_each(pageno[rows])])
