"""The C core without a mount: tracking, sealing, capturing against plain bytes."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdiskfs import native
from vdiskfs.native import Core, Image, ImageFlags, PageReader, Track
from vdiskfs.units import PAGE_SIZE, PAGES_PER_REGION, pages_of

PUNCH = 0x02 | 0x01
ZERO_RANGE = 0x10
KEEP_SIZE = 0x01
REGION_SIZE = PAGES_PER_REGION * PAGE_SIZE


class Disk:
    """An image with a track, and a chain of captured epochs laid over each other."""

    def __init__(self, directory: Path, size: int, *, track: Path | None = None) -> None:
        self.directory = directory
        self.tracks = track or directory / "track"
        self.tracks.mkdir(exist_ok=True, parents=True)
        self.file = directory / "image"
        self.file.write_bytes(b"")
        os.truncate(self.file, size)
        self.core = Core()
        self.vault = bytearray()  # the disk as the captured epochs say it is
        self.open(new=True)
        self.image.suspect_mark_allocated()

    def open(self, *, new: bool = False) -> None:
        fd = os.open(self.file, os.O_RDWR)
        self.image = Image(self.core, fd, ImageFlags.NONE, 7)
        os.close(fd)
        self.track = Track(self.tracks, self.image.size(), new=new)
        self.image.set_track(self.track)

    def close(self) -> None:
        self.image.set_track(None)
        self.track.close()
        self.image.close()
        self.core.close()

    def capture(self) -> native.Seal:
        """Seal, capture, lay over the vault's bytes by the rules of vdiskfs-format(5)."""
        [seal] = native.seal([self.image])
        self.lay(seal)
        return seal

    def lay(self, seal: native.Seal) -> None:
        # Whole pages older than the cut keep their bytes; the page of the cut is in the epoch.
        keep = min(len(self.vault), pages_of(seal.cut) * PAGE_SIZE)
        new = bytearray(self.vault[:keep])
        new.extend(bytes(pages_of(seal.size) * PAGE_SIZE - len(new)))
        del new[pages_of(seal.size) * PAGE_SIZE :]
        reader = PageReader(self.image, pages=64)
        last = -1
        while (batch := reader.next()) is not None:
            at = 0
            for number, zero in zip(batch.pageno.tolist(), batch.zero.tolist(), strict=True):
                assert number > last
                last = number
                page = bytes(PAGE_SIZE)
                if not zero:
                    page = bytes(batch.data[at : at + PAGE_SIZE])
                    at += PAGE_SIZE
                new[number * PAGE_SIZE : (number + 1) * PAGE_SIZE] = page
            sums = batch.sum[~batch.zero]
            assert native.pages_verify(bytes(batch.data), sums) == -1
        self.image.forget()
        self.vault = new

    def expect(self, content: bytes) -> None:
        assert len(self.vault) == pages_of(len(content)) * PAGE_SIZE
        assert bytes(self.vault[: len(content)]) == content
        assert not any(self.vault[len(content) :])


def read_all(reader: PageReader) -> None:
    while reader.next() is not None:
        pass


def fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(PAGE_SIZE))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path, 1 << 20)
    yield made
    made.close()


def test_an_epoch_holds_what_was_written_and_the_next_only_what_changed_after(disk: Disk) -> None:
    disk.image.write(5000, b"a" * 10000)
    seal = disk.capture()
    assert (seal.epoch, seal.size, seal.cut) == (1, 1 << 20, 0)
    disk.expect(disk.file.read_bytes())
    disk.image.write(0, b"b")
    assert disk.track.counts().dirty_pages == 1
    disk.capture()
    disk.expect(disk.file.read_bytes())


def test_a_write_after_the_seal_is_not_in_the_point(disk: Disk) -> None:
    disk.image.write(0, b"old" * 20000)
    before = disk.file.read_bytes()
    [seal] = native.seal([disk.image])
    disk.image.write(1000, b"new" * 9000)
    disk.image.allocate(PUNCH, 32768, 8192)
    disk.image.truncate(12345)
    disk.image.truncate(1 << 19)
    disk.lay(seal)
    disk.expect(before)
    disk.capture()
    disk.expect(disk.file.read_bytes())


def test_a_second_seal_waits_for_the_capture_of_the_first(disk: Disk) -> None:
    disk.image.write(0, b"x")
    native.seal([disk.image])
    with pytest.raises(OSError, match="busy") as caught:
        native.seal([disk.image])
    assert caught.value.errno == errno.EBUSY
    disk.image.forget()
    native.seal([disk.image])


