"""One protected disk without a mount: the library's own objects over a plain file.

What the daemon does for each disk is done here by hand: state directory, vault, tracked
image, replicator. Everything is real but the FUSE connection, so that a test can end it at
any step, take it up again as the next daemon would, and look at every byte.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import trio

import vdiskfs.disk
from tests.vaults import given
from vdiskfs import native
from vdiskfs.catalog import Owner, Vault
from vdiskfs.catalog.vault import now_text
from vdiskfs.delta import DeltaWriter, PageBatch
from vdiskfs.disk import ProtectedDisk, Site
from vdiskfs.liveness import Liveness
from vdiskfs.native import Core, FileIdentity, Image, ImageFlags
from vdiskfs.ownernote import Start
from vdiskfs.point.fetch import first_error
from vdiskfs.replicator import Replicator
from vdiskfs.state import DiskRecord, StateDirectory
from vdiskfs.store import open_store
from vdiskfs.stride import Pace
from vdiskfs.tree import SourceFile
from vdiskfs.units import PAGE_SIZE

NEVER_S = 1e6
"""An epoch interval after which no test seals by itself."""


BATCH_PAGES = 32
"""Pages read at once: small, so that much can happen between two batches."""


class PlainFile:
    """What a disk asks of its `SourceFile`."""

    def __init__(self, path: Path) -> None:
        self.file = path
        self.path = path.name

    def identity(self) -> FileIdentity:
        fd = os.open(self.file, os.O_RDONLY)
        try:
            return native.file_identity(fd)
        finally:
            os.close(fd)


class OneDisk:
    """A disk, its state directory and a folder vault below one directory.

    ``sealed`` is called right before the running epoch ends; ``between`` after the seal and
    before each batch that a capture or a pass writes, in another thread than the caller's
    but never beside it: a guest's writes may come from there.
    """

    def __init__(self, root: Path, *, boot_id: str = "boot-0") -> None:
        self.root = root
        self.path = root / "web01.img"
        self.boot_id = boot_id
        self.site = "site"
        self.force = False
        self.sealed: Callable[[], None] = lambda: None
        self.between: Callable[[], None] = lambda: None
        self._cookies = itertools.count(1)
        self._disk: ProtectedDisk | None = None

    # ---- the objects ---------------------------------------------------------------------

    @property
    def disk(self) -> ProtectedDisk:
        assert self._disk is not None, "not open"
        return self._disk

    @property
    def replicator(self) -> Replicator:
        return self.disk.replicator

    @property
    def image(self) -> Image:
        return self.disk.image

    @property
    def is_open(self) -> bool:
        return self._disk is not None

    async def init(self, size: int, content: bytes = b"") -> None:
        """Make the image and the vault."""
        self.path.write_bytes(content)
        os.truncate(self.path, size)
        store = open_store(f"file://{self.root}/vault")
        await Vault.init(store, given())
        await store.aclose()

    async def open(self) -> None:
        """Start as a daemon does: by what the one before it left."""
        self.state = StateDirectory.open(self.root / f"state-{self.site}", boot_id=self.boot_id)
        self.store = open_store(f"file://{self.root}/vault")
        self.vault = await Vault.open(self.store, given())
        self.core = Core()
        fd = os.open(self.path, os.O_RDWR)
        image = Image(self.core, fd, ImageFlags.NONE, next(self._cookies))
        os.close(fd)
        pace = Pace(NEVER_S, 1 << 30, 1)
        site = Site(
            self.site, self.core, self.vault, self.state, pace, lambda: next(self._cookies),
            Liveness(self.vault),
        )  # fmt: skip
        file = PlainFile(self.path)
        records = self.state.records()
        record = records[0] if records else await self._enroll(file)
        self._disk = ProtectedDisk(site, cast("SourceFile", file), record, image)
        await self._disk.start(Start(self.state.last_end, self.force))

    async def _enroll(self, file: PlainFile) -> DiskRecord:
        identity = file.identity()
        # As a mount does that finds the file of a disk that it has no record of.
        made = next(iter(await self.vault.disks()), None) or await self.vault.create_disk(
            "web01", file=file.path, size=identity.size, site=self.site,
            owner=Owner(self.site, self.state.writer_id, "", now_text()),
        )  # fmt: skip
        record = DiskRecord(
            disk_id=made.id, name=made.name, file=made.file, vault_id=self.vault.vault_id,
            writer_id=self.state.writer_id, device=identity.device, inode=identity.inode,
            birth_ns=identity.birth_ns,
        )  # fmt: skip
        self.state.create_disk(record)
        return record

    async def stop(self) -> None:
        """End in order: everything here is durable, nothing more is shipped."""
        await self.disk.stop(clean=True)
        self.image.close()
        self.core.close()
        self.state.end_clean()
        await self.store.aclose()
        self._disk = None

    async def kill(self) -> None:
        """Leave all as a killed daemon leaves it: nothing is synced, nothing noted."""
        self.replicator.live.close()
        self.image.close()
        self.core.close()
        self.state.close()
        await self.store.aclose()
        self._disk = None

    # ---- what a replicator does by itself -------------------------------------------------

    async def seal(self) -> None:
        """Run the pass where it is due, seal and capture what changed; not shipped."""
        if len(self.replicator.spool) and self._needs_pass():
            await self.ship()  # a pass compares with what the vault holds
            return
        await self.replicator.seal_if_changed()

    def _needs_pass(self) -> bool:
        return self.replicator.suspects.needed

    async def ship(self) -> None:
        """Seal what changed, and return when all of it is in the vault, joins included."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.replicator.run)
                await self.replicator.seal_if_changed()
                await self.replicator.wait_shipped()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        await self.replicator.points.publish_joins()

    # ---- what is marked, what is stored ------------------------------------------------------

    def suspect_pages(self) -> set[int]:
        reader = native.PageReader(self.image, suspect=True)
        found: set[int] = set()
        while (batch := reader.next()) is not None:
            found.update(batch.pageno.tolist())
        return found

    def marked(self, pages: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Say of each page below ``pages`` whether it is dirty, frozen or suspect."""
        found = np.fromiter((self.image.is_changed(page) for page in range(pages)), np.bool_, pages)
        suspect = [page for page in self.suspect_pages() if page < pages]
        found[suspect] = True
        return found

    async def points(self) -> dict[tuple[int, int], bytes]:
        """Return the bytes of every point in the vault, by generation and epoch."""
        log = self.vault.log(await self.vault.disk(self.disk.disk_id))
        found = {}
        for point in await log.points():
            async with await log.open(point) as reader:
                count = -(-reader.size // PAGE_SIZE)
                data = await reader.read_pages(0, count) if count else b""
                found[point.generation, point.epoch] = bytes(data[: reader.size])
        return found


@contextlib.contextmanager
def hooked(one: OneDisk) -> Iterator[None]:
    """Let ``one`` hear of seals and of what captures and passes write."""
    seal = native.seal

    def seal_and_tell(images: Sequence[Image]) -> list[native.Seal]:
        one.sealed()
        found = seal(images)
        one.between()
        return found

    class Writer(DeltaWriter):
        def add(self, batch: PageBatch) -> None:
            one.between()
            super().add(batch)

    class Reader(native.PageReader):
        def __init__(self, image: Image, *, suspect: bool = False, pages: int = 0) -> None:
            super().__init__(image, suspect=suspect, pages=BATCH_PAGES)

    with (
        mock.patch.object(native, "seal", seal_and_tell),
        mock.patch.object(native, "PageReader", Reader),
        mock.patch.object(vdiskfs.disk, "DeltaWriter", Writer),
    ):
        yield


@contextlib.asynccontextmanager
async def opened(root: Path, *, boot_id: str = "boot-0") -> AsyncIterator[OneDisk]:
    """Give the disk open; it is left as a killed daemon leaves it unless it was stopped."""
    one = OneDisk(root, boot_id=boot_id)
    with hooked(one):
        await one.open()
        try:
            yield one
        finally:
            if one.is_open:
                await one.kill()
