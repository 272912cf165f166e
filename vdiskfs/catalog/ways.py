"""Few deltas lead to any point of a thinned line: which leaves are made one, which are joined.

A small index is copied freely. A large one is copied where it is worth it: into a leaf once there
is a good part of it to add, into a join where too many deltas lead to a point without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np

from vdiskfs.catalog.indexes import INDEX_LIMIT, JOIN_LIMIT, index_bound
from vdiskfs.catalog.leaves import LeafWriter
from vdiskfs.catalog.ledger import LEAF_LEVEL, Leaf, shortest
from vdiskfs.catalog.line import MAX_LEVEL
from vdiskfs.catalog.tables import SLOT_INDEX_LIMIT, tail_bytes
from vdiskfs.point import PieceInfo
from vdiskfs.units import NS

_GROUP_NS = 256 * NS
_GROUP_FANOUT = 4
# Of the 64 deltas that lead to any point, 34 may lie between a horizon and the tip.
_WAY_LIMIT = 24
# To a point below the horizon more may: nothing lies between.
_INNER_LIMIT = 56
_RUN = 16
# What is added to a leaf with a large index has at least this part of it.
_WORTH = 16


def leaf_runs(by_start: Mapping[int, Leaf], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the spans between two states that are kept that each get one leaf.

    That is one, as a rule. Where it would have a large index, as the one that holds the beginning
    of a disk, deltas wait behind the leaf that there is until they are a 16th of it: so each
    page is copied 17 times at most, and what they supersede is little.
    """
    pieces: list[PieceInfo] = []
    position = start
    while position < end and position in by_start:
        pieces.append(by_start[position].piece)
        position = pieces[-1].to_epoch
    sizes = [tail_bytes(piece) for piece in pieces]
    first = 0
    while position == end and sum(sizes[first:]) > JOIN_LIMIT and first < len(pieces) - 1:
        is_worth = sum(sizes[first + 1 :]) * _WORTH >= sizes[first]
        if is_worth and index_bound(pieces[first:]) <= INDEX_LIMIT:
            break
        yield start, pieces[first].to_epoch
        start = pieces[first].to_epoch
        first += 1
    yield start, end


def still_right(
    pieces: Sequence[PieceInfo], leaves: Sequence[Leaf], known: set[str]
) -> list[PieceInfo]:
    """Return the joined deltas there are already that need nothing but what leaves need."""
    starts = {leaf.piece.from_epoch: index for index, leaf in enumerate(leaves)}
    ends = {leaf.piece.to_epoch: index for index, leaf in enumerate(leaves)}
    # How many leaves up to each were rewritten, or are no slots.
    new = np.cumsum([0, *(leaf.piece.name not in known for leaf in leaves)])
    thick = np.cumsum([0, *(leaf.piece.level > 0 for leaf in leaves)])
    right = []
    for piece in pieces:
        if piece.level in (0, LEAF_LEVEL):
            continue
        first, last = starts.get(piece.from_epoch), ends.get(piece.to_epoch)
        if first is None or last is None or last <= first:
            continue
        counts = thick if piece.level <= MAX_LEVEL else new
        if counts[last + 1] == counts[first]:
            right.append(piece)
    return right


async def join_leaves(
    writer: LeafWriter, leaves: Sequence[PieceInfo], joins: Sequence[PieceInfo], apart: set[str]
) -> list[PieceInfo]:
    """Make what joins are missing, so that few deltas lead to any leaf.

    ``apart`` are leaves that are read by themselves while few lead there all the same.
    """
    made = await _groups(writer, [one for one in leaves if _is_small(one, apart)], joins)
    return made + await _shortcuts(writer, leaves, [*joins, *made], apart)


