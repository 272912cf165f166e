"""The oracle accepts every cut of a run and nothing else."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.e2e.instants import NotACutError
from tests.e2e.oracle import Cut, Oracle, check_group
from tests.e2e.stamps import SECTOR, base_of, content, mix, operations, unmix
from tests.e2e.workload import FOREVER, Kind, Mix, Operation, Workload, WriteLog

SIZE = 64 * SECTOR


def sectors_of(op: Operation) -> set[int]:
    return set(range(op.offset // SECTOR, -(-(op.offset + op.length) // SECTOR)))


class History:
    """A made-up run in made-up time, whose image at any instant can be written out.

    Each sector of an operation is carried out at an instant of its own between start and end.
    """

    def __init__(self, seed: int, steps: int, writers: int = 4) -> None:
        self.rng = random.Random(seed)
        self.log = WriteLog(seed, SIZE)
        self.applied: list[dict[int, int]] = []  # by operation: sector -> instant; -1: the size
        self.clock = 1000
        self._free = [0] * writers  # when each writer is free again
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        rng = self.rng
        writer = min(range(len(self._free)), key=self._free.__getitem__)
        size = self.log.operations[-1].size_after if self.log.operations else SIZE
        kind = rng.choices([Kind.WRITE, Kind.ZERO, Kind.TRUNCATE], [8, 2, 1])[0]
        offset, length = rng.randrange(SIZE), rng.randrange(1, 12 * SECTOR)
        if rng.random() < 0.5:
            offset, length = offset // SECTOR * SECTOR, -(-length // SECTOR) * SECTOR
        after = size
        if kind is Kind.TRUNCATE:
            after = rng.randrange(SIZE // 2, 2 * SIZE)
            offset, length = after, max(0, size - after)
        elif kind is Kind.WRITE:
            after = max(size, offset + length)
        sectors = range(offset // SECTOR, -(-(offset + length) // SECTOR))
        start = self._start(writer, set(sectors), resizes=after != size)
        end = start + rng.randrange(1, 60)
        self._free[writer] = end + rng.randrange(10)
        self.log.operations.append(Operation(kind, offset, length, start, end, size, after))
        self.applied.append({s: rng.randint(start, end) for s in [*sectors, -1]})
        self.clock = max(self.clock, end)

    def _start(self, writer: int, sectors: set[int], *, resizes: bool) -> int:
        """Return the earliest start that overlaps no operation it must not overlap."""
        start = max(self._free[writer], 1000) + 1
        for op, applied in zip(self.log.operations, self.applied, strict=True):
            both = sectors & applied.keys() or (resizes or op.size_before != op.size_after)
            if both:
                start = max(start, op.end_ns + 1)
        return start

    def image(self, instant: int, skip: int = 0, also: int = 0) -> bytes:
        """Return the bytes at the instant; without operation ``skip``, with ``also``."""
        data, size = bytearray(4 * SIZE), SIZE
        for number, op in enumerate(self.log.operations, 1):
            when = self.applied[number - 1]
            now = FOREVER if number == also else 0 if number == skip else instant
            for sector in sectors_of(op):
                if when[sector] <= now:
                    self.put(data, number, sector)
            if op.size_after != op.size_before and when[-1] <= now:
                size = op.size_after
        return bytes(data[:size])

    def put(self, data: bytearray, number: int, sector: int) -> None:
        """Do to one sector what an operation does to it."""
        op = self.log.operations[number - 1]
        first = max(op.offset, sector * SECTOR)
        end = min(op.offset + op.length, (sector + 1) * SECTOR)
        fresh = bytes(end - first)
        if op.kind is Kind.WRITE:
            fresh = content(base_of(self.log.seed), number, first, end - first)
        data[first:end] = fresh

    def is_cut(self, image: bytes) -> bool:
        """Say by the rule's own words, trying every instant, whether the image is a cut."""
        operations = self.log.operations
        data = image.ljust(4 * SIZE, b"\0")
        times = {0} | {op.start_ns for op in operations} | {op.end_ns for op in operations}
        return any(self._is_cut_at(data, len(image), instant) for instant in sorted(times))

    def _is_cut_at(self, data: bytes, length: int, instant: int) -> bool:
        must, size = bytearray(4 * SIZE), SIZE
        flying = []
        for number, op in enumerate(self.log.operations, 1):
            if op.end_ns < instant:
                for sector in sectors_of(op):
                    self.put(must, number, sector)
                size = op.size_after if op.size_after != op.size_before else size
            elif op.start_ns <= instant:
                flying.append(number)
        may = bytearray(must)
        sizes = {size}
        for number in flying:
            op = self.log.operations[number - 1]
            for sector in sectors_of(op):
                self.put(may, number, sector)
            if op.size_after != op.size_before:
                growing = op.kind is Kind.WRITE
                sizes |= {*range(size, op.size_after)} if growing else set()
                sizes.add(op.size_after)
        return length in sizes and all(
            data[at : at + SECTOR] in (must[at : at + SECTOR], may[at : at + SECTOR])
            for at in range(0, 4 * SIZE, SECTOR)
        )


