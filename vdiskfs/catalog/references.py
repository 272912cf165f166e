"""What the deltas of a disk say of objects that are damaged, and where a page is once more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import trio

from vdiskfs.catalog.inspection import READS_AT_ONCE, Inspection
from vdiskfs.catalog.ledger import LEAF_LEVEL, ledger_name
from vdiskfs.catalog.records import DiskRecord
from vdiskfs.catalog.reframe import Frame, add_frames
from vdiskfs.catalog.walk import Listing, is_damage
from vdiskfs.delta.blocks import DATA, ZEROS
from vdiskfs.delta.entries import Entries, select_pages
from vdiskfs.delta.layout import LIMIT, DeltaHead, head_from_metadata
from vdiskfs.delta.names import parse_slot
from vdiskfs.errors import VdiskfsError
from vdiskfs.point import Piece, PieceInfo
from vdiskfs.point.fetch import fetch_pages, locate
from vdiskfs.units import PAGE_SIZE

Place = tuple[int, int]
"""A generation and an epoch."""


@dataclass(slots=True)
class Said:
    """What others say of one object: how large it is, its frames, blocks of indexes in it."""

    size: int | None = None
    writer_id: str = ""
    frames: dict[int, Frame] = field(default_factory=dict)
    blocks: list[tuple[int, int, bytes]] = field(default_factory=list)


@dataclass(slots=True)
class References:
    """The deltas of a disk that can be opened, and what they say of some objects."""

    said: dict[str, Said]
    pieces: list[Piece] = field(default_factory=list)
    starts: dict[Place, tuple[bytes, int]] = field(default_factory=dict)
    """Digest and size that a delta begins with, by where."""
    ends: dict[Place, tuple[bytes, int]] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    """Slots, leaves and ledgers that may say more: they are damaged."""


def deltas_of(listing: Listing) -> list[PieceInfo]:
    """Return all deltas of a line that points may be read through."""
    number = listing.generation
    slots = [
        PieceInfo(info.name, number, 0, epoch, 0, info.size, head_from_metadata(info.metadata))
        for epoch, info in listing.slots.items()
    ]
    return [*listing.leaves.values(), *slots, *listing.joined]


async def gather(work: Inspection, listings: Sequence[Listing], names: Iterable[str]) -> References:
    """Open all deltas of a disk and learn what they say of the objects with these names."""
    found = References({name: Said() for name in names})
    found.unread |= {name for name in names if _tells(work.record, name)}
    for listing in listings:
        for info in deltas_of(listing):
            try:
                piece = await work.open(info)
            except VdiskfsError as error:
                if not is_damage(error):
                    raise
                found.unread |= {info.name} if _is_first(info) else set()
                continue
            found.pieces.append(piece)
            _note_links(found, piece.head)
            whole = False
            try:
                whole = await _learn(work, found, piece)
            except VdiskfsError as error:
                if not is_damage(error):
                    raise
            if whole:
                found.unread.discard(info.name)
            elif _is_first(info):
                found.unread.add(info.name)
    return found


def _tells(record: DiskRecord, name: str) -> bool:
    """Say whether an object tells what other objects hold, and may be missing in the listing."""
    slot = parse_slot(name)
    if slot is not None:
        ref = record.ledgers.get(slot[0])
        return slot[1] >= (ref.horizon if ref is not None else record.base(slot[0]))
    return any(name == ledger_name(record.id, number, ref.id)
               for number, ref in record.ledgers.items())  # fmt: skip


def _is_first(info: PieceInfo) -> bool:
    """Say whether a delta is not made of others, which tell what it tells."""
    return info.level in (0, LEAF_LEVEL)


def _note_links(found: References, head: DeltaHead) -> None:
    found.starts[head.generation, head.from_epoch] = (head.from_digest, head.from_size)
    found.ends[head.generation, head.to_epoch] = (head.to_digest, head.size)


async def _learn(work: Inspection, found: References, piece: Piece) -> bool:
    """Learn what a delta says; say whether that is all it has to say."""
    whole = True
    wanted: dict[int, Said] = {}
    for number in range(1, piece.objects + 1):
        ref = await piece.object_ref(number)
        said = found.said.get(ref.name(work.record.id))
        if said is not None:
            said.size = ref.size
            said.writer_id = piece.head.writer_id
            wanted[number] = said
    if not wanted:
        return True
    for kind in (DATA, ZEROS):
        for row in await piece.rows(kind, 0, LIMIT - 1):
            said = wanted.get(int(row["object"]))
            if said is not None:
                said.blocks.append((int(row["offset"]), int(row["length"]), row["hash"].tobytes()))
            if kind == DATA:
                whole &= await _learn_block(piece, row, wanted)
    return whole


async def _learn_block(piece: Piece, row: np.void, wanted: Mapping[int, Said]) -> bool:
    try:
        entries = await piece.entries(row)
    except VdiskfsError as error:
        if not is_damage(error):
            raise
        return False
    for number, said in wanted.items():
        mine = np.flatnonzero(entries.object == number)
        if len(mine):
            add_frames(said.frames, entries.rows(mine))
    return True


# ---- the same page once more ------------------------------------------------------------


async def find_copies(
    work: Inspection, pieces: Sequence[Piece], wanted: Mapping[int, set[int]]
) -> dict[tuple[int, int], bytes]:
    """Read pages out of whichever frame of the disk holds them; by number and sum.

    Args:
        work: the disk's.
        pieces: its deltas.
        wanted: sums by page.
    """
    search = _Search(work, wanted)
    for piece in pieces:
        if not _is_first(piece.info):
            continue  # it refers to what slots and leaves have
        try:
            await search.look_into(piece)
        except VdiskfsError as error:
            if not is_damage(error):
                raise
    return search.found


class _Search:
    """Looks for pages in one delta after the other."""

    def __init__(self, work: Inspection, wanted: Mapping[int, set[int]]) -> None:
        self.found: dict[tuple[int, int], bytes] = {}
        self._work = work
        self._wanted = wanted
        self._keys = np.array(sorted(wanted), np.uint64)

    def _needed(self, first: int, last: int) -> bool:
        at = int(np.searchsorted(self._keys, np.uint64(first)))
        return at < len(self._keys) and int(self._keys[at]) <= last

    async def look_into(self, piece: Piece) -> None:
        """Read what it holds of the pages wanted."""
        for row in await piece.rows(DATA, 0, LIMIT - 1, self._needed):
            entries = await piece.entries(row)
            pageno, owner = entries.pages()
            for at in np.flatnonzero(np.isin(pageno, self._keys)).tolist():
                key = (int(pageno[at]), int(entries.sums[at]))
                if key in self.found or key[1] not in self._wanted[key[0]]:
                    continue
                chosen = select_pages(entries, pageno, owner, np.array([at]))
                page = await _page(self._work, piece, chosen)
                if page is not None:
                    self.found[key] = page


async def _page(work: Inspection, piece: Piece, chosen: Entries) -> bytes | None:
    out = bytearray(PAGE_SIZE)
    pages = chosen.pages()[0]
    limiter = trio.CapacityLimiter(READS_AT_ONCE)
    try:
        await fetch_pages(work.store, [await locate(piece, chosen)], pages, out, limiter)
    except VdiskfsError as error:
        if not is_damage(error):
            raise
        return None
    return bytes(out)
