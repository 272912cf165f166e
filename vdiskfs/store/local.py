"""A vault in a folder: objects are files, on a local file system.

An object appears whole or not at all: it is written under a temporary name, synced, then
linked (create) or renamed (replace) to its own, then the directory is synced. Replacing
holds a lock file, so that comparing and swapping are one step for every process of this
host; that, and the syncs, are why network file systems are refused.

Metadata lies in the extended attribute ``user.vdiskfs``; where the file system keeps none,
or a copy lost it, listing returns no metadata, and the reader looks at the object itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import trio

from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    DamagedError,
    NotFoundError,
    RefusedError,
    UsageError,
    VaultUnreachableError,
)
from vdiskfs.store.object import ObjectInfo, check_name
NO_METADATA: Mapping[str, str] = {}
READ_LIMIT = 64 << 20

T = TypeVar("T")

_ATTRIBUTE = "user.vdiskfs"
_TEMPORARY = ".new-"
_LOCK = ".lock"
_STALE_S = 86400.0
_THREADS = 8
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "9p", "afs", "glusterfs"})


class LocalStore:
    """A `Store` in a folder."""

    def __init__(self, root: Path) -> None:
        """Name the folder; nothing is looked at yet."""
        self._root = root
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._checked = False
        self.requests = 0
        self.bytes_sent = 0
        self.bytes_received = 0

    def describe(self) -> str:
        """Return the folder's path."""
        return str(self._root)

    async def prepare(self) -> None:
        """Make the folder where it is absent."""

        def make() -> None:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)

        await self._run("", make, probe=False)

    async def create(
        self, name: str, data: bytes, *, metadata: Mapping[str, str] = NO_METADATA
    ) -> str:
        """Create the object once."""
        self.bytes_sent += len(data)
        return await self._run(name, lambda: self._create(name, _bytes_writer(data), metadata))

    async def create_from_file(
        self, name: str, path: Path, *, metadata: Mapping[str, str] = NO_METADATA
    ) -> str:
        """Create the object once, with a file's content."""
        self.bytes_sent += path.stat().st_size
        return await self._run(name, lambda: self._create(name, _file_writer(path), metadata))

    async def replace(
        self, name: str, data: bytes, *, etag: str | None,
        metadata: Mapping[str, str] = NO_METADATA,
    ) -> str:  # fmt: skip
        """Compare and swap."""
        self.bytes_sent += len(data)
        return await self._run(name, lambda: self._replace(name, data, etag, metadata))

    async def read(self, name: str, *, limit: int = READ_LIMIT) -> tuple[bytes, ObjectInfo]:
        """Return a whole object."""

        def read() -> tuple[bytes, ObjectInfo]:
            with self._path(name).open("rb") as file:
                info = _info(name, file.fileno())
                if info.size > limit:
                    raise DamagedError(f"{name}: {info.size} bytes, more than {limit}")
                return file.read(limit), info

        data, info = await self._run(name, read)
        self.bytes_received += len(data)
        return data, info

    async def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Return exactly these bytes."""

        def read() -> bytes:
            with self._path(name).open("rb", buffering=0) as file:
                return _read_exactly(name, file.fileno(), offset, length)

        data = await self._run(name, read)
        self.bytes_received += len(data)
        return data

    async def stat(self, name: str) -> ObjectInfo:
        """Return what is known of the object."""
        return await self._run(name, lambda: _info(name, self._path(name)))

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Yield objects by name; looks only into directories that the prefix reaches."""
        for info in await self._run(prefix, lambda: list(self._walk(prefix))):
            yield info

    async def delete(self, name: str) -> None:
        """Delete the object."""

        def delete() -> None:
            path = self._path(name)
            path.unlink()
            _sync_directory(path.parent)

        await self._run(name, delete)

    async def aclose(self) -> None:
        """Nothing is open."""

    # ---- in a thread -------------------------------------------------------------------

    async def _run(self, name: str, action: Callable[[], T], *, probe: bool = True) -> T:
        self.requests += 1
        return await trio.to_thread.run_sync(
            self._translate, name, action, probe, limiter=self._limiter
        )

    def _translate(self, name: str, action: Callable[[], T], probe: bool) -> T:
        where = f"{self._root}/{name}" if name else str(self._root)
        try:
            if probe and not self._checked:
                self._check()
            return action()
        except FileNotFoundError:
            if probe and not self._root.is_dir():
                raise NotFoundError(
                    f"{self._root}: there is no such folder", hint="mount it, or vdiskfs vault init"
                ) from None
            raise NotFoundError(f"{where}: there is no such object") from None
        except PermissionError as error:
            raise RefusedError(
                f"{where}: {error.strerror}", hint="check the folder's owner and mode"
            ) from None
        except OSError as error:
            hint = "free space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise VaultUnreachableError(f"{where}: {error.strerror or error}", hint=hint) from error

    def _check(self) -> None:
        if self._root.exists() and not self._root.is_dir():
            raise UsageError(f"{self._root}: not a folder")
        kind = _file_system(self._root)
        if kind in _NETWORK:
            raise UsageError(
                f"{self._root}: a folder vault on {kind} could lose the order of its writes",
                hint="use a local file system, or azure://",
            )
        self._checked = self._root.is_dir()

    def _path(self, name: str) -> Path:
        return self._root / check_name(name)

    def _create(self, name: str, write: Callable[[int], None], metadata: Mapping[str, str]) -> str:
        path = self._path(name)
        with self._temporary(path, write, metadata) as temporary:
            try:
                os.link(temporary, path, follow_symlinks=False)
            except FileExistsError:
                raise AlreadyExistsError(f"{name}: the object exists") from None
            etag = _info(name, temporary).etag
        _sync_directory(path.parent)
        return etag

    def _replace(
        self, name: str, data: bytes, etag: str | None, metadata: Mapping[str, str]
    ) -> str:
        path = self._path(name)
        with self._temporary(path, _bytes_writer(data), metadata) as temporary, self._lock():
            try:
                current: str | None = _info(name, path).etag
            except FileNotFoundError:
                current = None
            if current != etag:
                raise ConflictError(f"{name}: somebody else has changed it")
            new = _info(name, temporary).etag
            temporary.rename(path)
        _sync_directory(path.parent)
        return new

    @contextlib.contextmanager
    def _temporary(
        self, path: Path, write: Callable[[int], None], metadata: Mapping[str, str]
    ) -> Iterator[Path]:
        """Give a synced file beside the object's place; remove what is left of it."""
        self._make_directory(path.parent)
        temporary = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
        fd = os.open(
            temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            try:
                write(fd)
                # The nonce makes each replacement differ, even one by the same bytes.
                held = json.dumps({"m": dict(metadata), "n": secrets.token_hex(8)})
                with contextlib.suppress(OSError):
                    os.setxattr(fd, _ATTRIBUTE, held.encode())
                os.fsync(fd)
            finally:
                os.close(fd)
            yield temporary
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()

    def _make_directory(self, directory: Path) -> None:
        if directory.is_dir():
            return
        if not self._root.is_dir():
            raise FileNotFoundError(directory)
        self._make_directory(directory.parent)
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
            _sync_directory(directory.parent)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        fd = os.open(self._root / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        if not self._root.is_dir():
            raise FileNotFoundError(self._root)
        start, _, stem = prefix.rpartition("/")
        names = sorted(self._names(start, stem))
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield _info(name, self._root / name)

    def _names(self, directory: str, stem: str) -> Iterator[str]:
        try:
            entries = list(os.scandir(self._root / directory))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if entry.name.startswith("."):
                self._clean(entry)
            elif entry.name.startswith(stem):
                name = f"{directory}/{entry.name}" if directory else entry.name
                if entry.is_dir(follow_symlinks=False):
                    yield from self._names(name, "")
                elif entry.is_file(follow_symlinks=False):
                    yield name

    def _clean(self, entry: os.DirEntry[str]) -> None:
        """Remove what a writer that died long ago has left."""
        if entry.name.startswith(_TEMPORARY):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_S:
                    os.unlink(entry.path)


def _bytes_writer(data: bytes) -> Callable[[int], None]:
    def write(fd: int) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    return write


def _file_writer(path: Path) -> Callable[[int], None]:
    def write(fd: int) -> None:
        with path.open("rb") as source, open(fd, "wb", closefd=False) as target:
            shutil.copyfileobj(source, target, 1024 * 1024)

    return write


def _read_exactly(name: str, fd: int, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise DamagedError(f"{name}: ends before byte {offset + length}")
        data += more
    return data


def _info(name: str, where: int | Path) -> ObjectInfo:
    status = os.stat(where) if isinstance(where, int) else where.lstat()
    held: dict[str, object] = {}
    with contextlib.suppress(OSError, ValueError):
        held = json.loads(os.getxattr(where, _ATTRIBUTE))
    metadata = held.get("m") if isinstance(held, dict) else None
    nonce = held.get("n") if isinstance(held, dict) else None
    return ObjectInfo(
        name=name,
        size=status.st_size,
        etag=f"{status.st_ino:x}-{status.st_mtime_ns:x}-{nonce or ''}",
        modified_ns=status.st_mtime_ns,
        metadata={str(key): str(value) for key, value in metadata.items()}
        if isinstance(metadata, dict)
        else {},
    )


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _file_system(path: Path) -> str:
    """Return the type of the file system that holds the path, as the kernel names it."""
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return ""
