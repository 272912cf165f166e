"""A point read through any chain is the disk as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.catalog.harness import Bench, bench, content, content_at
from tests.delta.model import PAGE
from vdiskfs import native
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.point import ABSENT, FULL, ZERO, PointReader
from vdiskfs.point import reader as reader_module

pytestmark = pytest.mark.usefixtures("each_vault")

WHOLE = 40 * PAGE
offsets = st.integers(0, WHOLE)
lengths = st.sampled_from([1, 100, 512, PAGE, PAGE + 1, 5 * PAGE, 20 * PAGE])
seeds = st.integers(0, 2**32)
steps = st.one_of(
    st.tuples(st.just("write"), offsets, lengths, seeds),
    st.tuples(st.just("fill"), offsets, lengths, seeds),
    st.tuples(st.just("discard"), offsets, lengths, seeds),
    st.tuples(st.just("truncate"), offsets, lengths, seeds),
    st.tuples(st.just("shrink"), offsets, lengths, seeds),
)
epochs = st.lists(st.lists(steps, max_size=4), min_size=1, max_size=40)


def act(test: Bench, step: tuple[str, int, int, int]) -> None:
    kind, offset, length, seed = step
    model = test.model
    if kind == "write":
        model.write(offset, random.Random(seed).randbytes(length))
    elif kind == "fill":
        model.write(offset, bytes([seed % 3]) * length)
    elif kind == "discard":
        model.discard(offset // PAGE * PAGE, length)
    elif kind == "truncate":
        model.truncate(offset)
    else:
        before = len(model.data)
        model.truncate(offset // 2)
        model.truncate(before)


async def assert_point(reader: PointReader, wanted: bytes) -> None:
    assert reader.size == len(wanted)
    assert await content(reader) == wanted
    pages = [wanted[at : at + PAGE].ljust(PAGE, b"\0") for at in range(0, len(wanted), PAGE)]
    mask = await reader.map_pages(0, reader.pages + 5)
    sums, kind = await reader.sums(0, reader.pages)
    assert not mask[reader.pages :].any()
    for number, page in enumerate(pages):
        assert mask[number] == (page != bytes(PAGE))
        assert (kind[number] == FULL) == mask[number]
    data = np.flatnonzero(mask[: reader.pages])
    if len(data):
        raw = b"".join(pages[number] for number in data)
        assert (native.pages_sum(raw) == sums[data]).all()
    assert set(kind.tolist()) <= {ABSENT, ZERO, FULL}


async def assert_seeks(reader: PointReader, wanted: bytes) -> None:
    mask = (await reader.map_pages(0, reader.pages)).tolist()
    for page in range(0, reader.pages, 3):
        following = [number for number in range(page, reader.pages) if mask[number]]
        found = await reader.next_data(page * PAGE + 7)
        if not following:
            assert found is None
        else:
            assert found == max(page * PAGE + 7, following[0] * PAGE)
        hole = next((n for n in range(page, reader.pages) if not mask[n]), None)
        wanted_hole = (
            reader.size if hole is None else min(reader.size, max(page * PAGE + 7, hole * PAGE))
        )
        assert (
            await reader.next_hole(page * PAGE + 7) == wanted_hole or page * PAGE + 7 >= reader.size
        )


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=epochs, seed=seeds)
async def test_every_point_is_the_disk_as_it_was(
    plan: list[list[tuple[str, int, int, int]]], seed: int
) -> None:
    """Writes, discards and changes of size, sealed at random: all points, joined or not."""
    rng = random.Random(seed)
    async with bench() as test:
        for actions in plan:
            for step in actions:
                act(test, step)
            await test.publish()
            if rng.random() < 0.7:
                await test.log.publish_joins()
        chosen = [test.model.epoch, *rng.sample(sorted(test.model.states)[1:], min(5, len(plan)))]
        for log in (test.log, test.fresh_log()):
            for epoch in chosen:
                async with await log.open(epoch) as reader:
                    await assert_point(reader, test.model.states[epoch])
        async with await test.log.open(test.model.epoch) as reader:
            await assert_seeks(reader, test.model.states[test.model.epoch])
        test.without_joins()
        for epoch in chosen:
            assert await content_at(test.fresh_log(), epoch) == test.model.states[epoch]


async def test_parts_of_a_point_are_read_alone() -> None:
    """Any range of pages is what the whole has there."""
    async with bench() as test:
        await test.churn(20, pages=200)
        wanted = test.model.states[20].ljust(300 * PAGE, b"\0")
        rng = random.Random(3)
        async with await test.log.open(20) as reader:
            for _ in range(60):
                first, count = rng.randrange(250), rng.randrange(1, 50)
                part = bytes(await reader.read_pages(first, count))
                assert part == wanted[first * PAGE : (first + count) * PAGE]


async def test_windows_hold_across_their_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A range larger than one window is resolved in several, with the same result."""
    monkeypatch.setattr(reader_module, "WINDOW", 32)
    async with bench() as test:
        await test.churn(10, pages=300)
        async with await test.log.open(10) as reader:
            await assert_point(reader, test.model.states[10])
            await assert_seeks(reader, test.model.states[10])


