"""Frames are made again: what no index tells of stays in them, and their checks are right."""

from __future__ import annotations

import random
import sys
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.catalog.damage import Here, Site, frames_of, kind_of, site
from tests.catalog.harness import bench, content_at
from tests.delta.model import PAGE
from tests.vaults import PLAIN
from vdiskfs import native
from vdiskfs.catalog import IndexCache, check
from vdiskfs.catalog.references import References, Said
from vdiskfs.catalog.reframe import Frame, remade, stored_pages
from vdiskfs.catalog.repair import repair

repair_module = sys.modules[repair.__module__]

pytestmark = pytest.mark.usefixtures("each_vault")


def raw_frame(data: bytes, used: int) -> Frame:
    """Return a frame that is not compressed, of which an index tells the first pages."""
    count = len(data) // PAGE
    sums = native.pages_sum(data).tolist()
    return Frame(0, len(data), packed=False, chunkno=0, mask=(1 << count) - 1,
                 check=zlib.crc32(data), sums=dict(enumerate(sums[:used])))  # fmt: skip


def packed_frame(one: Site) -> tuple[str, int, int]:
    """Return a compressed frame of a segment, of several pages, which the image has."""
    for name in one.names("segment"):
        frames: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for start, end, page, total in one.frames.get(name, []):
            frames.setdefault((start, end), []).append((page, total))
        for (start, end), pages in frames.items():
            has = all(one.here.sum(page) == total for page, total in pages)
            if has and len(pages) > 2 and (end - start) % PAGE:
                return name, start, end
    raise AssertionError("there is no such frame")


class HalfTold(References):
    """What indexes say of damaged objects, but of each frame only of half of its pages."""

    async def said(self, name: str) -> Said:
        half = await super().said(name)
        for frame in half.frames.values():
            for page in list(frame.sums)[len(frame.sums) // 2 :]:
                del frame.sums[page]
        return half


async def half_told(*args: Any) -> References:
    found = HalfTold(*args)
    await found.look()
    return found


def test_pages_without_a_sum_stay_what_they_are() -> None:
    data = random.Random(1).randbytes(4 * PAGE)
    frame = raw_frame(data, 2)
    torn = bytes(PAGE) + data[PAGE:]
    pages = {page: data[page * PAGE : (page + 1) * PAGE] for page in range(2)}
    assert remade(frame, pages, stored_pages(frame, torn), may_lose=False) == data
    # One of those without a sum was hurt: only one that means nothing may have the check made.
    torn = data[:-1] + bytes([data[-1] ^ 1])
    own = stored_pages(frame, torn)
    assert remade(frame, pages, own, may_lose=False) is None
    made = remade(frame, pages, own, may_lose=True)
    assert made is not None
    assert made[: 2 * PAGE] == data[: 2 * PAGE]
    assert zlib.crc32(made) == frame.check


@PLAIN
async def test_a_frame_is_healed_to_the_same_bytes_where_no_index_uses_all_of_it(
    tmp_path: Path,
) -> None:
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 4_000}
        test.model.write(0, random.Random(1).randbytes(8 * PAGE))
        await test.publish()
        [name] = [name for name in test.store.objects if name.startswith("segments/")]
        whole, metadata, _ = test.store.objects[name]
        data = bytearray(whole)
        data[-8 * PAGE] ^= 1
        test.store.put(name, bytes(data), metadata)
        here = Here(test.model, IndexCache(tmp_path / "indexes"))
        with mock.patch.object(repair_module, "gather", half_told):
            await repair(test.vault, sources=lambda _: here)
        assert test.store.objects[name][0] == whole


@PLAIN
async def test_a_frame_waits_for_the_indexes_that_may_tell_more_of_it(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        name, start, end = packed_frame(one)
        data = bytearray(one.whole[name][0])
        data[start:end] = bytes(end - start)
        one.bench.store.put(name, bytes(data), one.whole[name][1])
        leaf = one.names("leaf")[-1]
        one.bench.store.put(leaf, one.whole[leaf][0][:-700], one.whole[leaf][1])
        nothing = Here(one.here.model, IndexCache(tmp_path / "nothing"))
        with mock.patch.object(repair_module, "gather", half_told):
            report = await repair(one.vault(), sources=lambda _: nothing)
        assert one.bench.store.objects[name][0] == bytes(data)
        [why] = [left.why for left in report.left if left.problem.object == name]
        assert "only indexes tell of" in why
        assert (await one.repaired()).ok
        assert await one.hurt() == set()


@PLAIN
async def test_a_frame_whose_pages_are_all_right_gets_its_check_again(tmp_path: Path) -> None:
    """A bit that the decoder does not look at is wrong: readers look at the check."""
    text = " ".join(str(number * number) for number in range(9_000)).encode()[: 8 * PAGE]
    async with bench() as test:
        test.log = test.vault.log(test.record, cache=(cache := IndexCache(tmp_path / "indexes")))
        test.model.write(0, text)
        await test.publish()
        [name] = [name for name in test.store.objects if kind_of(name) == "slot"]
        whole, metadata, _ = test.store.objects[name]
        [(start, end)] = {(start, end) for start, end, *_ in (await frames_of(test))[name]}
        frame = Frame(start, end - start, packed=True, chunkno=0, mask=0xFF)

        def flipped(bit: int) -> bytes:
            data = bytearray(whole)
            data[start + bit // 8] ^= 1 << bit % 8
            return bytes(data)

        idle = next(
            data for bit in range(8 * 16)
            if b"".join(stored_pages(frame, (data := flipped(bit))[start:end]).values()) == text
        )  # fmt: skip
        test.store.put(name, idle, metadata)
        assert not (await check(test.vault, read_data=True)).ok
        assert (await repair(test.vault, sources=lambda _: Here(test.model, cache))).ok
        assert test.store.objects[name][0] == whole


@PLAIN
async def test_a_raw_frame_can_be_read_but_for_the_page_that_is_lost(tmp_path: Path) -> None:
    rng = random.Random(1)
    async with bench() as test:
        test.log = test.vault.log(test.record, cache=(cache := IndexCache(tmp_path / "indexes")))
        test.model.write(0, rng.randbytes(16 * PAGE))
        await test.publish()
        test.model.write(3 * PAGE, rng.randbytes(PAGE))
        await test.publish()
        name = min(name for name in test.store.objects if kind_of(name) == "slot")
        whole, metadata, _ = test.store.objects[name]
        data = bytearray(whole)
        data[min(start for start, *_ in (await frames_of(test))[name]) + 3 * PAGE + 9] ^= 1
        test.store.put(name, bytes(data), metadata)
        report = await repair(test.vault, sources=lambda _: Here(test.model, cache))
        assert report.left[0].problem.points == {1: [1]}
        assert [healed.in_part for healed in report.healed] == [True]
        assert await content_at(test.fresh_log(), 2) == test.model.states[2]
        before = test.store.objects[name]
        assert (await repair(test.vault, sources=lambda _: Here(test.model, cache))).healed == []
        assert test.store.objects[name] == before
