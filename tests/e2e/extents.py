"""Reads sparse files by what they hold; holes cost nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

BLOCK = 8 << 20


def extents(path: Path, offset: int = 0, size: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield the stretches ``[first, end)`` of a file that are no holes, from ``offset`` on."""
    end = path.stat().st_size if size is None else offset + size
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        at = offset
        while at < end:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            stop = min(os.lseek(fd, at, os.SEEK_HOLE), end)
            if at < stop:
                yield at, stop
            at = stop
    finally:
        os.close(fd)


def blocks(
    files: list[tuple[Path | None, int, int | None]], sector: int
) -> Iterator[tuple[int, Words, Words]]:
    """Read two files side by side, wherever one of them has data, in rising order.

    Args:
        files: two of (path, where it begins in the file, its length); None is all zeros.
        sector: bytes in a row.

    Yields:
        The first sector, and the words of each file from there on, one row a sector; what lies
        beyond a file's end is zeros.
    """
    wanted: set[int] = set()
    for path, offset, size in files:
        if path is not None:
            for first, end in extents(path, offset, size):
                wanted.update(range((first - offset) // BLOCK, -(-(end - offset) // BLOCK)))
    opened = [None if path is None else path.open("rb", buffering=0) for path, _, _ in files]
    try:
        for number in sorted(wanted):
            rows = []
            for file, (_, offset, size) in zip(opened, files, strict=True):
                data = bytearray(BLOCK)
                length = BLOCK if size is None else min(BLOCK, max(0, size - number * BLOCK))
                if file is not None and length > 0:
                    view = memoryview(data)[:length]
                    file.seek(offset + number * BLOCK)
                    while len(view) and (count := file.readinto(view)):
                        view = view[count:]
                rows.append(np.frombuffer(data, np.uint64).reshape(-1, sector // 8))
            yield number * BLOCK // sector, rows[0], rows[1]
    finally:
        for file in opened:
            if file is not None:
                file.close()
