"""Ledgers: what there is of a generation up to its horizon, in one immutable object.

A line begins as slots that are found by listing. Once it was thinned, disk.json names a
ledger for it: below the horizon the ledger alone says which deltas lead where and which
points there are, and slots that still lie there mean nothing. A new ledger becomes the truth
in one swap of disk.json. vdiskfs-format(5), "Ledgers"; vdiskfs-internals(7), "Thinning".
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import trio

from vdiskfs.catalog.documents import FORMAT, decode_document, encode_document, take
from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.delta.layout import LIMIT, Flags, ListedHead, is_id
from vdiskfs.delta.names import joined_name, segment_name, slot_name, slot_prefix
from vdiskfs.delta.points import PointTable
from vdiskfs.errors import FormatError
from vdiskfs.point import PieceInfo
from vdiskfs.store import READ_LIMIT, Store

LEAF_LEVEL = 9
"""The level of the leaves of a thinned line that are no slots."""

JOIN_LEVEL = 8
"""The level of joined deltas over leaves."""

_COLUMNS = ("epoch", "time_ns", "size", "changed_bytes", "stored_bytes", "flags")
_REVISION_MAX = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Leaf:
    """A delta from one kept state to the next, and what it needs beside itself.

    ``refs`` are the ids of segments and the from epochs (16 digits) of slots. ``tight``: its
    data was written for it alone, so that nothing in them is garbage.
    """

    piece: PieceInfo
    refs: tuple[str, ...] = ()
    tight: bool = False


@dataclass(frozen=True, slots=True)
class Ledger:
    """What there is of a generation up to ``horizon``.

    ``leaves`` follow each other from the generation's base to the horizon; ``joins`` are
    shorter ways over several of them, and need nothing that those do not. ``doomed`` are
    names that nothing of this ledger needs, each with when that was so first (store's time,
    ns); a name that was doomed is never given again: ``serial`` is above all revisions so far.
    ``now_ns`` is the time that the points were thinned for.
    """

    generation: int
    base: int
    horizon: int
    serial: int
    now_ns: int
    leaves: tuple[Leaf, ...]
    joins: tuple[PieceInfo, ...]
    points: PointTable
    doomed: dict[str, int] = field(default_factory=dict)

    @property
    def pieces(self) -> list[PieceInfo]:
        """Return all deltas there are."""
        return [*(leaf.piece for leaf in self.leaves), *self.joins]

    def live(self, disk_id: str) -> set[str]:
        """Return the names of all objects that points up to the horizon need."""
        names = {piece.name for piece in self.pieces}
        for leaf in self.leaves:
            names |= ref_names(disk_id, self.generation, leaf.refs)
        return names


def ref_names(disk_id: str, generation: int, refs: Iterable[str]) -> set[str]:
    """Return the names of objects that refs mean."""
    return {
        segment_name(disk_id, ref)
        if len(ref) == 32
        else slot_name(disk_id, generation, int(ref, 16))
        for ref in refs
    }


def shortest(
    pieces: Sequence[PieceInfo], start: int, end: int, without: frozenset[str] = frozenset()
) -> list[PieceInfo] | None:
    """Return the fewest deltas that lead from one epoch to another; None: there is no way."""
    best: dict[int, tuple[int, PieceInfo | None]] = {start: (0, None)}
    for piece in sorted(pieces, key=lambda one: (one.from_epoch, -one.to_epoch)):
        reached = best.get(piece.from_epoch)
        if reached is None or piece.to_epoch > end or piece.name in without:
            continue
        known = best.get(piece.to_epoch)
        if known is None or reached[0] + 1 < known[0]:
            best[piece.to_epoch] = (reached[0] + 1, piece)
    if end not in best:
        return None
    way: list[PieceInfo] = []
    position = end
    while position != start:
        piece_to = best[position][1]
        assert piece_to is not None
        way.append(piece_to)
        position = piece_to.from_epoch
    return way[::-1]


def ledger_prefix(disk_id: str, generation: int) -> str:
    """Return what the names of all ledgers of a generation begin with."""
    return f"{slot_prefix(disk_id, generation)[:-1]}.ledger/"


def ledger_name(disk_id: str, generation: int, ledger_id: str) -> str:
    """Return the name of a ledger."""
    return ledger_prefix(disk_id, generation) + ledger_id


async def read_ledger(
    store: Store, disk_id: str, generation: int, ledger_id: str, base: int
) -> Ledger:
    """Read a ledger.

    Raises:
        NotFoundError: it is gone: another one is named by now.
        FormatError: it is damaged, or another generation's.
    """
    where = ledger_name(disk_id, generation, ledger_id)
    data, _ = await store.read(where, limit=READ_LIMIT)
    ledger = decode_ledger(data, disk_id, where=where)
    if (ledger.generation, ledger.base) != (generation, base):
        raise FormatError("the ledger of another generation", where=where)
    return ledger


async def write_ledger(
    store: Store, disk_id: str, ledger: Ledger, cache: IndexCache | None = None
) -> str:
    """Create a ledger; return its id. Nobody knows it until disk.json names it.

    With a cache a copy stays here.
    """
    ledger_id = secrets.token_hex(16)
    name, data = ledger_name(disk_id, ledger.generation, ledger_id), encode_ledger(ledger)
    await store.create(name, data)
    if cache is not None:
        await trio.to_thread.run_sync(cache.put_aside, {name: data})
    return ledger_id


def encode_ledger(ledger: Ledger) -> bytes:
    """Return the document of a ledger."""
    table = ledger.points
    return encode_document({
        "format": FORMAT, "generation": ledger.generation, "base": ledger.base,
        "horizon": ledger.horizon, "serial": ledger.serial, "now": ledger.now_ns,
        "leaves": [
            [*_pack(leaf.piece), list(leaf.refs), leaf.tight] for leaf in ledger.leaves
        ],
        "joins": [_pack(piece) for piece in ledger.joins],
        "points": {name: getattr(table, name).tolist() for name in _COLUMNS},
        "labels": {str(epoch): text for epoch, text in table.labels.items()},
        "doomed": ledger.doomed,
    })  # fmt: skip


def decode_ledger(data: bytes, disk_id: str, *, where: str) -> Ledger:
    """Return what a ledger says.

    Raises:
        FormatError: it is damaged, or its deltas do not lead to its horizon.
    """
    values = decode_document(data, where=where)
    numbers = {key: take(values, key, int, where=where)
               for key in ("generation", "base", "horizon", "serial", "now")}  # fmt: skip
    generation = numbers["generation"]
    try:
        leaves = tuple(
            Leaf(_unpack(row[:-2], disk_id, generation), _refs(row[-2]), bool(row[-1]))
            for row in values["leaves"]
        )
        joins = tuple(_unpack(row, disk_id, generation) for row in values["joins"])
        points = _table(values["points"], values["labels"])
        doomed = {_doomed(name, disk_id): int(since) for name, since in values["doomed"].items()}
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError):
        raise FormatError("the ledger is damaged", where=where) from None
    position = numbers["base"]
    for leaf in leaves:
        if leaf.piece.from_epoch != position or leaf.piece.to_epoch <= position:
            raise FormatError("the ledger's deltas do not follow each other", where=where)
        position = leaf.piece.to_epoch
    if position != numbers["horizon"]:
        raise FormatError("the ledger's deltas do not lead to its horizon", where=where)
    ends = {leaf.piece.to_epoch for leaf in leaves}
    if not set(points.epoch.tolist()) <= ends or (points.epoch[1:] <= points.epoch[:-1]).any():
        raise FormatError("the ledger has points that no delta ends at", where=where)
    return Ledger(
        generation, numbers["base"], numbers["horizon"], numbers["serial"], numbers["now"],
        leaves, joins, points, doomed,
    )  # fmt: skip


def _pack(piece: PieceInfo) -> list[Any]:
    listed = piece.listed
    said: list[Any] = [] if listed is None else [
        listed.time_ns, listed.first_time_ns, listed.size, int(listed.flags),
        listed.changed_bytes, listed.stored_bytes, listed.tail_bytes, listed.to_digest.hex(),
        listed.label,
    ]  # fmt: skip
    return [piece.level, piece.from_epoch, piece.to_epoch, piece.revision, piece.size, said]


def _unpack(row: list[Any], disk_id: str, generation: int) -> PieceInfo:
    level, low, high, revision, size, said = row
    for number in (level, low, high, revision, size):
        if type(number) is not int or not 0 <= number < LIMIT:
            raise ValueError("a number is none")
    if level > 9 or revision > _REVISION_MAX or low >= high:
        raise ValueError("not a delta")
    name = (
        joined_name(disk_id, generation, level, (low, high), revision)
        if level
        else slot_name(disk_id, generation, low)
    )
    listed = None
    if said:
        time_ns, first, disk_size, flags, changed, stored, tail, digest, label = said
        listed = ListedHead(
            high, int(time_ns), int(first), int(disk_size), Flags(flags), int(changed),
            int(stored), int(tail), bytes.fromhex(digest), str(label),
        )  # fmt: skip
    return PieceInfo(name, generation, level, low, high, size, listed, revision)


def _refs(values: list[str]) -> tuple[str, ...]:
    for ref in values:
        if not is_id(ref) and not (len(ref) == 16 and is_id(ref * 2)):
            raise ValueError("a reference is none")
    return tuple(values)


def _doomed(name: str, disk_id: str) -> str:
    # Nothing that stands in an object leads outside its disk, least of all to a deletion.
    own = (f"disks/{disk_id}/g", f"segments/{disk_id}/")
    if not name.startswith(own) or ".." in name:
        raise ValueError("a name outside the disk")
    return name


def _table(columns: dict[str, list[int]], labels: dict[str, str]) -> PointTable:
    arrays = [np.array(columns[name], np.uint64) for name in _COLUMNS[:-1]]
    flags = np.array(columns["flags"], np.uint8)
    if {len(column) for column in arrays} != {len(flags)}:
        raise ValueError("columns differ in length")
    epoch, time_ns, size, changed, stored = arrays
    return PointTable(epoch, time_ns, size, changed, stored, flags,
                      {int(key): str(text) for key, text in labels.items()})  # fmt: skip
