"""Reading one recovery point: a chain of deltas, newest first, resolved page by page.

Nothing is taken on trust: heads and roots are checked when the chain is opened, index
blocks by their hashes, pages by their sums. All calls from one trio thread; they may
run side by side.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
import trio

from vdiskfs.delta.blocks import DATA, ZEROS
from vdiskfs.delta.entries import U8, U64, Bools, Extents, select_pages
from vdiskfs.delta.layout import Kind
from vdiskfs.errors import DamagedError, FormatError, NotFoundError, VdiskfsError
from vdiskfs.point.chosen import Chosen, PieceError, resolve_chosen
from vdiskfs.point.fetch import Found, fetch_pages, locate, stored_bytes
from vdiskfs.point.kinds import FULL, ZERO
from vdiskfs.point.piece import Piece
from vdiskfs.store import Store
from vdiskfs.units import PAGE_SIZE, PAGES_PER_CHUNK, pages_of

# Pages resolved at once: 64 MiB of the disk, a few hundred KiB of memory.
WINDOW = 16384
REQUESTS_AT_ONCE = 8

# reopen(names): another chain for the same point that does without these objects.
Reopen = Callable[[frozenset[str]], Awaitable[Sequence[Piece]]]


@dataclass(slots=True)
class Resolved:
    """What a point holds in pages [first, first + len(kind)).

    ``kind``: ABSENT (never written, or cut away) and ZERO read as zeros, FULL has data
    with these ``sums``.
    """

    first: int
    kind: U8
    sums: U64
    found: list[Found] = field(default_factory=list)


class PointReader:
    """The disk at one point. Opened by ``catalog``; ``pieces`` are oldest first, checked."""

    def __init__(
        self,
        store: Store,
        pieces: Sequence[Piece],
        *,
        title: str,
        size: int,
        generation: int,
        epoch: int,
        reopen: Reopen | None = None,
    ) -> None:
        """Read the chain; ``title`` names the point in errors."""
        self.size = size
        self.generation = generation
        self.epoch = epoch
        self.digest = pieces[-1].head.to_digest if pieces else b""
        self.title = title
        self._store = store
        self._pieces = list(pieces)
        self._reopen = reopen
        self._bad: frozenset[str] = frozenset()
        self._limiter = trio.CapacityLimiter(REQUESTS_AT_ONCE)
        # Stored bytes that `gather` has read.
        self.gathered_bytes = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    @property
    def objects(self) -> int:
        """Return how many deltas the chain has."""
        return len(self._pieces)

    @property
    def pieces(self) -> Sequence[Piece]:
        """Return the deltas of the chain as it is read now, oldest first."""
        return self._pieces

    @property
    def pages(self) -> int:
        """Return how many pages the disk has."""
        return pages_of(self.size)

    async def aclose(self) -> None:
        """Forget the chain. The store stays open: it is not the reader's."""
        self._pieces = []
        await trio.lowlevel.checkpoint()

    async def map_pages(self, first_page: int, count: int) -> Bools:
        """Return for each page whether it has data; pages beyond the end have none."""
        mask = np.zeros(count, np.bool_)
        for first, end in self._windows(first_page, count):
            part = await self._resolve(first, end)
            at = part.first - first_page
            mask[at : at + len(part.kind)] = part.kind == FULL
        return mask

    async def sums(self, first_page: int, count: int) -> tuple[U64, U8]:
        """Return the XXH3-64 of each page that has data, and each page's kind."""
        sums, kind = np.zeros(count, np.uint64), np.zeros(count, np.uint8)
        for first, end in self._windows(first_page, count):
            part = await self._resolve(first, end)
            at = part.first - first_page
            sums[at : at + len(part.kind)] = part.sums
            kind[at : at + len(part.kind)] = part.kind
        return sums, kind

    async def read_pages(self, first_page: int, count: int) -> bytearray:
        """Return ``count`` pages, each verified; zeros beyond the end of the disk.

        Raises:
            DamagedError: the vault does not hold what was stored; names object and point.
        """
        return (await self.read_mapped(first_page, count))[0]

    async def read_mapped(self, first_page: int, count: int) -> tuple[bytearray, Bools]:
        """Return ``read_pages`` and ``map_pages`` of a range at once."""
        out = bytearray(count * PAGE_SIZE)
        mask = np.zeros(count, np.bool_)
        for first, end in self._windows(first_page, count):
            while True:
                part = await self._resolve(first, end, places=True)
                try:
                    await fetch_pages(self._store, part.found, first_page, out, self._limiter)
                    break
                except NotFoundError as error:
                    if not await self.renew():
                        raise self._damaged(error) from error
                except DamagedError as error:
                    raise self._damaged(error) from error
            mask[first - first_page : end - first_page] = part.kind == FULL
        return out, mask

    async def next_data(self, offset: int) -> int | None:
        """Return the offset of the first byte at or after ``offset`` in a page with data."""
        page = offset // PAGE_SIZE
        while page < self.pages:
            candidate = await self.next_candidate(page)
            if candidate is None:
                return None
            count = min(WINDOW // 4, self.pages - candidate)
            mask = await self.map_pages(candidate, count)
            if mask.any():
                found = (candidate + int(np.argmax(mask))) * PAGE_SIZE
                return max(offset, found)
            page = candidate + count
        return None

    async def next_hole(self, offset: int) -> int:
        """Return the offset of the first byte at or after ``offset`` that is in no data."""
        page = offset // PAGE_SIZE
        while page < self.pages:
            count = min(WINDOW // 4, self.pages - page)
            mask = await self.map_pages(page, count)
            if not mask.all():
                return min(self.size, max(offset, (page + int(np.argmin(mask))) * PAGE_SIZE))
            page += count
        return self.size

    def _windows(self, first_page: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield the range in windows that end where chunks do, up to the end of the disk."""
        end = min(first_page + count, self.pages)
        page = first_page
        while page < end:
            stop = min(end, (page + WINDOW) // PAGES_PER_CHUNK * PAGES_PER_CHUNK)
            yield page, stop
            page = stop

    async def _resolve(self, first: int, end: int, *, places: bool = False) -> Resolved:
        """Resolve pages [first, end); go round a joined delta that is damaged."""
        while True:
            try:
                return await _resolve(self._pieces, first, end, places=places)
            except PieceError as broken:
                found = broken
            await self.go_round(found.piece, found.error)

    async def go_round(self, piece: Piece, error: VdiskfsError) -> None:
        """Do without a joined delta that is damaged: take another chain.

        Raises:
            DamagedError: it is not a joined one.
        """
        if isinstance(error, NotFoundError) and await self.renew():
            return
        if piece.head.kind is not Kind.JOINED or self._reopen is None:
            raise self._damaged(error) from error
        self._bad |= {piece.name}
        self._pieces = list(await self._reopen(self._bad))

    async def renew(self) -> bool:
        """Look for the chain again: its objects may have been replaced; say whether they were.

        Raises:
            NotFoundError: the point was thinned away.
        """
        if self._reopen is None or not self._pieces:
            return False
        pieces = list(await self._reopen(self._bad))
        if pieces[-1].head.to_digest != self.digest:
            raise DamagedError(f"{self.title}: its deltas lead to another state than before")
        changed = [piece.name for piece in pieces] != [piece.name for piece in self._pieces]
        self._pieces = pieces
        return changed

    # ---- pages that lie apart ----------------------------------------------------------

    async def choose(self, pages: U64, *, places: bool = False) -> Chosen:
        """Return what the point holds in some pages, which are sorted, each once.

        Pages beyond its end are absent. ``places``: also where it is stored, for `gather`.
        """
        while True:
            try:
                return await resolve_chosen(self._pieces, pages, self.pages, places=places)
            except PieceError as broken:
                found = broken
            await self.go_round(found.piece, found.error)

    async def gather(self, chosen: Chosen) -> bytearray:
        """Return the pages of ``chosen`` one after the other, each verified, without data zeros.

        Raises:
            DamagedError: the vault does not hold what was stored.
        """
        out = bytearray(len(chosen.pages) * PAGE_SIZE)
        while True:
            try:
                await fetch_pages(self._store, chosen.found, chosen.pages, out, self._limiter)
                break
            except NotFoundError as error:
                if not await self.renew():
                    raise self._damaged(error) from error
                chosen = await self.choose(chosen.pages, places=True)
            except DamagedError as error:
                raise self._damaged(error) from error
        self.gathered_bytes += stored_bytes(chosen.found)
        return out

    def aside(self, requests: int) -> PointReader:
        """Return another reader of the point, with requests of its own: so many at once.

        Asks nothing. It is closed for itself.
        """
        other = PointReader(
            self._store, self._pieces, title=self.title, size=self.size,
            generation=self.generation, epoch=self.epoch, reopen=self._reopen,
        )  # fmt: skip
        other._bad = self._bad
        other._limiter = trio.CapacityLimiter(requests)
        return other

    async def next_candidate(self, page: int) -> int | None:
        """Return the first page at or after ``page`` that may have data, or None."""
        candidates = []
        for piece in self._pieces:
            try:
                found = await piece.next_data_key(page)
            except (DamagedError, NotFoundError) as error:
                raise self._damaged(error) from error
            if found is not None and found < self.pages:
                candidates.append(found)
        return min(candidates, default=None)

    def _damaged(self, error: VdiskfsError) -> DamagedError:
        missing = " is missing" if isinstance(error, NotFoundError) else ""
        return DamagedError(f"{self.title}: {error.message}{missing}")


async def _resolve(pieces: Sequence[Piece], first: int, end: int, *, places: bool) -> Resolved:
    count = end - first
    result = Resolved(first, np.zeros(count, np.uint8), np.zeros(count, np.uint64))
    waiting = np.ones(count, np.bool_)
    limit = end
    for piece in reversed(pieces):
        if limit <= first or not waiting.any():
            break
        try:
            await _apply(piece, result, waiting, limit, places=places)
            torn = piece.head.torn_page
            if torn is not None and first <= torn < limit and waiting[torn - first]:
                raise FormatError(f"page {torn}, which the cut tears, is missing", where=piece.name)
        except (DamagedError, NotFoundError) as error:
            raise PieceError(piece, error) from error
        # Invariant: what is older than a cut has nothing to say beyond it.
        limit = min(limit, pages_of(piece.head.cut))
    return result


async def _apply(
    piece: Piece, result: Resolved, waiting: Bools, limit: int, *, places: bool
) -> None:
    """Let a piece decide the pages that still wait, below ``limit`` (pages)."""
    first = result.first

    def needed(low: int, high: int) -> bool:
        # What newer deltas have decided already is not read: damage there hurts nobody.
        return bool(waiting[max(0, low - first) : max(0, min(high + 1, limit) - first)].any())

    zero_rows = await piece.rows(ZEROS, first, limit - 1, needed)
    zeros = [await piece.zeros(row) for row in zero_rows]
    zero = _zero_mask(zeros, first, limit, len(waiting))
    for row in await piece.rows(DATA, first, limit - 1, needed):
        entries = (await piece.entries(row)).within(first, limit)
        pageno, owner = entries.pages()
        rows = np.flatnonzero((pageno >= np.uint64(first)) & (pageno < np.uint64(limit)))
        at = (pageno[rows] - np.uint64(first)).astype(np.int64)
        if zero[at].any():
            raise FormatError("a page is both zero and data", where=piece.name)
        fresh = waiting[at]
        rows, at = rows[fresh], at[fresh]
        if not len(rows):
            continue
        result.kind[at] = FULL
        result.sums[at] = entries.sums[rows]
        waiting[at] = False
        if places:
            chosen = select_pages(entries, pageno, owner, rows)
            result.found.append(await locate(piece, chosen))
    zero &= waiting
    result.kind[zero] = ZERO
    waiting[zero] = False


def _zero_mask(parts: Sequence[Extents], first: int, limit: int, count: int) -> Bools:
    steps = np.zeros(count + 1, np.int64)
    for part in parts:
        runs = part.clip(first, limit)
        np.add.at(steps, (runs.start - np.uint64(first)).astype(np.int64), 1)
        np.add.at(steps, (runs.end - np.uint64(first)).astype(np.int64), -1)
    mask: Bools = np.cumsum(steps)[:count] > 0
    return mask
