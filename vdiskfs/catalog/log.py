"""The points of one disk: listing, finding, opening, publishing.

One ``DiskLog`` follows one generation and, for what is older, its ancestors. It keeps
what it has learned: objects of a vault never change. Used from the trio thread, by several
tasks at once; readers it opened are free of that.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import trio

from vdiskfs.catalog.chain import Chains
from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.catalog.joins import make_joins
from vdiskfs.catalog.line import Line
from vdiskfs.catalog.points import Point, Wanted, parse_spec, point_of
from vdiskfs.catalog.publish import (
    Progress,
    check_segments,
    publish_slot,
    upload_segments,
)
from vdiskfs.catalog.records import DiskRecord
from vdiskfs.catalog.saved import read_saved, write_saved
from vdiskfs.catalog.tables import Tables
from vdiskfs.delta import Spooled, genesis_digest
from vdiskfs.delta.layout import Flags, listed_of
from vdiskfs.delta.names import slot_name
from vdiskfs.delta.points import PointTable
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.point import BlockCache, Piece, PieceInfo, PointReader
from vdiskfs.store import Store
from vdiskfs.units import format_time

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tip:
    """Where a generation ends: what the next delta must start from."""

    generation: int
    epoch: int
    digest: bytes
    time_ns: int
    size: int
    fenced: bool


class DiskLog:
    """The points of a disk in one generation and its ancestors."""

    def __init__(
        self,
        store: Store,
        vault_id: str,
        record: DiskRecord,
        generation: int,
        *,
        blocks: BlockCache,
        cache: IndexCache | None,
    ) -> None:
        """Use ``Vault.log``. Makes no request."""
        self.store = store
        self.vault_id = vault_id
        self.record = record
        self.generation = generation
        self.cache = cache
        self._blocks = blocks
        self._tables = Tables(store, blocks, vault_id, record.id)
        self._chains = Chains(self._tables, record.name)
        self._lines = [
            Line(store, record.id, number, record.base(number))
            for number in (*(parent for parent, _ in record.lineage(generation)), generation)
        ]
        for line, (_, end) in zip(self._lines, record.lineage(generation), strict=False):
            line.end = end

    @property
    def line(self) -> Line:
        """Return the line of the generation itself."""
        return self._lines[-1]

    async def refresh(self) -> Tip:
        """Learn what others added, and return the tip."""
        return await self.tip()

    async def tip(self) -> Tip:
        """Read from the vault where the generation ends.

        Raises:
            DamagedError: its newest delta is damaged, or one before it is missing.
        """
        await self.line.refresh()
        return await self._around(self._tip)

    async def _tip(self) -> Tip:
        line = self.line
        if line.gap is not None:
            name = slot_name(self.record.id, line.generation, line.gap[0])
            raise DamagedError(f"{name}: the delta is missing, and later ones are there")
        fenced = line.fence is not None
        if line.cover:
            head = (await self._ask(line, line.cover[-1], self._tables.piece)).head
            return Tip(self.generation, head.to_epoch, head.to_digest, head.time_ns, head.size,
                       fenced)  # fmt: skip
        if line.base == 0:
            digest = genesis_digest(self.vault_id, self.record.id)
            return Tip(self.generation, 0, digest, 0, 0, fenced)
        pieces = await self._chains.open(self._lines[:-1], line.base)
        head = pieces[-1].head
        return Tip(self.generation, line.base, head.to_digest, head.time_ns, head.size, fenced)

    async def place(self, epoch: int) -> tuple[int, bytes] | None:
        """Return the generation of the lineage that an epoch lies in, and its digest.

        None: no delta ends there.

        Raises:
            DamagedError: the chain to it is broken.
        """
        if epoch == 0:
            return self._lines[0].generation, genesis_digest(self.vault_id, self.record.id)
        try:
            point = await self.find(epoch)
        except NotFoundError:
            return None
        lines = [one for one in self._lines if one.generation <= point.generation]
        pieces = await self._chains.open(lines, epoch)
        return point.generation, pieces[-1].head.to_digest

    async def publish(self, spooled: Spooled, progress: Progress | None = None) -> Point:
        """Store a delta of the spool: segments first, then the slot. On return the point is.

        Raises:
            ConflictError: another writer's delta is in the slot: this site is displaced.
            DamagedError: a segment it refers to is not in the vault.
        """
        head = spooled.head
        await upload_segments(self.store, self.record.id, spooled.segments, progress)
        await check_segments(self.store, spooled)
        await publish_slot(self.store, spooled)
        if progress is not None:
            progress(head.object_size)
        name = slot_name(head.disk_id, head.generation, head.from_epoch)
        if not head.is_fence:
            info = PieceInfo(name, head.generation, 0, head.from_epoch, head.to_epoch,
                             head.object_size, listed_of(head))  # fmt: skip
            self.line.append(info)
            if self.cache is not None:
                await trio.to_thread.run_sync(_keep_tail, self.cache, name, spooled)
        return Point(
            head.generation, head.to_epoch, head.time_ns, head.flags, head.size,
            head.changed_bytes, head.stored_bytes, head.label,
        )  # fmt: skip

    async def publish_joins(self) -> int:
        """Join what can be joined now; return how many joined deltas were made.

        May be called at any time and again: what is there already is left alone.
        """
        await self._load(self.line)
        return await make_joins(self.line, self._tables, self.cache)

    async def points(
        self, since_ns: int | None = None, until_ns: int | None = None, limit: int | None = None
    ) -> list[Point]:
        """Return the points between two times (both included), newest last.

        With a limit: the newest so many.
        """
        return await self._around(lambda: self._points(since_ns, until_ns, limit))

    async def _points(
        self, since_ns: int | None, until_ns: int | None, limit: int | None
    ) -> list[Point]:
        found: list[Point] = []
        for line, end in self._newest_lines():
            await self._load(line)
            for piece in reversed(tuple(line.cover)):
                if piece.from_epoch >= end or (limit is not None and len(found) >= limit):
                    continue
                if until_ns is not None and await self._first(line, piece) > until_ns:
                    continue
                if since_ns is not None and await self._last(line, piece) < since_ns:
                    return _limited(found, limit)
                table = await self._ask(line, piece, self._tables.table)
                stop = int(np.searchsorted(table.epoch, np.uint64(end), side="right"))
                for index in range(stop - 1, -1, -1):
                    moment = int(table.time_ns[index])
                    if (until_ns is not None and moment > until_ns) or (
                        since_ns is not None and moment < since_ns
                    ):
                        continue
                    found.append(point_of(table.row(index), line.generation))
                    if limit is not None and len(found) >= limit:
                        return _limited(found, limit)
        return _limited(found, limit)

    async def find(self, spec: str | int, now_ns: int | None = None) -> Point:
        """Return the point that a name means: the newest at or before a time.

        Raises:
            NotFoundError: there is none; a time before the first point says when that is.
            UsageError: the name is none.
        """
        wanted = parse_spec(spec, time.time_ns() if now_ns is None else now_ns)
        point = await self._around(lambda: self._find(wanted))
        if point is None:
            raise await self._around(lambda: self._not_found(spec, wanted))
        return point

    async def _find(self, wanted: Wanted) -> Point | None:
        for line, end in self._newest_lines():
            await self._load(line)
            for piece in reversed(tuple(line.cover)):
                if piece.from_epoch >= end or not await self._may_hold(line, piece, wanted):
                    continue
                table = await self._ask(line, piece, self._tables.table)
                index = _newest(table, wanted, end)
                if index is not None:
                    return point_of(table.row(index), line.generation)
        return None

    async def open(self, point: Point | int) -> PointReader:
        """Open a point: its chain is found, read and checked.

        Raises:
            NotFoundError: there is no such point.
            DamagedError: its chain is broken.
        """
        if isinstance(point, int):
            point = await self.find(point)
        generations = [line.generation for line in self._lines]
        if point.generation not in generations:
            raise NotFoundError(f"{self._title(point.epoch)}: no generation {point.generation}")
        lines = self._lines[: generations.index(point.generation) + 1]
        epoch, title = point.epoch, self._title(point.epoch)

        async def reopen(without: frozenset[str]) -> Sequence[Piece]:
            return await self._chains.open(lines, epoch, without)

        pieces = await reopen(frozenset())
        head = pieces[-1].head
        if (head.size, head.time_ns) != (point.size, point.time_ns):
            raise DamagedError(
                f"{title}: {pieces[-1].name} says another size or time than the list"
            )
        return PointReader(
            self.store, pieces, title=title, size=head.size, generation=point.generation,
            epoch=epoch, reopen=reopen,
        )  # fmt: skip

    async def deltas(
        self,
        after: tuple[int, int] | None,
        until: tuple[int, int],
        without: frozenset[str] = frozenset(),
    ) -> list[Piece]:
        """Open the deltas that lead from one place of the lineage to another, oldest first.

        A place is a generation and an epoch; None: the empty disk. Joined deltas that are
        damaged, or in ``without``, are gone round.

        Raises:
            DamagedError: a delta is missing, damaged, or does not follow the one before.
        """
        generations = [line.generation for line in self._lines]
        first = 0 if after is None else generations.index(after[0])
        lines = self._lines[first : generations.index(until[0]) + 1]
        start = None if after is None else after[1]
        return await self._chains.open(lines, until[1], without, after=start)

    def save(self, path: Path) -> None:
        """Write what is known of the points to a local file.

        Raises:
            LocalError: it cannot be written.
        """
        write_saved(path, self._identity, self._lines, self._tables.known())

    def load(self, path: Path) -> bool:
        """Take up what was saved; return False if it is of no use. The tip is read anew."""
        tables = read_saved(path, self._identity, self._lines)
        if tables is not None:
            self._tables.restore(tables)
        return tables is not None

    @property
    def _identity(self) -> list[str]:
        return [self.vault_id, self.record.id]

    def _title(self, epoch: int) -> str:
        return f"{self.record.name}@{epoch}"

    async def _load(self, line: Line) -> None:
        await line.load()

    def _newest_lines(self) -> Iterator[tuple[Line, int]]:
        """Yield the lines, newest first, each with the last epoch that counts."""
        for index in range(len(self._lines) - 1, -1, -1):
            yield self._lines[index], self._lines[index].end

    async def _around(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask again without each joined delta that turns out to be damaged."""
        while True:
            try:
                return await ask()
            except _DamagedJoinError as broken:
                line, piece = broken.line, broken.piece
            await line.dissolve(piece)

    async def _ask(
        self, line: Line, piece: PieceInfo, ask: Callable[[PieceInfo], Awaitable[T]]
    ) -> T:
        try:
            return await ask(piece)
        except (DamagedError, NotFoundError) as error:
            if not piece.level:
                raise
            raise _DamagedJoinError(line, piece) from error

    async def _first(self, line: Line, piece: PieceInfo) -> int:
        return await self._ask(line, piece, self._tables.first_time)

    async def _last(self, line: Line, piece: PieceInfo) -> int:
        return await self._ask(line, piece, self._tables.last_time)

    async def _may_hold(self, line: Line, piece: PieceInfo, wanted: Wanted) -> bool:
        if wanted.epoch is not None:
            return piece.from_epoch < wanted.epoch <= piece.to_epoch
        if wanted.until_ns is not None:
            return await self._first(line, piece) <= wanted.until_ns
        return True

    async def _not_found(self, spec: str | int, wanted: Wanted) -> NotFoundError:
        name = self.record.name
        for line in self._lines:
            await self._load(line)
            if line.cover:
                first = await self._first(line, line.cover[0])
                if wanted.until_ns is not None:
                    return NotFoundError(
                        f"{name}: no point at or before {format_time(wanted.until_ns)}",
                        hint=f"its first point is of {format_time(first)}",
                    )
                return NotFoundError(
                    f"{name}: no point {spec}", hint=f"see `vdiskfs point list {name}`"
                )
        return NotFoundError(f"{name}: it has no points yet")


class _DamagedJoinError(Exception):
    """A joined delta of a line cannot be read."""

    def __init__(self, line: Line, piece: PieceInfo) -> None:
        super().__init__(piece.name)
        self.line = line
        self.piece = piece


def _newest(table: PointTable, wanted: Wanted, end: int) -> int | None:
    """Return the row of the newest point of a table that is wanted, up to an epoch."""
    fits = table.epoch <= np.uint64(end)
    if wanted.epoch is not None:
        fits &= table.epoch == np.uint64(wanted.epoch)
    if wanted.until_ns is not None:
        fits &= table.time_ns <= np.uint64(max(0, wanted.until_ns))
    if wanted.application:
        fits &= (table.flags & np.uint8(Flags.APPLICATION)) != 0
    rows = np.flatnonzero(fits)
    return int(rows[-1]) if len(rows) else None


def _limited(found: list[Point], limit: int | None) -> list[Point]:
    return found[:limit][::-1]


def _keep_tail(cache: IndexCache, name: str, spooled: Spooled) -> None:
    with spooled.path.open("rb") as file:
        file.seek(spooled.head.tail_offset)
        cache.put(name, file.read())
