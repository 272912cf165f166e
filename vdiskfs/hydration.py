"""Images of recovery points: bytes that come from the vault when they are read.

An opened point is a lazy native image over an unnamed sparse file in the cache directory.
The core parks a read of what is not here and posts an event; a task here maps the region,
fetches and verifies the chunks, fills them in and lets the read run again. Nothing waits
in a C thread, and a vault that does not answer stops only who reads its points.

All points together keep at most ``limit`` bytes; the regions filled first go first.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import trio

from vdiskfs import native
from vdiskfs.errors import VaultUnreachableError, VdiskfsError
from vdiskfs.native import ImageFlags
from vdiskfs.point import PointReader
from vdiskfs.units import CHUNK_SIZE, PAGE_SIZE, PAGES_PER_REGION, REGION_SIZE, pages_of

log = logging.getLogger(__name__)

IDLE_IMAGES = 32
"""Points nobody has open whose bytes are kept for the next who opens them."""

READ_AHEAD = 1024 * 1024
"""Bytes fetched at once for who reads on from where the last fetch ended."""

RETRY_S = 2.0
"""Seconds between tries of a read while the vault cannot: the reader may interrupt."""

Key = tuple[str, int, int]


@dataclass(eq=False)
class OpenedPoint:
    """One point's image. ``opens`` counts who uses it."""

    key: Key
    reader: PointReader
    image: native.Image
    opens: int = 0
    fetching: dict[int, trio.Event] = field(default_factory=dict)
    next_offset: int = -1


