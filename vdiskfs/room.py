"""Room for guests: what this program keeps gives way where an image's file system is full.

A write that finds no space waits in the C core, once. Caches of points go first, then deltas
that wait for the vault, of the disk that has most of them; what these held is compared with
the vault later. Then the write is tried again: an error that it gets now the guest would have
got without this program, too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import trio

from vdiskfs import native
from vdiskfs.errors import VdiskfsError

log = logging.getLogger(__name__)

SHORT = 64 << 20
"""Bytes: a file system with less is full; so much is given back at once, if there is so much."""

LIMIT_S = 60.0
"""Seconds after which a write is tried again, whatever was given back."""


class Cache(Protocol):
    """Opened points."""

    def give_way(self) -> bool:
        """Drop what is kept; return whether there was anything."""


class Spooling(Protocol):
    """A replicator."""

    name: str

    @property
    def spooled_bytes(self) -> int:
        """Bytes that wait for the vault."""

    async def give_room(self) -> int:
        """Give them back; return how many."""


class RoomMaker:
    """Makes room when it is asked to. Trio thread only."""

    def __init__(
        self, core: native.Core, cache: Cache, spools: Callable[[], Sequence[Spooling]],
        nursery: trio.Nursery, places: tuple[int | None, Path],
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            core: of the mount; its requests wait.
            cache: what is kept of points.
            spools: of the disks, as they are now.
            nursery: where requests are answered.
            places: a descriptor of the directory of images, or None: there are only copies of
                points; and the state directory, with the spools, the cache and those copies.
        """
        self._core = core
        self._cache = cache
        self._spools = spools
        self._source, self._state = places
        self._nursery = nursery
        self._asked = self._answers = False

    def ask(self) -> None:
        """A request waits for room; it is answered as soon as something has given way."""
        self._asked = True
        if not self._answers:
            self._answers = True
            self._nursery.start_soon(self._answer)

    async def _answer(self) -> None:
        while self._asked:
            self._asked = False
            try:
                with trio.move_on_after(LIMIT_S):
                    await self._make()
            except (VdiskfsError, OSError) as error:
                log.error("no room could be made for an image: %s", error)
            await trio.to_thread.run_sync(self._core.try_again)
        self._answers = False

    async def _make(self) -> None:
        if not await trio.to_thread.run_sync(self._helps):
            return
        if self._cache.give_way():
            log.warning("cached bytes of points give way to an image")
            if not await trio.to_thread.run_sync(self._is_short):
                return
        given = 0
        for one in sorted(self._spools(), key=lambda one: one.spooled_bytes, reverse=True):
            given += await one.give_room()
            if given >= SHORT:
                return

    def _helps(self) -> bool:
        """Say whether what is given back here is of use to images, or to copies of points."""
        if self._source is None or self._is_short():
            return True
        return os.fstat(self._source).st_dev == self._state.stat().st_dev

    def _is_short(self) -> bool:
        status = os.statvfs(self._state)
        return status.f_bavail * status.f_frsize < SHORT
