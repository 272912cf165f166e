"""A folder as an object store, one call at a time: the file operations and their order.

An object is a file of the same name. New files are written in ``.vdiskfs`` beside the
objects and become visible by link(2) (create) or, under a lock, by rename(2) (replace).
Metadata is an extended attribute, a hint: a copy that drops it is a good vault. The etag
is the modification time, which a replace always moves forward, and the size; both
survive a copy.

Every name is walked with openat(2) and O_NOFOLLOW: no symbolic link below the root is
followed. Everything here blocks; ``local`` runs it in threads.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from vdiskfs.crash import hook
from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    DamagedError,
    NotFoundError,
    RefusedError,
    UsageError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.store.file import (
    Fill,
    etag_of,
    exists,
    get_metadata,
    info_of,
    read_exactly,
    seal,
    set_metadata,
    stat_file,
)
from vdiskfs.store.object import ObjectInfo

_WORK = ".vdiskfs"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_CLOEXEC | os.O_NOFOLLOW
# An upload writes at most 64 MiB to a temporary file; a day is far beyond that.
_OLD_S = 86400


class LockedError(Exception):
    """Another writer holds the folder's lock. Try again in a moment."""


class Folder:
    """The objects below ``root``. Holds no descriptors between calls; any thread."""

    def __init__(self, root: Path) -> None:
        """Nothing is touched."""
        self.root = root

    def prepare(self) -> None:
        """Make the folder if it is absent, and check that it can hold a vault."""
        with self._reported(str(self.root)):
            self.root.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self.root.mkdir(0o700)
                _sync_path(self.root.parent)
            with self._temporary() as (work, temporary, _):
                self._probe_link(work, temporary)

    def clean(self) -> None:
        """Remove temporary files of writers that died more than a day ago."""
        oldest = time.time() - _OLD_S
        with self._reported(_WORK):
            try:
                work = self._directory((_WORK,))
            except FileNotFoundError:
                return
            try:
                for entry in os.listdir(work):  # noqa: PTH208 - by descriptor
                    if entry.startswith("new-"):
                        _unlink_if_older(entry, work, oldest)
            finally:
                os.close(work)

    def create(self, name: str, fill: Fill, metadata: Mapping[str, str]) -> str:
        """Make a new object durable and return its etag. ``fill`` writes to a descriptor."""
        with self._reported(name), self._parent(name, create=True) as (parent, base):
            if exists(parent, base):
                raise AlreadyExistsError(f"{name} exists already")
            with self._temporary() as (work, temporary, file):
                fill(file)
                set_metadata(file, metadata)
                info = seal(file, 0)
                hook("object.synced")
                try:
                    os.link(temporary, base, src_dir_fd=work, dst_dir_fd=parent)
                except FileExistsError:
                    raise AlreadyExistsError(f"{name} exists already") from None
                hook("object.linked")
            os.fsync(parent)
            hook("object.durable")
            return etag_of(info)

    def adopt(self, name: str, path: Path, metadata: Mapping[str, str]) -> str | None:
        """Make the file at ``path`` an object under a second name, durable, and return its etag.

        None where it cannot be: on another file system, or one that links no file of ours.
        """
        with self._reported(name), self._parent(name, create=True) as (parent, base):
            if exists(parent, base):
                raise AlreadyExistsError(f"{name} exists already")
            try:
                file = os.open(path, os.O_RDWR | _FILE)
            except OSError:
                return None
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    return None
                set_metadata(file, metadata)
                info = seal(file, 0)
                hook("object.sealed")
                # By descriptor: what was sealed is what gets the name.
                os.link(f"/proc/self/fd/{file}", base, dst_dir_fd=parent, follow_symlinks=True)
            except FileExistsError:
                raise AlreadyExistsError(f"{name} exists already") from None
            except OSError as error:
                if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOENT):
                    return None
                raise
            finally:
                os.close(file)
            hook("object.adopted")
            os.fsync(parent)
            return etag_of(info)

    def replace(self, name: str, fill: Fill, etag: str, metadata: Mapping[str, str]) -> str:
        """Swap an object if its etag is ``etag``; durable on return. Raises LockedError."""
        with self._reported(name), self._lock():
            try:
                return self._swap(name, fill, etag, metadata)
            except (FileNotFoundError, NotFoundError):
                raise ConflictError(f"{name} is gone") from None

    def _swap(self, name: str, fill: Fill, etag: str, metadata: Mapping[str, str]) -> str:
        # Invariant: under the lock, so nobody changes the name between look and rename.
        with self._parent(name) as (parent, base):
            before = stat_file(parent, base, name)
            if etag_of(before) != etag:
                raise ConflictError(f"{name} was changed by another writer")
            with self._temporary() as (work, temporary, file):
                fill(file)
                set_metadata(file, metadata)
                info = seal(file, before.st_mtime_ns)
                hook("object.renewed")
                os.rename(temporary, base, src_dir_fd=work, dst_dir_fd=parent)
            os.fsync(parent)
            hook("object.swapped")
            return etag_of(info)

    def delete(self, name: str) -> None:
        """Delete an object; durable on return. Raises LockedError."""
        with self._reported(name), self._lock(), self._parent(name) as (parent, base):
            stat_file(parent, base, name)
            os.unlink(base, dir_fd=parent)
            os.fsync(parent)
            hook("object.deleted")

    def read(self, name: str, limit: int) -> tuple[bytes, ObjectInfo]:
        """Return an object's bytes and what it is."""
        with self._reported(name), self._opened(name) as file:
            info = info_of(name, os.fstat(file), get_metadata(file))
            if info.size > limit:
                raise DamagedError(f"{name} has {info.size} bytes, at most {limit} are expected")
            return read_exactly(name, file, 0, info.size), info

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``."""
        with self._reported(name), self._opened(name) as file:
            if offset + length > os.fstat(file).st_size:
                raise DamagedError(f"{name} ends before byte {offset + length}")
            return read_exactly(name, file, offset, length)

    def stat(self, name: str) -> ObjectInfo:
        """Return what an object is."""
        with self._reported(name), self._opened(name) as file:
            return info_of(name, os.fstat(file), get_metadata(file))

    def entries(self, directory: str, rest: str) -> list[ObjectInfo | str]:
        """List one directory: objects, and the names of directories, in the order of names.

        Args:
            directory: "" for the root, else ending in "/"; an absent one has no entries.
            rest: what the entries' names begin with.

        Returns:
            The entries; a directory's name ends in "/".
        """
        with self._reported(directory or str(self.root)):
            try:
                opened = self._directory(tuple(directory.split("/")[:-1]))
            except (FileNotFoundError, NotADirectoryError):
                self._check_root()
                return []
            try:
                return _scan(opened, directory, rest)
            finally:
                os.close(opened)

    def _check_root(self) -> None:
        if not self.root.is_dir():
            raise NotFoundError(
                f"there is no folder {self.root}",
                hint="is its file system mounted? vdiskfs vault init makes a new one",
            )

    def _directory(self, parts: tuple[str, ...], *, create: bool = False) -> int:
        """Open a directory below the root, each part without following links."""
        opened = os.open(self.root, _DIRECTORY)
        try:
            for part in parts:
                inner = _open_inner(opened, part, create=create)
                os.close(opened)
                opened = inner
        except BaseException:
            os.close(opened)
            raise
        return opened

    @contextmanager
    def _parent(self, name: str, *, create: bool = False) -> Iterator[tuple[int, str]]:
        *parts, base = name.split("/")
        opened = self._directory(tuple(parts), create=create)
        try:
            yield opened, base
        finally:
            os.close(opened)

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        with self._parent(name) as (parent, base):
            # O_NONBLOCK: a fifo put there by somebody must not stop a thread.
            file = os.open(base, os.O_RDONLY | os.O_NONBLOCK | _FILE, dir_fd=parent)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise NotFoundError(f"{name} is not an object")
            yield file
        finally:
            os.close(file)

    @contextmanager
    def _temporary(self) -> Iterator[tuple[int, str, int]]:
        """Make an unnamed-to-be file; yields directory, name and descriptor."""
        work = self._directory((_WORK,), create=True)
        name = f"new-{secrets.token_hex(12)}"
        try:
            file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FILE, 0o600, dir_fd=work)
            try:
                yield work, name, file
            finally:
                os.close(file)
                _unlink_if_older(name, work, None)
        finally:
            os.close(work)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the lock that replace and delete take, of all processes of this host."""
        self._check_root()
        work = self._directory((_WORK,), create=True)
        try:
            file = os.open("lock", os.O_RDWR | os.O_CREAT | _FILE, 0o600, dir_fd=work)
        finally:
            os.close(work)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockedError from None
            yield
        finally:
            os.close(file)

    def _probe_link(self, work: int, temporary: str) -> None:
        probe = f"{temporary}-link"
        try:
            os.link(temporary, probe, src_dir_fd=work, dst_dir_fd=work)
        except OSError as error:
            raise UsageError(
                f"{self.root}: the file system has no hard links ({os.strerror(error.errno or 0)})",
                hint="a folder vault needs ext4, xfs, btrfs or another local file system",
            ) from error
        os.unlink(probe, dir_fd=work)

    @contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """Turn what the kernel says into what a store says."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                self._check_root()
                raise NotFoundError(f"there is no object {name} in {self.root}") from error
            raise _store_error(self.root, name, error) from error


def _store_error(root: Path, name: str, error: OSError) -> VdiskfsError:
    text = f"{root}: {name}: {os.strerror(error.errno or 0)}"
    match error.errno:
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return RefusedError(text, hint="check the owner and the mode of the vault's folder")
        case errno.ELOOP:
            return DamagedError(text, hint="a vault holds no symbolic links")
        case errno.ENOSPC | errno.EDQUOT:
            return VaultUnreachableError(text, hint="make room for the vault")
        case _:
            return VaultUnreachableError(text)


def _open_inner(parent: int, part: str, *, create: bool) -> int:
    try:
        return os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except NotADirectoryError:
        # Linux says so of a symbolic link too, when it may not follow it.
        if stat.S_ISLNK(os.stat(part, dir_fd=parent, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
        raise
    except FileNotFoundError:
        if not create:
            raise
    with suppress(FileExistsError):
        os.mkdir(part, 0o700, dir_fd=parent)
    os.fsync(parent)
    return os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)


def _scan(opened: int, directory: str, rest: str) -> list[ObjectInfo | str]:
    found: list[tuple[str, ObjectInfo | str]] = []
    with os.scandir(opened) as entries:
        for entry in entries:
            name = directory + entry.name
            if not entry.name.startswith(rest) or (not directory and entry.name[0] == "."):
                continue
            if entry.is_dir(follow_symlinks=False):
                found.append((name + "/", name + "/"))
            elif entry.is_file(follow_symlinks=False):
                try:
                    info = entry.stat(follow_symlinks=False)
                    metadata = get_metadata(f"/proc/self/fd/{opened}/{entry.name}")
                except FileNotFoundError:
                    continue
                found.append((name, info_of(name, info, metadata)))
    # Names sort as whole names do: "a-b" before "a/b", so a directory sorts with its slash.
    found.sort(key=lambda pair: pair[0])
    return [entry for _, entry in found]


def _unlink_if_older(name: str, directory: int, oldest: float | None) -> None:
    try:
        info = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if oldest is None or info.st_mtime < oldest:
            os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass


def _sync_path(path: Path) -> None:
    opened = os.open(path, _DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