async def _groups(
    writer: LeafWriter, smalls: Sequence[PieceInfo], joins: Sequence[PieceInfo]
) -> list[PieceInfo]:
    """Join leaves whose ends lie in one stretch of the calendar.

    In stretches of 256 s, and of 4 times as much, and so on.
    """
    made: list[PieceInfo] = []
    spans = {(piece.from_epoch, piece.to_epoch) for piece in joins}
    if not smalls:
        return made
    newest = _end_ns(smalls[-1])
    width = _GROUP_NS
    while width <= max(_GROUP_NS, newest - _end_ns(smalls[0])):
        for bucket, group in groupby(smalls, key=lambda piece: _end_ns(piece) // width):
            for run in _unbroken(list(group)):
                span = (run[0].from_epoch, run[-1].to_epoch)
                if len(run) < 2 or span in spans or (bucket + 1) * width > newest:
                    continue
                way = shortest([*run, *_inside([*joins, *made], span)], *span) or run
                if len(way) > 1 and sum(map(tail_bytes, way)) <= JOIN_LIMIT:
                    made.append(await writer.make_join(way))
                    spans.add(span)
        width *= _GROUP_FANOUT
    return made


async def _shortcuts(
    writer: LeafWriter, leaves: Sequence[PieceInfo], joins: Sequence[PieceInfo], apart: set[str]
) -> list[PieceInfo]:
    """Make joins where many deltas lead to a point all the same.

    So it is where much is kept of a stretch that is not over, by holds or by a ladder of many
    steps, and where leaves have large indexes. Joined are those with the smallest indexes that
    lie together, large ones where there are no others.
    """
    made: list[PieceInfo] = []
    while leaves:
        way = _longest_way(leaves, [*joins, *made])
        run = _cheapest_run(way, apart)
        if run is None:
            break
        made.append(await writer.make_join(run))
    return made


def _longest_way(leaves: Sequence[PieceInfo], joins: Sequence[PieceInfo]) -> list[PieceInfo]:
    """Return the way to the horizon, or to the leaf that most deltas lead to; []: few do."""
    start = leaves[0].from_epoch
    pieces = [*leaves, *joins]
    way = shortest(pieces, start, leaves[-1].to_epoch) or []
    if len(way) > _WAY_LIMIT:
        return way
    lengths = {start: 0}
    for piece in sorted(pieces, key=lambda one: one.from_epoch):
        reached = lengths[piece.from_epoch] + 1
        lengths[piece.to_epoch] = min(reached, lengths.get(piece.to_epoch, reached))
    longest = max(lengths, key=lambda end: lengths[end])
    if lengths[longest] <= _INNER_LIMIT:
        return []
    return shortest(pieces, start, longest) or []


def _cheapest_run(way: Sequence[PieceInfo], apart: set[str]) -> list[PieceInfo] | None:
    """Return what of a way is joined with the least to copy."""
    for length in (_RUN, _RUN // 2, _RUN // 4, 2):
        runs = [list(way[start : start + length]) for start in range(len(way) - length + 1)]
        small = [run for run in runs if all(_is_small(piece, apart) for piece in run)]
        small = [run for run in small if sum(map(tail_bytes, run)) <= JOIN_LIMIT]
        if fits := small or [run for run in runs if index_bound(run) <= INDEX_LIMIT]:
            return min(fits, key=lambda run: sum(map(tail_bytes, run)))
    return None


def _is_small(piece: PieceInfo, apart: set[str]) -> bool:
    return piece.name not in apart and tail_bytes(piece) <= SLOT_INDEX_LIMIT


def _inside(pieces: Iterable[PieceInfo], span: tuple[int, int]) -> list[PieceInfo]:
    return [one for one in pieces if span[0] <= one.from_epoch and one.to_epoch <= span[1]]


def _unbroken(pieces: Sequence[PieceInfo]) -> Iterable[list[PieceInfo]]:
    """Cut a list where one does not follow the one before."""
    run: list[PieceInfo] = []
    for piece in pieces:
        if run and run[-1].to_epoch != piece.from_epoch:
            yield run
            run = []
        run.append(piece)
    yield run


def _end_ns(piece: PieceInfo) -> int:
    return piece.listed.time_ns if piece.listed is not None else 0
