"""Images of recovery points: bytes that come from the vault when they are read.

An opened point is a lazy native image over an unnamed sparse file in the cache directory
(`vdiskfs.hydrator`). All points together keep at most ``limit`` bytes; the regions filled
first go first.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path

from vdiskfs import native
from vdiskfs.errors import NO_ROOM
from vdiskfs.hydrator import Hydrator
from vdiskfs.native import ImageFlags
from vdiskfs.point import PointReader
from vdiskfs.units import REGION_SIZE

IDLE_IMAGES = 32
"""Points nobody has open whose bytes are kept for the next who opens them."""

Key = tuple[str, int, int]


class OpenedPoint(Hydrator):
    """One point's image. ``opens`` counts who uses it."""

    def __init__(
        self, images: PointImages, key: Key, image: native.Image, reader: PointReader
    ) -> None:
        """Take the reader over."""
        super().__init__(f"point {key[0]}@{key[2]}", image, self._opened)
        self.key = key
        self.opens = 0
        self._images = images
        self._reader = reader

    async def _opened(self) -> PointReader:
        raise ValueError(f"{self.name}: closed")

    async def put(self, start: int, view: memoryview) -> int:
        """Fill bytes in; on a full disk what is kept of all points gives way to them."""
        try:
            return await super().put(start, view)
        except OSError as error:
            if error.errno not in NO_ROOM or not self._images.give_way():
                raise
        await self.map(start // REGION_SIZE, (start + len(view) - 1) // REGION_SIZE)
        return await super().put(start, view)

    def count(self, region: int, filled: int) -> None:
        """They count to what is kept of all points."""
        self._images.count(self, region, filled)


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

    async def open(
        self, key: Key, make_reader: Callable[[], Awaitable[PointReader]]
    ) -> OpenedPoint:
        """Return the point's image, made if need be. Pair it with `close`.

        Args:
            key: disk id, generation, epoch.
            make_reader: opens the point's chain. Called only where it is needed.
        """
        opened = self._by_key.get(key)
        if opened is None:
            reader = await make_reader()
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
        opened = OpenedPoint(self, key, image, reader)
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
        await opened.aclose()
        opened.image.close()

    def in_use(self) -> list[Key]:
        """Return the points that somebody has open."""
        return [opened.key for opened in self._by_key.values() if opened.opens]

    def by_cookie(self, cookie: int) -> OpenedPoint | None:
        """Return the point whose image has the cookie."""
        return self._by_cookie.get(cookie)

    # ---- what is kept ------------------------------------------------------------------

    def give_way(self) -> bool:
        """Evict all that is kept; return whether there was anything."""
        oldest = list(self._filled)
        for opened, region in oldest:
            self._evict(opened, region)
        return bool(oldest)

    def _evict(self, opened: OpenedPoint, region: int) -> None:
        self.cached_bytes -= self._filled.pop((opened, region))
        opened.image.evict(region, 1)

    def count(self, opened: OpenedPoint, region: int, filled: int) -> None:
        """Bytes have come; beyond the limit the oldest go."""
        key = (opened, region)
        self._filled[key] = self._filled.get(key, 0) + filled
        self.cached_bytes += filled
        while self.cached_bytes > self._limit and len(self._filled) > 1:
            oldest, at = next(iter(self._filled))
            if (oldest, at) == key:
                self._filled.move_to_end(key)
                continue
            self._evict(oldest, at)
