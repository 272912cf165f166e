"""A point read back from the vault, every page of it, against the checksums of its seal."""

from __future__ import annotations

from collections.abc import Callable

import trio

from vdiskfs.point import PointReader
from vdiskfs.units import PAGE_SIZE

STEP = 2048
"""Pages read at once: 8 MiB."""


async def read_back(
    reader: PointReader, progress: Callable[[int, int], None] | None = None, *, rest: float = 0.0,
    limit: int | None = None,
) -> int:  # fmt: skip
    """Read every page that a point has from the vault and verify it; return the bytes of data.

    Holes cost nothing. Nothing is written anywhere.

    Args:
        reader: of the point, open.
        progress: is told (done, total), bytes of the disk.
        rest: seconds of rest for each second of work: what runs in the background is idle.
        limit: bytes of data after which it ends; None: all is read.

    Raises:
        DamagedError: something is missing, or is not what was sealed.
        VaultUnreachableError: the vault does not answer.
    """
    page = read = 0
    while (found := await reader.next_candidate(page)) is not None:
        if limit is not None and read >= limit:
            return read
        began = trio.current_time()
        count = min(STEP - found % STEP, reader.pages - found)
        _, mask = await reader.read_mapped(found, count)
        read += int(mask.sum()) * PAGE_SIZE
        page = found + count
        if progress is not None:
            progress(min(page * PAGE_SIZE, reader.size), reader.size)
        if rest:
            await trio.sleep((trio.current_time() - began) * rest)
    if progress is not None:
        progress(reader.size, reader.size)
    return read
