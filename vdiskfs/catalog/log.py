"""The points of one disk: listing, finding, opening, publishing.

One ``DiskLog`` follows one generation and, for what is older, its ancestors. It keeps
what it has learned: objects of a vault never change. Used from the trio thread, by several
tasks at once; readers it opened are free of that.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import trio

from vdiskfs.catalog.batches import Claims
from vdiskfs.catalog.chain import Chains
from vdiskfs.catalog.documents import DOCUMENT_LIMIT
from vdiskfs.catalog.garbage import FRESH_S, boottime_s
from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.catalog.joins import make_joins
from vdiskfs.catalog.line import END, DamagedJoinError, Line
from vdiskfs.catalog.points import Point, Tip, Wanted, newest_row, parse_spec, point_of
from vdiskfs.catalog.proofs import HASHED, list_proven, mark_proven
from vdiskfs.catalog.publish import Progress, collected, keep_tail, store_delta
from vdiskfs.catalog.records import DiskRecord, LedgerRef, decode_disk
from vdiskfs.catalog.saved import read_saved, write_saved
from vdiskfs.catalog.tables import Tables
from vdiskfs.delta import Spooled, genesis_digest
from vdiskfs.delta.layout import listed_of
from vdiskfs.delta.names import slot_name
from vdiskfs.delta.points import PointRow, PointTable, concat_points
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.point import BlockCache, Piece, PieceInfo, PointReader
from vdiskfs.store import Store
from vdiskfs.units import format_time

T = TypeVar("T")


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
        self.tables = Tables(store, blocks, vault_id, record.id)
        self._chains = Chains(self.tables, record.name)
        self._lines: list[Line] = []
        self.claims = Claims(store, record)
        self.adopt(record)

    @property
    def line(self) -> Line:
        """Return the line of the generation itself."""
        return self._lines[-1]

    def adopt(self, record: DiskRecord) -> None:
        """Take the disk's record as it was just read; lines that were thinned are read anew."""
        before = {line.generation: line for line in self._lines}
        self.record = record
        self._record_at = boottime_s()
        self.claims.learned(record)
        lines = []
        lineage = record.lineage(self.generation)
        for number, end in [*lineage, (self.generation, END)]:
            ref = record.ledgers.get(number)
            line = before.get(number)
            if line is None or line.ref != ref:
                line = Line(self.store, record.id, number, record.base(number), end, ref=ref)
            lines.append(line)
        self._lines = lines

    def learned(self, record: DiskRecord) -> None:
        """Take from the disk's record what concerns its points: ledgers, holds, the policy."""
        # Whose line it is, and where it forks, is ownership's to say.
        self.adopt(replace(self.record, ledgers=record.ledgers, holds=record.holds,
                           policy=record.policy, batches=record.batches,
                           claims=record.claims))  # fmt: skip

    def _refs(self) -> list[LedgerRef | None]:
        return [line.ref for line in self._lines]

    async def _learned(self, refs: list[LedgerRef | None]) -> bool:
        """Read the record again; say if a line was thinned since; others may have seen that."""
        with contextlib.suppress(DamagedError, NotFoundError):  # what was hurt first is told
            await self.learn()
        return refs != self._refs()

    async def learn(self) -> None:
        """Read the disk's record again."""
        where = f"disks/{self.record.id}/disk.json"
        data, _ = await self.store.read(where, limit=DOCUMENT_LIMIT)
        record = decode_disk(data, self.record.id, where=where)
        if self.generation in record.parents:
            self.learned(record)

    async def _be_fresh(self) -> None:
        """Look at the record, if what is known of it is old: slots may have been collected."""
        if boottime_s() - self._record_at > FRESH_S:
            await self.learn()

    async def refresh(self) -> Tip:
        """Learn what others added, and return the tip."""
        return await self.tip()

    async def tip(self) -> Tip:
        """Read from the vault where the generation ends.

        Raises:
            DamagedError: its newest delta is damaged, or one before it is missing.
        """
        await self._be_fresh()

        async def ask() -> Tip:
            await self.line.refresh()
            return await self._tip()

        return await self._around(ask)

    async def _tip(self) -> Tip:
        line = self.line
        if line.gap is not None:
            name = slot_name(self.record.id, line.generation, line.gap[0])
            raise DamagedError(f"{name}: the delta is missing, and later ones are there")
        fenced = line.fence is not None
        if line.cover:
            head = (await self._ask(line, line.cover[-1], self.tables.piece)).head
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

    async def publish(
        self, spooled: Spooled, progress: Progress | None = None,
        offered: Callable[[], None] = lambda: None,
    ) -> Point:  # fmt: skip
        """Store a delta of the spool: segments first, then the slot. On return the point is.

        ``offered`` is called when the segments are stored, before the slot is asked for.

        Raises:
            ConflictError: another writer's delta is in the slot: this site is displaced.
            SegmentsGoneError, DamagedError: a segment it refers to is not in the vault.
        """
        head = spooled.head
        if head.from_epoch < self.line.floor:
            raise collected(head)
        await store_delta(self.store, spooled, progress, offered, self.claims)
        # Invariant: a slot below the horizon may have been collected, and so be filled twice.
        # One that is not below it, as disk.json says afterwards, was never filled before.
        await self._be_fresh()
        if head.from_epoch < self.line.floor:
            raise collected(head)
        if progress is not None:
            progress(head.object_size)
        name = slot_name(head.disk_id, head.generation, head.from_epoch)
        if not head.is_fence:
            info = PieceInfo(name, head.generation, 0, head.from_epoch, head.to_epoch,
                             head.object_size, listed_of(head))  # fmt: skip
            self.line.append(info)
            if self.cache is not None:
                await trio.to_thread.run_sync(keep_tail, self.cache, name, spooled)
        return Point(
            head.generation, head.to_epoch, head.time_ns, head.flags, head.size,
            head.changed_bytes, head.stored_bytes, head.label,
        )  # fmt: skip

    def is_below(self, generation: int, epoch: int) -> bool:
        """Say whether an epoch of the lineage lies where points may have been thinned away."""
        line = next((one for one in self._lines if one.generation == generation), None)
        return line is not None and line.ref is not None and epoch <= line.floor

    async def line_points(self) -> PointTable:
        """Return the points of the generation itself, oldest first."""

        async def ask() -> PointTable:
            line = self.line
            await line.load()
            return concat_points([await self._table(line, piece) for piece in line.cover])

        return await self._around(ask)

    async def publish_joins(self) -> int:
        """Join what can be joined now; return how many joined deltas were made.

        May be called at any time and again: what is there already is left alone.
        """

        async def ask() -> int:
            await self.line.load()
            return await make_joins(self.line, self.tables, self.cache)

        return await self._around(ask)

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
            await line.load()
            for piece in reversed(tuple(line.cover)):
                if piece.from_epoch >= end or (limit is not None and len(found) >= limit):
                    continue
                if until_ns is not None and await self._first(line, piece) > until_ns:
                    continue
                if since_ns is not None and await self._last(line, piece) < since_ns:
                    return _limited(found, limit)
                table = await self._table(line, piece)
                stop = int(np.searchsorted(table.epoch, np.uint64(end), side="right"))
                for index in range(stop - 1, -1, -1):
                    moment = int(table.time_ns[index])
                    if (until_ns is not None and moment > until_ns) or (
                        since_ns is not None and moment < since_ns
                    ):
                        continue
                    found.append(self._point(table.row(index), line))
                    if limit is not None and len(found) >= limit:
                        return _limited(found, limit)
        return _limited(found, limit)

    def _point(self, row: PointRow, line: Line) -> Point:
        place = (line.generation, row.epoch)
        held = any((hold.generation, hold.epoch) == place for hold in self.record.holds)
        return point_of(row, line.generation, held=held)

    async def find(self, spec: str | int, now_ns: int | None = None) -> Point:
        """Return the point that a name means: the newest at or before a time.

        Raises:
            NotFoundError: there is none; a time before the first point says when that is.
            UsageError: the name is none.
        """
        wanted = parse_spec(spec, time.time_ns() if now_ns is None else now_ns)
        if wanted.proven:
            return await self.find_proven()
        point = await self._around(lambda: self._find(wanted))
        if point is None:
            raise await self._around(lambda: self._not_found(spec, wanted))
        return point

    async def find_proven(self, level: str = HASHED) -> Point:
        """Return the newest proven point of which a level is not to be tried any more."""
        proven = await list_proven(self.store, self.record.id)
        for line, end in self._newest_lines():
            epochs = [
                epoch for (generation, epoch), one in proven.items()
                if generation == line.generation and epoch <= end and one.settles(level)
            ]  # fmt: skip
            for epoch in sorted(epochs, reverse=True):
                point = await self._around(partial(self._find, Wanted(epoch=epoch)))
                if point is not None and point.generation == line.generation:
                    return mark_proven(point, proven[point.generation, epoch])
        raise NotFoundError(
            f"{self.record.name}: no point of it is proven",
            hint=f"vdiskfs point prove {shlex.quote(self.record.name)}@latest --level hashed",
        )

    async def _find(self, wanted: Wanted) -> Point | None:
        for line, end in self._newest_lines():
            await line.load()
            for piece in reversed(tuple(line.cover)):
                if piece.from_epoch >= end or not await self._may_hold(line, piece, wanted):
                    continue
                table = await self._table(line, piece)
                index = newest_row(table, wanted, end)
                if index is not None:
                    return self._point(table.row(index), line)
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
        count = generations.index(point.generation) + 1
        epoch, title = point.epoch, self._title(point.epoch)

        async def again(without: frozenset[str]) -> Sequence[Piece]:
            await self.learn()  # what is open still, of deltas that are gone, proves nothing
            return await reopen(without)

        async def reopen(without: frozenset[str]) -> Sequence[Piece]:
            while True:
                lines, refs = self._lines[:count], self._refs()
                try:
                    return await self._chains.open(lines, epoch, without)
                except (DamagedError, NotFoundError) as error:
                    learned = await self._learned(refs)
                    if not await self._is_kept(count - 1, epoch):
                        raise NotFoundError(
                            f"{title}: the point was thinned away",
                            hint=f"see `vdiskfs point list {shlex.quote(self.record.name)}`",
                        ) from error
                    if not learned:
                        raise

        pieces = await reopen(frozenset())
        head = pieces[-1].head
        if (head.size, head.time_ns) != (point.size, point.time_ns):
            raise DamagedError(
                f"{title}: {pieces[-1].name} says another size or time than the list"
            )
        return PointReader(
            self.store, pieces, title=title, size=head.size, generation=point.generation,
            epoch=epoch, reopen=again,
        )  # fmt: skip

    async def _is_kept(self, index: int, epoch: int) -> bool:
        """Say whether an epoch of a line is above its horizon, or one that its ledger leads to."""
        line = self._lines[index]
        await line.load()
        return line.ledger is None or epoch > line.floor or any(
            leaf.piece.to_epoch == epoch for leaf in line.ledger.leaves
        )  # fmt: skip

    def delta_name(self, point: Point, from_epoch: int) -> str:
        """Return the name of the delta that ends at a point; the point before is known."""
        line = next(one for one in self._lines if one.generation == point.generation)
        for leaf in line.ledger.leaves if line.ledger is not None else ():
            if leaf.piece.to_epoch == point.epoch:
                return leaf.piece.name
        return slot_name(self.record.id, line.generation, max(from_epoch, line.floor))

    async def leads_to(self, generation: int, epoch: int) -> bool:
        """Say whether the state at an epoch was not thinned away, if it was ever there."""
        index = [line.generation for line in self._lines].index(generation)
        return await self._is_kept(index, epoch)

    async def deltas(
        self, after: tuple[int, int] | None, until: tuple[int, int],
        without: frozenset[str] = frozenset(),
    ) -> list[Piece]:  # fmt: skip
        """Open the deltas that lead from one place of the lineage to another, oldest first.

        A place is a generation and an epoch; None: the empty disk. Joined deltas that are
        damaged, or in ``without``, are gone round.

        Raises:
            DamagedError: a delta is missing, damaged, or does not follow the one before.
        """
        generations = [line.generation for line in self._lines]
        first = 0 if after is None else generations.index(after[0])
        last = generations.index(until[0]) + 1
        start = None if after is None else after[1]
        while True:
            lines, refs = self._lines[first:last], self._refs()
            try:
                return await self._chains.open(lines, until[1], without, after=start)
            except (DamagedError, NotFoundError):
                if not await self._learned(refs):
                    raise

    def save(self, path: Path) -> None:
        """Write what is known of the points to a local file.

        Raises:
            LocalError: it cannot be written.
        """
        write_saved(path, [self.vault_id, self.record.id], self._lines, self.tables.known())

    def load(self, path: Path) -> bool:
        """Take up what was saved; return False if it is of no use. The tip is read anew."""
        tables = read_saved(path, [self.vault_id, self.record.id], self._lines)
        if tables is not None:
            self.tables.restore(tables)
        return tables is not None

    def _title(self, epoch: int) -> str:
        return f"{self.record.name}@{epoch}"

    def _newest_lines(self) -> Iterator[tuple[Line, int]]:
        """Yield the lines, newest first, each with the last epoch that counts."""
        for index in range(len(self._lines) - 1, -1, -1):
            yield self._lines[index], self._lines[index].end

    async def _around(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask again without each joined delta that turns out to be damaged."""
        while True:
            refs = self._refs()
            try:
                return await ask()
            except DamagedJoinError as broken:
                line, piece = broken.line, broken.piece
            except (DamagedError, NotFoundError):
                # What is gone was perhaps collected: the line is another one now.
                if not await self._learned(refs):
                    raise
                continue
            if not await self._learned(refs):
                await line.dissolve(piece)

    async def _table(self, line: Line, piece: PieceInfo) -> PointTable:
        """Return the points inside a delta of a line: below the horizon those of the ledger."""
        if line.ledger is None or piece.to_epoch > line.floor:
            return await self._ask(line, piece, self.tables.table)
        points = line.ledger.points
        ends = np.array([piece.from_epoch, piece.to_epoch], np.uint64)
        low, high = np.searchsorted(points.epoch, ends, side="right").tolist()
        return points.part(low, high)

    async def _ask(
        self, line: Line, piece: PieceInfo, ask: Callable[[PieceInfo], Awaitable[T]]
    ) -> T:
        try:
            return await ask(piece)
        except (DamagedError, NotFoundError) as error:
            if not piece.level:
                raise
            raise DamagedJoinError(line, piece) from error

    async def _first(self, line: Line, piece: PieceInfo) -> int:
        return await self._ask(line, piece, self.tables.first_time)

    async def _last(self, line: Line, piece: PieceInfo) -> int:
        return await self._ask(line, piece, self.tables.last_time)

    async def _may_hold(self, line: Line, piece: PieceInfo, wanted: Wanted) -> bool:
        if wanted.epoch is not None:
            return piece.from_epoch < wanted.epoch <= piece.to_epoch
        if wanted.until_ns is not None:
            return await self._first(line, piece) <= wanted.until_ns
        return True

    async def _not_found(self, spec: str | int, wanted: Wanted) -> NotFoundError:
        name = self.record.name
        for line in self._lines:
            await line.load()
            if line.cover:
                first = await self._first(line, line.cover[0])
                if wanted.until_ns is not None:
                    return NotFoundError(
                        f"{name}: no point at or before {format_time(wanted.until_ns)}",
                        hint=f"its first point is of {format_time(first)}",
                    )
                hint = f"see `vdiskfs point list {shlex.quote(name)}`"
                return NotFoundError(f"{name}: no point {spec}", hint=hint)
        return NotFoundError(f"{name}: it has no points yet")


def _limited(found: list[Point], limit: int | None) -> list[Point]:
    return found[:limit][::-1]
