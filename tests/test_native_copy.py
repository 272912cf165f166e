"""Writable copies in the C core: what they read, what survives, what is tracked of them."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdiskfs import native
from vdiskfs.native import Core, Image, ImageFlags, PageReader, Track
from vdiskfs.units import CHUNK_SIZE, PAGE_SIZE, PAGES_PER_REGION, pages_of

PUNCH = 0x02 | 0x01
ZERO_RANGE = 0x10 | 0x01


class Copy:
    """A copy over a base of bytes, and what a guest that writes to it expects."""

    def __init__(self, directory: Path, base: bytes, *, tracked: bool = False) -> None:
        self.directory = directory
        self.base = base
        self.padded = base + bytes(-len(base) % PAGE_SIZE)
        self.file = directory / "copy.img"
        self.file.touch()
        os.truncate(self.file, len(base))
        self.presence = directory / "presence"
        self.presence.mkdir()
        native.create_presence(self.presence, len(base))
        self.core = Core()
        self.track: Track | None = None
        self.open(host_lived=True)
        self.expected = bytearray(base)
        self.committed = (bytes(base), self.file.read_bytes(), self.log())
        self.vault = bytearray(self.padded)
        if tracked:
            (directory / "track").mkdir()
            self.track = Track(directory / "track", len(base), new=True)
            self.track.set_epoch(1, len(base))
            self.image.set_track(self.track)

    def log(self) -> bytes:
        return (self.presence / "presence.log").read_bytes()

    def open(self, *, host_lived: bool) -> None:
        fd = os.open(self.file, os.O_RDWR)
        self.image = Image(self.core, fd, ImageFlags.LAZY, 7)
        os.close(fd)
        native.open_presence(self.image, self.presence, host_lived=host_lived)

    def close(self) -> None:
        if self.track is not None:
            self.image.set_track(None)
            self.track.close()
        self.image.close()
        self.core.close()

    # the base

    def map(self) -> None:
        data = np.zeros(PAGES_PER_REGION, np.bool_)
        pages = np.frombuffer(self.padded, np.uint8).reshape(-1, PAGE_SIZE)
        data[: len(pages)] = pages.any(axis=1)
        self.image.map(0, 1, data)

    def fetch(self, offset: int) -> None:
        """Bring the page at an offset; beyond the base there is none."""
        start = offset // PAGE_SIZE * PAGE_SIZE
        if start < len(self.padded):
            self.map()
            self.image.fill(start, self.padded[start : start + PAGE_SIZE])

    def change(self, action: Callable[[], None], start: int, end: int) -> None:
        try:
            action()
        except BlockingIOError:
            self.fetch(start)
            self.fetch(end)
            action()

    # what a guest does

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        self.change(lambda: self.image.write(offset, data), offset, end)
        self.expected.extend(bytes(max(0, end - len(self.expected))))
        self.expected[offset:end] = data

    def zero(self, mode: int, offset: int, length: int) -> None:
        end = offset + length
        self.change(lambda: self.image.allocate(mode, offset, length), offset, end)
        end = min(end, len(self.expected))
        self.expected[offset:end] = bytes(max(0, end - offset))

    def truncate(self, size: int) -> None:
        self.change(lambda: self.image.truncate(size), size, size)
        self.expected.extend(bytes(max(0, size - len(self.expected))))
        del self.expected[size:]

    def read(self, offset: int, length: int) -> bytes:
        data = self.image.read(offset, length)
        if data is None:
            for at in range(offset // PAGE_SIZE * PAGE_SIZE, offset + length, PAGE_SIZE):
                self.fetch(at)
            data = self.image.read(offset, length)
        assert data is not None
        return data

    def check(self) -> None:
        assert self.image.size() == len(self.expected)
        assert self.read(0, len(self.expected)) == bytes(self.expected)

    # what becomes of it

    def commit(self) -> None:
        self.image.sync()
        self.committed = (bytes(self.expected), self.file.read_bytes(), self.log())

    def lose_process(self) -> None:
        self.image.close()
        self.open(host_lived=True)

    def lose_host(self) -> None:
        """All is as it was synced last."""
        self.image.close()
        expected, file, log = self.committed
        self.expected = bytearray(expected)
        self.file.write_bytes(file)
        shutil.rmtree(self.presence)
        self.presence.mkdir()
        (self.presence / "presence.log").write_bytes(log)
        self.open(host_lived=False)
        assert native.presence_counts(self.image).rebuilt

    def capture(self) -> None:
        """Lay an epoch over what the vault holds: only what was written is in it."""
        [seal] = native.seal([self.image])
        new = self.vault[: pages_of(seal.cut) * PAGE_SIZE]
        new.extend(bytes(pages_of(seal.size) * PAGE_SIZE - len(new)))
        reader = PageReader(self.image, pages=64)
        while (batch := reader.next()) is not None:
            at = 0
            for number, zero in zip(batch.pageno.tolist(), batch.zero.tolist(), strict=True):
                page = bytes(PAGE_SIZE) if zero else batch.data[at : at + PAGE_SIZE]
                at += 0 if zero else PAGE_SIZE
                new[number * PAGE_SIZE : (number + 1) * PAGE_SIZE] = page
        self.image.forget()
        self.vault = new
        assert bytes(self.vault[: seal.size]) == bytes(self.expected)


def some_base(size: int) -> bytes:
    """Bytes with holes in them, no two pages the same."""
    base = bytearray(np.random.default_rng(size).integers(1, 256, size, np.uint8).tobytes())
    for page in range(0, pages_of(size), 5):
        base[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
    return bytes(base[:size])


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Copy]:
    made = Copy(tmp_path, some_base(80 * PAGE_SIZE + 123))
    yield made
    made.close()


def test_a_write_of_whole_pages_needs_neither_map_nor_vault(copy: Copy) -> None:
    copy.image.write(3 * PAGE_SIZE, b"x" * 2 * PAGE_SIZE)
    assert copy.image.read(4 * PAGE_SIZE, 10) == b"x" * 10
    assert not copy.image.is_mapped(0)
    assert copy.image.read(5 * PAGE_SIZE, 1) is None
    with pytest.raises(BlockingIOError):
        copy.image.write(8 * PAGE_SIZE, b"y" * (PAGE_SIZE + 1))
    assert not copy.image.is_present(8 * PAGE_SIZE, PAGE_SIZE)
    copy.map()
    assert copy.image.fill(0, copy.base[: 8 * PAGE_SIZE]) == 4 * PAGE_SIZE
    assert copy.image.read(4 * PAGE_SIZE, 10) == b"x" * 10
    with pytest.raises(OSError, match="Invalid") as refused:
        copy.image.evict(0, 1)
    assert refused.value.errno == errno.EINVAL


def test_a_copy_is_hydrated_to_the_end_and_is_an_image_like_any_other_then(copy: Copy) -> None:
    copy.write(7 * PAGE_SIZE, b"mine" * 1024)
    assert native.next_unmapped(copy.image, 0) == 0
    assert not native.complete_presence(copy.image)
    copy.map()
    assert native.next_unmapped(copy.image, 0) is None
    at = 0
    while (run := native.next_absent(copy.image, at)) is not None:
        start, length = run
        copy.image.fill(start, copy.padded[start : start + length])
        at = start + length
    assert native.complete_presence(copy.image)
    counts = native.presence_counts(copy.image)
    assert counts.complete
    assert counts.base_size == len(copy.base)
    copy.lose_process()
    assert native.presence_counts(copy.image).complete
    copy.write(5, b"in part, without a map")
    assert bytes(copy.expected) == copy.image.read(0, len(copy.expected))
    copy.commit()


def test_what_was_synced_outlives_the_host_and_all_else_the_daemon(copy: Copy) -> None:
    copy.write(0, b"synced" * 1000)
    copy.commit()
    copy.write(20 * PAGE_SIZE, b"acknowledged" * 1000)
    copy.lose_process()
    copy.check()
    copy.lose_host()
    copy.check()
    assert copy.image.read(20 * PAGE_SIZE, 12) == copy.base[20 * PAGE_SIZE :][:12]


def test_a_sync_of_our_own_names_the_pages_too(copy: Copy) -> None:
    """Before a region leaves the intent log its pages must be here for good."""
    copy.write(20 * PAGE_SIZE, b"z" * PAGE_SIZE)
    copy.image.sync_internal()
    assert native.presence_counts(copy.image).uncommitted_pages == 0
    copy.committed = (bytes(copy.expected), copy.file.read_bytes(), copy.log())
    copy.lose_host()
    copy.check()


def test_a_sync_costs_what_became_present_since_and_not_the_size_of_the_disk(
    tmp_path: Path,
) -> None:
    size = 2**42
    image = tmp_path / "copy.img"
    image.touch()
    os.truncate(image, size)
    (tmp_path / "presence").mkdir()
    native.create_presence(tmp_path / "presence", size)
    with Core() as core:
        fd = os.open(image, os.O_RDWR)
        with Image(core, fd, ImageFlags.LAZY, 7) as copy:
            os.close(fd)
            native.open_presence(copy, tmp_path / "presence", host_lived=True)
            before = native.presence_counts(copy).log_bytes
            for i in range(10):
                copy.write(size // 10 * i // PAGE_SIZE * PAGE_SIZE, b"x" * PAGE_SIZE)
                copy.sync()
                assert native.presence_counts(copy).log_bytes == before + 512 * (i + 1)
            copy.sync()
            assert native.presence_counts(copy).log_bytes == before + 512 * 10


def test_a_disk_that_comes_home_lacks_only_what_changed_elsewhere(tmp_path: Path) -> None:
    image = tmp_path / "home.img"
    image.write_bytes(b"h" * 100 * PAGE_SIZE)
    (tmp_path / "presence").mkdir()
    native.create_presence(tmp_path / "presence", 100 * PAGE_SIZE, absent=[(10, 2), (90, 1)])
    with Core() as core:
        fd = os.open(image, os.O_RDWR)
        with Image(core, fd, ImageFlags.LAZY, 7) as home:
            os.close(fd)
            native.open_presence(home, tmp_path / "presence", host_lived=True)
            assert home.read(0, 5) == b"hhhhh"
            home.write(5, b"in part")
            assert home.read(11 * PAGE_SIZE, 1) is None
            assert native.next_absent(home, 0) == (10 * PAGE_SIZE, 2 * PAGE_SIZE)
            home.fill(10 * PAGE_SIZE, b"a" * 2 * PAGE_SIZE)
            assert not native.complete_presence(home)
            home.write(90 * PAGE_SIZE, b"b" * PAGE_SIZE)
            assert native.complete_presence(home)


def test_presence_that_is_missing_or_damaged_is_told(copy: Copy, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="exists"):
        native.create_presence(copy.presence, 1)
    for kind in ("missing", "damaged"):
        other = tmp_path / kind
        other.mkdir()
        if kind == "damaged":
            (other / "presence.log").write_bytes(b"?" * 512)
        fd = os.open(copy.file, os.O_RDWR)
        with Image(copy.core, fd, ImageFlags.LAZY, 7) as image:
            os.close(fd)
            said = errno.ENOENT if kind == "missing" else errno.EBADMSG
            with pytest.raises(OSError, match=os.strerror(said)):
                native.open_presence(image, other, host_lived=True)


def test_a_pass_asks_for_what_is_not_here_instead_of_reading_a_hole(tmp_path: Path) -> None:
    copy = Copy(tmp_path, some_base(80 * PAGE_SIZE), tracked=True)
    copy.write(2 * PAGE_SIZE, b"x" * PAGE_SIZE)
    copy.image.suspect_mark(0, 40 * PAGE_SIZE)
    reader = PageReader(copy.image, suspect=True, pages=64)
    seen: dict[int, bytes] = {}
    fetched = []
    while True:
        try:
            batch = reader.next()
        except BlockingIOError:
            fetched.append(reader.cursor)
            for page in range(reader.cursor, reader.cursor + CHUNK_SIZE // PAGE_SIZE):
                copy.fetch(page * PAGE_SIZE)
            continue
        if batch is None:
            break
        at = 0
        for number, zero in zip(batch.pageno.tolist(), batch.zero.tolist(), strict=True):
            seen[number] = bytes(PAGE_SIZE) if zero else bytes(batch.data[at : at + PAGE_SIZE])
            at += 0 if zero else PAGE_SIZE
    assert fetched == [0, 16, 32]
    assert b"".join(seen[page] for page in range(40)) == bytes(copy.expected[: 40 * PAGE_SIZE])
    assert not copy.image.is_changed(0)
    copy.close()


def test_a_frozen_page_that_is_not_here_is_never_captured_as_a_hole(tmp_path: Path) -> None:
    """Marked, and then not written: what a change that failed leaves, or a dead host."""
    copy = Copy(tmp_path, some_base(80 * PAGE_SIZE), tracked=True)
    copy.image.mark(3 * PAGE_SIZE, PAGE_SIZE)
    native.seal([copy.image])
    reader = PageReader(copy.image)
    with pytest.raises(BlockingIOError):
        reader.next()
    copy.fetch(3 * PAGE_SIZE)
    batch = reader.next()
    assert batch is not None
    assert bytes(batch.data) == copy.base[3 * PAGE_SIZE :][:PAGE_SIZE]
    copy.image.forget()
    # Overwritten before it was fetched: it cannot be preserved, the epoch is given up.
    copy.image.mark(9 * PAGE_SIZE, PAGE_SIZE)
    native.seal([copy.image])
    copy.write(9 * PAGE_SIZE, b"y" * PAGE_SIZE)
    with pytest.raises(OSError, match=os.strerror(errno.ECANCELED)):
        PageReader(copy.image).next()
    copy.image.abandon()
    copy.capture()
    copy.close()


def test_a_fill_preserves_nothing_and_marks_nothing(tmp_path: Path) -> None:
    copy = Copy(tmp_path, some_base(80 * PAGE_SIZE), tracked=True)
    assert copy.track is not None
    copy.write(PAGE_SIZE, b"x" * PAGE_SIZE)
    native.seal([copy.image])
    for page in range(80):
        copy.fetch(page * PAGE_SIZE)
    counts = copy.track.counts()
    assert (counts.preserved_pages, counts.dirty_pages, counts.changed) == (0, 0, False)
    assert counts.frozen_pages == 1
    copy.image.forget()
    copy.close()


def test_a_fill_keeps_the_time_of_the_intent_log(tmp_path: Path) -> None:
    """Else a file that was only fetched to would seem changed by somebody else."""
    copy = Copy(tmp_path, some_base(80 * PAGE_SIZE), tracked=True)
    native.begin_intent(copy.image)
    while native.intent_counts(copy.image).is_void:
        os.sched_yield()
    assert copy.track is not None
    copy.image.set_track(None)
    copy.track.close()
    copy.track = Track(tmp_path / "track", len(copy.base))
    copy.image.set_track(copy.track)  # found kept: asleep until something changes
    assert native.intent_counts(copy.image).commits == 0
    copy.fetch(PAGE_SIZE)
    counts = native.intent_counts(copy.image)
    assert (counts.commits, counts.active) == (1, 0)
    copy.fetch(2 * PAGE_SIZE)
    assert native.intent_counts(copy.image).commits == 1
    copy.close()


BASE = 40 * PAGE_SIZE + 77
END = 50 * PAGE_SIZE
offsets = st.one_of(
    st.integers(0, END - 1), st.integers(0, END // PAGE_SIZE - 1).map(lambda page: page * PAGE_SIZE)
)
lengths = st.one_of(st.integers(1, 30_000), st.integers(1, 8).map(lambda pages: pages * PAGE_SIZE))
operation = st.one_of(
    st.tuples(st.just("write"), offsets, lengths, st.integers(1, 255)),
    st.tuples(st.just("write"), offsets, lengths, st.integers(1, 255)),
    st.tuples(st.just("zero"), offsets, lengths, st.sampled_from([PUNCH, ZERO_RANGE])),
    st.tuples(st.just("truncate"), st.integers(0, END)),
    st.tuples(st.just("read"), offsets, lengths),
    st.tuples(st.just("fetch"), offsets),
    st.tuples(st.just("commit")),
    st.tuples(st.just("process")),
    st.tuples(st.just("host")),
    st.tuples(st.just("capture")),
)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(operation, max_size=25), tracked=st.booleans())
def test_any_order_of_changes_fetches_and_deaths_gives_what_a_guest_expects(
    steps: list[tuple[object, ...]], tracked: bool
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        copy = Copy(Path(directory), some_base(BASE), tracked=tracked)
        for name, *given_to in steps:
            numbers = [int(one) for one in given_to]  # type: ignore[call-overload]
            if name == "write":
                copy.write(numbers[0], bytes([numbers[2]]) * numbers[1])
            elif name == "zero":
                copy.zero(numbers[2], numbers[0], numbers[1])
            elif name == "truncate":
                copy.truncate(numbers[0])
            elif name == "read":
                offset, length = numbers
                assert copy.read(offset, length) == copy.expected[offset : offset + length]
            elif name == "fetch":
                copy.fetch(numbers[0])
            elif name == "commit":
                copy.commit()
            elif name == "capture" and tracked:
                copy.capture()
            elif name == "process" and not tracked:
                copy.lose_process()
            elif name == "host" and not tracked:
                copy.lose_host()
        copy.check()
        if tracked:
            copy.capture()
        copy.close()
