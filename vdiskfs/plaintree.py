"""The names of a mount that is served plainly (`vdiskfs.plain`): no disks, no points.

What happens to names is noted as far as the next daemon could not find it out itself.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath

from vdiskfs import native
from vdiskfs.config import Config
from vdiskfs.errors import VaultUnreachableError, VdiskfsError
from vdiskfs.ownernote import read_note
from vdiskfs.state import DiskRecord, ImageLock, StateDirectory, find_record
from vdiskfs.tree import (
    Access,
    DiskName,
    Disks,
    FailoverRef,
    OpenCopy,
    OpenPoint,
    PointFacts,
    PointKind,
    PointRef,
    SourceFile,
)
from vdiskfs.untracked import UntrackedImages

log = logging.getLogger(__name__)


class PlainDisks:
    """The files of the source, none of them tracked: the tree's `DiskHooks`."""

    def __init__(self, state: StateDirectory, images: UntrackedImages, options: Config) -> None:
        """Prepare; `load` finds the disks."""
        self._state = state
        self._images = images
        self._patterns = options.patterns
        self._read_only = options.when_displaced == "read-only"
        self._disks: dict[SourceFile, DiskRecord] = {}
        self._locks: dict[SourceFile, ImageLock] = {}

    @property
    def records(self) -> list[DiskRecord]:
        """The disks whose files are here, by name."""
        return sorted(self._disks.values(), key=lambda record: record.name)

    def load(self, files: Disks) -> None:
        """Find the disks, and keep others from their images; nobody is served yet.

        A disk that cannot be looked at is served all the same.
        """
        try:
            records = [one for one in self._state.records() if not one.retired]
        except VdiskfsError as error:
            log.error("the disks' records cannot be read: %s", error)
            return
        known = {record.file for record in records}
        for file in [*files.scan(lambda path: path in known or self._matches(path)),
                     *files.unnamed()]:  # fmt: skip
            record = None
            with contextlib.suppress(VdiskfsError, OSError):
                record = find_record(records, file.identity(), file.path)
            if record is None or file in self._disks:
                file.drop()
            else:
                self._take(file, record)

    def _take(self, file: SourceFile, record: DiskRecord) -> None:
        self._disks[file] = record
        try:
            if self._read_only and read_note(self._state.disk(record.disk_id).directory).line:
                self._images.refused.add(file)
            self._locks[file] = ImageLock(file.descriptor, file.path)
        except VdiskfsError as error:
            log.warning("disk %s: %s", record.name, error)

    def close(self) -> None:
        """The mount is gone: let the files go."""
        for file in list(self._disks):
            self._let_go(file)

    def _let_go(self, file: SourceFile) -> None:
        if self._disks.pop(file, None) is not None:
            lock = self._locks.pop(file, None)
            if lock is not None:
                lock.close()
            file.drop()

    # ---- DiskHooks -------------------------------------------------------------------------

    async def image_for(self, file: SourceFile, *, writable: bool) -> native.Image:
        """Return an image that nobody tracks."""
        return self._images.image_for(file, writable=writable)

    async def closed_last(self, file: SourceFile) -> None:
        """Close the image."""
        self._images.close_last(file)

    async def created(self, file: SourceFile) -> None:
        """The next daemon looks for new files."""

    async def linked(self, file: SourceFile, path: str) -> None:
        """One more name changes nothing."""

    async def unlinked(self, file: SourceFile, path: str, *, last: bool) -> None:
        """The file goes when nobody has it open."""
        if last:
            self._let_go(file)

    async def replaced(self, file: SourceFile, path: str, *, last: bool) -> None:
        """Another file has the name now."""
        if last:
            self._let_go(file)

    async def renamed(self, file: SourceFile, old_path: str, new_path: str) -> None:
        """Note under which name the next daemon finds the disk."""
        record = self._disks.get(file)
        if record is not None:
            self._note_name(file, replace(record, file=new_path))

    async def directory_renamed(self, old_path: str, new_path: str) -> None:
        """The files below it have new paths."""
        for file, record in list(self._disks.items()):
            if record.file.startswith(f"{old_path}/"):
                path = new_path + record.file[len(old_path) :]
                self._note_name(file, replace(record, file=path))

    def _note_name(self, file: SourceFile, record: DiskRecord) -> None:
        self._disks[file] = record
        try:
            self._state.write_disk(record)
        except VdiskfsError as error:
            log.error("disk %s: its new name is not noted: %s", record.name, error)

    def _matches(self, path: str) -> bool:
        name = PurePath(path).name
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns)


def _away() -> VaultUnreachableError:
    return VaultUnreachableError("the mount is served plainly: no vault is asked")


class NoFailovers:
    """The tree's `FailoverSource` meanwhile: machines on copies wait for a daemon."""

    def failovers(self) -> Sequence[FailoverRef]:
        """Refuse."""
        raise _away()

    def copy(self, failover_id: str, disk_id: str) -> OpenCopy | None:
        """Refuse; one that a predecessor opened is asked for again."""
        raise _away()


class NoPoints:
    """The tree's `PointSource` while no vault is asked.

    Points are refused; a read of one that is open waits for a daemon.
    """

    async def disks(self) -> Sequence[DiskName]:
        """Return nothing: an empty directory says too little."""
        raise _away()

    async def days(self, disk: str) -> Sequence[str]:
        """Refuse."""
        raise _away()

    async def points(self, disk: str, since_ns: int, until_ns: int) -> Sequence[PointRef]:
        """Refuse."""
        raise _away()

    async def latest(self, disk: str, kind: PointKind) -> PointRef | None:
        """Refuse."""
        raise _away()

    async def find(self, disk: str, text: str) -> PointRef | None:
        """Refuse."""
        raise _away()

    async def describe(self, disk: str, point: PointRef) -> PointFacts:
        """Refuse."""
        raise _away()

    async def open_point(self, disk: str, point: PointRef) -> OpenPoint:
        """Refuse; one that a predecessor opened is asked for again."""
        raise _away()

    async def close_point(self, opened: OpenPoint) -> None:
        """None is open."""

    def access(self, disk: str) -> Access | None:
        """Nothing is known."""
        return None