def judge(
    tmp_path: Path, history: History, image: bytes, window: tuple[int, int] | None = None
) -> Cut:
    path = tmp_path / "point.img"
    path.write_bytes(image)
    return Oracle(history.log).check(path, window)


def test_a_word_names_its_operation_and_its_place() -> None:
    """Stamps are read back from their place, and from no other."""
    base = base_of(7)
    data = np.frombuffer(content(base, 5, 3 * SECTOR, SECTOR), np.uint64).reshape(1, -1)
    assert (operations(base, data, np.array([3])) == 5).all()
    assert (operations(base, data, np.array([4])) != 5).all()
    words = np.arange(1000, dtype=np.uint64) * np.uint64(2**54 + 1)
    assert (unmix(mix(words)) == words).all()


def test_unaligned_content_is_a_slice_of_aligned_content() -> None:
    """What an operation puts at a byte does not depend on where it begins."""
    base = base_of(1)
    assert content(base, 9, 1003, 777) == content(base, 9, 0, 4096)[1003:1780]


@given(seed=st.integers(0, 2**32), steps=st.integers(0, 60), part=st.floats(0, 1))
def test_every_instant_of_a_run_is_a_cut(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: int, part: float
) -> None:
    """An image taken at any instant is accepted, and the instant is among those found."""
    history = History(seed, steps)
    instant = int(900 + part * (history.clock - 800))
    cut = judge(tmp_path_factory.mktemp("cut"), history, history.image(instant))
    assert any(first <= instant <= last for first, last in cut.instants)


