"""The log of a guest's disk that QEMU's blklogwrites driver writes, and when each entry was made.

The layout is that of Linux' dm-log-writes (Documentation/admin-guide/device-mapper): sector 0
holds magic, version, number of entries and sector size; then for each entry one sector with
sector, count, flags and data length, and behind it the data, but for discards. QEMU does the
request first and logs it then: the log has the order of completion. What it does not have is
when a request came. That is in QEMU's trace (``TRACE``), whose line numbers are the clock here;
its time stamps are the host's wall clock.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SECTOR = 512
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
_MAGIC = 0x6A736677736872
# Issued by the guest; written to the log.
TRACE = ("virtio_blk_handle_write", "bdrv_co_pwritev_part")
_LINE = re.compile(
    r"^\d+@(?P<s>\d+)\.(?P<us>\d+):(?:"
    r"virtio_blk_handle_write .* sector (?P<sector>\d+) nsectors (?P<count>\d+)|"
    r"bdrv_co_pwritev_part bs (?P<bs>\S+) offset (?P<offset>\d+) bytes (?P<bytes>\d+) .*)$"
)


class WriteLogError(AssertionError):
    """The log, or the trace, is not what the format says, or they do not fit together."""


class Entry(NamedTuple):
    """One entry; sectors of 512 bytes."""

    sector: int
    sectors: int
    flags: int
    data: bytes  # nothing for a discard and a flush
    offset: int  # of the entry itself in the log


class Timed(NamedTuple):
    """An entry, and the lines of the trace between which the disk carried it out."""

    entry: Entry
    start: int  # -1: not known (a discard, a flush), but behind the operation before
    end: int


def read_entries(log: Path) -> list[Entry]:
    """Return the entries of a log whose writer has ended.

    Raises:
        WriteLogError: it is no such log, or cut off.
    """
    data = log.read_bytes()
    if len(data) < SECTOR:
        raise WriteLogError(f"a log of {len(data)} bytes")
    magic, version, count, size = struct.unpack_from("<QQQI", data)
    if (magic, version, size) != (_MAGIC, 1, SECTOR):
        raise WriteLogError(f"no log: magic {magic:x}, version {version}, sectors of {size}")
    entries, at = [], SECTOR
    for number in range(count):
        if at + SECTOR > len(data):
            raise WriteLogError(f"the log ends in front of entry {number} of {count}")
        sector, sectors, flags, _ = struct.unpack_from("<QQQQ", data, at)
        length = 0 if flags & DISCARD else sectors * SECTOR
        if flags & ~(FLUSH | FUA | DISCARD | MARK) or at + SECTOR + length > len(data):
            raise WriteLogError(f"entry {number} of {count}: flags {flags:x}, {length} bytes")
        begin = at + SECTOR
        entries.append(Entry(sector, sectors, flags, data[begin : begin + length], at))
        at = begin + length
    if at != len(data):
        raise WriteLogError(f"{len(data) - at} bytes behind the last of {count} entries")
    return entries


def replay(entries: list[Entry], initial: bytes) -> bytes:
    """Return the disk after all entries."""
    disk = bytearray(initial)
    for entry in entries:
        begin, length = entry.sector * SECTOR, entry.sectors * SECTOR
        disk[begin : begin + length] = entry.data or bytes(length)
    return bytes(disk)


@dataclass(frozen=True)
class Trace:
    """The lines of a trace that concern one log, all of one guest with one disk."""

    stamps_ns: list[int]  # of each line, never falling
    issued: dict[tuple[int, int], list[int]]  # (sector, count): the lines, in order
    written: dict[str, list[tuple[int, int, int]]]  # block node: (offset, bytes, line)

    def before(self, time_ns: int) -> int:
        """Return the last line that was traced before a time of the wall clock."""
        # A stamp is cut to the microsecond.
        return bisect_right(self.stamps_ns, time_ns - 1000) - 1


def read_trace(path: Path) -> Trace:
    """Read a trace of the events ``TRACE``."""
    stamps: list[int] = []
    issued: dict[tuple[int, int], list[int]] = defaultdict(list)
    written: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for text in path.read_text(errors="replace").splitlines():
        match = _LINE.match(text)
        if match is None:
            raise WriteLogError(f"a line of the trace: {text!r}")
        line = len(stamps)
        stamp = int(match["s"]) * 10**9 + int(match["us"].ljust(6, "0")) * 1000
        stamps.append(max(stamp, stamps[-1] if stamps else 0))
        if match["sector"]:
            issued[int(match["sector"]), int(match["count"])].append(line)
        else:
            written[match["bs"]].append((int(match["offset"]), int(match["bytes"]), line))
    return Trace(stamps, issued, written)


def timed(entries: list[Entry], trace: Trace) -> list[Timed]:
    """Put entries and trace together: each entry was logged at one line and issued at another.

    Raises:
        WriteLogError: they are not of one run, or an entry is in one only.
    """
    ends = _logged(entries, trace)
    waiting = {key: iter(lines) for key, lines in trace.issued.items()}
    found = []
    for entry, end in zip(entries, ends, strict=True):
        start = -1
        if entry.data:
            start = next(waiting.get((entry.sector, entry.sectors), iter(())), -1)
            if not 0 <= start < end:
                raise WriteLogError(f"sector {entry.sector}: logged, and not issued before")
        found.append(Timed(entry, start, end))
    if left := [key for key, lines in waiting.items() if next(lines, None) is not None]:
        raise WriteLogError(f"issued and not logged: {left}")
    return found


def _logged(entries: list[Entry], trace: Trace) -> list[int]:
    """Return the line at which each entry was written, by the block node that is the log."""
    wanted = [(e.offset, SECTOR + len(e.data)) for e in entries]
    for writes in trace.written.values():
        mine = [(offset, length, line) for offset, length, line in writes if offset > 0]
        if [(offset, length) for offset, length, _ in mine] == wanted:
            return [line for *_, line in mine]
    raise WriteLogError(f"no block node of the trace wrote these {len(entries)} entries")
