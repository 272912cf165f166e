"""One image whose bytes come from the vault when they are asked for.

The core parks a request for what is not here and posts an event; a task here maps the
region, fetches and verifies the chunks, fills them in and lets the request run again. Nothing
waits in a C thread, and a vault that does not answer stops only who asks for what is absent:
until it answers, without an error. Trio thread only.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable

import numpy as np
import trio

from vdiskfs import native
from vdiskfs.errors import VaultUnreachableError, VdiskfsError
from vdiskfs.point import PointReader
from vdiskfs.units import CHUNK_SIZE, PAGE_SIZE, PAGES_PER_REGION, REGION_SIZE, pages_of

log = logging.getLogger(__name__)

READ_AHEAD = 1024 * 1024
"""Bytes fetched at once for who reads on from where the last fetch ended."""

RETRY_S = 2.0
"""Seconds between tries of a read while the vault cannot: the reader may interrupt."""


class Hydrator:
    """Brings what one lazy image lacks. A subclass may say where room comes from."""

    def __init__(
        self, name: str, image: native.Image, make_reader: Callable[[], Awaitable[PointReader]]
    ) -> None:
        """Prepare; asks nobody.

        Args:
            name: of the image, for the log.
            image: lazy; stays the caller's.
            make_reader: opens the point whose bytes they are; called when they are needed.
        """
        self.name = name
        self.image = image
        self._make_reader = make_reader
        self._reader: PointReader | None = None
        self._opening = trio.Lock()
        self._fetching: dict[int, trio.Event] = {}
        self._next_offset = -1
        # Requests that wait for something now; why none of them gets it, or nothing.
        self.asked = 0
        self.waiting = ""
        self._scopes: set[trio.CancelScope] = set()
        self._idle = trio.Event()
        self._closed = False

    async def reader(self) -> PointReader:
        """Return the reader of the point, opened if need be."""
        async with self._opening:
            if self._reader is None:
                self._reader = await self._make_reader()
        return self._reader

    async def aclose(self) -> None:
        """End what is being brought, and give the reader up."""
        self._closed = True
        for scope in self._scopes:
            scope.cancel()
        while self._scopes:
            self._idle = trio.Event()
            await self._idle.wait()
        if self._reader is not None:
            await self._reader.aclose()
            self._reader = None

    async def until_closed(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do it, but no longer than until `aclose`."""
        if self._closed:
            return
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                await work()
            finally:
                self._scopes.discard(scope)
                self._idle.set()

    async def answer(self, event: native.Event) -> None:
        """Do what a WANT or SEEK event asks, then let the requests run again."""
        await self.until_closed(lambda: self._answer(event))

    async def _answer(self, event: native.Event) -> None:
        error = 0
        self.asked += 1
        try:
            if event.kind is native.EventKind.SEEK:
                await self.patiently(lambda: self._map_until_data(event.offset))
            else:
                await self.patiently(lambda: self.fetch(event.offset, event.length))
        except (VdiskfsError, OSError) as failure:
            log.error("%s: a read failed: %s", self.name, failure)
            error = errno.EIO
        except Exception:
            log.exception("%s: a read failed", self.name)
            error = errno.EIO
        finally:
            self.asked -= 1
        # Writes that waited run in it.
        await trio.to_thread.run_sync(self.image.answer, event.offset, event.length, error)

    async def patiently(self, action: Callable[[], Awaitable[None]]) -> None:
        """Do it until the vault answers: who reads waits, and may be interrupted."""
        while True:
            try:
                await action()
                self.waiting = ""
                return
            except VaultUnreachableError as failure:
                self.waiting = failure.message
                log.info("%s: waiting: %s", self.name, failure)
                await trio.sleep(max(RETRY_S, failure.retry_after_s or 0.0))

    # ---- what there is -----------------------------------------------------------------

    async def map(self, first: int, last: int) -> None:
        """Map the regions first..last that are not mapped yet."""
        for region in range(first, last + 1):
            if not self.image.is_mapped(region):
                reader = await self.reader()
                page = region * PAGES_PER_REGION
                count = min(PAGES_PER_REGION, pages_of(reader.size) - page)
                data = np.zeros(PAGES_PER_REGION, np.bool_)
                if count > 0:
                    data[:count] = await reader.map_pages(page, count)
                self.image.map(region, 1, data)

    async def _map_until_data(self, offset: int) -> None:
        """Map from the first region that is unknown up to the next one with data."""
        end = -(-self.image.size() // REGION_SIZE)
        region = offset // REGION_SIZE
        while region < end and self.image.is_mapped(region):
            region += 1
        if region >= end:
            return
        reader = await self.reader()
        data = None
        if region * REGION_SIZE < reader.size:
            data = await reader.next_data(region * REGION_SIZE)
        stop = end if data is None else min(end, data // REGION_SIZE)
        if stop > region:
            self.image.map(region, stop - region, None)
        if stop < end:
            await self.map(stop, stop)

    # ---- the bytes ---------------------------------------------------------------------

    async def fetch(self, offset: int, length: int) -> None:
        """Bring what is absent of a range, and what follows for who reads on.

        Raises:
            VaultUnreachableError: it cannot be said when.
            DamagedError: the vault has it no more.
            OSError: the local disk refused.
        """
        ahead = READ_AHEAD if offset == self._next_offset else 0
        end = min(self.image.size(), offset + max(length, ahead))
        self._next_offset = offset + length
        if offset >= end:
            return
        first, last = offset // CHUNK_SIZE, (end - 1) // CHUNK_SIZE
        await self.map(offset // REGION_SIZE, (end - 1) // REGION_SIZE)
        while True:
            ours, theirs = self._missing(first, last)
            if ours:
                await self._fill(ours)
            elif theirs is not None:
                await theirs.wait()
            else:
                self._next_offset = max(self._next_offset, end)
                return

    def _missing(self, first: int, last: int) -> tuple[list[int], trio.Event | None]:
        """Return a run of chunks to fetch, or what to wait for if others fetch all of them."""
        run: list[int] = []
        theirs = None
        for chunk in range(first, last + 1):
            if self.image.is_present(chunk * CHUNK_SIZE, CHUNK_SIZE):
                wanted = False
            elif chunk in self._fetching:
                theirs, wanted = self._fetching[chunk], False
            else:
                wanted = True
            if wanted:
                run.append(chunk)
            elif run:
                break
        return run, theirs

    async def _fill(self, run: list[int]) -> None:
        done = trio.Event()
        self._fetching.update(dict.fromkeys(run, done))
        try:
            reader = await self.reader()
            start = run[0] * CHUNK_SIZE
            pages = min(pages_of(reader.size), (run[-1] + 1) * CHUNK_SIZE // PAGE_SIZE)
            count = pages - start // PAGE_SIZE
            data = await reader.read_pages(start // PAGE_SIZE, count) if count > 0 else b""
            length = min(reader.size - start, len(data))
            if length > 0:
                await self._filled(start, memoryview(data)[:length])
        finally:
            for chunk in run:
                self._fetching.pop(chunk, None)
            done.set()

    async def _filled(self, start: int, view: memoryview) -> None:
        filled = await self.put(start, view)
        first, last = start // REGION_SIZE, (start + len(view) - 1) // REGION_SIZE
        if filled == 0 and not self.image.is_present(start, len(view)):
            # Evicted meanwhile: it is mapped anew, then fetched anew.
            await self.map(first, last)
        self.count(first, filled)

    async def put(self, start: int, view: memoryview) -> int:
        """Fill bytes in; return how many were absent."""
        return await trio.to_thread.run_sync(self.image.fill, start, view)

    def count(self, region: int, filled: int) -> None:
        """Bytes of a region have come."""
