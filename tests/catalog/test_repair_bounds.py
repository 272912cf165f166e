"""What a repair keeps and asks for grows with what is damaged, and not with what there is."""

from __future__ import annotations

import gc
import os
import random
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.catalog.damage import Here, kind_of
from tests.catalog.harness import Bench, bench
from tests.delta.model import PAGE
from vdiskfs.catalog import IndexCache, check, copies, damage, healer, inspection, repair
from vdiskfs.catalog.reframe import Frame
from vdiskfs.point import Piece, open_piece

pytestmark = [
    pytest.mark.usefixtures("each_vault"),
    pytest.mark.parametrize("each_vault", ["plain"], indirect=True),
]


class Opened:
    """Counts the deltas that are opened, and those that are open at once."""

    def __init__(self) -> None:
        self.count = self.most = 0
        self._alive: weakref.WeakSet[Piece] = weakref.WeakSet()

    async def open(self, *args: Any, **rest: Any) -> Piece:
        piece = await open_piece(*args, **rest)
        self._alive.add(piece)
        self.count += 1
        self.most = max(self.most, len(self._alive))
        return piece


@contextmanager
def counted() -> Iterator[Opened]:
    opened = Opened()
    with mock.patch.object(inspection, "open_piece", opened.open):
        yield opened


@asynccontextmanager
async def history(directory: Path) -> AsyncIterator[tuple[Bench, Here]]:
    """Give a disk of 130 points, of which the source still has the newest pages."""
    rng = random.Random(1)
    async with bench() as test:
        cache = IndexCache(directory / "indexes")
        test.log = test.vault.log(test.record, cache=cache)
        test.model.writer_options = {"inline_limit": 24_000, "segment_limit": 48_000}
        for at in range(10):
            test.model.write(at * 48_000, rng.randbytes(48_000))
            await test.publish()
        with mock.patch.object(os, "fsync"), mock.patch.object(os, "fdatasync"):
            for _ in range(120):
                test.model.write(rng.randrange(117) * PAGE, rng.randbytes(PAGE))
                await test.publish()
                await test.log.publish_joins()
        yield test, Here(test.model, cache)


def names(test: Bench, *kinds: str) -> list[str]:
    return sorted(name for name in test.store.objects if kind_of(name) in kinds)


def flip(test: Bench, name: str) -> None:
    """Damage the first frame of an object."""
    data, metadata, _ = test.store.objects[name]
    test.store.put(name, data[:600] + bytes([data[600] ^ 1]) + data[601:], metadata)


async def test_few_deltas_are_open_at_once_however_many_there_are(tmp_path: Path) -> None:
    async with history(tmp_path) as (test, here):
        flip(test, names(test, "segment")[0])
        with counted() as opened:
            report = await repair(test.vault, sources=lambda _: here)
        assert report.healed
        assert opened.count > 2 * len(names(test, "slot", "joined")) > 240
        assert opened.most <= 20


async def test_frames_of_one_damaged_object_at_a_time_are_in_memory(tmp_path: Path) -> None:
    async with history(tmp_path) as (test, here):
        damaged = names(test, "segment")
        assert len(damaged) > 8
        for name in damaged:
            flip(test, name)
        alive: list[int] = []

        def look(_: str) -> None:
            gc.collect()
            alive.append(sum(type(found) is Frame for found in gc.get_objects()))

        with mock.patch.object(healer, "hook", look):
            report = await repair(test.vault, sources=lambda _: here)
        assert len(report.healed) == len(damaged)
        # A segment has 48,000 bytes, and a frame of a chunk that is full more than 3,000.
        assert 0 < max(alive) <= 16


async def test_many_slots_side_by_side_are_put_back_in_one_turn(tmp_path: Path) -> None:
    """A check names the first: joined deltas tell of the others."""
    async with history(tmp_path) as (test, here):
        gone = names(test, "slot")[-100:-40]
        for name in gone:
            del test.store.objects[name]
        checked = await check(test.vault)
        assert [problem.object for problem in checked.problems] == gone[:1]
        planned = await repair(test.vault, sources=lambda _: here, dry_run=True)
        assert {one.problem.object for one in planned.healed} == set(gone)
        report = await repair(test.vault, sources=lambda _: here)
        assert {one.problem.object for one in report.healed} == set(gone)
        assert all(name in test.store.objects for name in gone)
        # All that is left is what guests have overwritten.
        assert all("pages are nowhere" in one.why for one in report.left)


