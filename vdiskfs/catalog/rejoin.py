"""Joined deltas made again: they hold nothing that what they join does not hold."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio

from vdiskfs.catalog.indexes import JOIN_LIMIT
from vdiskfs.catalog.ledger import JOIN_LEVEL, LEAF_LEVEL, shortest
from vdiskfs.catalog.tables import tail_bytes
from vdiskfs.delta.joined import points_of, write_joined
from vdiskfs.delta.layout import DeltaHead
from vdiskfs.delta.local import LocalDelta, open_tail
from vdiskfs.delta.points import concat_points
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.point import PieceInfo
from vdiskfs.point.piece import check_identity
from vdiskfs.store import Store

_READ = 4 << 20


async def make_again(
    store: Store, info: PieceInfo, pieces: Sequence[PieceInfo], *, vault_id: str, disk_id: str
) -> tuple[bytes, DeltaHead] | None:
    """Join what a joined delta joined; return its bytes and its head.

    Args:
        store: the vault's.
        info: the delta that is damaged.
        pieces: all deltas of its line.
        vault_id: the vault's.
        disk_id: the disk's.

    None: what it joined is not there any more, or damaged itself.
    """
    parts = [one for one in pieces if _level(one) < _level(info)]
    way = shortest(parts, info.from_epoch, info.to_epoch)
    if way is None or len(way) < 2 or sum(tail_bytes(one) for one in way) > JOIN_LIMIT:
        return None
    try:
        tails = [await _tail(store, one) for one in way]
    except (DamagedError, NotFoundError):
        return None

    def write() -> tuple[bytes, DeltaHead]:
        deltas: list[LocalDelta] = []
        for piece, tail in zip(way, tails, strict=True):
            delta = open_tail(tail, where=piece.name)
            check_identity(delta.head, piece, vault_id=vault_id, disk_id=disk_id)
            deltas.append(delta)
        points = None
        if info.level == JOIN_LEVEL:
            last = concat_points([points_of(deltas[-1])])
            points = last.part(len(last) - 1, len(last))
        with tempfile.TemporaryDirectory(prefix="vdiskfs-repair-") as scratch:
            path, head = write_joined(deltas, info.level, Path(scratch), points=points)
            return path.read_bytes(), head

    try:
        return await trio.to_thread.run_sync(write)
    except DamagedError:
        return None


def _level(piece: PieceInfo) -> int:
    """Return what is made of what: a leaf is the beginning of things, as a slot is."""
    return 0 if piece.level == LEAF_LEVEL else piece.level


async def _tail(store: Store, piece: PieceInfo) -> bytes:
    length = tail_bytes(piece)
    if not 0 < length <= piece.size:
        raise DamagedError(f"{piece.name}: the listing says an impossible length")
    parts = []
    for start in range(piece.size - length, piece.size, _READ):
        size = min(_READ, piece.size - start)
        parts.append(await store.read_range(piece.name, start, size))
    return b"".join(parts)
