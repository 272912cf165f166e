"""One object's file: its bytes, its time, its metadata. Descriptors in, no names kept.

Metadata is one extended attribute, lines of ``key=value``: 10,000 objects are listed with
two system calls each and none is opened. ext4 keeps about 100 bytes of it in the inode.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from vdiskfs.errors import DamagedError, LocalError, NotFoundError
from vdiskfs.store.object import ObjectInfo

_ATTRIBUTE = "user.vdiskfs"
_COPY_BYTES = 8 * 1024 * 1024
# EIO may be of either file: reading and writing by itself tells of which.
_NO_COPY_RANGE = (
    errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EIO
)  # fmt: skip
_NO_ATTRIBUTES = (errno.ENOTSUP, errno.ENODATA, errno.E2BIG, errno.EPERM)
# A file system with coarse times needs a jump that it can write down: FAT has 2 s.
_LARGEST_STEP_NS = 16_000_000_000

Fill = Callable[[int], None]
"""Writes an object's bytes to a descriptor."""


def fill_bytes(data: bytes | bytearray | memoryview) -> Fill:
    """Return what writes ``data``."""

    def fill(file: int) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(file, rest) :]

    return fill


def fill_from(path: Path, check: Callable[[], None]) -> Fill:
    """Return what copies the file at ``path``; ``check`` is called now and then, may raise."""

    def fill(file: int) -> None:
        try:
            source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LocalError(f"{path}: {os.strerror(error.errno or 0)}") from error
        try:
            if not stat.S_ISREG(os.fstat(source).st_mode):
                raise LocalError(f"{path} is not a file")
            _copy(source, path, file, check)
        finally:
            os.close(source)

    return fill


def _copy(source: int, path: Path, target: int, check: Callable[[], None]) -> None:
    """Copy a file within the kernel; shared blocks where the file system can.

    Raises:
        LocalError: the source, at ``path``, cannot be read.
        OSError: the target cannot be written.
    """
    try:
        while os.copy_file_range(source, target, _COPY_BYTES):
            check()
        # Some file systems (procfs, some FUSE) copy nothing and call it success.
        if os.lseek(source, 0, os.SEEK_CUR) >= os.fstat(source).st_size:
            return
    except OSError as error:
        if error.errno not in _NO_COPY_RANGE:
            raise
    while part := _read_next(source, path):
        fill_bytes(part)(target)
        check()


def _read_next(source: int, path: Path) -> bytes:
    try:
        return os.read(source, 1024 * 1024)
    except OSError as error:
        raise LocalError(f"{path}: {os.strerror(error.errno or 0)}") from error


def seal(file: int, after_ns: int) -> os.stat_result:
    """Give the file a modification time later than ``after_ns`` and make it durable."""
    moment = max(time.time_ns(), after_ns + 1)
    step = 1
    os.utime(file, ns=(moment, moment))
    while (info := os.fstat(file)).st_mtime_ns <= after_ns:
        step *= 16
        if step > _LARGEST_STEP_NS:
            raise OSError(errno.EIO, "the file system keeps no times")
        os.utime(file, ns=(after_ns + step, after_ns + step))
    os.fsync(file)
    return info


def etag_of(info: os.stat_result) -> str:
    """Return the version: a replace always moves the time forward."""
    return f"{info.st_mtime_ns:x}-{info.st_size:x}"


def info_of(name: str, info: os.stat_result, metadata: dict[str, str]) -> ObjectInfo:
    """Say what an object is from what the kernel says of its file."""
    return ObjectInfo(name, info.st_size, etag_of(info), info.st_mtime_ns, metadata)


def exists(parent: int, base: str) -> bool:
    """Tell whether a directory has an entry, of whatever kind."""
    try:
        os.stat(base, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def stat_file(parent: int, base: str, name: str) -> os.stat_result:
    """Look at an object's file. Raises NotFoundError where there is none."""
    try:
        info = os.stat(base, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        raise NotFoundError(f"there is no object {name}") from None
    if not stat.S_ISREG(info.st_mode):
        raise NotFoundError(f"{name} is not an object")
    return info


def set_metadata(file: int, metadata: Mapping[str, str]) -> None:
    """Keep metadata with a file, where its file system can."""
    if not metadata:
        return
    text = "\n".join(f"{key}={value}" for key, value in metadata.items())
    try:
        os.setxattr(file, _ATTRIBUTE, text.encode("ascii"))
    except OSError as error:
        # A file system without them keeps a vault whose objects alone carry the truth.
        if error.errno not in _NO_ATTRIBUTES:
            raise


def get_metadata(file: int | str) -> dict[str, str]:
    """Return the metadata kept with a file, given as a descriptor or a path; none if lost."""
    try:
        # A path is one that was seen to be a regular file; a descriptor has no link to follow.
        raw = os.getxattr(file, _ATTRIBUTE, follow_symlinks=isinstance(file, int))
    except OSError as error:
        if error.errno in _NO_ATTRIBUTES:
            return {}
        raise
    pairs = (line.partition("=") for line in raw.decode("ascii", "replace").split("\n"))
    return {key: value for key, equals, value in pairs if equals}


def read_exactly(name: str, file: int, offset: int, length: int) -> bytes:
    """Read a range that the file had when it was looked at, in one copy if it can be."""
    data = os.pread(file, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    missing = length - len(data)
    while missing:
        data = os.pread(file, missing, offset + length - missing)
        if not data:
            raise DamagedError(f"{name} ends before byte {offset + length}")
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)
