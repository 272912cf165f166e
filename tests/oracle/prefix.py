"""Says whether an image of a guest's disk is a cut of the log of that disk (FAULTS.md, P).

Unlike tests/e2e/oracle.py it knows nothing of the bytes but the log: whatever the guest does, a
file system for instance, can be judged. Time is the line number of the trace (writelog.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.e2e.instants import Instants, Intervals, NotACutError, common_instants
from tests.e2e.workload import FOREVER
from tests.oracle.writelog import SECTOR, Timed

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.uint64]


class PrefixOracle:
    """Judges images of one disk by its log.

    Args:
        log: in its order; two entries of one sector never overlap in time, as no sane guest has
            two writes to one sector in flight.
        initial: the disk before the first entry.
    """

    def __init__(self, log: Sequence[Timed], initial: bytes) -> None:
        self._initial = _rows(initial)
        numbers, sectors, rows, starts, ends = [], [], [], [], []
        for number, sector, row, start, end in _versions(log, initial):
            numbers.append(number)
            sectors.append(sector)
            rows.append(row)
            starts.append(start)
            ends.append(end)
        order = np.argsort(np.array(sectors, np.int64), kind="stable")
        self._sector: Ints = np.array(sectors, np.int64)[order]
        self._number: Ints = np.array(numbers, np.int64)[order]
        self._content = _rows(b"".join(rows))[order]
        self._bound(np.array(starts, np.int64)[order], np.array(ends, np.int64)[order])

    def _bound(self, start: Ints, end: Ints) -> None:
        """A version may be seen from its start until the end of the sector's next one."""
        last = np.append(self._sector[1:] != self._sector[:-1], True)[: self._sector.size]
        self._high: Ints = np.where(last, FOREVER, np.append(end[1:], FOREVER)[: end.size])
        self._next: Ints = np.where(last, 0, np.append(self._number[1:], 0)[: end.size])
        # Where a start is not known, the operation came behind the one before it.
        before = np.concatenate([[0], end[:-1]])[: end.size]
        self._low: Ints = np.where(start < 0, before, start)
        self._low[self._number == 0] = 0

    def check(self, image: Path, window: tuple[int, int] | None = None) -> Instants:
        """Return the lines of the trace at which the disk may have been what the image is.

        Raises:
            NotACutError: there is none (in ``window``).
        """
        data = image.read_bytes()
        if len(data) != self._initial.nbytes:
            raise NotACutError(f"the image has {len(data)} bytes: another size", "size")
        rows = _rows(data)
        untouched: Flags = np.asarray((rows != self._initial).any(axis=1))
        untouched[self._sector] = False
        if untouched.any():
            sector = int(np.flatnonzero(untouched)[0])
            raise NotACutError(f"sector {sector} changed and nobody wrote to it", "strange")
        at = np.flatnonzero((self._content == rows[self._sector]).all(axis=1))
        unknown = np.setdiff1d(self._sector, self._sector[at])
        if unknown.size:
            raise NotACutError(f"sector {unknown[0]} holds bytes that it never held", "torn")
        return common_instants(self._joined(at), window)

    def _joined(self, at: Ints) -> Intervals:
        """Join the stretches of versions of a sector that meet."""
        sector, low, high = self._sector[at], self._low[at], self._high[at]
        fresh = np.ones(at.size, bool)
        fresh[1:] = (sector[1:] != sector[:-1]) | (low[1:] > high[:-1])
        begin = np.flatnonzero(fresh)
        finish = np.append(begin[1:], at.size)[: begin.size] - 1
        return Intervals(
            sector[begin], low[begin], high[finish], self._number[at[begin]], self._next[at[finish]]
        )


def _rows(data: bytes) -> Rows:
    return np.frombuffer(data, np.uint64).reshape(-1, SECTOR // 8)


def _versions(log: Sequence[Timed], initial: bytes) -> Iterator[tuple[int, int, bytes, int, int]]:
    """Yield (number of the entry, sector, bytes, start, end); 0 is what was there before."""
    touched = sorted({s for e, *_ in log for s in range(e.sector, e.sector + e.sectors)})
    for sector in touched:
        row = initial[sector * SECTOR : (sector + 1) * SECTOR]
        if len(row) != SECTOR:
            raise NotACutError(f"the log has sector {sector}, beyond the disk", "size")
        yield 0, sector, row, 0, 0
    for number, (entry, start, end) in enumerate(log, 1):
        for i in range(entry.sectors):
            row = entry.data[i * SECTOR : (i + 1) * SECTOR] or bytes(SECTOR)
            yield number, entry.sector + i, row, start, end
