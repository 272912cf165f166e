"""The log of a guest's disk is read as it was written, and judges images by it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.e2e.instants import NotACutError
from tests.oracle.prefix import PrefixOracle
from tests.oracle.writelog import (
    DISCARD,
    FLUSH,
    SECTOR,
    Entry,
    Timed,
    Trace,
    WriteLogError,
    read_entries,
    read_trace,
    replay,
    timed,
)

DISK = bytes(16 * SECTOR)


def sectors(letter: str, count: int) -> bytes:
    return letter.encode() * (SECTOR * count)


def layout(*entries: tuple[int, int, int, bytes], count: int | None = None) -> bytes:
    """Write a log down, by the documentation's words."""
    made = struct.pack("<QQQI", 0x6A736677736872, 1, count or len(entries), SECTOR)
    made = made.ljust(SECTOR, b"\0")
    for sector, length, flags, data in entries:
        made += struct.pack("<QQQQ", sector, length, flags, 0).ljust(SECTOR, b"\0") + data
    return made


def test_entries_are_read_and_replayed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(
        layout(
            (2, 2, 0, sectors("a", 2)), (0, 0, FLUSH, b""), (3, 1, DISCARD, b""),
            (5, 1, 0, sectors("b", 1)),
        )
    )  # fmt: skip
    entries = read_entries(log)
    assert [(e.sector, e.sectors, e.flags, e.offset // SECTOR) for e in entries] == [
        (2, 2, 0, 1), (0, 0, FLUSH, 4), (3, 1, DISCARD, 5), (5, 1, 0, 6),
    ]  # fmt: skip
    disk = replay(entries, DISK)
    wanted = DISK[: 2 * SECTOR] + sectors("a", 1) + bytes(2 * SECTOR) + sectors("b", 1)
    assert disk == wanted.ljust(len(DISK), b"\0")


@pytest.mark.parametrize(
    "data",
    [
        b"", bytes(SECTOR), layout((0, 1, 0, sectors("a", 1)))[:-1],
        layout((0, 1, 0, sectors("a", 1)), count=2), layout((0, 1, 16, sectors("a", 1))),
        layout((0, 1, 0, sectors("a", 1))) + bytes(SECTOR),
    ],
)  # fmt: skip
def test_what_is_no_log_is_refused(tmp_path: Path, data: bytes) -> None:
    log = tmp_path / "log"
    log.write_bytes(data)
    with pytest.raises(WriteLogError):
        read_entries(log)


TRACE = """\
7@100.000001:virtio_blk_handle_write vdev 0x1 req 0x2 sector 2 nsectors 1
7@100.000002:virtio_blk_handle_write vdev 0x1 req 0x3 sector 5 nsectors 1
7@100.000003:bdrv_co_pwritev_part bs 0xd offset 1024 bytes 512 flags 0x0
7@100.000004:bdrv_co_pwritev_part bs 0xd offset 2560 bytes 512 flags 0x0
7@100.000005:bdrv_co_pwritev_part bs 0xa offset 512 bytes 1024 flags 0x0
7@100.000006:bdrv_co_pwritev_part bs 0xa offset 1536 bytes 1024 flags 0x0
7@100.000007:bdrv_co_pwritev_part bs 0xa offset 2560 bytes 512 flags 0x0
7@100.000007:bdrv_co_pwritev_part bs 0xa offset 0 bytes 512 flags 0x0
"""
LOG = layout((5, 1, 0, sectors("b", 1)), (2, 1, 0, sectors("a", 1)), (0, 0, FLUSH, b""))


def test_log_and_trace_say_together_when_each_write_was_carried_out(tmp_path: Path) -> None:
    log, trace = tmp_path / "log", tmp_path / "trace"
    log.write_bytes(LOG)
    trace.write_text(TRACE)
    read = read_trace(trace)
    assert [(t.start, t.end) for t in timed(read_entries(log), read)] == [(1, 4), (0, 5), (-1, 6)]
    assert read.before(100 * 10**9 + 6000) == 4
    assert read.before(100 * 10**9 + 5999) == 3
    for line in (0, 4):
        trace.write_text("".join(TRACE.splitlines(keepends=True)[:line]))
        with pytest.raises(WriteLogError):
            timed(read_entries(log), read_trace(trace))


def judge(tmp_path: Path, log: list[Timed], image: bytes) -> tuple[tuple[int, int], ...]:
    path = tmp_path / "image"
    path.write_bytes(image.ljust(len(DISK), b"\0"))
    return PrefixOracle(log, DISK).check(path)


def write(sector: int, data: str, start: int, end: int) -> Timed:
    count = len(data)
    return Timed(Entry(sector, count, 0, b"".join(sectors(c, 1) for c in data), 0), start, end)


def test_a_prefix_of_the_log_is_told_from_what_is_none(tmp_path: Path) -> None:
    """Three writes, two in flight together: each cut, one lost, one early, one torn."""
    log = [write(0, "ab", 1, 3), write(2, "c", 2, 5), write(0, "d", 6, 8)]
    done = sectors("a", 1) + sectors("b", 1)
    assert judge(tmp_path, log, b"") == ((0, 3),)
    assert judge(tmp_path, log, sectors("a", 1)) == ((1, 3),)
    assert judge(tmp_path, log, done) == ((1, 5),)
    assert judge(tmp_path, log, bytes(2 * SECTOR) + sectors("c", 1)) == ((2, 3),)
    assert judge(tmp_path, log, done + sectors("c", 1)) == ((2, 8),)
    bad = {
        "lost": sectors("d", 1) + sectors("b", 1),
        "torn": sectors("a", 1)[:100],
        "strange": done + sectors("c", 1) + sectors("x", 1),
    }
    for kind, image in bad.items():
        with pytest.raises(NotACutError) as caught:
            judge(tmp_path, log, image)
        assert caught.value.kind in (kind, "reordered")


def test_a_discard_is_zeros_from_some_instant_behind_the_write_before(tmp_path: Path) -> None:
    log = [write(0, "a", 1, 3), Timed(Entry(0, 1, DISCARD, b"", 0), -1, 9), write(4, "b", 10, 11)]
    assert judge(tmp_path, log, b"") == ((0, 11),)
    assert judge(tmp_path, log, sectors("a", 1)) == ((1, 9),)
    with pytest.raises(NotACutError):
        judge(tmp_path, log, sectors("a", 1) + bytes(3 * SECTOR) + sectors("b", 1))


def test_a_trace_of_other_things_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("7@1.000001:something else\n")
    with pytest.raises(WriteLogError):
        read_trace(trace)
    assert Trace([], {}, {}).before(10**18) == -1