class PointImages:
    """All opened points of a mount. Only the trio thread uses it."""

    def __init__(
        self, core: native.Core, directory: Path, limit: int, next_cookie: Callable[[], int]
    ) -> None:
        """Keep at most ``limit`` bytes in ``directory``, which must exist."""
        self._core = core
        self._directory = directory
        self._limit = limit
        self._next_cookie = next_cookie
        self._by_key: OrderedDict[Key, OpenedPoint] = OrderedDict()
        self._by_cookie: dict[int, OpenedPoint] = {}
        self._filled: OrderedDict[tuple[OpenedPoint, int], int] = OrderedDict()
        self.cached_bytes = 0

    async def open(self, key: Key, make_reader: Callable[[], object]) -> OpenedPoint:
        """Return the point's image, made if need be. Pair it with `close`.

        Args:
            key: disk id, generation, epoch.
            make_reader: async; opens the point's chain. Called only where it is needed.
        """
        opened = self._by_key.get(key)
        if opened is None:
            reader = await make_reader()  # type: ignore[misc]
            opened = self._by_key.get(key)
            if opened is None:
                opened = self._add(key, reader)
            else:
                await reader.aclose()
        self._by_key.move_to_end(key)
        opened.opens += 1
        return opened

    def _add(self, key: Key, reader: PointReader) -> OpenedPoint:
        fd = os.open(self._directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, reader.size)
            flags = ImageFlags.LAZY | ImageFlags.READONLY | ImageFlags.KEEP_CACHE
            image = native.Image(self._core, fd, flags, self._next_cookie())
        finally:
            os.close(fd)
        opened = OpenedPoint(key, reader, image)
        self._by_key[key] = opened
        self._by_cookie[image.cookie] = opened
        return opened

    async def close(self, opened: OpenedPoint) -> None:
        """One user less. The bytes stay for a while."""
        opened.opens -= 1
        idle = [one for one in self._by_key.values() if one.opens == 0]
        for one in idle[: max(0, len(idle) - IDLE_IMAGES)]:
            await self._drop(one)

    async def aclose(self) -> None:
        """Drop all of them. Nobody reads any more."""
        for opened in list(self._by_key.values()):
            await self._drop(opened)

    async def _drop(self, opened: OpenedPoint) -> None:
        del self._by_key[opened.key]
        del self._by_cookie[opened.image.cookie]
        for key in [key for key in self._filled if key[0] is opened]:
            self.cached_bytes -= self._filled.pop(key)
        opened.image.close()
        await opened.reader.aclose()

    # ---- events of the core ------------------------------------------------------------

    def knows(self, cookie: int) -> bool:
        """Tell whether the cookie is one of ours."""
        return cookie in self._by_cookie

    async def answer(self, event: native.Event) -> None:
        """Do what a WANT or SEEK event asks, then let the requests run again."""
        opened = self._by_cookie.get(event.cookie)
        if opened is None:
            return
        error = 0
        try:
            if event.kind is native.EventKind.SEEK:
                await self._try(opened, lambda: self._map_until_data(opened, event.offset))
            else:
                await self._try(opened, lambda: self._fetch(opened, event.offset, event.length))
        except (VdiskfsError, OSError) as failure:
            log.error("point %s@%d: a read failed: %s", opened.key[0], opened.key[2], failure)
            error = errno.EIO
        except Exception:
            log.exception("point %s@%d: a read failed", opened.key[0], opened.key[2])
            error = errno.EIO
        opened.image.answer(event.offset, event.length, error)

    async def _try(self, opened: OpenedPoint, action: Callable[[], object]) -> None:
        """Until the vault answers: who reads waits, and may be interrupted."""
        while True:
            try:
                await action()  # type: ignore[misc]
                return
            except VaultUnreachableError as failure:
                log.info("point %s@%d: waiting: %s", opened.key[0], opened.key[2], failure)
                await trio.sleep(max(RETRY_S, failure.retry_after_s or 0.0))

    async def _map(self, opened: OpenedPoint, first: int, last: int) -> None:
        """Map the regions first..last that are not mapped yet."""
        for region in range(first, last + 1):
            if not opened.image.is_mapped(region):
                page = region * PAGES_PER_REGION
                count = min(PAGES_PER_REGION, pages_of(opened.reader.size) - page)
                data = np.zeros(PAGES_PER_REGION, np.bool_)
                data[:count] = await opened.reader.map_pages(page, count)
                opened.image.map(region, 1, data)

    async def _map_until_data(self, opened: OpenedPoint, offset: int) -> None:
        """Map from the first region that is unknown up to the next one with data."""
        end = -(-opened.reader.size // REGION_SIZE)
        region = offset // REGION_SIZE
        while region < end and opened.image.is_mapped(region):
            region += 1
        if region >= end:
            return
        data = await opened.reader.next_data(region * REGION_SIZE)
        stop = end if data is None else data // REGION_SIZE
        if stop > region:
            opened.image.map(region, stop - region, None)
        if data is not None:
            await self._map(opened, stop, stop)

    async def _fetch(self, opened: OpenedPoint, offset: int, length: int) -> None:
        ahead = READ_AHEAD if offset == opened.next_offset else 0
        end = min(opened.reader.size, offset + max(length, ahead))
        first, last = offset // CHUNK_SIZE, (end - 1) // CHUNK_SIZE
        opened.next_offset = offset + length
        await self._map(opened, offset // REGION_SIZE, (end - 1) // REGION_SIZE)
        while True:
            ours, theirs = self._missing(opened, first, last)
            if ours:
                await self._fill(opened, ours)
            elif theirs is not None:
                await theirs.wait()
            else:
                opened.next_offset = max(opened.next_offset, end)
                return

    def _missing(
        self, opened: OpenedPoint, first: int, last: int
    ) -> tuple[list[int], trio.Event | None]:
        """Return a run of chunks to fetch, or what to wait for if others fetch all of them."""
        run: list[int] = []
        theirs = None
        for chunk in range(first, last + 1):
            if opened.image.is_present(chunk * CHUNK_SIZE, CHUNK_SIZE):
                wanted = False
            elif chunk in opened.fetching:
                theirs, wanted = opened.fetching[chunk], False
            else:
                wanted = True
            if wanted:
                run.append(chunk)
            elif run:
                break
        return run, theirs

    async def _fill(self, opened: OpenedPoint, run: list[int]) -> None:
        done = trio.Event()
        opened.fetching.update(dict.fromkeys(run, done))
        try:
            start = run[0] * CHUNK_SIZE
            end = min(opened.reader.size, (run[-1] + 1) * CHUNK_SIZE)
            data = await opened.reader.read_pages(start // PAGE_SIZE, pages_of(end - start))
            view = memoryview(data)[: end - start]
            filled = await self._put(opened, start, view)
            if filled == 0 and not opened.image.is_present(start, end - start):
                # Evicted meanwhile: it is mapped anew, then fetched anew.
                await self._map(opened, start // REGION_SIZE, (end - 1) // REGION_SIZE)
            self._count(opened, start // REGION_SIZE, filled)
        finally:
            for chunk in run:
                opened.fetching.pop(chunk, None)
            done.set()

    async def _put(self, opened: OpenedPoint, start: int, view: memoryview) -> int:
        """Fill bytes in; on a full disk what is kept of all points gives way to them."""
        try:
            return await trio.to_thread.run_sync(opened.image.fill, start, view)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._filled:
                raise
        for oldest, at in list(self._filled):
            self._evict(oldest, at)
        first, last = start // REGION_SIZE, (start + len(view) - 1) // REGION_SIZE
        await self._map(opened, first, last)
        return await trio.to_thread.run_sync(opened.image.fill, start, view)

    def _evict(self, opened: OpenedPoint, region: int) -> None:
        self.cached_bytes -= self._filled.pop((opened, region))
        opened.image.evict(region, 1)

    def _count(self, opened: OpenedPoint, region: int, filled: int) -> None:
        key = (opened, region)
        self._filled[key] = self._filled.get(key, 0) + filled
        self.cached_bytes += filled
        while self.cached_bytes > self._limit and len(self._filled) > 1:
            oldest, at = next(iter(self._filled))
            if (oldest, at) == key:
                self._filled.move_to_end(key)
                continue
            self._evict(oldest, at)
