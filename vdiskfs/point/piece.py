"""One delta of a chain, slot or joined, read from the vault block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vdiskfs.delta.blocks import BLOCK_RAW_MAX, DATA, OBJECTS, PAGE, Rows
from vdiskfs.delta.columns import decode_data, decode_objects, decode_zeros
from vdiskfs.delta.entries import Entries, Extents
from vdiskfs.delta.index import (
    check_entries,
    decode_page,
    decode_root,
    find_rows,
    object_count,
)
from vdiskfs.delta.layout import (
    HEAD_SIZE,
    LIMIT,
    DeltaHead,
    Kind,
    ListedHead,
    decode_head,
    listed_of,
)
from vdiskfs.delta.names import joined_name, slot_name
from vdiskfs.delta.points import PointTable, decode_points
from vdiskfs.delta.refs import ObjectRef, ObjectTable
from vdiskfs.errors import DamagedError, FormatError, NotFoundError
from vdiskfs.point.cache import Block, BlockCache
from vdiskfs.sealed import expect_size
from vdiskfs.store import Store
from vdiskfs.units import PAGES_PER_CHUNK

# An object of this size is read whole at once; of others this much of the end.
WHOLE = 32 * 1024
TAIL = 256 * 1024

T = TypeVar("T", bound=Block)
# needed(first, last): whether anything in pages [first, last] is asked for.
Needed = Callable[[int, int], bool]


@dataclass(frozen=True, slots=True)
class PieceInfo:
    """What is known of a delta of the vault before it is read.

    ``listed`` is what the listing said, or None: the head says it then.
    """

    name: str
    generation: int
    level: int
    from_epoch: int
    to_epoch: int
    size: int
    listed: ListedHead | None = None
    revision: int = 0

    @property
    def is_alone(self) -> bool:
        """Whether it is a slot that refers to no other object, as the listing said."""
        listed = self.listed
        return not self.level and listed is not None and listed.stored_bytes == self.size


class Piece:
    """An open delta: its head and root are checked, blocks are read when needed."""

    def __init__(
        self, store: Store, cache: BlockCache, info: PieceInfo, head: DeltaHead, tail: bytes
    ) -> None:
        """Use ``open_piece``."""
        self.info = info
        self.head = head
        self._store = store
        self._cache = cache
        self._tail = tail
        self._tail_at = head.object_size - len(tail)
        self.root = np.zeros(0, np.void)
        self.objects = 0

    @property
    def name(self) -> str:
        """Return the object's name."""
        return self.info.name

    async def load_root(self) -> None:
        """Read and check the root."""
        head = self.head
        stored = await self.read(0, head.root_offset, head.root_length)
        self.root = decode_root(head, stored, where=self.name)
        self.objects = object_count(self.root)

    async def read(self, number: int, offset: int, length: int) -> bytes:
        """Return stored bytes of object ``number`` (0: this delta)."""
        if number == 0 and offset >= self._tail_at:
            start = offset - self._tail_at
            part = self._tail[start : start + length]
            if len(part) == length:
                return part
        name = self.name if number == 0 else (await self.object_ref(number)).name(self.head.disk_id)
        return await self._store.read_range(name, offset, length)

    def held(self, number: int, offset: int, length: int) -> bytes | None:
        """Return stored bytes if they are in memory already."""
        start = offset - self._tail_at
        if number or start < 0:
            return None
        part = self._tail[start : start + length]
        return part if len(part) == length else None

    async def rows(self, kind: int, first: int, last: int, needed: Needed | None = None) -> Rows:
        """Return the rows of a kind whose keys meet [first, last].

        With ``needed`` only those (and only those pages of rows are read) whose keys it
        says are needed.
        """
        parts: list[Rows] = []
        for row in find_rows(self.root, kind, first, last):
            if needed is not None and not needed(int(row["first"]), int(row["last"])):
                continue
            if int(row["kind"]) & PAGE:
                page = await self._block(row, lambda row, stored: decode_page(
                    row, stored, self.head, where=self.name
                ), 4)  # fmt: skip
                found = find_rows(page, kind, first, last)
                if needed is not None:
                    keep = [needed(int(item["first"]), int(item["last"])) for item in found]
                    found = found[np.array(keep, np.bool_)]
                parts.append(found)
            else:
                parts.append(row.reshape(1))
        if not parts:
            return self.root[:0]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    async def next_row(self, kind: int, key: int) -> np.void | None:
        """Return the first row of a kind with a key at or after ``key``."""
        rows = find_rows(self.root, kind, key, LIMIT - 1)
        if not len(rows):
            return None
        if int(rows[0]["kind"]) & PAGE:
            rows = await self.rows(kind, key, max(key, int(rows[0]["last"])))
        row: np.void = rows[0]
        return row

    async def next_data_key(self, page: int) -> int | None:
        """Return the first page at or after ``page`` in a chunk that has entries, or None.

        Where the block that knows is damaged it is ``page``: who reads it finds a way round.
        """
        row = await self.next_row(DATA, page)
        if row is None or page <= int(row["first"]):
            return None if row is None else int(row["first"])
        try:
            chunks = (await self.entries(row)).chunkno
        except (DamagedError, NotFoundError):
            return page
        after = int(np.searchsorted(chunks, np.uint64(page // PAGES_PER_CHUNK)))
        return max(page, int(chunks[after]) * PAGES_PER_CHUNK) if after < len(chunks) else page

    async def entries(self, row: np.void) -> Entries:
        """Return a block of entries."""

        def decode(row: np.void, stored: bytes) -> Entries:
            entries = decode_data(row, stored, where=self.name)
            check_entries(entries, self.head, self.objects, where=self.name)
            return entries

        return await self._block(row, decode, 1)

    async def zeros(self, row: np.void) -> Extents:
        """Return a block of runs of zeros."""
        return await self._block(
            row, lambda row, stored: decode_zeros(row, stored, where=self.name), 1
        )

    async def object_ref(self, number: int) -> ObjectRef:
        """Return what an object number means."""
        rows = await self.rows(OBJECTS, number, number)
        if not len(rows) or number < 1:
            raise FormatError("an entry refers to no object", where=self.name)
        table: ObjectTable = await self._block(
            rows[0], lambda row, stored: decode_objects(row, stored, where=self.name), 1
        )
        ref = table.ref(number - int(rows[0]["first"]))
        expect_size(self._store, ref.name(self.head.disk_id), ref.size)
        return ref

    async def points(self, row: np.void) -> PointTable:
        """Return a block of points."""
        return await self._block(
            row, lambda row, stored: decode_points(row, stored, where=self.name), 1
        )

    async def _block(self, row: np.void, decode: Callable[[np.void, bytes], T], weight: int) -> T:
        length = int(row["length"])
        if length > BLOCK_RAW_MAX:
            raise FormatError("a block is larger than the format allows", where=self.name)
        # The key has the hash: what another delta says of this place is another block.
        key = (self.name + row["hash"].tobytes().hex(), int(row["offset"]))
        found = self._cache.get(key)
        if found is None:
            stored = await self.read(int(row["object"]), int(row["offset"]), length)
            found = decode(row, stored)
            self._cache.put(key, found, 256 + weight * int(row["raw"]))
        return found  # type: ignore[return-value]  # a key is decoded in one way only


async def open_piece(
    store: Store, cache: BlockCache, info: PieceInfo, *, vault_id: str, disk_id: str
) -> Piece:
    """Open a delta in one request (two if its root is larger than 256 KiB).

    Raises:
        DamagedError: it is not the delta that its name says, or not whole.
        NotFoundError: it is not there.
    """
    if info.size < 2 * HEAD_SIZE:
        raise FormatError("too short for a delta", where=info.name)
    wanted = info.listed.tail_bytes if info.listed else TAIL
    wanted = max(2 * HEAD_SIZE, min(wanted, TAIL))
    length = info.size if info.size <= WHOLE else min(info.size, wanted)
    tail = await store.read_range(info.name, info.size - length, length)
    head = decode_head(tail[-HEAD_SIZE:], where=info.name)
    check_identity(head, info, vault_id=vault_id, disk_id=disk_id)
    if length == info.size and tail[:HEAD_SIZE] != tail[-HEAD_SIZE:]:
        raise FormatError("the two heads differ", where=info.name)
    piece = Piece(store, cache, info, head, tail)
    await piece.load_root()
    return piece


def check_identity(head: DeltaHead, info: PieceInfo, *, vault_id: str, disk_id: str) -> None:
    """Check that a delta is the one that its name and the listing say.

    Raises:
        FormatError: it is another one.
    """
    if head.vault_id != vault_id or head.disk_id != disk_id or head.object_size != info.size:
        raise FormatError("not the object that was written under this name", where=info.name)
    if head.kind is Kind.SLOT:
        name = slot_name(disk_id, head.generation, head.from_epoch)
    elif head.kind is Kind.JOINED:
        epochs = (head.from_epoch, head.to_epoch)
        name = joined_name(disk_id, head.generation, head.level, epochs, info.revision)
    else:
        name = ""
    if name != info.name:
        raise FormatError("not the object that was written under this name", where=info.name)
    if info.listed is not None and info.listed != listed_of(head):
        raise FormatError("the listing says another thing than the head", where=info.name)
