"""The points of lines of which no document tells any more, by the deltas that lie there.

For ``check``: without its ledger no point of a thinned line can be read, without its record no
point of a disk. Which points these were is told by the deltas themselves: each ends at one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vdiskfs.catalog.ledger import LEAF_LEVEL, Ledger, decode_ledger
from vdiskfs.catalog.line import END, choose
from vdiskfs.delta.layout import head_from_metadata
from vdiskfs.delta.names import joined_prefix, parse_joined, parse_slot, slot_prefix
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.point import PieceInfo
from vdiskfs.store import READ_LIMIT, ObjectInfo, Store

_LEDGER = re.compile(r"disks/[0-9a-f]{32}/g([0-9a-f]{8})\.ledger/[0-9a-f]{32}")


async def thinned_points(
    store: Store, disk_id: str, generation: int, base: int, horizon: int
) -> list[int]:
    """Return the epochs of a line's points up to its horizon, where its ledger is lost.

    What thinning has merged and not yet deleted lies inside longer deltas, and is left out.
    """
    prefixes = (slot_prefix(disk_id, generation), joined_prefix(disk_id, generation, LEAF_LEVEL))
    listed = [info for prefix in prefixes for info in [one async for one in store.list(prefix)]]
    return _ends([one for one in map(_piece, listed) if one is not None], base, horizon)


async def all_points(store: Store, disk_id: str) -> dict[int, list[int]]:
    """Return the epochs of all points of a disk by generation, where its record is lost."""
    pieces: dict[int, list[PieceInfo]] = {}
    ledgers: dict[int, Ledger] = {}
    for info in [one async for one in store.list(f"disks/{disk_id}/g")]:
        piece, match = _piece(info), _LEDGER.fullmatch(info.name)
        if piece is not None:
            pieces.setdefault(piece.generation, []).append(piece)
        elif match is not None:
            try:
                data, _ = await store.read(info.name, limit=READ_LIMIT)
                ledger = decode_ledger(data, disk_id, where=info.name)
            except (DamagedError, NotFoundError):
                continue
            known = ledgers.get(ledger.generation)
            newest = (known.horizon, known.serial) if known is not None else (-1, -1)
            if (ledger.horizon, ledger.serial) > newest:
                ledgers[ledger.generation] = ledger
    found = {}
    for generation in sorted(pieces.keys() | ledgers.keys()):
        line, of_line = ledgers.get(generation), pieces.get(generation, [])
        kept = [] if line is None else line.points.epoch.tolist()
        start = 0 if line is None else line.horizon
        epochs = [*kept, *_ends(of_line, start, END)]
        if epochs:
            found[generation] = epochs
    return found


def _piece(info: ObjectInfo) -> PieceInfo | None:
    """Return what an object is as a slot or a leaf; None: it is neither, or a fence."""
    listed = head_from_metadata(dict(info.metadata))
    joined, slot = parse_joined(info.name), parse_slot(info.name)
    if joined is not None and joined[1] == LEAF_LEVEL and joined[2] < joined[3]:
        generation, _, start, end, revision = joined
        return PieceInfo(info.name, generation, LEAF_LEVEL, start, end, info.size, listed, revision)
    if slot is None:
        return None
    generation, start = slot
    end = listed.to_epoch if listed is not None else start + 1
    return PieceInfo(info.name, generation, 0, start, end, info.size) if end > start else None


def _ends(pieces: Sequence[PieceInfo], start: int, end: int) -> list[int]:
    return [piece.to_epoch for piece in choose(pieces, (start, end))]
