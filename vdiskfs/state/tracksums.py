"""What the bitmaps of a disk were at a clean stop: damage on the disk is seen at the next start.

Blocks that are zero do not count, allocated or not: a bitmap costs what is marked in it. After
the death of the daemon there are no sums: its bitmaps changed until then.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from vdiskfs import native
from vdiskfs.crash import hook
from vdiskfs.errors import DamagedError, LocalError, NotFoundError
from vdiskfs.state.files import read_record, remove_file, write_record
from vdiskfs.units import PAGE_SIZE

_FILES = ("track", "dirty.0", "dirty.1", "suspect")
_STEP = 1 << 20


class TrackSums:
    """The sums of one track, in a file beside it. Everything waits for the local disk."""

    def __init__(self, path: Path, track: Path) -> None:
        """Take the file's path, and the track's directory."""
        self._path = path
        self._track = track

    def write(self) -> None:
        """Note what the files hold, which nobody changes any more; both are durable on return.

        Raises:
            LocalError: the disk refused.
        """
        write_record(self._path, {"format": 1, "files": self._sums(sync=True)})
        hook("sums.noted")

    def remove(self) -> None:
        """The files are going to change."""
        if self._path.exists():
            remove_file(self._path)

    def check(self) -> None:
        """See that the files are what they were; nothing is said where no sums are.

        Raises:
            DamagedError: they are not.
        """
        try:
            noted = read_record(self._path).get("files")
        except NotFoundError:
            return
        try:
            found = self._sums(sync=False)
        except LocalError as error:
            raise DamagedError(str(error)) from error
        if noted != found:
            wrong = [name for name in _FILES
                     if not isinstance(noted, dict) or noted.get(name) != found[name]]  # fmt: skip
            raise DamagedError(f"{self._track}: changed since the clean end: {', '.join(wrong)}")

    def _sums(self, *, sync: bool) -> dict[str, Any]:
        try:
            return {name: _sum_of(self._track / name, sync=sync) for name in _FILES}
        except OSError as error:
            raise LocalError(f"{error.filename or self._track}: {error.strerror}") from error


def _sum_of(path: Path, *, sync: bool) -> list[int | str]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if sync:
            os.fsync(fd)
        size = os.fstat(fd).st_size
        total = blake2b(digest_size=16)
        for offset, data in _blocks(fd, size):
            pages = data + bytes(-len(data) % PAGE_SIZE)
            kept = np.flatnonzero(~native.pages_zero(pages))
            numbers = np.asarray(kept + offset // PAGE_SIZE, np.uint64)
            total.update(numbers.tobytes())
            total.update(native.pages_sum(pages)[kept].tobytes())
    finally:
        os.close(fd)
    return [size, total.hexdigest()]


def _blocks(fd: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield what may hold something, in aligned steps; zeros may be among it."""
    offset = 0
    while offset < size:
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        offset = data // _STEP * _STEP
        yield offset, os.pread(fd, _STEP, offset)
        offset += _STEP
