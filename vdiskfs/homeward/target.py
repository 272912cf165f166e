"""The image file that is brought home: its pages written, made holes, read back.

Everything blocks on the local disk: call it from a thread. Threads may use it side by side for
different pages.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vdiskfs import native
from vdiskfs.delta.entries import U64, Bools, Extents, extents_of_pages
from vdiskfs.errors import LocalError
from vdiskfs.units import PAGE_SIZE

_ZEROS = bytes(1 << 20)
_NO_HOLES = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class TargetFile:
    """An image, open for as long as it is moved. Every error of its disk is a `LocalError`."""

    def __init__(self, path: Path) -> None:
        """Open it. A block device is none: it has neither a size to set nor holes."""
        self.path = path
        with self._errors():
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self.size = os.fstat(self._fd).st_size

    def close(self) -> None:
        """Close it; nothing becomes durable by that."""
        os.close(self._fd)

    def resize(self, size: int) -> None:
        """Set the size in bytes."""
        with self._errors():
            os.ftruncate(self._fd, size)
            self.size = size

    def write(self, pages: U64, data: memoryview, full: Bools) -> None:
        """Make pages what ``data`` has one after the other; a hole where they are not ``full``.

        What lies beyond the end of the file is left out.
        """
        with self._errors():
            for start, end in _runs(extents_of_pages(pages[full])):
                at = int(np.searchsorted(pages, np.uint64(start))) * PAGE_SIZE
                part = data[at : at + (end - start) * PAGE_SIZE]
                _write_all(self._fd, part[: max(0, self.size - start * PAGE_SIZE)],
                           start * PAGE_SIZE)  # fmt: skip
            self.clear(extents_of_pages(pages[~full]))

    def clear(self, runs: Extents) -> None:
        """Make runs of pages holes."""
        with self._errors():
            for start, end in _runs(runs):
                offset = start * PAGE_SIZE
                # Whole pages, also where the file ends inside one.
                length = min(end * PAGE_SIZE, -(-self.size // PAGE_SIZE) * PAGE_SIZE) - offset
                if length > 0:
                    self._punch(offset, length)

    def _punch(self, offset: int, length: int) -> None:
        try:
            native.punch(self._fd, offset, length)
        except OSError as error:
            if error.errno not in _NO_HOLES:
                raise
            for at in range(offset, min(offset + length, self.size), len(_ZEROS)):
                end = min(at + len(_ZEROS), offset + length, self.size)
                _write_all(self._fd, memoryview(_ZEROS)[: end - at], at)

    def sync(self) -> None:
        """Make all that was written durable, the size too."""
        with self._errors():
            os.fdatasync(self._fd)

    def forget_cache(self) -> None:
        """Let what is read from now on come from the disk, as far as it is synced."""
        with self._errors():
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def holds(self, pages: U64, full: Bools, sums: U64) -> Bools:
        """Return which pages have data with these sums, or are zeros where not ``full``."""
        same = np.zeros(len(pages), np.bool_)
        with self._errors():
            for start, end in _runs(extents_of_pages(pages)):
                at = int(np.searchsorted(pages, np.uint64(start)))
                data = self._read(start * PAGE_SIZE, (end - start) * PAGE_SIZE)
                part = slice(at, at + end - start)
                zero, found = native.pages_zero(data), native.pages_sum(data)
                same[part] = np.where(full[part], ~zero & (found == sums[part]), zero)
        return same

    def _read(self, offset: int, length: int) -> bytearray:
        """Return bytes; zeros beyond the end."""
        data = bytearray(length)
        view, at = memoryview(data), 0
        while at < length:
            got = os.preadv(self._fd, [view[at:]], offset + at)
            if got == 0:
                break
            at += got
        return data

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LocalError(f"{self.path}: {os.strerror(error.errno or errno.EIO)}") from error


def _runs(extents: Extents) -> Iterator[tuple[int, int]]:
    return zip(extents.start.tolist(), extents.end.tolist(), strict=True)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done