def test_a_discard_that_would_preserve_too_much_gives_the_epoch_up_and_loses_nothing(
    tmp_path: Path,
) -> None:
    disk = Disk(tmp_path, 64 << 20)
    try:
        disk.image.write(0, os.urandom(32 << 20))
        native.seal([disk.image])
        disk.image.allocate(PUNCH, 0, 64 << 20)
        with pytest.raises(OSError, match="too large"):
            read_all(PageReader(disk.image))
        disk.image.abandon()
        seal = disk.capture()
        assert seal.epoch == 2
        assert seal.cut == 0
        disk.expect(disk.file.read_bytes())
    finally:
        disk.close()


def test_a_track_found_frozen_goes_back_to_dirty(disk: Disk) -> None:
    disk.image.write(0, b"one" * 5000)
    disk.capture()
    disk.image.write(8192, b"two" * 5000)
    native.seal([disk.image])
    disk.image.write(1 << 19, b"three" * 5000)
    disk.image.set_track(None)
    disk.track.close()
    disk.image.close()
    disk.open()
    assert not disk.track.counts().frozen
    disk.capture()
    disk.expect(disk.file.read_bytes())


def test_growth_by_writes_beyond_the_end_is_tracked(disk: Disk) -> None:
    disk.capture()
    disk.image.write((1 << 32) + 12345, b"far" * 3000)
    assert disk.track.counts().dirty_pages == 3
    [seal] = native.seal([disk.image])
    assert (seal.size, seal.cut, seal.low) == ((1 << 32) + 12345 + 9000, 1 << 20, 1 << 20)
    batch = PageReader(disk.image).next()
    assert batch is not None
    first = ((1 << 32) + 12345) // PAGE_SIZE
    assert batch.pageno.tolist() == [first, first + 1, first + 2]
    assert b"far" * 3000 in bytes(batch.data)


@pytest.fixture
def small_room(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    room = tmp_path / "room"
    room.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(room)], check=True)
    yield room
    subprocess.run(["umount", str(room)], check=True)


@pytest.mark.root
def test_a_full_state_directory_gives_the_epoch_up_and_the_guest_writes_on(
    tmp_path: Path, small_room: Path
) -> None:
    disk = Disk(tmp_path, 8 << 20, track=small_room)
    try:
        disk.image.write(0, os.urandom(4 << 20))
        [seal] = native.seal([disk.image])
        for offset in range(0, 4 << 20, 1 << 20):
            disk.image.write(offset, os.urandom(1 << 20))
        assert disk.track.counts().abandoned
        with pytest.raises(OSError, match="ancel"):
            disk.lay(seal)
        kinds = []
        while event := disk.core.next_event():
            kinds.append((event.kind, event.error))
        assert (native.EventKind.ABANDONED, errno.ENOSPC) in kinds
        disk.image.abandon()
        disk.capture()
        disk.expect(disk.file.read_bytes())
    finally:
        disk.close()


@pytest.mark.root
def test_what_bitmaps_without_room_could_not_mark_is_suspect_later(
    tmp_path: Path, small_room: Path
) -> None:
    disk = Disk(tmp_path, 1 << 20, track=small_room)
    try:
        disk.capture()
        disk.image.suspect_clear_from(0)
        ballast = small_room / "ballast"
        with pytest.raises(OSError, match="No space"):
            fill_up(ballast)
        far = 200 << 20  # one page of bitmap reaches 128 MiB
        disk.image.write(far, b"far")
        assert disk.track.counts().overflow
        with pytest.raises(BlockingIOError):
            native.seal([disk.image])
        ballast.unlink()
        # Growth that works again forgets nothing of what was missed before.
        disk.image.write(far + (100 << 20), b"farther")
        with pytest.raises(BlockingIOError):
            native.seal([disk.image])
        assert not disk.track.counts().overflow
        batch = PageReader(disk.image, suspect=True, pages=1 << 16).next()
        assert batch is not None
        assert far // PAGE_SIZE in batch.pageno.tolist()
        native.seal([disk.image])
    finally:
        disk.close()


