"""The instants at which every sector of an image may have been what it is; or why there is none.

Each sector is one line of stretches of time. This is the last step of every oracle: oracle.py
for stamped sectors, writelog.py for the log of a guest's disk.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tests.e2e.stamps import SECTOR
from tests.e2e.workload import FOREVER

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Instants = tuple[tuple[int, int], ...]


class NotACutError(AssertionError):
    """The image is not the disk at any instant; the message says what is wrong with it.

    ``kind``: ``lost`` (one completed operation is missing), ``reordered`` (one is there before
    its time), ``mixed`` (no single operation explains it), ``torn`` (bytes that the sector never
    held), ``strange`` (bytes where nobody wrote), ``size``.
    """

    def __init__(self, message: str, kind: str = "mixed") -> None:
        super().__init__(message)
        self.kind = kind


class Intervals(NamedTuple):
    """Sorted by sector, then time; those of one sector do not overlap."""

    sector: Ints
    low: Ints
    high: Ints
    newest: Ints  # the operation seen (0: the initial bytes) at the beginning
    missing: Ints  # the operation not seen at the end (0: there is none)


def common_instants(found: Intervals, window: tuple[int, int] | None) -> Instants:
    """Return the instants that lie in an interval of every sector.

    Raises:
        NotACutError: there is none.
    """
    low, high = window or (0, FOREVER)
    single = np.ones(found.sector.size, bool)
    same = found.sector[1:] == found.sector[:-1]
    single[1:] &= ~same
    single[:-1] &= ~same
    low_at, high_at = -1, -1
    if single.any():
        ones = np.flatnonzero(single)
        newest, oldest = ones[found.low[ones].argmax()], ones[found.high[ones].argmin()]
        if found.low[newest] > low:
            low, low_at = int(found.low[newest]), int(newest)
        if found.high[oldest] < high:
            high, high_at = int(found.high[oldest]), int(oldest)
    if low > high:
        kind = _kind(found, np.flatnonzero(single), low_at, high_at)
        raise NotACutError(_contradiction(found, low_at, high_at, window), kind)
    return _sweep(found, ~single, low, high)


def _sweep(found: Intervals, several: Flags, low: int, high: int) -> Instants:
    """Find instants in [low, high] for the sectors that fit at several stretches of time."""
    sector, starts, ends = found.sector[several], found.low[several], found.high[several]
    inside = (starts <= high) & (ends >= low)
    needed = np.unique(sector).size
    sector, starts, ends = sector[inside], starts[inside], ends[inside]
    everywhere = np.unique(sector[(starts <= low) & (ends >= high)])
    open_ = ~np.isin(sector, everywhere)
    needed -= everywhere.size
    if needed == 0:
        return ((low, high),)
    starts, ends = np.maximum(starts[open_], low), np.minimum(ends[open_], high)
    # An interval covers its end: ends sort behind starts of the same instant.
    times = np.concatenate([starts, ends])
    steps = np.concatenate([np.ones(starts.size, np.int64), -np.ones(ends.size, np.int64)])
    order = np.lexsort((-steps, times))
    covered = np.cumsum(steps[order])
    full = np.flatnonzero(covered == needed)
    if full.size == 0:
        raise NotACutError(
            f"no instant fits all sectors: at best {covered.max(initial=0)} of the {needed} "
            "sectors that hold bytes of several times fit at once"
        )
    instants = times[order]
    return tuple((int(instants[at]), int(instants[at + 1])) for at in full)


def _kind(found: Intervals, ones: Ints, low_at: int, high_at: int) -> str:
    """Say which single operation explains why there is no instant, if one does."""
    if low_at < 0 or high_at < 0:
        return "lost" if high_at >= 0 else "reordered"
    rest = ones[found.missing[ones] != found.missing[high_at]]
    if found.low[low_at] <= found.high[rest].min(initial=FOREVER):
        return "lost"
    rest = ones[found.newest[ones] != found.newest[low_at]]
    if found.low[rest].max(initial=0) <= found.high[high_at]:
        return "reordered"
    return "mixed"


def _contradiction(
    found: Intervals, low_at: int, high_at: int, window: tuple[int, int] | None
) -> str:
    seen = f"the seal began at {window[0] if window else 0} ns"
    if low_at >= 0:
        seen = (
            f"{place(found.sector[low_at])} holds operation #{found.newest[low_at]}, "
            f"issued at {found.low[low_at]} ns"
        )
    lost = f"the seal had ended at {window[1] if window else 0} ns"
    if high_at >= 0:
        lost = (
            f"{place(found.sector[high_at])} lacks operation #{found.missing[high_at]}, "
            f"completed at {found.high[high_at]} ns"
        )
    return f"not the disk at any instant: {seen}, but {lost}"


def place(sector: int) -> str:
    """Name a sector for people."""
    return "the size" if sector < 0 else f"sector {sector} (byte {sector * SECTOR})"


def joined(a: Intervals, b: Intervals) -> Intervals:
    """Put the intervals of two sets of sectors into one."""
    return Intervals(*(np.concatenate(pair) for pair in zip(a, b, strict=True)))
