"""Tables of points by delta, and open deltas: what the vault said once stays true."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from vdiskfs.delta.blocks import DATA, POINTS, ZEROS
from vdiskfs.delta.layout import LIMIT
from vdiskfs.delta.points import PointTable, concat_points, make_points, point_row
from vdiskfs.errors import DamagedError, FormatError, NotFoundError
from vdiskfs.point import BlockCache, Piece, PieceInfo, open_piece
from vdiskfs.store import Store

_PIECES = 64
# A larger index of a slot is not copied from level to level while few deltas lead to any point
# (1.1 GiB changed at random, 2 GiB in one piece).
SLOT_INDEX_LIMIT = 4 << 20


class Tables:
    """The points inside each delta of a disk."""

    def __init__(self, store: Store, blocks: BlockCache, vault_id: str, disk_id: str) -> None:
        """Read from a store, through a cache of blocks."""
        self.store = store
        self.blocks = blocks
        self.vault_id = vault_id
        self.disk_id = disk_id
        self._tables: dict[str, PointTable] = {}
        self._pieces: OrderedDict[str, Piece] = OrderedDict()
        self._elsewhere: dict[str, bool] = {}

    async def piece(self, info: PieceInfo) -> Piece:
        """Open a delta; the ones opened last are kept."""
        found = self._pieces.get(info.name)
        if found is None:
            found = await open_piece(
                self.store, self.blocks, info, vault_id=self.vault_id, disk_id=self.disk_id
            )
            self._pieces[info.name] = found
            if len(self._pieces) > _PIECES:
                self._pieces.popitem(last=False)
        self._pieces.move_to_end(info.name)
        return found

    async def segments(self, slot: PieceInfo) -> tuple[str, ...]:
        """Return the ids of the segments that a slot refers to."""
        if slot.is_alone:
            return ()
        opened = await self.piece(slot)
        refs = [await opened.object_ref(number) for number in range(1, opened.objects + 1)]
        return tuple(ref.segment_id for ref in refs if ref.segment_id)

    async def apart(self, pieces: Iterable[PieceInfo]) -> set[str]:
        """Return the names of the slots whose indexes are not copied: large, or in segments."""
        found = set()
        for info in pieces:
            if info.level == 0 and (
                tail_bytes(info) > SLOT_INDEX_LIMIT or await self.lies_elsewhere(info)
            ):
                found.add(info.name)
        return found

    async def lies_elsewhere(self, info: PieceInfo) -> bool:
        """Return whether the index of a delta lies in segments, or cannot be read."""
        if info.level or info.is_alone:
            return False  # it has no segments
        known = self._elsewhere.get(info.name)
        if known is None:
            try:
                piece = await self.piece(info)
                # All blocks are moved, or none.
                rows = [await piece.next_row(kind, 0) for kind in (DATA, ZEROS)]
            except (DamagedError, NotFoundError):
                return True  # nothing can be made of it now
            known = any(row is not None and int(row["object"]) for row in rows)
            self._elsewhere[info.name] = known
        return known

    async def first_time(self, info: PieceInfo) -> int:
        """Return the time of the first point inside."""
        if info.listed is not None:
            return info.listed.first_time_ns
        return (await self.piece(info)).head.first_time_ns

    async def last_time(self, info: PieceInfo) -> int:
        """Return the time of the last point inside."""
        if info.listed is not None:
            return info.listed.time_ns
        return (await self.piece(info)).head.time_ns

    async def table(self, info: PieceInfo) -> PointTable:
        """Return the points inside, oldest first."""
        if info.level == 0 and info.listed is not None:
            # Made at once, and not kept: a watcher sees a slot every second.
            return make_points([point_row(info.listed)])
        table = self._tables.get(info.name)
        if table is None:
            table = await self._read(info)
            self._tables[info.name] = table
        return table

    def known(self) -> dict[str, PointTable]:
        """Return all tables read so far, by the delta's name."""
        return dict(self._tables)

    def restore(self, tables: dict[str, PointTable]) -> None:
        """Take tables that were read before."""
        self._tables.update(tables)

    def keep(self, info: PieceInfo, table: PointTable, replaced: list[str]) -> None:
        """Take the table of a joined delta that was just made; forget those of its parts."""
        self._tables[info.name] = table
        for name in replaced:
            self._tables.pop(name, None)
            self._pieces.pop(name, None)

    async def _read(self, info: PieceInfo) -> PointTable:
        piece = await self.piece(info)
        if info.level == 0:
            return make_points([point_row(piece.head)])
        parts = [await piece.points(row) for row in await piece.rows(POINTS, 0, LIMIT - 1)]
        table = concat_points(parts)
        check_table(table, info)
        return table


def tail_bytes(piece: PieceInfo) -> int:
    """Return the bytes at the end of a delta that hold all but its frames."""
    return piece.listed.tail_bytes if piece.listed else piece.size


def check_table(table: PointTable, info: PieceInfo) -> None:
    """Check that a joined delta's points lie inside it and lead to its end.

    Raises:
        FormatError: they do not.
    """
    epoch, moment = table.epoch, table.time_ns
    if (
        not len(table)
        or int(epoch[0]) <= info.from_epoch
        or int(epoch[-1]) != info.to_epoch
        or (epoch[1:] <= epoch[:-1]).any()
        or (moment[1:] < moment[:-1]).any()
    ):
        raise FormatError("its points are not those of its epochs", where=info.name)