def test_a_lazy_image_gives_the_bytes_that_it_was_filled_with(tmp_path: Path) -> None:
    size = REGION_SIZE + 5 * PAGE_SIZE + 100
    content = bytearray(size)
    content[PAGE_SIZE : 4 * PAGE_SIZE] = os.urandom(3 * PAGE_SIZE)
    content[REGION_SIZE:] = os.urandom(size - REGION_SIZE)
    pages = np.frombuffer(content + bytes(-size % PAGE_SIZE), np.uint8).reshape(-1, PAGE_SIZE)
    data = np.zeros(2 * PAGES_PER_REGION, np.bool_)
    data[: len(pages)] = pages.any(axis=1)
    path = tmp_path / "cache"
    path.touch()
    os.truncate(path, size)
    fd = os.open(path, os.O_RDWR)
    flags = ImageFlags.LAZY | ImageFlags.READONLY
    with Core() as core, Image(core, fd, flags, 1) as image:
        os.close(fd)
        assert image.read(0, 1) is None
        assert image.seek(0, os.SEEK_DATA) is None
        image.map(0, 2, data)
        assert image.read(0, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert image.read(PAGE_SIZE, 1) is None
        assert image.seek(0, os.SEEK_DATA) == PAGE_SIZE
        assert image.seek(PAGE_SIZE, os.SEEK_HOLE) == 4 * PAGE_SIZE
        assert image.seek(4 * PAGE_SIZE, os.SEEK_DATA) == REGION_SIZE
        assert image.seek(REGION_SIZE, os.SEEK_HOLE) == size
        assert image.fill(0, bytes(content[: 8 * PAGE_SIZE])) == 3 * PAGE_SIZE
        assert image.fill(REGION_SIZE, bytes(content[REGION_SIZE:])) == size - REGION_SIZE
        assert image.is_present(0, size)
        assert image.read(0, size) == bytes(content)
        assert image.seek(0, os.SEEK_DATA) == PAGE_SIZE
        image.evict(0, 1)
        assert not image.is_mapped(0)
        assert image.read(REGION_SIZE, PAGE_SIZE) == bytes(content[REGION_SIZE:][:PAGE_SIZE])
        assert image.read(0, PAGE_SIZE) is None
        assert path.stat().st_blocks * 512 <= 6 * PAGE_SIZE
        with pytest.raises(OSError, match="Read-only"):
            image.write(0, b"x")


operation = st.one_of(
    st.tuples(
        st.just("write"), st.integers(0, 300_000), st.integers(1, 70_000), st.integers(1, 255)
    ),
    st.tuples(st.just("punch"), st.integers(0, 300_000), st.integers(1, 200_000)),
    st.tuples(st.just("zero"), st.integers(0, 300_000), st.integers(1, 200_000), st.booleans()),
    st.tuples(st.just("truncate"), st.integers(0, 400_000)),
    st.tuples(st.just("seal")),
    st.tuples(st.just("capture")),
    st.tuples(st.just("abandon")),
    st.tuples(st.just("reopen")),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(operation, min_size=1, max_size=40))
def test_any_order_of_changes_seals_and_restarts_captures_the_bytes_of_each_seal(
    operations: list[tuple[object, ...]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        disk = Disk(Path(name), 200_000)
        model = bytearray(200_000)
        frozen: tuple[native.Seal, bytes] | None = None
        try:
            for step in operations:
                match step:
                    case ("write", int(offset), int(length), int(byte)):
                        disk.image.write(offset, bytes([byte]) * length)
                        model.extend(bytes(max(0, offset + length - len(model))))
                        model[offset : offset + length] = bytes([byte]) * length
                    case ("punch", int(offset), int(length)):
                        disk.image.allocate(PUNCH, offset, length)
                        end = min(len(model), offset + length)
                        if end > offset:
                            model[offset:end] = bytes(end - offset)
                    case ("zero", int(offset), int(length), bool(keep)):
                        disk.image.allocate(ZERO_RANGE | (KEEP_SIZE if keep else 0), offset, length)
                        if not keep:
                            model.extend(bytes(max(0, offset + length - len(model))))
                        end = min(len(model), offset + length)
                        if end > offset:
                            model[offset:end] = bytes(end - offset)
                    case ("truncate", int(size)):
                        disk.image.truncate(size)
                        del model[size:]
                        model.extend(bytes(size - len(model)))
                    case ("seal",) if frozen is None:
                        [seal] = native.seal([disk.image])
                        frozen = (seal, bytes(model))
                    case ("capture",) if frozen is not None:
                        disk.lay(frozen[0])
                        disk.expect(frozen[1])
                        frozen = None
                    case ("abandon",) if frozen is not None:
                        disk.image.abandon()
                        frozen = None
                    case ("reopen",):
                        disk.image.set_track(None)
                        disk.track.close()
                        disk.image.close()
                        disk.open()
                        frozen = None
                assert disk.image.size() == len(model)
            if frozen is not None:
                disk.lay(frozen[0])
                disk.expect(frozen[1])
            disk.capture()
            disk.expect(bytes(model))
            assert disk.file.read_bytes() == bytes(model)
        finally:
            disk.close()


disk_step = st.one_of(
    st.tuples(
        st.just("write"), st.integers(0, 1), st.integers(0, 90_000), st.integers(1, 30_000),
        st.integers(1, 255),
    ),
    st.tuples(st.just("punch"), st.integers(0, 1), st.integers(0, 90_000), st.integers(1, 50_000)),
    st.tuples(st.just("truncate"), st.integers(0, 1), st.integers(0, 120_000)),
    st.tuples(st.just("seal")),
    st.tuples(st.just("capture"), st.booleans()),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(disk_step, min_size=1, max_size=30))
def test_two_disks_sealed_together_hold_the_bytes_of_one_instant(
    steps: list[tuple[object, ...]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        for directory in ("a", "b"):
            (Path(name) / directory).mkdir()
        disks = [Disk(Path(name) / directory, 60_000) for directory in ("a", "b")]
        frozen: list[tuple[native.Seal, bytes]] = []
        try:
            for step in [*steps, ("capture", True), ("seal",), ("capture", True)]:
                match step:
                    case ("write", int(which), int(offset), int(length), int(byte)):
                        disks[which].image.write(offset, bytes([byte]) * length)
                    case ("punch", int(which), int(offset), int(length)):
                        disks[which].image.allocate(PUNCH, offset, length)
                    case ("truncate", int(which), int(size)):
                        disks[which].image.truncate(size)
                    case ("seal",) if not frozen:
                        content = [disk.file.read_bytes() for disk in disks]
                        seals = native.seal([disk.image for disk in disks])
                        assert seals[0].time_ns == seals[1].time_ns
                        frozen = list(zip(seals, content, strict=True))
                    case ("seal",):
                        # One that is frozen stops the group, and nothing of it is sealed.
                        epochs = [disk.track.epoch for disk in disks]
                        with pytest.raises(OSError, match="busy"):
                            native.seal([disk.image for disk in reversed(disks)])
                        assert [disk.track.epoch for disk in disks] == epochs
                    case ("capture", bool(both)) if frozen:
                        for disk, (seal, content_then) in zip(disks, frozen, strict=True):
                            if both or disk is disks[0]:
                                disk.lay(seal)
                                disk.expect(content_then)
                            else:
                                disk.image.abandon()
                        frozen = []
            for disk in disks:
                disk.capture()
                disk.expect(disk.file.read_bytes())
        finally:
            for disk in disks:
                disk.close()


def test_concurrent_writers_are_cut_at_one_instant(tmp_path: Path) -> None:
    """A point has all that completed before its seal and nothing that was issued after it.

    Each sector carries the number of its write.
    """
    disk = Disk(tmp_path, 4 << 20)
    sectors = (4 << 20) // 512
    stop = threading.Event()
    clock = threading.Lock()
    tick = [0]
    log: list[tuple[int, int, int, int, int]] = []  # start, end, first, count, number

    def now() -> int:
        with clock:
            tick[0] += 1
            return tick[0]

    def writer(seed: int) -> None:
        rng = random.Random(seed)
        low = seed * (sectors // 4)
        for number in range(seed << 40, (seed << 40) + 100_000):
            if stop.is_set():
                return
            count = rng.choice([1, 3, 8, 64, 200])
            first = low + rng.randrange(sectors // 4 - count)
            data = np.full(count * 64, number + 1, np.uint64).tobytes()
            start = now()
            disk.image.write(first * 512, data)
            log.append((start, now(), first, count, number + 1))

    threads = [threading.Thread(target=writer, args=(i,)) for i in range(4)]
    points: list[tuple[int, int, bytes]] = []
    for thread in threads:
        thread.start()
    try:
        while len(points) < 60:
            before = now()
            [seal] = native.seal([disk.image])
            after = now()
            disk.lay(seal)
            points.append((before, after, bytes(disk.vault)))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        disk.close()
    log.sort()
    for before, after, content in points:
        held = np.frombuffer(content, np.uint64).reshape(sectors, 64)
        assert (held == held[:, :1]).all()
        latest = np.zeros(sectors, np.uint64)
        allowed: dict[int, set[int]] = {}
        for start, end, first, count, number in log:
            if end < before:
                latest[first : first + count] = number
            elif start < after:
                for sector in range(first, first + count):
                    allowed.setdefault(sector, set()).add(number)
        for sector in np.nonzero(held[:, 0] != latest)[0].tolist():
            assert int(held[sector, 0]) in allowed.get(sector, set())
