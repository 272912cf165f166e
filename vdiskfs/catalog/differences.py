"""Where two points of one disk differ, wherever in its generations and branches they lie.

Both lines are the same up to a fork. What differs was named since by a delta of one of them,
or cut away by one: so only those pages are looked at, and of them those are kept whose
checksums differ. No data is read. Requests and time grow with what changed since the fork.

The steps walk the indexes of the deltas after the fork side by side, from page 0 on; a step
ends where the first block of one of them does, so that at most one block of each is held.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import trio

from vdiskfs.catalog.log import DiskLog
from vdiskfs.catalog.points import Point
from vdiskfs.delta.blocks import DATA, ZEROS
from vdiskfs.delta.entries import U64, Extents, distinct, extents_of_pages, unite_extents
from vdiskfs.delta.layout import LIMIT, Kind
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.point import Chosen, Piece, PointReader
from vdiskfs.point.chosen import PieceError
from vdiskfs.point.fetch import first_error
from vdiskfs.units import pages_of

T = TypeVar("T")

BATCH = 16384
"""Pages that are compared at once."""

Run = tuple[int, int]
"""A first page and a number of pages."""


def fork_of(log_a: DiskLog, a: Point, log_b: DiskLog, b: Point) -> tuple[int, int] | None:
    """Return the generation and epoch up to which two points have one history; None: nothing."""
    left = [*log_a.record.lineage(a.generation), (a.generation, a.epoch)]
    right = [*log_b.record.lineage(b.generation), (b.generation, b.epoch)]
    fork = None
    for (mine, my_end), (theirs, their_end) in zip(left, right, strict=False):
        if mine != theirs:
            break
        fork = (mine, min(my_end, their_end))
        if my_end != their_end:
            break
    return fork


async def open_differences(log_a: DiskLog, a: Point, log_b: DiskLog, b: Point) -> Differences:
    """Open two points of one disk to tell where they differ. Close it after use.

    Args:
        log_a: of the disk, with the generation that ``a`` lies in.
        a: the one point.
        log_b: of the same disk, with the generation that ``b`` lies in.
        b: the other point.

    Raises:
        DamagedError: a chain of deltas is broken.
        NotFoundError: a log does not lead to its point.
        VaultUnreachableError, RefusedError: as the store.
    """
    if log_a.record.id != log_b.record.id:
        raise ValueError("points of two disks")
    found = Differences(log_a, a, log_b, b)
    await found.open()
    return found


@dataclass(frozen=True, slots=True)
class _Step:
    """What the deltas after the fork say of pages [start, end)."""

    start: int
    end: int
    named: U64
    zeros: Extents


class Differences:
    """Where two points differ. Trio thread only; one iteration at a time."""

    def __init__(self, log_a: DiskLog, a: Point, log_b: DiskLog, b: Point) -> None:
        """Use `open_differences`."""
        self.fork = fork_of(log_a, a, log_b, b)
        self._sides = ((log_a, a), (log_b, b))
        self._bad: frozenset[str] = frozenset()
        self._after: list[Piece] = []
        self._before: list[Piece] | None = None
        self._cut = LIMIT
        self.a: PointReader
        self.b: PointReader

    async def open(self) -> None:
        """Open both chains; called by `open_differences`."""
        (log_a, a), (log_b, b) = self._sides
        self.a = await log_a.open(a)
        try:
            self.b = await log_b.open(b)
            await self._open_after()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.aclose()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Forget both chains."""
        await self.a.aclose()
        if hasattr(self, "b"):
            await self.b.aclose()

    async def _open_after(self) -> None:
        """Open the deltas of both sides since the fork."""
        sides = [
            await log.deltas(self.fork, (at.generation, at.epoch), self._bad)
            for log, at in self._sides
        ]
        self._before = None
        # Invariant: both sides hang on the same state, else a line was exchanged.
        roots = {
            side[0].head.from_digest if side else reader.pieces[-1].head.to_digest
            for side, reader in zip(sides, (self.a, self.b), strict=True)
        } if self.fork is not None else ()  # fmt: skip
        if len(roots) > 1:
            raise DamagedError(
                f"{self.a.title}: its deltas and those of {self.b.title} begin with another disk"
            )
        self._after = [piece for side in sides for piece in side]
        cut = min((piece.head.cut for piece in self._after), default=LIMIT)
        known = [side[0].head.from_size for side in sides if side]
        # Beyond what the disk had at the fork there was nothing to cut away.
        self._cut = pages_of(cut) if known and cut < known[0] else LIMIT

    # ---- what differs ------------------------------------------------------------------

    async def runs(self, first_page: int = 0) -> AsyncGenerator[Run, None]:
        """Yield the pages that differ, as runs in order that do not touch.

        Bytes beyond the end of a disk count as zeros.

        Raises:
            DamagedError: an index cannot be read.
            VaultUnreachableError, RefusedError: as the store.
        """
        last: Run | None = None
        async with aclosing(self.pages(first_page)) as batches:
            async for pages in batches:
                found = extents_of_pages(pages)
                for start, end in zip(found.start.tolist(), found.end.tolist(), strict=True):
                    if last is not None and sum(last) == start:
                        last = (last[0], end - last[0])
                        continue
                    if last is not None:
                        yield last
                    last = (start, end - start)
        if last is not None:
            yield last

    async def pages(self, first_page: int = 0) -> AsyncGenerator[U64, None]:
        """Yield the pages that differ, in order, up to `BATCH` at once.

        Raises:
            As `runs`.
        """
        async with aclosing(self._candidates(first_page)) as found:
            async for pages in found:
                for at in range(0, len(pages), BATCH):
                    part = pages[at : at + BATCH]
                    a, b = await self._both(part)
                    differs = a.differs(b)
                    if differs.any():
                        yield part[differs]

    async def count(self) -> int:
        """Return how many pages differ."""
        total = 0
        async with aclosing(self.pages()) as batches:
            async for pages in batches:
                total += len(pages)
        return total

    async def _both(self, pages: U64) -> tuple[Chosen, Chosen]:
        found: list[Chosen | None] = [None, None]

        async def look(side: int, reader: PointReader) -> None:
            found[side] = await reader.choose(pages)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look, 0, self.a)
                nursery.start_soon(look, 1, self.b)
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        a, b = found
        assert a is not None
        assert b is not None
        return a, b

    # ---- what may differ ---------------------------------------------------------------

    async def _candidates(self, position: int) -> AsyncGenerator[U64, None]:
        """Yield all pages that deltas after the fork have changed; zeros where there was data."""
        end = max(self.a.pages, self.b.pages)
        while position < end:
            try:
                step = await self._step(position, end)
                if step is None:
                    return
                stop, pages = await self._part(step)
            except PieceError as broken:
                found = broken
            else:
                if len(pages):
                    yield pages
                position = stop
                continue
            await self._go_round(found)

    async def _step(self, position: int, end: int) -> _Step | None:
        """Return the next stretch at or after a page in which a delta names anything."""
        rows: list[tuple[Piece, int, np.void]] = []
        for piece in self._after:
            for kind in (DATA, ZEROS):
                row = await _ask(piece, piece.next_row(kind, position))
                if row is not None:
                    rows.append((piece, kind, row))
        begins = [int(row["first"]) for _, _, row in rows]
        start = max(position, min([*begins, self._cut]))
        if start >= end:
            return None
        stop = min([int(row["last"]) + 1 for _, _, row in rows] + [end])
        named, zeros = [np.empty(0, np.uint64)], []
        for piece, kind, row in rows:
            if int(row["first"]) >= stop:
                continue
            if kind == DATA:
                entries = await _ask(piece, piece.entries(row))
                named.append(_between(entries.within(start, stop).pages()[0], start, stop))
            else:
                zeros.append((await _ask(piece, piece.zeros(row))).clip(start, stop))
        if self._cut < stop:
            run = np.array([max(start, self._cut), stop], np.uint64)
            zeros.append(Extents(run[:1], run[1:]))
        return _Step(start, stop, distinct(np.concatenate(named)), unite_extents(zeros))

    async def _part(self, step: _Step) -> tuple[int, U64]:
        """Return the pages at the start of a step that may differ, and where that part ends.

        Zeros differ only where the disk had data before the fork.
        """
        stop = step.end
        rows: list[tuple[Piece, np.void]] = []
        for piece in await self._deltas_before() if len(step.zeros) else ():
            row = await self._data_in(piece, step.zeros, step.start, stop)
            if row is not None:
                rows.append((piece, row))
                stop = min(stop, int(row["last"]) + 1)
        parts = [_between(step.named, step.start, stop)]
        for piece, row in rows:
            if int(row["first"]) < stop:
                entries = await _ask(piece, piece.entries(row))
                pages = _between(entries.within(step.start, stop).pages()[0], step.start, stop)
                parts.append(pages[step.zeros.contains(pages)])
        return stop, distinct(np.concatenate(parts))

    async def _data_in(self, piece: Piece, runs: Extents, start: int, end: int) -> np.void | None:
        """Return the first row of a delta in [start, end) that may have data inside runs."""
        while len(inside := runs.clip(start, end)):
            start = int(inside.start[0])
            row = await _ask(piece, piece.next_row(DATA, start))
            if row is None or int(row["first"]) >= end:
                return None
            if len(inside.clip(int(row["first"]), int(row["last"]) + 1)):
                return row
            start = int(row["last"]) + 1
        return None

    async def _deltas_before(self) -> Sequence[Piece]:
        """Return the deltas that lead to the fork.

        Those of a point's own chain will not do: one that was joined over the fork lacks what
        was cut away after it.
        """
        if self._before is None:
            log = self._sides[0][0]
            self._before = [] if self.fork is None else await log.deltas(
                None, self.fork, self._bad
            )  # fmt: skip
        return self._before

    async def _go_round(self, broken: PieceError) -> None:
        """Do without a joined delta that is damaged.

        Raises:
            DamagedError: it is no joined one.
        """
        piece = broken.piece
        if piece.head.kind is not Kind.JOINED or piece.name in self._bad:
            raise DamagedError(f"{self.b.title}: {broken.error.message}") from broken.error
        self._bad |= {piece.name}
        await self._open_after()


async def _ask(piece: Piece, question: Awaitable[T]) -> T:
    try:
        return await question
    except (DamagedError, NotFoundError) as error:
        raise PieceError(piece, error) from error


def _between(pages: U64, start: int, end: int) -> U64:
    return pages[(pages >= np.uint64(start)) & (pages < np.uint64(end))]
