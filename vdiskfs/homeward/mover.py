"""Moves a local image to a point of its disk: only what differs, many pieces at once.

While nobody uses the image. A note (`note`) that is durable before the first byte is changed
says what is known of it, so that a run that is killed anywhere, or loses its power, is gone on
with by the next one, also towards another point. Trio thread only; the file is used in threads.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import trio

from vdiskfs.catalog import Differences, DiskLog, open_differences
from vdiskfs.crash import hook
from vdiskfs.delta.entries import U64, Extents
from vdiskfs.errors import (
    DamagedError,
    NotFoundError,
    StateError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.homeward.moves import MoveProgress, Place
from vdiskfs.homeward.note import HomeNote, read_home, write_home
from vdiskfs.homeward.target import TargetFile
from vdiskfs.point import PointReader, data_pages
from vdiskfs.point.fetch import first_error
from vdiskfs.ratelimit import RateLimiter
from vdiskfs.units import PAGE_SIZE, PAGES_PER_CHUNK

log = logging.getLogger(__name__)

T = TypeVar("T")

PIECE = 512
"""Pages of one piece: 2 MiB."""

AT_ONCE = 8
"""Pieces under way at once."""

MARK_PIECES = 128
"""After so many pieces, 256 MiB, of a full download it is durable how far it is."""

RETRY_S = 2.0
"""Seconds between tries while the vault cannot."""

# A log of the disk that leads to the points of a generation: a new one at each call.
MakeLog = Callable[[int], Awaitable[DiskLog]]
Pieces = Callable[[int], AsyncGenerator[U64, None]]


async def _never() -> bool:
    return False


class HomeMover:
    """Moves one image. Moves that are asked for at once are made one after the other."""

    def __init__(
        self, image: Path, directory: Path, make_log: MakeLog, *,
        limiter: RateLimiter | None = None, is_away: Callable[[], Awaitable[bool]] = _never,
        verify: bool = False,
    ) -> None:  # fmt: skip
        """Read the note that `prepare_home` or an earlier move has left.

        Args:
            image: a regular file that nobody uses.
            directory: has the note.
            make_log: gives the points of a generation of the disk: a new log at each call, made
                from a record that has the generation.
            limiter: bounds the bytes that are read from the vault.
            is_away: says whether the vault as a whole is not there, when it lacks something.
            verify: read back what was moved, from the disk, before it counts as moved.

        Raises:
            NotFoundError, DamagedError: there is no note, or none that can be believed.
        """
        self.image = image
        self.note: HomeNote = read_home(directory)
        self.progress = MoveProgress()
        self._directory = directory
        self._make_log = make_log
        self._limiter = limiter if limiter is not None else RateLimiter()
        self._is_away = is_away
        self._verify = verify
        self._resumed = False
        self._moving = trio.Lock()
        self._target: TargetFile
        self._reader: PointReader

    @property
    def at(self) -> Place | None:
        """Return the point that the image is, byte for byte; None: it is on its way."""
        return None if self._moving.locked() else self.note.at

    # ---- what is to be done ------------------------------------------------------------

    async def plan(self, to: Place) -> int:
        """Return how many bytes of pages a move would deal with; nothing changes.

        Waits while the vault is away.

        Raises:
            NotFoundError: no such point.
            DamagedError: the vault does not hold what was stored.
        """
        note = self.note.toward(to)
        async with AsyncExitStack() as stack:
            pairs, content = await self._open(stack, note)
            return await self._count(note, pairs, content) * PAGE_SIZE

    async def move(self, to: Place) -> MoveProgress:
        """Make the image exactly a point; return how it went. Durable on return.

        Waits while the vault is away. Whatever ends it, cancellation too: the note says what
        is known of the image, and another call goes on.

        Raises:
            NotFoundError: no such point. Nothing was changed.
            DamagedError: the vault does not hold what was stored; or, read back, the image
                does not hold what was written.
            LocalError: the local disk refused.
            RefusedError: the vault refused.
            StateError: the points are another disk's.
        """
        # Invariant: what a call notes is what it has moved itself; another one's note would
        # count pages as moved that nobody has written.
        async with self._moving:
            return await self._move(to)

    async def _move(self, to: Place) -> MoveProgress:
        self.progress = MoveProgress()
        if self.note.at == to:
            return self.progress
        note = self.note.toward(to)
        # An earlier run has begun it: some of it may be done.
        self._resumed = len(self.note.path) > 1
        async with AsyncExitStack() as stack:
            pairs, content = await self._open(stack, note)
            self._reader = content if content is not None else pairs[-1].b
            self.progress.total_bytes = await self._count(note, pairs, content) * PAGE_SIZE
            self.progress.counted = True
            self._target = await trio.to_thread.run_sync(TargetFile, self.image)
            stack.callback(self._target.close)
            await self._write(note)
            hook("homeward.noted")
            await trio.to_thread.run_sync(self._target.resize, self._reader.size)
            hook("homeward.resized")
            await self._move_pairs(pairs)
            if content is not None:
                await self._move_rest(content)
            await self._arrive(None)
            hook("homeward.arrived")
        log.info("%s: is at generation %d, epoch %d", self.image, *to)
        return self.progress

    async def _open(
        self, stack: AsyncExitStack, note: HomeNote
    ) -> tuple[list[Differences], PointReader | None]:
        """Open what lies between the places of a note, and the last one whole if need be."""

        # Anew at each try: a log that was made while the vault was away believes it empty.
        async def find(place: Place) -> DiskLog:
            found = await self._make_log(place[0])
            if found.record.id != note.disk_id:
                raise StateError(
                    f"{self.image}: is an image of disk {note.disk_id}, not of {found.record.id}"
                )
            return found

        async def between(a: Place, b: Place) -> Differences:
            log_b = await find(b)
            log_a = log_b if a[0] == b[0] else await find(a)
            return await open_differences(
                log_a, await log_a.find(a[1]), log_b, await log_b.find(b[1])
            )

        async def whole(place: Place) -> PointReader:
            one = await find(place)
            return await one.open(await one.find(place[1]))

        pairs: list[Differences] = []
        for a, b in zip(note.path, note.path[1:], strict=False):
            pair = await self._patiently(partial(between, a, b))
            pairs.append(await stack.enter_async_context(pair))
        if note.known is None:
            return pairs, None
        content = await self._patiently(lambda: whole(note.path[-1]))
        return pairs, await stack.enter_async_context(content)

    async def _count(
        self, note: HomeNote, pairs: list[Differences], content: PointReader | None
    ) -> int:
        total = 0
        end = note.known
        for pair in pairs:
            async with aclosing(self._patient(pair.pages)) as batches:
                async for pages in batches:
                    total += len(_below(pages, end))
        if content is not None:
            async with aclosing(
                self._patient(partial(data_pages, content), note.known or 0)
            ) as batches:
                async for pages in batches:
                    total += len(pages)
        return total

    # ---- what differs ------------------------------------------------------------------

    async def _move_pairs(self, pairs: list[Differences]) -> None:
        """Bring the pages below ``known`` from wherever they are to the last place."""
        if not pairs:
            return
        if self._resumed:
            # What was written and not synced may be in memory alone.
            await trio.to_thread.run_sync(self._target.forget_cache)
        for pair in pairs:
            await self._bring(partial(self._differing, pair))
            # The next pair may name the same pages, which are right by then.
            self._resumed = True
        await self._sync(lambda: self._differing(*pairs))
        if self.note.known is not None:
            await self._arrive(self.note.known)
            hook("homeward.marked")

    async def _differing(self, *pairs: Differences) -> AsyncGenerator[U64, None]:
        for pair in pairs:
            async with aclosing(self._patient(pair.pages)) as batches:
                async for batch in batches:
                    for piece in _pieces(_below(batch, self.note.known)):
                        yield piece

    # ---- all of it ---------------------------------------------------------------------

    async def _move_rest(self, content: PointReader) -> None:
        """Bring all pages from ``known`` on: data where the point has it, else holes."""
        self._resumed = False
        position = self.note.known or 0
        while position < self._reader.pages:
            end = await self._move_stretch(content, position)
            await self._arrive(end)
            hook("homeward.marked")
            position = end

    async def _move_stretch(self, content: PointReader, position: int) -> int:
        """Bring pages from a position on, up to a bound; return where it ends. It is synced."""
        pieces: list[U64] = []
        async with aclosing(self._patient(partial(data_pages, content), position)) as batches:
            async for batch in batches:
                pieces += _pieces(batch)
                if len(pieces) >= MARK_PIECES:
                    break
        pieces = pieces[:MARK_PIECES]
        full = len(pieces) == MARK_PIECES
        end = int(pieces[-1][-1]) + 1 if full else max(self._reader.pages, position)

        async def again() -> AsyncGenerator[U64, None]:
            for piece in pieces:
                yield piece

        data = np.concatenate([np.empty(0, np.uint64), *pieces])
        await trio.to_thread.run_sync(self._target.clear, _gaps(data, position, end))
        await self._bring(again)
        await self._sync(again)
        return end

    # ---- pieces ------------------------------------------------------------------------

    async def _bring(self, pieces: Callable[[], AsyncGenerator[U64, None]]) -> None:
        """Bring pieces, many at once."""
        free = trio.Semaphore(AT_ONCE)

        async def one(pages: U64) -> None:
            try:
                await self._bring_piece(pages)
            finally:
                free.release()

        try:
            async with trio.open_nursery() as nursery, aclosing(pieces()) as found:
                async for pages in found:
                    await free.acquire()
                    nursery.start_soon(one, pages)
        except BaseExceptionGroup as group:
            raise first_error(group) from None

    async def _bring_piece(self, pages: U64) -> None:
        total = len(pages)
        if self._resumed:
            known = await self._patiently(lambda: self._reader.choose(pages))
            same = await trio.to_thread.run_sync(self._target.holds, pages, known.full, known.sums)
            pages = pages[~same]
        if len(pages):
            chosen = await self._patiently(lambda: self._reader.choose(pages, places=True))
            stored = chosen.stored_bytes
            await self._limiter.take(stored)
            data = await self._patiently(lambda: self._reader.gather(chosen))
            self.progress.fetched_bytes += stored
            await trio.to_thread.run_sync(self._target.write, pages, memoryview(data), chosen.full)
            hook("homeward.written")
        self.progress.done_bytes += total * PAGE_SIZE

    async def _sync(self, pieces: Callable[[], AsyncGenerator[U64, None]]) -> None:
        """Make what was written durable; with ``verify`` see that the disk holds it."""
        await trio.to_thread.run_sync(self._target.sync)
        hook("homeward.synced")
        if not self._verify:
            return
        await trio.to_thread.run_sync(self._target.forget_cache)
        async with aclosing(pieces()) as found:
            async for pages in found:
                await self._verify_piece(pages)

    async def _verify_piece(self, pages: U64) -> None:
        chosen = await self._patiently(lambda: self._reader.choose(pages))
        same = await trio.to_thread.run_sync(self._target.holds, pages, chosen.full, chosen.sums)
        if not same.all():
            wrong = int(pages[np.flatnonzero(~same)[0]])
            raise DamagedError(
                f"{self.image}: page {wrong} does not hold what was written to it",
                hint="look at the disk that the image lies on, then move it again",
            )

    async def _arrive(self, known: int | None) -> None:
        await self._write(self.note.arrived(known))

    async def _write(self, note: HomeNote) -> None:
        if note != self.note:
            await trio.to_thread.run_sync(write_home, self._directory, note)
            self.note = note

    # ---- patience ----------------------------------------------------------------------

    async def _patient(self, make: Pieces, position: int = 0) -> AsyncGenerator[U64, None]:
        """Yield what an iteration yields; go on behind the last page when the vault is back."""
        while True:
            try:
                async with aclosing(make(position)) as batches:
                    async for pages in batches:
                        yield pages
                        position = int(pages[-1]) + 1
                return
            except (VaultUnreachableError, DamagedError, NotFoundError) as error:
                failure = error
            await self._wait(failure)

    async def _patiently(self, action: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                result = await action()
            except (VaultUnreachableError, DamagedError, NotFoundError) as error:
                failure = error
            else:
                self.progress.waiting = ""
                return result
            await self._wait(failure)

    async def _wait(self, failure: VdiskfsError) -> None:
        """Wait for the vault to be tried again; raise what is no matter of patience."""
        after = RETRY_S
        if isinstance(failure, VaultUnreachableError):
            after = max(after, failure.retry_after_s or 0.0)
        # A folder that is not mounted lacks everything.
        elif not await self._is_away():
            raise failure
        self.progress.waiting = failure.message
        log.info("%s: waiting for the vault: %s", self.image, failure)
        await trio.sleep(after)


def _below(pages: U64, end: int | None) -> U64:
    return pages if end is None else pages[pages < np.uint64(end)]


def _pieces(pages: U64) -> Iterator[U64]:
    """Cut sorted pages into pieces; where it can be, not inside a chunk: it is stored as one."""
    at = 0
    while at < len(pages):
        end = at + PIECE
        if end < len(pages):
            begin = int(pages[end]) // PAGES_PER_CHUNK * PAGES_PER_CHUNK
            cut = int(np.searchsorted(pages, np.uint64(begin)))
            end = cut if cut > at else end
        yield pages[at:end]
        at = end


def _gaps(pages: U64, start: int, end: int) -> Extents:
    """Return the runs of [start, end) between sorted pages."""
    bounds = np.array([start, end], np.uint64)
    begin = np.concatenate([bounds[:1], pages + np.uint64(1)])
    stop = np.concatenate([pages, bounds[1:]])
    some = begin < stop
    return Extents(begin[some], stop[some])
