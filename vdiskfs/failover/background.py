"""Brings all of a writable copy, behind whatever its machine asks for, to completion.

First the index is read, region by region, so that it is known what is to come; then what is
absent is brought in pieces, with requests of its own, few at once, and one at a time while the
machine waits for something. Trio thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
import trio

from vdiskfs import native
from vdiskfs.crash import hook
from vdiskfs.delta.entries import U64, distinct, extents_of_pages
from vdiskfs.errors import VdiskfsError
from vdiskfs.failover.copy import WritableCopy
from vdiskfs.point import PointReader, data_pages
from vdiskfs.point.fetch import first_error
from vdiskfs.ratelimit import RateLimiter
from vdiskfs.units import PAGE_SIZE, PAGES_PER_CHUNK, PAGES_PER_REGION, pages_of

log = logging.getLogger(__name__)

PIECE = 256
"""Pages of one piece: 1 MiB."""

AT_ONCE = 4
"""Pieces, and requests, under way at once."""

COMMIT_PIECES = 256
"""After so many pieces, 256 MiB, what is present outlives the host."""

LOCAL_RETRY_S = 30.0
"""Seconds between tries while the local disk takes nothing."""


@dataclass(slots=True)
class HydrationProgress:
    """How far a copy is. Bytes are those of whole pages.

    ``present_bytes`` are here: written, brought, or made zero; ``absent_bytes`` are still to
    come, exactly once ``mapped``. ``fetched_bytes`` were read from the vault by this task.
    ``waiting`` says why nothing comes, or is empty.
    """

    present_bytes: int = 0
    absent_bytes: int = 0
    fetched_bytes: int = 0
    mapped: bool = False
    done: bool = False
    waiting: str = ""


class BackgroundHydration:
    """Completes one copy. `run` it once for each opening of the copy; it may be cancelled."""

    def __init__(self, copy: WritableCopy, limiter: RateLimiter) -> None:
        """Prepare; asks nobody.

        Args:
            copy: open. Its own wants are neither delayed by the limiter nor counted.
            limiter: of the bytes that are read from the vault; may be shared.
        """
        self._copy = copy
        self._image = copy.image
        self._limiter = limiter
        self._single = trio.Lock()
        self._fetched = 0
        self._mapped = False
        self._waiting = ""
        self._reader: PointReader | None = None
        self.error: VdiskfsError | None = None
        """Why it has ended before the copy is complete."""

    def progress(self) -> HydrationProgress:
        """Return how far it is now. Not after the copy is closed."""
        counts = native.presence_counts(self._image)
        done = counts.complete
        return HydrationProgress(
            self._copy.present_bytes, 0 if done else counts.absent_pages * PAGE_SIZE,
            self._fetched, self._mapped or done, done, self._waiting or self._copy.waiting,
        )  # fmt: skip

    async def run(self) -> None:
        """Bring everything; on return the copy is complete, durably, or was closed.

        Waits while the vault is away and while the local disk is full. A copy that is
        complete asks nobody for anything.

        Raises:
            DamagedError, NotFoundError: the vault is there, and lacks what is absent here.
                What else there is has not been tried.
            RefusedError: the vault refused.
        """
        try:
            await self._copy.until_closed(self._run)
        except BaseExceptionGroup as group:
            error = first_error(group)
            self.error = error if isinstance(error, VdiskfsError) else None
            raise error from None
        except VdiskfsError as error:
            self.error = error
            raise

    async def _run(self) -> None:
        while not native.presence_counts(self._image).complete:
            if self._reader is None:
                await self._copy.patiently(self._open)
            await self._copy.patiently(self._map)
            self._mapped = True
            await self._fill_all()
            # Not so where the machine has changed the size meanwhile: once more.
            await self._locally(self._complete)
        log.info("%s: all of it is here", self._copy.name)

    async def _open(self) -> None:
        self._reader = (await self._copy.reader()).aside(AT_ONCE)

    def _complete(self) -> None:
        if native.complete_presence(self._image):
            hook("hydration.completed")

    # ---- what there is -----------------------------------------------------------------

    async def _map(self) -> None:
        """Learn of every region what of it has data; holes cost nothing, however long."""
        assert self._reader is not None
        region = native.next_unmapped(self._image, 0)
        while region is not None:
            await self._map_from(self._reader, region)
            region = native.next_unmapped(self._image, region)

    async def _map_from(self, reader: PointReader, region: int) -> None:
        """Map from a region on, until one is found that is known already."""
        rest = np.empty(0, np.uint64)
        async with aclosing(data_pages(reader, region * PAGES_PER_REGION)) as found:
            async for pages in found:
                rest = np.concatenate([rest, pages])
                # The last region that is named may have more.
                end = int(rest[-1]) // PAGES_PER_REGION
                below = int(np.searchsorted(rest, np.uint64(end * PAGES_PER_REGION)))
                self._say(region, end, rest[:below])
                rest, region = rest[below:], max(region, end)
                following = native.next_unmapped(self._image, region)
                if following is None or following > region:
                    return
        self._say(region, -(-pages_of(self._image.size()) // PAGES_PER_REGION), rest)

    def _say(self, first: int, end: int, pages: U64) -> None:
        """Tell the core which pages of regions [first, end) have data: these."""
        for number in distinct(pages // np.uint64(PAGES_PER_REGION)).tolist():
            if number >= end:
                return
            if number > first:
                self._image.map(first, number - first, None)
            start = number * PAGES_PER_REGION
            low, high = np.searchsorted(pages, np.array([start, start + PAGES_PER_REGION], "u8"))
            data = np.zeros(PAGES_PER_REGION, np.bool_)
            data[(pages[low:high] - np.uint64(start)).astype(np.int64)] = True
            self._image.map(number, 1, data)
            first = number + 1
        if first < end:
            self._image.map(first, end - first, None)

    # ---- the bytes ---------------------------------------------------------------------

    async def _fill_all(self) -> None:
        """Bring what is absent, several pieces at once."""
        pieces = self._absent()
        begun = 0

        async def work() -> None:
            nonlocal begun
            for piece in pieces:
                begun += 1
                commit = begun % COMMIT_PIECES == 0
                await self._fill(piece)
                if commit:
                    await self._locally(lambda: native.commit_presence(self._image))
                    hook("hydration.committed")

        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(work)

    def _absent(self) -> Iterator[U64]:
        """Yield the absent pages in order, in pieces of whole chunks as far as that goes."""
        offset, piece = 0, np.empty(0, np.uint64)
        while (run := native.next_absent(self._image, offset)) is not None:
            start, length = run
            first, end = start // PAGE_SIZE, pages_of(start + length)
            while first < end:
                stop = min(end, first + PIECE - len(piece))
                if stop < end and stop // PAGES_PER_CHUNK * PAGES_PER_CHUNK > first:
                    stop = stop // PAGES_PER_CHUNK * PAGES_PER_CHUNK
                piece = np.concatenate([piece, np.arange(first, stop, dtype=np.uint64)])
                first = stop
                if len(piece) >= PIECE or first < end:
                    yield piece
                    piece = np.empty(0, np.uint64)
            offset = start + length
        if len(piece):
            yield piece

    async def _fill(self, pages: U64) -> None:
        """Bring one piece; alone while the machine waits for something."""
        stored = await self._stored(pages)
        await self._limiter.take(stored)
        if self._copy.asked:
            async with self._single:
                await self._copy.patiently(lambda: self._bring(pages))
        else:
            await self._copy.patiently(lambda: self._bring(pages))

    async def _stored(self, pages: U64) -> int:
        """Return how many bytes of the vault a piece takes."""
        found = [0]

        async def look() -> None:
            assert self._reader is not None
            found[0] = (await self._reader.choose(pages, places=True)).stored_bytes

        await self._copy.patiently(look)
        return found[0]

    async def _bring(self, pages: U64) -> None:
        reader = self._reader
        assert reader is not None
        # What came meanwhile, or was written, is not brought.
        wanted = [not self._image.is_present(int(page) * PAGE_SIZE, PAGE_SIZE) for page in pages]
        pages = pages[np.array(wanted, np.bool_)]
        if not len(pages):
            return
        chosen = await reader.choose(pages, places=True)
        data = memoryview(await reader.gather(chosen))
        self._fetched += chosen.stored_bytes
        fills = []
        runs = extents_of_pages(pages)
        for start, end in zip(runs.start.tolist(), runs.end.tolist(), strict=True):
            at = int(np.searchsorted(pages, np.uint64(start))) * PAGE_SIZE
            length = min((end - start) * PAGE_SIZE, reader.size - start * PAGE_SIZE)
            if length > 0:
                fills.append((start * PAGE_SIZE, data[at : at + length]))
        await self._locally(lambda: self._put(fills))
        hook("hydration.filled")

    def _put(self, fills: Sequence[tuple[int, memoryview]]) -> None:
        for offset, view in fills:
            self._image.fill(offset, view)

    async def _locally(self, action: Callable[[], None]) -> None:
        """Do it in a thread until the local disk takes it: it may be full for a while."""
        while True:
            try:
                await trio.to_thread.run_sync(action)
            except OSError as error:
                self._waiting = f"the local disk: {error.strerror}"
                log.warning("%s: waiting for %s", self._copy.name, self._waiting)
            else:
                self._waiting = ""
                return
            await trio.sleep(LOCAL_RETRY_S)
