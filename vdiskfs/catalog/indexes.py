"""Indexes of deltas that are to be joined: small ones are read whole, large ones in parts.

What is joined is merged block by block, so that the memory it takes is what is held here,
whatever the indexes' size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import trio

from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.catalog.tables import SLOT_INDEX_LIMIT, Tables, tail_bytes
from vdiskfs.delta.layout import OBJECT_MAX, DeltaHead
from vdiskfs.delta.local import LocalDelta, open_tail
from vdiskfs.errors import DamagedError
from vdiskfs.point import Piece, PieceInfo
from vdiskfs.point.piece import check_identity
from vdiskfs.units import pages_of

JOIN_LIMIT = 128 << 20
"""Bytes of indexes that are in memory at once, of one join."""

INDEX_LIMIT = OBJECT_MAX - (64 << 20)
"""A joined delta is one object: above this nothing is joined."""

# Of a large index parts are read, and two of each are held: entries lie in one place, runs of
# zeros in another.
_PART = 4 << 20
_PART_LEAST = 64 << 10
_READ = 4 << 20
# A page that is an entry of its own takes 14 bytes as stored, measured with random ones.
_PAGE_COST = 24


def index_bound(way: Sequence[PieceInfo]) -> int:
    """Return how large the index over several deltas may become, at most."""
    total = sum(tail_bytes(piece) for piece in way)
    if any(piece.listed is None for piece in way):
        return total
    pages = max(pages_of(piece.listed.size) for piece in way if piece.listed is not None)
    return min(total, pages * _PAGE_COST + (1 << 20))


class Indexes:
    """The indexes of deltas that follow each other, in the order of the line.

    ``tails`` are of those that were read whole.
    """

    def __init__(self, way: Sequence[PieceInfo], found: Sequence[bytes | LocalDelta]) -> None:
        """Use ``read_indexes``."""
        self._way = way
        self._found = found
        self.tails = {
            piece.name: one
            for piece, one in zip(way, found, strict=True) if isinstance(one, bytes)
        }  # fmt: skip

    def open(self, vault_id: str, disk_id: str) -> list[LocalDelta]:
        """Open them all; in a thread that trio has started, in which they are read, too.

        Raises:
            FormatError: one is damaged.
        """
        deltas: list[LocalDelta] = []
        for piece, found in zip(self._way, self._found, strict=True):
            delta = open_tail(found, where=piece.name) if isinstance(found, bytes) else found
            check_identity(delta.head, piece, vault_id=vault_id, disk_id=disk_id)
            deltas.append(delta)
        return deltas


async def read_indexes(
    tables: Tables, cache: IndexCache | None, way: Sequence[PieceInfo]
) -> Indexes:
    """Read the indexes of deltas, or be ready to read them in parts.

    Raises:
        DamagedError, NotFoundError: one is damaged.
    """
    part = max(_PART_LEAST, min(_PART, JOIN_LIMIT // (2 * len(way))))
    fits = sum(tail_bytes(piece) for piece in way) <= JOIN_LIMIT
    found: list[bytes | LocalDelta] = []
    for piece in way:
        is_whole = fits or tail_bytes(piece) <= 2 * part
        if is_whole and not await tables.lies_elsewhere(piece):
            found.append(await read_tail(tables, cache, piece))
        else:
            opened = await tables.piece(piece)
            found.append(
                LocalDelta(opened.head, opened.root, _Parts(opened, part).read, piece.name)
            )
    return Indexes(way, found)


class _Parts:
    """Reads the blocks of a large index, which come in order, many in one request."""

    def __init__(self, piece: Piece, part: int) -> None:
        self._piece = piece
        self._part = part
        self._held: list[tuple[int, int, bytes]] = []

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Return bytes of an object of the delta; in a thread that trio has started."""
        for object_number, start, data in self._held:
            if object_number == number and start <= offset:
                found = data[offset - start : offset - start + length]
                if len(found) == length:
                    return found
        data = trio.from_thread.run(self._fetch, number, offset, length)
        self._held = [(number, offset, data), *self._held[:1]]
        return data[:length]

    async def _fetch(self, number: int, offset: int, length: int) -> bytes:
        size = self._piece.head.object_size
        if number:
            size = (await self._piece.object_ref(number)).size
        return await self._piece.read(
            number, offset, max(length, min(self._part, size - offset))
        )  # fmt: skip


async def read_tail(tables: Tables, cache: IndexCache | None, piece: PieceInfo) -> bytes:
    """Return the tail of a delta: from the cache if it is right there, else the vault's."""
    length = tail_bytes(piece)
    if cache is not None:
        found = await trio.to_thread.run_sync(cache.get, piece.name)
        if found is not None and len(found) == length and _is_whole(found, piece):
            return found
    if not 0 < length <= piece.size:
        raise DamagedError(f"{piece.name}: the listing says an impossible length")
    parts = []
    for start in range(piece.size - length, piece.size, _READ):
        size = min(_READ, piece.size - start)
        parts.append(await tables.store.read_range(piece.name, start, size))
    tail = b"".join(parts)
    if cache is not None and length <= SLOT_INDEX_LIMIT:
        # What is thinned is joined again a few times, from hour to hour.
        await trio.to_thread.run_sync(cache.put, piece.name, tail)
    return tail


def _is_whole(tail: bytes, piece: PieceInfo) -> bool:
    try:
        open_tail(tail, where=piece.name)
    except DamagedError:
        return False
    return True


def keep_tail(cache: IndexCache, name: str, path: Path, head: DeltaHead) -> None:
    """Put the tail of a delta that was just written into the cache; in a thread."""
    if head.tail_bytes <= JOIN_LIMIT:
        with path.open("rb") as file:
            file.seek(head.tail_offset)
            cache.put(name, file.read())
