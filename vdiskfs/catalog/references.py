"""What the deltas of a disk say of objects that are damaged.

All deltas are opened once, one after the other, and none is kept: of those that refer to a
damaged object it is noted which rows of their indexes do. What they say is read again when the
object is healed, so that no more than one object's frames are in memory.
"""

from __future__ import annotations

import bisect
from array import array
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vdiskfs.catalog.beside import Beside, is_first
from vdiskfs.catalog.copies import Copies
from vdiskfs.catalog.inspection import Inspection
from vdiskfs.catalog.ledger import LEAF_LEVEL, ledger_name
from vdiskfs.catalog.records import DiskRecord
from vdiskfs.catalog.reframe import Frame, add_frames
from vdiskfs.catalog.walk import Listing, is_damage
from vdiskfs.delta.blocks import DATA, ZEROS
from vdiskfs.delta.entries import distinct
from vdiskfs.delta.layout import LIMIT
from vdiskfs.delta.names import parse_joined, parse_segment, parse_slot
from vdiskfs.errors import VdiskfsError
from vdiskfs.point import Piece, PieceInfo

_OPEN = 16
"""Deltas that stay open: neighbours refer to the same objects."""


@dataclass(slots=True)
class Said:
    """What others say of one object: how large it is, its frames, blocks of indexes in it."""

    size: int | None = None
    writer_id: str = ""
    frames: dict[int, Frame] = field(default_factory=dict)
    blocks: list[tuple[int, int, bytes]] = field(default_factory=list)


@dataclass(slots=True)
class _Use:
    """What a delta has to do with an object: the first keys of rows of its index."""

    info: PieceInfo
    number: int
    frames: array[int] = field(default_factory=lambda: array("Q"))
    """Of entries that lead into the object."""
    blocks: dict[int, array[int]] = field(default_factory=dict)
    """Of blocks that lie in it, by kind."""


@dataclass(slots=True)
class _About:
    """What is kept of one damaged object."""

    size: int | None = None
    writer_id: str = ""
    uses: list[_Use] = field(default_factory=list)


class References:
    """The deltas of a disk, and what they say of some objects."""

    def __init__(
        self, work: Inspection, listings: Sequence[Listing], names: Collection[str]
    ) -> None:
        """Use ``gather``."""
        self.beside = Beside(work, listings)
        self.copies = Copies(work, self.beside, names)
        self.names = names
        self.unread = {name for name in names if _tells(work.record, name)}
        """Slots, leaves and ledgers that may say more: they are damaged."""
        self._work = work
        self._about = {name: _About() for name in names}
        self._open: OrderedDict[str, Piece] = OrderedDict()

    async def look(self) -> None:
        """Open the deltas, and note which of them say something."""
        if not any(_has_frames(name) for name in self.names):
            return
        for info in self.beside.deltas():
            if info.name not in self.names and info.is_alone:
                continue
            piece = await self.beside.opened(info)
            if piece is not None and await self._learn(piece):
                self.unread.discard(info.name)
            elif is_first(info):
                self.unread.add(info.name)

    async def _learn(self, piece: Piece) -> bool:
        """Note what a delta has to do with which objects; say whether that could all be read."""
        whole, wanted = True, dict[int, _Use]()
        try:
            for number in range(1, piece.objects + 1):
                ref = await piece.object_ref(number)
                about = self._about.get(ref.name(self._work.record.id))
                if about is not None:
                    about.size, about.writer_id = ref.size, piece.head.writer_id
                    wanted[number] = _Use(piece.info, number)
                    about.uses.append(wanted[number])
            if not wanted:
                return True
            for kind in (DATA, ZEROS):
                for row in await piece.rows(kind, 0, LIMIT - 1):
                    use = wanted.get(int(row["object"]))
                    if use is not None:
                        use.blocks.setdefault(kind, array("Q")).append(int(row["first"]))
                    if kind == DATA:
                        whole &= await self._learn_block(piece, row, wanted)
        except VdiskfsError as error:
            if not is_damage(error):
                raise
            return False
        return whole

    async def _learn_block(self, piece: Piece, row: np.void, wanted: Mapping[int, _Use]) -> bool:
        try:
            entries = await piece.entries(row)
        except VdiskfsError as error:
            if not is_damage(error):
                raise
            return False
        for number in distinct(entries.object).tolist():
            if number in wanted:
                wanted[number].frames.append(int(row["first"]))
        return True

    async def said(self, name: str) -> Said:
        """Return what the deltas say of an object: read again, for this one alone."""
        about = self._about[name]
        said = Said(about.size, about.writer_id)
        for use in about.uses:
            try:
                await self._tell(use, said)
            except VdiskfsError as error:
                if not is_damage(error):
                    raise
                if is_first(use.info):
                    self.unread.add(use.info.name)
        return said

    async def _tell(self, use: _Use, said: Said) -> None:
        piece = await self._piece(use.info)
        for kind, keys in use.blocks.items():
            for row in await _rows(piece, kind, keys):
                said.blocks.append((int(row["offset"]), int(row["length"]), row["hash"].tobytes()))
        for row in await _rows(piece, DATA, use.frames):
            entries = await piece.entries(row)
            mine = np.flatnonzero(entries.object == use.number)
            add_frames(said.frames, entries.rows(mine))

    async def _piece(self, info: PieceInfo) -> Piece:
        piece = self._open.pop(info.name, None)
        if piece is None:
            piece = await self._work.open(info)
        self._open[info.name] = piece
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)
        return piece


async def gather(
    work: Inspection, listings: Sequence[Listing], names: Collection[str]
) -> References:
    """Open the deltas of a disk and learn which of them say something of some objects."""
    found = References(work, listings, names)
    await found.look()
    return found


async def _rows(piece: Piece, kind: int, keys: array[int]) -> list[np.void]:
    """Return the rows with these first keys, which are sorted."""

    def needed(first: int, last: int) -> bool:
        at = bisect.bisect_left(keys, first)
        return at < len(keys) and keys[at] <= last

    if not keys:
        return []
    rows = await piece.rows(kind, 0, LIMIT - 1, needed)
    return [row for row in rows if _has(keys, int(row["first"]))]


def _has(keys: array[int], key: int) -> bool:
    at = bisect.bisect_left(keys, key)
    return at < len(keys) and keys[at] == key


def _has_frames(name: str) -> bool:
    """Say whether others may refer to an object."""
    joined = parse_joined(name)
    if joined is not None:
        return joined[1] == LEAF_LEVEL
    return parse_slot(name) is not None or parse_segment(name) is not None


def _tells(record: DiskRecord, name: str) -> bool:
    """Say whether an object tells what other objects hold, and may be missing in the listing."""
    slot = parse_slot(name)
    if slot is not None:
        ref = record.ledgers.get(slot[0])
        return slot[1] >= (ref.horizon if ref is not None else record.base(slot[0]))
    return any(name == ledger_name(record.id, number, ref.id)
               for number, ref in record.ledgers.items())  # fmt: skip
