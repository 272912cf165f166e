"""Which files of the source are disks, and what follows when files come and go.

The base of `protection.Protection`: what is known of the files, and the tree's `DiskHooks`.
Nothing here waits for the vault in the name of a guest: what needs the vault runs in tasks.
"""

from __future__ import annotations

import errno
import fnmatch
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import PurePath

import trio

from vdiskfs import enrolment, native
from vdiskfs.catalog import DiskLog
from vdiskfs.disk import ProtectedDisk, Site
from vdiskfs.earlydisk import EarlyDisk
from vdiskfs.errors import NotFoundError, VdiskfsError
from vdiskfs.ownernote import Start
from vdiskfs.state import DiskRecord, ImageLock, LastEnd
from vdiskfs.tree import Access, Disks, SourceFile
from vdiskfs.untracked import UntrackedImages

log = logging.getLogger(__name__)


class DiskFiles:
    """The files of a mount's source, and the disks that they are. Trio thread only."""

    def __init__(self, site: Site, patterns: Iterable[str], nursery: trio.Nursery) -> None:
        """Know of none yet."""
        self._site = site
        self._patterns = tuple(patterns)
        self._nursery = nursery
        self._files: Disks | None = None
        self._disks: dict[SourceFile, ProtectedDisk] = {}
        self._plain = UntrackedImages(site.core, site.next_cookie)
        self._locks: dict[SourceFile, ImageLock] = {}
        self._early: dict[SourceFile, EarlyDisk] = {}
        self._fresh: set[SourceFile] = set()
        self._starting: set[SourceFile] = set()
        self._retiring: set[ProtectedDisk] = set()
        self._parked: dict[str, SourceFile] = {}
        self._by_cookie: dict[int, ProtectedDisk] = {}
        self.adopted: set[ProtectedDisk] = set()
        """Those that others start and stop."""
        self._force = self._accept = False
        self.closing = False
        self.stop_machine: Callable[[ProtectedDisk, str], Awaitable[None]] = _nothing_to_stop

    # ---- look-ups ----------------------------------------------------------------------

    def disks(self) -> list[ProtectedDisk]:
        """Return the protected disks by name."""
        return sorted((disk for disk in self._all() if disk.started), key=lambda disk: disk.name)

    def _all(self) -> list[ProtectedDisk]:
        return [*self._disks.values(), *self.adopted]

    def known_ids(self) -> set[str]:
        """Return the ids of the disks that are here, whether they were started yet or not."""
        early = {one.record.disk_id for one in self._early.values()}
        return {disk.disk_id for disk in self._all()} | early | set(self._parked)

    def early(self) -> list[EarlyDisk]:
        """Return the disks that are tracked and wait to be started, by name."""
        waiting = [
            early for file, early in self._early.items()
            if file not in self._disks or not self._disks[file].started
        ]  # fmt: skip
        return sorted(waiting, key=lambda early: early.record.name)

    async def wait_started(self) -> None:
        """Wait until no disk waits to be started."""
        for early in self.early():
            await early.started.wait()

    def find_early(self, name: str) -> EarlyDisk | None:
        """Return a disk that waits to be started by its name, its id or its file's path."""
        for early in self.early():
            if name in (early.record.name, early.record.disk_id, early.record.file):
                return early
        return None

    def find(self, name: str) -> ProtectedDisk:
        """Return a disk by its name, its id, or its file's path in the source.

        Raises:
            NotFoundError: it is not protected here.
            StateError: it waits to be started.
        """
        for disk in self.disks():
            if name in (disk.name, disk.disk_id, disk.file.path):
                return disk
        early = self.find_early(name)
        if early is not None:
            raise early.refusal()
        raise NotFoundError(f"no disk {name} is protected here", hint="vdiskfs disk list")

    def by_cookie(self, cookie: int) -> ProtectedDisk | None:
        """Return the disk of a native image."""
        return self._by_cookie.get(cookie)

    def logs(self) -> Mapping[str, DiskLog]:
        """Return the points of the disks written here, by name."""
        return {disk.title: disk.points for disk in self.disks() if not disk.line.handed}

    def access(self, name: str) -> Access | None:
        """Return who may read a disk's file; None: it is not here."""
        for disk in self._all():
            if disk.name == name or name.startswith(f"{disk.name}@"):
                return disk.file.access()
        return None

    def matches(self, path: str) -> bool:
        """Say whether the name of a file is one that is protected by itself."""
        name = PurePath(path).name
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns)

    # ---- what a subclass does ------------------------------------------------------------

    async def _protect(
        self, file: SourceFile, record: DiskRecord | None, how: Start
    ) -> ProtectedDisk:
        """Start a disk over a held file; the hold becomes the disk's."""
        raise NotImplementedError

    async def _take_up(self, file: SourceFile, record: DiskRecord | None, how: Start) -> None:
        """Protect a held file, later if the vault is away; the hold is dropped."""
        raise NotImplementedError

    async def _retire(self, disk: ProtectedDisk, *, gone: bool) -> None:
        """Ship what there is, mark the disk retired, and let the file go."""
        raise NotImplementedError

    # ---- DiskHooks -------------------------------------------------------------------------

    async def image_for(self, file: SourceFile, *, writable: bool) -> native.Image:
        """Return the disk's image, or a plain one."""
        disk, early = self._disks.get(file), self._early.get(file)
        image = disk.image if disk is not None else early.image if early is not None else None
        if image is not None:
            if image.refuses and writable:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), file.path)
            return image
        return self._plain.image_for(file, writable=writable)

    async def created(self, file: SourceFile) -> None:
        """A new file: it may become a disk when it is closed."""
        self._fresh.add(file)

    async def closed_last(self, file: SourceFile) -> None:
        """Close the plain image; make a disk of a new file that matches."""
        self._plain.close_last(file)
        fresh = file in self._fresh
        self._fresh.discard(file)
        wanted = fresh and self.matches(file.path) and file.status().st_nlink > 0
        if wanted and not self.closing and file not in self._disks:
            file.hold()
            self._nursery.start_soon(self._take_up, file, None, Start(LastEnd.NONE))

    async def linked(self, file: SourceFile, path: str) -> None:
        """One more name changes nothing."""

    async def unlinked(self, file: SourceFile, path: str, *, last: bool) -> None:
        """The disk's file is gone: retire it."""
        await self._gone(file, last=last)

    async def replaced(self, file: SourceFile, path: str, *, last: bool) -> None:
        """Another file has the name now: the disk is retired."""
        await self._gone(file, last=last)

    async def _gone(self, file: SourceFile, *, last: bool) -> None:
        disk = self._disks.get(file)
        if disk is None or not last or not disk.started:
            return
        self._nursery.start_soon(self._retire_later, disk)

    async def _retire_later(self, disk: ProtectedDisk) -> None:
        if disk in self._retiring or self._disks.get(source_file(disk)) is not disk:
            return  # somebody does it, or has done it
        try:
            await self._retire(disk, gone=True)
        except VdiskfsError as error:
            log.error("disk %s: cannot be retired: %s", disk.name, error)

    async def renamed(self, file: SourceFile, old_path: str, new_path: str) -> None:
        """The disk keeps its identity; a new file may match under its new name."""
        disk = self._disks.get(file)
        if disk is not None:
            disk.renamed(new_path)
            self._nursery.start_soon(self._tell_name, disk, new_path)
        elif self.matches(old_path) or not self.matches(new_path) or file in self._starting:
            return  # the name says nothing new: what the user left alone stays alone
        elif file in self._early:
            return  # a disk already, which waits to be started
        elif file.is_open:
            self._fresh.add(file)
        elif not self.closing:
            # Written under a temporary name, then renamed: as good as closed.
            file.hold()
            self._nursery.start_soon(self._take_up, file, None, Start(LastEnd.NONE))

    async def directory_renamed(self, old_path: str, new_path: str) -> None:
        """The files below it have new paths."""
        for disk in self._disks.values():
            if disk.record.file.startswith(f"{old_path}/"):
                path = new_path + disk.record.file[len(old_path) :]
                disk.renamed(path)
                self._nursery.start_soon(self._tell_name, disk, path)

    async def _tell_name(self, disk: ProtectedDisk, path: str) -> None:
        change = partial(enrolment.tell, self._site, disk.disk_id, enrolment.with_file(path))
        await disk.health.until_done("noting the new name", change)


def source_file(disk: ProtectedDisk) -> SourceFile:
    """Return the file of a disk that is one of the source."""
    assert isinstance(disk.file, SourceFile)
    return disk.file


async def _nothing_to_stop(disk: ProtectedDisk, _: str) -> None:
    log.debug("disk %s: no machine of it is known", disk.name)


def writable_again(disk: ProtectedDisk) -> None:
    """Let guests write: the disk is this site's again."""
    disk.refuse_writes(False)
    log.warning("disk %s: takes writes again", disk.name)
