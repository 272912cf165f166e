"""Every version that every sector of a file had, from the log of what was done to it.

Flat arrays, one entry a version, sorted by sector and then by time: some millions for some ten
thousand operations. A version is the whole bytes of one operation (its number), zeros (0), the
bytes from before the run (START), or, where an operation covers only part of the sector, bytes
that are worked out here (PARTIAL).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tests.e2e.stamps import SECTOR, WORDS, Words, base_of, sectors
from tests.e2e.workload import FOREVER, Kind, WriteLog

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

PARTIAL = -2
START = -3


class Sizes(NamedTuple):
    """The sizes that the file had, in order; the first is from before the run."""

    size: Ints
    before: Ints
    low: Ints  # the operation that made it was issued
    end: Ints  # and completed
    high: Ints  # the next one was completed
    operation: Ints
    following: Ints
    is_write: Flags


def ranges(first: Ints, count: Ints) -> Ints:
    """Return first[0], first[0] + 1, ... (count[0] of them), then the same for the next."""
    total = int(count.sum())
    before = np.concatenate([[0], np.cumsum(count)[:-1]]) if count.size else count
    result: Ints = np.arange(total, dtype=np.int64) + np.repeat(first - before, count)
    return result


class Versions:
    """The versions of all sectors that an operation touched.

    ``touched``: their sector numbers, sorted. Per version: ``place`` (index into touched),
    ``operation`` (0: before the run), ``following`` (the next operation on the sector, 0: none),
    ``shown`` (what it looks like: operation number, 0, PARTIAL or START), ``low`` and ``high``
    (the instants at which it may be seen). ``partial_*``: the PARTIAL ones, in the same order.
    """

    def __init__(self, log: WriteLog, initial: Path | None) -> None:
        table = np.array(log.operations, dtype=np.int64).reshape(-1, 7)
        self._kind, self._offset, self._length = table[:, 0], table[:, 1], table[:, 2]
        self.start, self.end = table[:, 3], table[:, 4]
        self._base = base_of(log.seed)
        self._lay_out()
        self._bound()
        self._show(initial)
        self.sizes = _sizes(log, table)

    def partials_in(self, first: int, end: int) -> slice:
        """Return which of the partial versions are of the sectors [first, end)."""
        return slice(*np.searchsorted(self.partial_sector, [first, end]))

    def operations_of(self, place: int) -> list[int]:
        """Return the numbers of the operations on one sector, in order."""
        lo, hi = np.searchsorted(self.place, [place, place + 1])
        return [int(n) for n in self.operation[lo + 1 : hi]]

    def _lay_out(self) -> None:
        """Make one entry for each sector of each operation and one for each sector's beginning."""
        real = self._length > 0
        first = np.where(real, self._offset // SECTOR, 0)
        count = np.where(real, -(-(self._offset + self._length) // SECTOR) - first, 0)
        # One number for sector and operation: sorting plain numbers is what numpy does best, and
        # within a sector the operations stay in the order of the locks.
        base = first.size + 1
        key = ranges(first, count) * base
        key += np.repeat(np.arange(1, base), count)
        key.sort()
        sector = key // base
        begins = np.flatnonzero(np.diff(sector, prepend=-1))
        self.touched = sector[begins]
        # In front of each sector's operations stands what it held before: operation 0.
        self._key: Ints = np.insert(key, begins, self.touched * base)
        self._key_base = base
        self._sector: Ints = np.insert(sector, begins, self.touched)
        self.operation: Ints = self._key - self._sector * base
        self.place: Ints = np.cumsum(self.operation == 0) - 1

    def _bound(self) -> None:
        """Set low, high and following: [start of its operation, end of the next one]."""
        start = np.concatenate([[0], self.start])
        end = np.concatenate([[FOREVER], self.end])
        self.low: Ints = start[self.operation]
        # The entry behind a sector's last one is the next sector's beginning: operation 0.
        self.following: Ints = np.append(self.operation[1:], 0)
        self.high: Ints = end[self.following]
        # One whose end is not known has given way at the latest when its successor was completed.
        while (some := np.flatnonzero(self._outlives_successor())).size:
            self.high[some] = self.high[some + 1]

    def _outlives_successor(self) -> Flags:
        inner = self.place[:-1] == self.place[1:]
        result: Flags = inner & (self.high[:-1] > self.high[1:])
        return result

    def _show(self, initial: Path | None) -> None:
        """Set shown, and work out the bytes of what is shown in part."""
        number = np.arange(1, self._kind.size + 1)
        looks = np.where(self._kind == Kind.WRITE, number, 0)
        self.shown: Ints = np.concatenate([[START], looks])[self.operation]
        # Only an operation's first and last sector can be covered in part.
        real = self._length > 0
        for edge in (self._offset, self._offset + self._length):
            some = np.flatnonzero(real & (edge % SECTOR != 0))
            keys = edge[some] // SECTOR * self._key_base + number[some]
            self.shown[np.searchsorted(self._key, keys)] = PARTIAL
        self.initial_zero: Flags = np.ones(self.touched.size, bool)
        self._start_content = _Start(initial, self.touched, self.initial_zero)
        self._work_out_partials()

    def _work_out_partials(self) -> None:
        at = np.flatnonzero(self.shown == PARTIAL)
        self.partial_sector: Ints = self._sector[at]
        self.partial_content: Words = np.zeros((at.size, WORDS), np.uint64)
        self._index = np.full(self.shown.size, -1, np.int64)
        self._index[at] = np.arange(at.size)
        # A partial version lies over the version before it: in rounds, by how many partial ones
        # stand in a row before it.
        step = np.arange(at.size)
        begins = np.diff(at, prepend=-2) != 1
        depth = step - np.maximum.accumulate(np.where(begins, step, 0))
        for level in range(int(depth.max(initial=-1)) + 1):
            self._overlay(at[depth == level])
        self.partial_zero: Flags = np.logical_not(self.partial_content.any(axis=1))

    def contents(self, at: Ints) -> Words:
        """Return the bytes of these versions, a row each."""
        data = np.zeros((at.size, WORDS), np.uint64)
        some = np.flatnonzero(self.shown[at] == PARTIAL)
        data[some] = self.partial_content[self._index[at[some]]]
        some = np.flatnonzero(self.shown[at] == START)
        data[some] = self._start_content.of(self.place[at[some]])
        some = np.flatnonzero(self.shown[at] > 0)
        data[some] = sectors(self._base, self.shown[at[some]], self._sector[at[some]])
        return data

    def _overlay(self, at: Ints) -> None:
        """Work out these partial versions; those before them are known."""
        data = self.contents(at - 1)
        number = self.operation[at]
        fresh = sectors(self._base, number, self._sector[at])
        fresh[self._kind[number - 1] != Kind.WRITE] = 0
        begin = np.clip(self._offset[number - 1] - self._sector[at] * SECTOR, 0, SECTOR)
        finish = self._offset[number - 1] + self._length[number - 1] - self._sector[at] * SECTOR
        byte = np.arange(SECTOR)[None, :]
        mine = (byte >= begin[:, None]) & (byte < np.clip(finish, 0, SECTOR)[:, None])
        joined = np.where(mine, fresh.view(np.uint8), data.view(np.uint8))
        self.partial_content[self._index[at]] = joined.view(np.uint64)


class _Start:
    """The bytes of the touched sectors from before the run."""

    def __init__(self, path: Path | None, touched: Ints, zero: Flags) -> None:
        self._touched = touched
        self._data: Words | None = None
        if path is None:
            return
        with path.open("rb") as file:
            rows = []
            for sector in touched:
                file.seek(int(sector) * SECTOR)
                rows.append(file.read(SECTOR).ljust(SECTOR, b"\0"))
        self._data = np.frombuffer(b"".join(rows), np.uint64).reshape(-1, WORDS)
        zero[:] = np.logical_not(self._data.any(axis=1))

    def of(self, places: Ints) -> Words:
        """Return the rows of these touched sectors."""
        if self._data is None:
            return np.zeros((places.size, WORDS), np.uint64)
        return self._data[places]


def _sizes(log: WriteLog, table: Ints) -> Sizes:
    """List the sizes; operations that change the size never overlap in time."""
    number = np.flatnonzero(table[:, 5] != table[:, 6]) + 1
    changed = table[number - 1]
    start = np.concatenate([[0], changed[:, 3]])
    end = np.concatenate([[0], changed[:, 4]])
    size = np.concatenate([[log.initial_size], changed[:, 6]])
    before = np.concatenate([[log.initial_size], changed[:, 5]])
    operation = np.concatenate([[0], number])
    is_write = np.concatenate([[False], changed[:, 0] == Kind.WRITE])
    high = np.append(end[1:], FOREVER)
    return Sizes(size, before, start, end, high, operation, np.append(operation[1:], 0), is_write)