async def test_a_sparse_disk_of_a_tebibyte_is_searched_by_its_index() -> None:
    """Seeking data in a disk that is nearly all hole looks at blocks, not at pages."""
    async with bench() as test:
        model = test.model
        model.data = Sparse(1 << 40)  # type: ignore[assignment]
        far = (1 << 40) - 5 * PAGE
        model.data.pages[far // PAGE] = b"y" * PAGE  # type: ignore[attr-defined]
        model.dirty = {far // PAGE}
        await test.publish()
        async with await test.fresh_log().open(1) as reader:
            assert await reader.next_data(0) == far
            assert await reader.next_hole(far) == far + PAGE
            assert await reader.next_data(far + PAGE) is None
            assert bytes(await reader.read_pages(far // PAGE, 1)) == b"y" * PAGE


class Sparse:
    """A bytearray of which only some pages are there."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pages: dict[int, bytes] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        return self.pages.get(part.start // PAGE, bytes(PAGE))

    def __bytes__(self) -> bytes:
        return b""


async def test_neighbouring_frames_come_in_one_request() -> None:
    """A mebibyte written at once is read back with one request."""
    async with bench() as test:
        test.model.write(0, random.Random(1).randbytes(1 << 20))
        await test.publish()
        async with await test.fresh_log().open(1) as reader:
            before = test.store.requests
            await reader.read_pages(0, 256)
            assert test.store.requests - before == 1


async def test_a_missing_segment_is_named_with_the_point() -> None:
    """The error names the object that is gone and the point that was read."""
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0}
        test.model.write(0, random.Random(1).randbytes(40 * PAGE))
        await test.publish()
        name = next(name for name in test.store.objects if name.startswith("segments/"))
        del test.store.objects[name]
        async with await test.fresh_log().open(1) as reader:
            with pytest.raises(DamagedError, match=f"web01@1: {name}.*missing"):
                await reader.read_pages(0, 1)


async def test_a_point_that_is_not_there_is_not_found() -> None:
    async with bench() as test:
        await test.churn(3)
        with pytest.raises(NotFoundError, match="no point 9"):
            await test.log.open(9)


async def test_long_indexes_are_read_through_pages_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks and pages made tiny, everything is found through two levels."""
    monkeypatch.setattr("vdiskfs.delta.builder.BLOCK_RAW", 700)
    monkeypatch.setattr("vdiskfs.delta.builder.DIRECT_ROWS", 2)
    monkeypatch.setattr("vdiskfs.delta.builder.ROWS_PER_PAGE", 3)
    monkeypatch.setattr("vdiskfs.delta.builder.ZEROS_PER_BLOCK", 2)
    monkeypatch.setattr("vdiskfs.delta.builder.POINTS_PER_BLOCK", 2)
    monkeypatch.setattr("vdiskfs.delta.builder.OBJECTS_PER_BLOCK", 2)
    monkeypatch.setattr("vdiskfs.point.piece.WHOLE", 0)
    monkeypatch.setattr("vdiskfs.point.piece.TAIL", 0)
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 10_000, "segment_limit": 20_000}
        rng = random.Random(1)
        for _ in range(34):
            for _ in range(8):
                page = rng.randrange(600)
                test.model.write(page * PAGE, rng.randbytes(PAGE * rng.randrange(1, 20)))
                test.model.discard(rng.randrange(600) * PAGE, PAGE * 3)
            await test.publish()
            await test.log.publish_joins()
        log = test.fresh_log()
        assert [point.epoch for point in await log.points()] == list(range(1, 35))
        for epoch in (1, 16, 17, 33, 34):
            async with await log.open(epoch) as reader:
                await assert_point(reader, test.model.states[epoch])
        async with await log.open(34) as reader:
            await assert_seeks(reader, test.model.states[34])
