"""Says whether an image is a cut: the disk at one instant, whatever was in flight.

The rule, by sector of 512 bytes: one instant T exists such that every operation that was
completed before T is in the image, none that was issued after T, and of those in flight at T
each sector has it or not, whole.

The proof. The operations on one sector never overlap in time (workload.py), so the sector has a
line of versions 0, 1, ..., k. Version j can be what is seen at T exactly if operation j was
issued by T and operation j + 1 was not completed before T: T in [start(j), end(j+1)]. Stamps say
which versions a sector's bytes are; the file's size is one more sector. The image is a cut if
and only if one T lies in an interval of every sector. Nothing is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.e2e.extents import blocks
from tests.e2e.instants import Instants, Intervals, NotACutError, common_instants, joined, place
from tests.e2e.stamps import SECTOR, Words, base_of, operations, sectors
from tests.e2e.versions import PARTIAL, START, Versions
from tests.e2e.workload import FOREVER, WriteLog

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_STRANGE = -1  # bytes that no operation alone put there, and not zeros


@dataclass(frozen=True)
class Cut:
    """The instants (CLOCK_MONOTONIC) at which the disk may have been what the image is."""

    instants: tuple[tuple[int, int], ...]  # stretches, both ends included, in order
    in_flight: int  # operations under way at some instant of the first stretch
    sectors: int  # touched by any operation


class Oracle:
    """Judges any number of images of the file that one log is about.

    Args:
        log: complete (after ``Workload.stop``).
        initial: the file's bytes before the first operation; None: all zeros.
    """

    def __init__(self, log: WriteLog, initial: Path | None = None) -> None:
        self._log = log
        self._base = base_of(log.seed)
        self._initial = initial
        self._versions = Versions(log, initial)

    def check(
        self,
        image: Path,
        window: tuple[int, int] | None = None,
        *,
        check_size: bool = True,
        offset: int = 0,
    ) -> Cut:
        """Prove that the image is a cut and return the instants at which.

        Args:
            image: a file; holes are not read.
            window: the instant must lie in here too, e.g. between call and return of the seal.
            check_size: the file's size is part of what must fit.
            offset: where in the image the file begins (a guest's partition).

        Raises:
            NotACutError: it is none.
        """
        size = image.stat().st_size - offset
        matched = self._matches(image, offset, size)
        found = self._intervals(matched)
        if check_size:
            found = joined(found, self._size_intervals(size))
        instants = common_instants(found, window)
        first, last = instants[0]
        versions = self._versions
        in_flight = int(((versions.start <= last) & (versions.end >= first)).sum())
        return Cut(instants, in_flight, versions.touched.size)

    def check_flushed(self, image: Path, *, check_size: bool = True) -> None:
        """Prove that an image has what a host's loss must leave (FAULTS.md, property L).

        Each sector equals the last write to it that was completed before the last acknowledged
        flush began, or any write that was not completed then: later ones in any order. The size
        is a place of its own: the sector that it cuts is judged by what lies in front of it.

        Raises:
            NotACutError: a sector does not.
        """
        size = image.stat().st_size
        found = self._intervals(self._matches(image, 0, size, loose_end=True))
        if check_size:
            found = joined(found, self._size_intervals(size))
        flush = max((begin for begin, _ in self._log.flushes), default=0)
        order = np.lexsort((found.high, found.sector))
        last = np.append(found.sector[order][1:] != found.sector[order][:-1], True)
        newest = order[last[: order.size]]
        lost = newest[found.high[newest] < flush]
        if lost.size:
            at = int(lost[0])
            raise NotACutError(
                f"{place(found.sector[at])} lacks operation #{found.missing[at]}, completed at "
                f"{found.high[at]} ns, before the flush of {flush} ns: {lost.size} such places",
                "lost",
            )

    # ---- which versions the bytes are ---------------------------------------------------

    def _matches(self, image: Path, offset: int, size: int, *, loose_end: bool = False) -> Flags:
        """Return for every version of every sector whether the image may hold it.

        With ``loose_end`` the image may end at the size of one version and hold another.
        """
        versions = self._versions
        seen = np.zeros(versions.touched.size, np.int64)  # operation; 0: zeros
        # Sectors that the loop below does not meet hold zeros; so do their zero partial versions.
        partial = versions.partial_zero.copy()
        initial = versions.initial_zero.copy()
        files = [(image, offset, size), (self._initial, 0, None)]
        for first, data, original in blocks(files, SECTOR):
            count = data.shape[0]
            here = slice(*np.searchsorted(versions.touched, [first, first + count]))
            rows = versions.touched[here] - first
            self._check_untouched(first, data, original, rows)
            numbers = versions.touched[here]
            seen[here] = self._identify(data[rows], numbers)
            initial[here] = (data[rows] == original[rows]).all(axis=1)
            some = versions.partials_in(first, first + count)
            mine = data[versions.partial_sector[some] - first]
            partial[some] = (mine == versions.partial_content[some]).all(axis=1)
        owner = seen[versions.place]
        matched: Flags = (versions.shown >= 0) & (owner == versions.shown)
        matched[versions.shown == PARTIAL] = partial
        matched[versions.shown == START] = initial
        if loose_end and size % SECTOR:
            self._match_end(image, size, matched)
        self._check_known(matched, seen)
        return matched

    def _match_end(self, image: Path, size: int, matched: Flags) -> None:
        versions = self._versions
        place = int(np.searchsorted(versions.touched, size // SECTOR))
        if place == versions.touched.size or versions.touched[place] != size // SECTOR:
            return
        with image.open("rb") as file:
            file.seek(size // SECTOR * SECTOR)
            mine = np.frombuffer(file.read(), np.uint8)
        at = np.flatnonzero(versions.place == place)
        held = versions.contents(at).view(np.uint8)[:, : mine.size]
        matched[at] = (held == mine).all(axis=1)

    def _identify(self, data: Words, numbers: Ints) -> Ints:
        """Return the one operation whose bytes each sector holds, 0 for zeros, else _STRANGE."""
        found = np.full(numbers.size, _STRANGE, np.int64)
        found[~data.any(axis=1)] = 0
        named = operations(self._base, data[:, :1], numbers)[:, 0]
        some = np.flatnonzero((named >= 1) & (named <= len(self._log.operations)))
        ops = named[some].astype(np.int64)
        right = (sectors(self._base, ops, numbers[some]) == data[some]).all(axis=1)
        found[some[right]] = ops[right]
        return found

    def _check_untouched(self, first: int, data: Words, original: Words, rows: Ints) -> None:
        other = (data != original).any(axis=1)
        other[rows] = False
        if other.any():
            sector = first + int(np.flatnonzero(other)[0])
            raise NotACutError(
                f"sector {sector} (byte {sector * SECTOR}) changed and nobody wrote to it; "
                f"it holds {self._describe(data[sector - first], sector)}",
                "strange",
            )

    def _check_known(self, matched: Flags, seen: Ints) -> None:
        versions = self._versions
        known = np.zeros(versions.touched.size, bool)
        known[versions.place[matched]] = True
        if known.all():
            return
        place = int(np.flatnonzero(~known)[0])
        sector = int(versions.touched[place])
        what = f"write #{seen[place]}" if seen[place] > 0 else "zeros"
        if seen[place] == _STRANGE:
            what = "torn or foreign bytes"
        mine = versions.operations_of(place)
        raise NotACutError(
            f"sector {sector} (byte {sector * SECTOR}) holds {what}, which it never held: "
            f"{(~known).sum()} such sectors; its own operations are {mine}",
            "torn",
        )

    def _describe(self, data: Words, sector: int) -> str:
        if not data.any():
            return "zeros"
        named = operations(self._base, data[None, :], np.array([sector]))[0]
        known = named[(named >= 1) & (named <= len(self._log.operations))]
        return f"words of writes {sorted({int(n) for n in known})}" if known.size else "other bytes"

    # ---- when that may have been --------------------------------------------------------

    def _intervals(self, matched: Flags) -> Intervals:
        """Join the intervals of the versions that each sector may be."""
        versions = self._versions
        at = np.flatnonzero(matched)
        sector = versions.place[at]
        low, high = versions.low[at], versions.high[at]
        # Both bounds rise within a sector, so only neighbours can overlap.
        fresh = np.ones(at.size, bool)
        fresh[1:] = (sector[1:] != sector[:-1]) | (low[1:] > high[:-1])
        begin = np.flatnonzero(fresh)
        finish = np.append(begin[1:], at.size)[: begin.size] - 1
        return Intervals(
            versions.touched[sector[begin]],
            low[begin],
            high[finish],
            versions.operation[at[begin]],
            versions.following[at[finish]],
        )

    def _size_intervals(self, size: int) -> Intervals:
        """Return when the file may have had this size; it stands as sector -1."""
        sizes = self._versions.sizes
        fits = sizes.size == size
        # A write that extends the file may have been carried out in several requests.
        growing = (sizes.before < size) & (size < sizes.size) & sizes.is_write
        if not (fits.any() or growing.any()):
            raise NotACutError(
                f"the image has {size} bytes, a size that the file never had", "size"
            )
        low = np.concatenate([sizes.low[fits], sizes.low[growing]])
        high = np.concatenate([sizes.high[fits], sizes.end[growing]])
        newest = np.concatenate([sizes.operation[fits], sizes.operation[growing]])
        missing = np.concatenate([sizes.following[fits], sizes.operation[growing]])
        order = np.argsort(low, kind="stable")
        low, high, newest, missing = low[order], high[order], newest[order], missing[order]
        reach = np.maximum.accumulate(high)
        fresh = np.ones(low.size, bool)
        fresh[1:] = low[1:] > reach[:-1]
        begin = np.flatnonzero(fresh)
        finish = np.append(begin[1:], low.size)[: begin.size] - 1
        none = np.full(begin.size, -1, np.int64)
        return Intervals(none, low[begin], reach[finish], newest[begin], missing[finish])


def check_group(cuts: list[Cut]) -> Instants:
    """Prove that several disks were cut at one instant and return the instants at which.

    Raises:
        NotACutError: no instant fits them all.
    """
    common: Instants = ((0, FOREVER),)
    for cut in cuts:
        both = [(max(a, c), min(b, d)) for a, b in common for c, d in cut.instants]
        common = tuple(pair for pair in both if pair[0] <= pair[1])
    if not common:
        raise NotACutError(f"no instant fits all {len(cuts)} disks")
    return common
