"""Where two points differ: by comparing page sums, without reading data."""

from __future__ import annotations

import numpy as np

from vdiskfs.delta.entries import extents_of_pages
from vdiskfs.point.kinds import FULL
from vdiskfs.point.reader import PointReader
from vdiskfs.units import PAGE_SIZE

_STEP = 16384


async def diff(a: PointReader, b: PointReader) -> list[tuple[int, int]]:
    """Return the extents (offset, length) whose bytes differ, in whole pages, in order.

    Bytes beyond the end of a disk count as zeros; the last extent ends with the larger
    disk. Exact as far as two different pages have different XXH3-64 sums.
    """
    pages, size = max(a.pages, b.pages), max(a.size, b.size)
    extents: list[tuple[int, int]] = []
    page = 0
    while page < pages:
        candidates = [await a.next_candidate(page), await b.next_candidate(page)]
        found = min((item for item in candidates if item is not None), default=None)
        if found is None:
            break
        count = min(_STEP, pages - found)
        sums_a, kind_a = await a.sums(found, count)
        sums_b, kind_b = await b.sums(found, count)
        differs = ((kind_a == FULL) != (kind_b == FULL)) | (sums_a != sums_b)
        runs = extents_of_pages((np.flatnonzero(differs) + found).astype(np.uint64))
        for start, end in zip(runs.start.tolist(), runs.end.tolist(), strict=True):
            _append(extents, start * PAGE_SIZE, min(end * PAGE_SIZE, size))
        page = found + count
    return extents


def _append(extents: list[tuple[int, int]], start: int, end: int) -> None:
    if extents and sum(extents[-1]) == start:
        extents[-1] = (extents[-1][0], end - extents[-1][0])
    else:
        extents.append((start, end - start))