async def test_data_that_was_right_is_read_once(tmp_path: Path) -> None:
    """However often it is looked what is left: what was healed, or was hidden, is read again."""
    async with history(tmp_path) as (test, here):
        name = names(test, "segment")[-1]
        checked = await check(test.vault, read_data=True)
        flip(test, name)
        whole, metadata, _ = test.store.objects[hidden := names(test, "slot")[0]]
        test.store.put(hidden, whole[:-700], metadata)
        report = await repair(test.vault, sources=lambda _: here)
        assert {one.problem.object for one in report.healed} == {name, hidden}
        size = len(whole) + len(test.store.objects[name][0])
        assert checked.read_bytes < report.read_bytes <= checked.read_bytes + 3 * size
        again = await check(test.vault, read_data=True)
        # What guests have overwritten since is nowhere.
        assert [one.object for one in again.problems] == [one.problem.object for one in report.left]


async def test_damage_that_comes_to_light_is_found_by_the_next_look(tmp_path: Path) -> None:
    """An index that is damaged hides that a segment of its delta is damaged, too."""
    async with bench() as test:
        cache = IndexCache(tmp_path / "indexes")
        test.log = test.vault.log(test.record, cache=cache)
        test.model.writer_options = {"inline_limit": 4_000}
        test.model.write(0, random.Random(1).randbytes(8 * PAGE))
        await test.publish()
        [name], [slot] = names(test, "segment"), names(test, "slot")
        flip(test, name)
        data, metadata, _ = test.store.objects[slot]
        test.store.put(slot, data[:-700], metadata)
        report = await repair(test.vault, sources=lambda _: Here(test.model, cache))
        assert {one.problem.object for one in report.healed} == {name, slot}
        assert (await check(test.vault, read_data=True)).ok


async def test_a_check_keeps_what_is_hurt_where_joined_deltas_begin(tmp_path: Path) -> None:
    """However many points there are behind damage."""
    async with history(tmp_path) as (test, _):
        flip(test, names(test, "segment")[0])
        kept: list[int] = []

        def remember(tracker: damage.Tracker, epoch: int) -> None:
            real(tracker, epoch)
            kept.append(len(tracker._past))

        real = damage.Tracker.remember
        with mock.patch.object(damage.Tracker, "remember", remember):
            report = await check(test.vault, read_data=True)
        assert len(report.problems[0].points[1]) > 30
        assert 0 < max(kept) <= 8


async def test_pages_of_many_objects_are_looked_for_at_once(tmp_path: Path) -> None:
    async with history(tmp_path) as (test, here):
        for name in names(test, "slot")[40:80]:
            del test.store.objects[name]
        test.model.write(0, random.Random(2).randbytes(480_000))
        deltas = len(names(test, "slot", "joined")) + 40
        with counted() as opened:
            report = await repair(test.vault, sources=lambda _: here)
        assert len(report.left) == 40
        # Each check opens what there is, joined deltas twice; the search once more.
        assert opened.count < 8 * deltas


async def copied(test: Bench, directory: Path) -> Here:
    """Publish pages of which the source has none any more, and the vault has each twice."""
    rng = random.Random(2)
    test.log = test.vault.log(test.record, cache=(cache := IndexCache(directory / "indexes")))
    data = [rng.randbytes(PAGE) for _ in range(6)]
    for turn in (data, data[::-1], data):
        for at, page in enumerate(turn):
            test.model.write(at * 20 * PAGE, page)
        # Another one in each, of which there is no copy.
        test.model.write(200 * PAGE, rng.randbytes(PAGE))
        await test.publish()
    test.model.write(0, rng.randbytes(201 * PAGE))
    return Here(test.model, cache)


async def test_more_pages_than_one_search_may_look_for_are_found_all_the_same(
    tmp_path: Path,
) -> None:
    async with bench() as test:
        here = await copied(test, tmp_path)
        for name in names(test, "slot")[:2]:
            del test.store.objects[name]
        with mock.patch.object(copies, "ASKED_MOST", 1):
            report = await repair(test.vault, sources=lambda _: here)
        # Of the second one the third has half as many: the middle ones are elsewhere in it.
        assert [one.pages_vault for one in report.healed] == [6, 0]
        assert all("1 pages are nowhere" in one.why for one in report.left[:1])


async def test_a_page_is_taken_from_a_frame_that_is_good_of_an_object_that_is_damaged(
    tmp_path: Path,
) -> None:
    async with bench() as test:
        here = await copied(test, tmp_path)
        first, _, third = names(test, "slot")
        del test.store.objects[first]
        data, metadata, _ = test.store.objects[third]
        # The frames are in order: the last one is that of the page that has no copy.
        end = data.rindex(here.model.states[3][200 * PAGE : 201 * PAGE][:64])
        test.store.put(third, data[:end] + bytes(64) + data[end + 64 :], metadata)
        report = await repair(test.vault, sources=lambda _: here)
        assert {one.problem.object: one.pages_vault for one in report.healed} == {first: 6}
        assert {one.problem.object for one in report.left} == {first, third}
