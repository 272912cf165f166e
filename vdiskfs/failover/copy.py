"""One disk's writable copy of a recovery point.

A sparse file here, and a record of which of its pages are here: what is not comes from the vault
when it is read, whole pages that are written need nothing from it. Writes stay here. What
is present survives the daemon at once and the host's death from the next sync on, so that
a machine on it sees a disk like any other; while the vault is away it waits for what is absent
and gets no error. Trio thread only.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import trio

from vdiskfs import native
from vdiskfs.errors import DamagedError, NotFoundError, VdiskfsError
from vdiskfs.failover.bootblocks import Run
from vdiskfs.failover.record import Member
from vdiskfs.hydrator import RETRY_S, Hydrator
from vdiskfs.native import ImageFlags
from vdiskfs.point import PointReader
from vdiskfs.state.files import write_file
from vdiskfs.units import CHUNK_SIZE, PAGE_SIZE

log = logging.getLogger(__name__)

IMAGE = "image"
BOOT = "boot"
PRESENCE = "presence"

AT_ONCE = 16
"""Pieces that are fetched at once before a machine asks for them."""

WAITS_KEPT = 65536
"""Of so many requests that waited it is kept what they waited for."""

PIECE_CHUNKS = 16
"""Chunks of one such piece: 1 MiB."""


class WritableCopy(Hydrator):
    """A copy that is open. The core answers for it while it is attached to a node."""

    def __init__(
        self, core: native.Core, directory: Path, member: Member, cookie: int,
        make_reader: Callable[[], Awaitable[PointReader]], *,
        is_away: Callable[[], Awaitable[bool]], boot_id: str,
    ) -> None:  # fmt: skip
        """Open the copy in ``directory``; asks the vault nothing. Blocks on the local disk.

        Args:
            core: the data plane.
            directory: the copy's own; `make_files` made it.
            member: which disk, which point.
            cookie: of the image's events.
            make_reader: opens the point.
            is_away: says whether the vault as a whole is not there.
            boot_id: of the host as it runs. If the copy was open in the same run, all that was
                present is present; else what was synced.

        Raises:
            OSError, LocalError: the local disk refused; EBADMSG, the files are damaged.
        """
        self.directory = directory
        self.member = member
        self.fd = os.open(directory / IMAGE, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        flags = ImageFlags.LAZY | ImageFlags.DIRECT
        image = native.Image(core, self.fd, flags, cookie)
        super().__init__(f"copy {member.disk}@{member.epoch}", image, make_reader)
        self.users = 0
        self._is_away = is_away
        # How often somebody had to wait, and for what.
        self.waits = 0
        self.waited: list[Run] = []
        try:
            same_run = _read(directory / BOOT) == boot_id
            native.open_presence(image, directory / PRESENCE, host_lived=same_run)
            if not same_run:
                # From here on the bitmap is right, and was not before.
                write_file(directory / BOOT, boot_id.encode())
        except BaseException:
            image.close()
            os.close(self.fd)
            raise

    @property
    def present_bytes(self) -> int:
        """Bytes that are here: written, or brought from the vault."""
        counts = native.presence_counts(self.image)
        if counts.complete and not counts.present_pages:
            # It was opened as one that is complete: there is nothing to count pages for.
            return min(self.image.size(), 512 * os.fstat(self.fd).st_blocks)
        return counts.present_pages * PAGE_SIZE

    async def answer(self, event: native.Event) -> None:
        """Do what an event asks, and note what had to be waited for."""
        if event.kind is native.EventKind.WANT:
            self.waits += 1
            if len(self.waited) < WAITS_KEPT:
                first = event.offset // CHUNK_SIZE
                last = (event.offset + max(1, event.length) - 1) // CHUNK_SIZE
                self.waited.append((first, last + 1 - first))
        await super().answer(event)

    async def patiently(self, action: Callable[[], Awaitable[None]]) -> None:
        """Do it until the vault is there and answers.

        Raises:
            DamagedError, NotFoundError: the vault is there, and lacks what is asked for.
        """
        while True:
            try:
                await super().patiently(action)
                return
            except (DamagedError, NotFoundError) as failure:
                # A folder that is not mounted lacks everything.
                if not await self._is_away():
                    raise
                self.waiting = failure.message
                log.info("%s: waiting for the vault: %s", self.name, failure)
            await trio.sleep(RETRY_S)

    async def fetch_page(self, page: int) -> None:
        """Bring the chunk of a page, waiting for the vault."""
        await self.patiently(lambda: self.fetch(page * PAGE_SIZE, CHUNK_SIZE))

    async def truncate(self, size: int) -> None:
        """Set the size in bytes; what is cut off is gone, also if it grows again."""
        while True:
            try:
                await trio.to_thread.run_sync(self.image.truncate, size)
                return
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise
            # The page of the new end must be here.
            await self.patiently(lambda: self.fetch(max(0, size - 1), 1))

    async def fetch_first(self, runs: Sequence[Run]) -> None:
        """Bring what a machine is known to read at first, many pieces at once.

        Gives up quietly where the vault does not answer: who needs it asks again.
        """
        pieces = iter(runs)

        async def work() -> None:
            for first, count in pieces:
                for chunk in range(first, first + count, PIECE_CHUNKS):
                    length = min(PIECE_CHUNKS, first + count - chunk) * CHUNK_SIZE
                    await self.fetch(chunk * CHUNK_SIZE, length)

        try:
            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(work)
        except* (VdiskfsError, OSError) as group:
            log.info("%s: not all was fetched first: %s", self.name, group.exceptions[0])

    def use(self, reader: PointReader) -> None:
        """Read from a point that is open already; the reader is taken over."""
        self._reader = reader

    async def discard(self) -> None:
        """Close it without a word: its files go."""
        await super().aclose()
        self.close()

    def close(self) -> None:
        """Close what nobody has used yet, or does any more."""
        self.image.close()
        os.close(self.fd)

    async def aclose(self) -> None:
        """Close it; all that is present is recorded durably, if the disk takes it."""
        try:
            await trio.to_thread.run_sync(self.image.sync)
        finally:
            await self.discard()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def make_files(directory: Path, member: Member) -> None:
    """Make an empty copy: a hole as large as the point's disk, and that nothing of it is here.

    Not durable before the directory is synced.

    Raises:
        OSError: the local disk refused.
    """
    directory.mkdir(mode=0o700)
    (directory / PRESENCE).mkdir(mode=0o700)
    native.create_presence(directory / PRESENCE, member.size)
    fd = os.open(directory / IMAGE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, member.size)
        os.fsync(fd)
    finally:
        os.close(fd)