@given(seed=st.integers(0, 2**32), steps=st.integers(2, 50), data=st.data())
def test_the_verdict_is_that_of_the_rule(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: int, data: st.DataObject
) -> None:
    """With a write lost, early or torn, or two instants mixed, the rule tried out says the same."""
    history = History(seed, steps)
    instant, other = (data.draw(st.integers(1000, history.clock)) for _ in range(2))
    number = data.draw(st.integers(1, len(history.log.operations)))
    fault = data.draw(st.sampled_from(["lost", "early", "torn", "mixed"]))
    image = history.image(instant)
    if fault == "lost":
        image = history.image(instant, skip=number)
    elif fault == "early":
        image = history.image(instant, also=number)
    else:
        at = data.draw(st.integers(0, SIZE // 2))
        at = at // SECTOR * SECTOR if fault == "mixed" else at
        image = history.image(other)[:at] + image[at:]
    try:
        judge(tmp_path_factory.mktemp("cut"), history, image)
        verdict = True
    except NotACutError:
        verdict = False
    assert verdict == history.is_cut(image)


def completed_visible(history: History) -> int:
    """Return a write that nothing overwrote, though other operations came after it."""
    operations = history.log.operations
    for number, op in enumerate(operations, 1):
        after = [sectors_of(o) for o in operations[number:] if o.start_ns > op.end_ns]
        hidden_by = set().union(*after)
        if op.kind is Kind.WRITE and hidden_by and sectors_of(op) - hidden_by:
            return number
    raise LookupError("no such operation in this history")


@pytest.fixture(scope="module")
def history() -> History:
    return History(seed=3, steps=80)


def test_a_lost_write_is_found_and_named(tmp_path: Path, history: History) -> None:
    """An image without a write that had been completed is refused, and the write is named."""
    number = completed_visible(history)
    with pytest.raises(NotACutError, match=rf"lacks operation #{number}\b|holds"):
        judge(tmp_path, history, history.image(history.clock, skip=number))


def test_what_is_wrong_has_a_kind(tmp_path: Path) -> None:
    """Of five writes, the second one lost, the last one early, two of five: each by its name."""
    log = WriteLog(1, SIZE)
    for n in range(5):
        op = Operation(Kind.WRITE, n * SECTOR, SECTOR, 20 * n + 10, 20 * n + 20, SIZE, SIZE)
        log.operations.append(op)
    path = tmp_path / "point.img"
    for there, kind in (("10111", "lost"), ("11001", "reordered"), ("00011", "mixed")):
        parts = [log.content(n) if yes == "1" else bytes(SECTOR) for n, yes in enumerate(there, 1)]
        path.write_bytes(b"".join(parts).ljust(SIZE, b"\0"))
        with pytest.raises(NotACutError) as caught:
            Oracle(log).check(path)
        assert caught.value.kind == kind


def test_after_a_host_s_loss_what_was_flushed_must_be_there(tmp_path: Path) -> None:
    """Any later write may be there without those before it; a flushed one may not be missing."""
    log = WriteLog(1, SIZE)
    for n, end in enumerate((20, 40, 60, 80)):
        log.operations.append(Operation(Kind.WRITE, n * SECTOR, SECTOR, end - 10, end, SIZE, SIZE))
    log.flushes.append((50, 65))
    path = tmp_path / "disk.img"
    for there, is_right in (("1100", True), ("1101", True), ("0111", False), ("1001", False)):
        parts = [log.content(n) if yes == "1" else bytes(SECTOR) for n, yes in enumerate(there, 1)]
        path.write_bytes(b"".join(parts).ljust(SIZE, b"\0"))
        if is_right:
            Oracle(log).check_flushed(path)
        else:
            with pytest.raises(NotACutError, match="before the flush"):
                Oracle(log).check_flushed(path)


def test_a_flush_holds_for_the_size_apart_from_the_bytes(tmp_path: Path) -> None:
    """After a host's loss the file may end as one write left it, and hold another one's bytes."""
    log = WriteLog(1, SIZE)
    for number, length in enumerate((100, SECTOR)):
        start, end = 10 + 20 * number, 20 + 20 * number
        before, after = (SIZE, SIZE + 100) if number == 0 else (SIZE + 100, SIZE + SECTOR)
        log.operations.append(Operation(Kind.WRITE, SIZE, length, start, end, before, after))
    path = tmp_path / "disk.img"
    later = log.content(2)[:100]
    path.write_bytes(bytes(SIZE) + later)
    Oracle(log).check_flushed(path)
    log.flushes.append((25, 26))
    Oracle(log).check_flushed(path)
    path.write_bytes(bytes(SIZE) + later[:99] + b"?")
    with pytest.raises(NotACutError, match="never held"):
        Oracle(log).check_flushed(path)
    path.write_bytes(bytes(SIZE) + later)
    log.flushes.append((45, 46))
    with pytest.raises(NotACutError, match="before the flush"):
        Oracle(log).check_flushed(path)


def test_a_failed_write_that_was_overwritten_is_over(tmp_path: Path) -> None:
    """What an operation of unknown end replaced cannot come back after its successor is done."""
    log = WriteLog(1, SIZE)
    for start, end in ((10, 20), (30, FOREVER), (50, 60)):
        log.operations.append(Operation(Kind.WRITE, 0, SECTOR, start, end, SIZE, SIZE))
    path = tmp_path / "disk.img"
    for number, instants in ((1, (10, 60)), (2, (30, 60)), (3, (50, FOREVER))):
        path.write_bytes(log.content(number).ljust(SIZE, b"\0"))
        assert Oracle(log).check(path).instants == (instants,)


def test_a_write_from_after_the_cut_is_found(tmp_path: Path, history: History) -> None:
    """An image of an early instant that holds a late write is refused."""
    late = max(
        (n for n, o in enumerate(history.log.operations, 1) if o.kind is Kind.WRITE),
        key=lambda n: history.log.operations[n - 1].start_ns,
    )
    instant = history.log.operations[20].end_ns
    with pytest.raises(NotACutError):
        judge(tmp_path, history, history.image(instant, also=late))


def test_two_writes_in_the_wrong_order_are_found(tmp_path: Path) -> None:
    """A later write in, an earlier and completed one out: refused, with both named."""
    log = WriteLog(1, SIZE)
    log.operations += [
        Operation(Kind.WRITE, 0, SECTOR, 10, 20, SIZE, SIZE),
        Operation(Kind.WRITE, SECTOR, SECTOR, 30, 40, SIZE, SIZE),
    ]
    path = tmp_path / "point.img"
    path.write_bytes((bytes(SECTOR) + log.content(2)).ljust(SIZE, b"\0"))
    with pytest.raises(NotACutError, match=r"holds operation #2.* lacks operation #1,"):
        Oracle(log).check(path)


@pytest.mark.parametrize("at", [1, 8, 100, 256, 511])
def test_a_torn_sector_is_found(tmp_path: Path, at: int) -> None:
    """A sector that is half old and half new is refused, wherever it is torn."""
    log = WriteLog(1, SIZE)
    log.operations += [
        Operation(Kind.WRITE, 0, 4 * SECTOR, 10, 20, SIZE, SIZE),
        Operation(Kind.WRITE, 0, 4 * SECTOR, 30, 40, SIZE, SIZE),
    ]
    old, new = log.content(1), log.content(2)
    path = tmp_path / "point.img"
    path.write_bytes((new[: SECTOR + at] + old[SECTOR + at :]).ljust(SIZE, b"\0"))
    with pytest.raises(
        NotACutError, match=r"sector 1 .*torn or foreign bytes, which it never held"
    ):
        Oracle(log).check(path)
    path.write_bytes((new[:SECTOR] + old[SECTOR:]).ljust(SIZE, b"\0"))
    assert Oracle(log).check(path).instants == ((30, 40),)


def test_two_instants_in_one_image_are_found(tmp_path: Path, history: History) -> None:
    """An image whose halves are of different instants is refused."""
    early, late = history.image(history.log.operations[10].end_ns), history.image(history.clock)
    half = min(len(early), len(late)) // 2 // SECTOR * SECTOR
    for image in (early[:half] + late[half:], late[:half] + early[half:]):
        with pytest.raises(NotACutError):
            judge(tmp_path, history, image)


def test_moved_flipped_and_strange_bytes_are_found(tmp_path: Path, history: History) -> None:
    """Bytes at another place, with one bit flipped, or where nobody wrote are refused."""
    good = history.image(history.clock)
    full = next(s for s in range(len(good) // SECTOR) if any(good[s * SECTOR :][:SECTOR]))
    at = full * SECTOR
    flipped = bytearray(good)
    flipped[at + 77] ^= 16
    moved = bytearray(good)
    moved[at : at + SECTOR] = good[at + SECTOR : at + 2 * SECTOR]
    for image in (flipped, moved):
        with pytest.raises(NotACutError):
            judge(tmp_path, history, bytes(image))
    empty = WriteLog(1, SIZE)
    path = tmp_path / "empty.img"
    path.write_bytes(bytes(SIZE - 1) + b"x")
    with pytest.raises(NotACutError, match="nobody wrote to it"):
        Oracle(empty).check(path)


def test_the_size_is_part_of_the_cut(tmp_path: Path, history: History) -> None:
    """A size of another time, or of no time, is refused."""
    image = history.image(history.clock)
    with pytest.raises(NotACutError, match="never had"):
        judge(tmp_path, history, image + bytes(3))
    other = next(
        o.size_after
        for o in history.log.operations
        if o.kind is Kind.TRUNCATE and o.size_after > len(image)
    )
    with pytest.raises(NotACutError):
        judge(tmp_path, history, image.ljust(other, b"\0"))


def test_the_instant_lies_in_the_seal_s_window(tmp_path: Path, history: History) -> None:
    """A cut of another time than the seal's is refused."""
    op = history.log.operations[30]
    image = history.image(op.end_ns)
    cut = judge(tmp_path, history, image, window=(op.end_ns - 1, op.end_ns + 1))
    assert cut.instants[0][0] >= op.end_ns - 1
    with pytest.raises(NotACutError, match="seal"):
        judge(tmp_path, history, image, window=(history.clock + 1, history.clock + 2))


def test_disks_of_a_group_share_an_instant() -> None:
    """Cuts of several disks fit together only where their instants meet."""
    assert check_group([Cut(((1, 5), (9, 12)), 0, 0), Cut(((6, 10),), 0, 0)]) == ((9, 10),)
    with pytest.raises(NotACutError):
        check_group([Cut(((1, 5),), 0, 0), Cut(((6, 10),), 0, 0)])


def test_bytes_from_before_the_run_count(tmp_path: Path) -> None:
    """An image that was not empty is judged against what it held."""
    before = random.Random(5).randbytes(SIZE)
    initial = tmp_path / "initial.img"
    initial.write_bytes(before)
    log = WriteLog(1, SIZE)
    log.operations.append(Operation(Kind.WRITE, 700, 900, 10, 20, SIZE, SIZE))
    path = tmp_path / "point.img"
    oracle = Oracle(log, initial)
    for seen, instants in ((False, ((0, 20),)), (True, ((10, FOREVER),))):
        image = bytearray(before)
        if seen:
            image[700:1600] = log.content(1)
        path.write_bytes(image)
        assert oracle.check(path).instants == instants
    image[5000] ^= 1
    path.write_bytes(image)
    with pytest.raises(NotACutError, match="nobody wrote to it"):
        oracle.check(path)
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    with pytest.raises(NotACutError):
        oracle.check(path)


def real_run(path: Path, take: Callable[[Workload], None]) -> Workload:
    """Run real writers on a plain file; ``take`` looks on."""
    path.touch()
    os.truncate(path, 24 << 20)
    mixture = Mix(max_size=32 << 20, min_size=4 << 20, truncate=0.02)
    with Workload(path, seed=11, writers=8, operations=1500, mix=mixture) as load:
        take(load)
        load.join()
    return load


def test_real_writers_leave_what_their_log_says(tmp_path: Path) -> None:
    """After a run of real writers the file is the cut after the last operation."""
    path = tmp_path / "disk.img"
    load = real_run(path, lambda load: load.wait_operations(100))
    assert len(load.log.operations) == 1500
    kinds = {op.kind for op in load.log.operations}
    assert kinds == set(Kind)
    last = max(op.end_ns for op in load.log.operations)
    cut = Oracle(load.log).check(path)
    assert cut.instants[-1][1] == FOREVER
    assert cut.in_flight == 0 or cut.instants[0][0] <= last


def test_a_copy_taken_while_writers_run_is_no_cut(tmp_path: Path) -> None:
    """A plain copy of a file under load is refused: this is what the oracle is there for."""
    path, copy = tmp_path / "disk.img", tmp_path / "copy.img"

    def take(load: Workload) -> None:
        load.wait_operations(300)
        with path.open("rb") as source, copy.open("wb") as target:
            for _ in range(8):
                target.write(source.read(3 << 20))
                load.wait_operations(100)

    load = real_run(path, take)
    with pytest.raises(NotACutError):
        Oracle(load.log).check(copy, check_size=False)


def test_an_unfinished_operation_may_be_in_or_not(tmp_path: Path) -> None:
    """An operation whose end is not known may be seen, sector by sector, at any time after."""
    log = WriteLog(1, SIZE)
    log.operations.append(Operation(Kind.WRITE, 0, 2 * SECTOR, 10, FOREVER, SIZE, SIZE))
    path = tmp_path / "point.img"
    path.write_bytes(log.content(1)[:SECTOR].ljust(SIZE, b"\0"))
    assert Oracle(log).check(path).instants == ((10, FOREVER),)


def test_holes_are_not_read(tmp_path: Path) -> None:
    """A sparse image of a tebibyte is judged as quickly as what it holds."""
    log = WriteLog(1, 1 << 40)
    log.operations.append(Operation(Kind.WRITE, 1 << 39, SECTOR, 10, 20, 1 << 40, 1 << 40))
    path = tmp_path / "point.img"
    path.touch()
    with path.open("r+b") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(log.content(1))
    assert Oracle(log).check(path).instants == ((10, FOREVER),)
