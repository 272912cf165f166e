"""A delta written to the spool says what was captured, and is whole or not there."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.delta.model import DISK, PAGE, VAULT, DiskModel
from vdiskfs.delta import (
    DeltaWriter,
    Flags,
    PageBatch,
    genesis_digest,
    open_file,
    open_spooled,
    remove_spooled,
)
from vdiskfs.delta.digest import epoch_digest
from vdiskfs.delta.layout import decode_head, encode_head
from vdiskfs.errors import FormatError


@pytest.fixture
def model(tmp_path: Path) -> DiskModel:
    return DiskModel(tmp_path)


def pages_in(path: Path) -> set[int]:
    return {page for entries in open_file(path).entries() for page in entries.pages()[0].tolist()}


def zeros_in(path: Path) -> set[int]:
    zeros = open_file(path).zeros()
    return {
        page
        for start, end in zip(zeros.start.tolist(), zeros.end.tolist(), strict=True)
        for page in range(start, end)
    }


def test_a_delta_has_the_pages_it_was_given(model: DiskModel) -> None:
    model.write(0, b"x" * PAGE * 3)
    model.write(40 * PAGE, bytes(PAGE * 2) + b"y")
    spooled = model.seal(label="one")
    assert pages_in(spooled.path) == {0, 1, 2, 42}
    assert zeros_in(spooled.path) == {40, 41}
    assert spooled.head.changed_bytes == 6 * PAGE
    assert spooled.head.stored_bytes == spooled.path.stat().st_size
    assert open_spooled(spooled.path) == spooled
    assert sorted(os.listdir(model.spool)) == ["0000000000000000.delta"]


def test_an_epoch_without_changes_is_a_delta_too(model: DiskModel) -> None:
    model.truncate(10 * PAGE)
    spooled = model.seal()
    assert (pages_in(spooled.path), zeros_in(spooled.path)) == (set(), set())
    assert spooled.head.size == 10 * PAGE


def test_the_head_comes_back_as_it_was(model: DiskModel) -> None:
    model.write(0, b"x")
    head = model.seal(label="ünï", flags=Flags.APPLICATION).head
    assert decode_head(encode_head(head)) == head


def test_the_digest_covers_what_changed_and_not_how_it_is_stored(tmp_path: Path) -> None:
    """Another level, other segments, other batches: the same digest. Another byte: another."""
    digests = set()
    for number, options in enumerate(
        ({"level": 1}, {"level": 9}, {"inline_limit": 0}, {"segment_limit": 5000})
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        model = DiskModel(directory)
        model.writer_options = options
        model.write(0, random.Random(1).randbytes(100 * PAGE))
        model.write(200 * PAGE, b"z" * 50 * PAGE)
        model.discard(90 * PAGE, 5 * PAGE)
        digests.add(model.seal(per_batch=1 + 3 * number).head.to_digest)
    assert len(digests) == 1
    model.data[0] ^= 1
    assert model.data
    other = DiskModel(tmp_path)
    other.write(0, bytes(model.data))
    assert other.seal().head.to_digest not in digests


@pytest.mark.parametrize(
    "change",
    [{"time_ns": 5}, {"size": 99 * PAGE}, {"label": "x", "flags": Flags.LABELLED},
     {"flags": Flags.APPLICATION}, {"from_digest": bytes(32)}, {"generation": 2}],
)  # fmt: skip
def test_the_digest_covers_the_facts(model: DiskModel, change: dict[str, object]) -> None:
    model.write(0, b"x")
    head = model.seal().head
    changed = replace(head, **change)  # type: ignore[arg-type]
    assert epoch_digest(head) == head.to_digest
    assert epoch_digest(changed) != head.to_digest


def test_no_two_disks_begin_with_the_same_digest() -> None:
    digests = {genesis_digest(a, b) for a in (VAULT, DISK) for b in (VAULT, DISK)}
    assert len(digests) == 4


def test_pages_out_of_order_or_in_two_batches_of_a_chunk_are_refused(model: DiskModel) -> None:
    model.write(0, b"x" * PAGE * 40)
    for first, second in ((20, 5), (3, 4), (3, 3)):
        writer = model.writer()
        writer.add(model.batch([first]))
        with pytest.raises(ValueError, match="ascending"):
            writer.add(model.batch([second]))
        writer.abandon()
    writer = model.writer()
    with pytest.raises(ValueError, match="bytes for"):
        writer.add(
            PageBatch(np.array([1], np.uint64), np.array([1], np.uint64), np.array([False]), b"")
        )
    writer.abandon()
    assert os.listdir(model.spool) == []


def test_a_page_that_is_zero_and_data_is_refused(model: DiskModel) -> None:
    model.write(0, b"x" * PAGE * 4)
    writer = model.writer()
    writer.add(model.batch([0, 1, 2]))
    writer.add_zeros(2, 5)
    with pytest.raises(ValueError, match="both zero and data"):
        writer.finish(model.facts())
    assert os.listdir(model.spool) == []


def test_a_page_beyond_the_disk_is_refused(model: DiskModel) -> None:
    model.write(0, b"x" * PAGE * 4)
    for add in (lambda w: w.add(model.batch([3])), lambda w: w.add_zeros(2, 2)):
        writer = model.writer()
        add(writer)  # type: ignore[no-untyped-call]
        with pytest.raises(ValueError, match="beyond the disk"):
            writer.finish(replace(model.facts(), size=3 * PAGE))


def test_a_torn_page_must_be_in_the_delta(model: DiskModel) -> None:
    """What a cut inside a page left of it cannot be told from the older page."""
    model.write(0, b"x" * PAGE * 10)
    model.seal()
    model.truncate(5 * PAGE + 7)
    model.dirty.clear()
    with pytest.raises(ValueError, match="page 5, which the cut tears, is missing"):
        model.seal()
    writer = model.writer()
    writer.add_zeros(5, 1)
    assert writer.finish(model.facts()).head.torn_page == 5


@pytest.mark.parametrize(
    "change",
    [{"from_epoch": 5}, {"to_epoch": 0}, {"size": 1 << 63}, {"time_ns": 1 << 63},
     {"label": "x"}, {"flags": Flags.FENCE}, {"flags": Flags.MERGED}],
)  # fmt: skip
def test_facts_that_contradict_themselves_are_refused(
    model: DiskModel, change: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match=r"."):
        model.writer().finish(replace(model.facts(), **change))  # type: ignore[arg-type]
    assert os.listdir(model.spool) == []


def test_large_deltas_go_on_in_segments(model: DiskModel) -> None:
    """Frames first fill the delta, then segments; the index too where it is long."""
    model.writer_options = {"inline_limit": 20_000, "segment_limit": 30_000}
    model.write(0, random.Random(1).randbytes(2000 * PAGE))
    spooled = model.seal(per_batch=1)
    sizes = [segment.size for segment in spooled.segments]
    assert len(sizes) > 3
    assert spooled.head.stored_bytes == sum(sizes) + spooled.head.object_size
    # The index (16 KiB of sums and more) is inline as long as it is below a segment.
    assert pages_in(spooled.path) == set(range(2000))
    model.write(0, random.Random(2).randbytes(6000 * PAGE))
    spooled = model.seal(per_batch=1)
    # What is left is the table of some 800 segments.
    assert spooled.head.tail_bytes < 24 * len(spooled.segments) + 2000
    assert pages_in(spooled.path) == set(range(6000))
    assert open_spooled(spooled.path) == spooled
    remove_spooled(spooled)


def test_segments_can_be_taken_while_writing(model: DiskModel) -> None:
    model.writer_options = {"inline_limit": 0, "segment_limit": 70_000}
    model.write(0, random.Random(1).randbytes(64 * PAGE))
    writer = model.writer()
    taken = []
    for batch in model.batches(list(range(64)), 1):
        writer.add(batch)
        taken += writer.take_segments()
    assert len(taken) == 3
    assert all(segment.path.stat().st_size == segment.size for segment in taken)
    spooled = writer.finish(model.facts())
    assert spooled.segments[:3] == taken


def test_what_is_abandoned_leaves_nothing(model: DiskModel) -> None:
    model.writer_options = {"inline_limit": 0, "segment_limit": 70_000}
    model.write(0, random.Random(1).randbytes(64 * PAGE))
    writer = model.writer()
    for batch in model.batches(list(range(64)), 1):
        writer.add(batch)
    writer.abandon()
    writer.abandon()
    assert os.listdir(model.spool) == []


def test_a_pass_supplies_what_was_not_captured(model: DiskModel) -> None:
    """Captured pages win over a pass, later parts over earlier ones, the cut over all."""
    model.writer_options = {"inline_limit": 0}
    model.write(0, b"1" * 80 * PAGE)
    parts = []
    for first, last in ((0, 40), (30, 80)):
        writer = model.writer()
        for batch in model.batches(list(range(first, last)), 1):
            writer.add(batch)
        parts.append(writer.finish_part())
        model.write(30 * PAGE, b"2" * 30 * PAGE)
    model.truncate(70 * PAGE)
    model.truncate(80 * PAGE)
    model.write(0, b"3" * 2 * PAGE)
    model.write(20 * PAGE, bytes(3 * PAGE))
    model.write(50 * PAGE, b"4" * 10 * PAGE)
    writer = model.writer(inline_limit=1 << 20)
    captured = [0, 1, 20, 21, 22, *range(50, 60)]
    for batch in model.batches(captured, 4):
        writer.add(batch)
    for part in parts:
        writer.add_stored(open_spooled(part.path), 70 * PAGE)
    spooled = model.sealed(writer.finish(model.facts()))
    assert pages_in(spooled.path) == set(range(70)) - {20, 21, 22}
    assert zeros_in(spooled.path) == {20, 21, 22}
    table = open_file(spooled.path).objects()
    ids = {table.ref(index).segment_id for index in range(len(table))}
    assert ids == {segment.id for part in parts for segment in part.segments}


def test_a_part_with_frames_inside_is_refused(model: DiskModel) -> None:
    model.write(0, b"x")
    writer = model.writer()
    writer.add(model.batch([0]))
    with pytest.raises(ValueError, match="inline_limit=0"):
        writer.finish_part()
    assert os.listdir(model.spool) == []


def test_frames_that_do_not_compress_are_kept_as_they_are(model: DiskModel) -> None:
    model.write(0, random.Random(1).randbytes(16 * PAGE))
    model.write(100 * PAGE, b"text " * 4000)
    entries = list(open_file(model.seal().path).entries())[0]
    assert entries.flags.tolist() == [2, 3]
    assert entries.length[0] == 16 * PAGE


def test_a_small_random_delta_costs_little_beyond_its_pages(model: DiskModel) -> None:
    """2,560 random pages of 4 KiB, 10 MiB: at most 10.3 MiB, index and all."""
    rng = random.Random(1)
    model.truncate(1 << 30)
    writer = model.writer()
    for page in sorted(rng.sample(range(1 << 18), 2560)):
        if page // 16 != writer._last_chunk:
            model.data[page * PAGE : (page + 1) * PAGE] = rng.randbytes(PAGE)
            writer.add(model.batch([page]))
    spooled = writer.finish(model.facts())
    pages = spooled.head.changed_bytes // PAGE
    assert pages > 2000
    overhead = spooled.head.stored_bytes - pages * PAGE
    assert overhead <= 0.02 * pages * PAGE
    assert overhead / pages < 16


@pytest.mark.parametrize("length", [0, 1, 511, 512, 1023, 1024])
def test_a_file_that_is_too_short_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.delta"
    path.write_bytes(bytes(length))
    with pytest.raises(FormatError):
        open_file(path)


def test_a_writer_needs_its_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DeltaWriter(tmp_path / "no", vault_id=VAULT, disk_id=DISK, writer_id=DISK)


def test_a_writer_on_a_full_disk_can_be_abandoned(model: DiskModel) -> None:
    model.write(0, b"x" * PAGE * 4)
    writer = model.writer()
    writer.add(model.batch([0, 1, 2]))
    with writer._file as file, Path("/dev/full").open("rb+", buffering=0) as full:
        os.dup2(full.fileno(), file.fileno())
        writer.abandon()
    assert os.listdir(model.spool) == []
