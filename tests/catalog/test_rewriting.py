"""What is stored stays near to what the points need, also of a disk larger than the limits.

All objects are counted: indexes, joins, ledgers, what waits for its hour to be deleted.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.catalog.harness import bench
from tests.catalog.test_thinning import Site
from tests.delta.model import T0
from tests.vaults import BOTH
from vdiskfs.catalog import DiskLog
from vdiskfs.catalog.ledger import Ledger
from vdiskfs.catalog.retention import parse_ladder
from vdiskfs.catalog.rewriting import MOVE_LIMIT, Held, choose_moved
from vdiskfs.catalog.thinning import Thinner
from vdiskfs.catalog.upkeep import Upkeep
from vdiskfs.delta.blocks import DATA
from vdiskfs.errors import DamagedError
from vdiskfs.units import NS

pytestmark = BOTH

MIB = 1 << 20
PAGES = 4096
PER_HOUR = 16
HOURS = 24 * 6
LADDER = parse_ladder("1h for 1d")


async def test_a_base_above_the_limits_is_rewritten_as_it_is_superseded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six days of 16 pages an hour, of 4096; a day of points is kept."""
    monkeypatch.setattr("vdiskfs.catalog.rewriting.MOVE_LIMIT", 64 << 10)
    monkeypatch.setattr("vdiskfs.catalog.rewriting.REWRITE_LIMIT", 512 << 10)
    monkeypatch.setattr("vdiskfs.catalog.rewriting._SMALL", 32 << 10)
    rng = random.Random(3)
    async with bench() as test:
        model, store = test.model, test.store
        model.remembers = False
        model.writer_options = {"inline_limit": 0, "segment_limit": 64 << 10}
        for page in range(PAGES):
            model.write(page * 4096, rng.randbytes(2048) + bytes(2048))
        await test.publish(time_ns=T0)
        model.writer_options = {}
        now = T0
        upkeep = Upkeep(test.vault, "cc" * 16, clock=lambda: now)
        ratios = []
        began, sent = store.requests, store.bytes_sent
        for hour in range(HOURS):
            now = store.now_ns = T0 + (hour + 1) * 3600 * NS
            for _ in range(PER_HOUR):
                model.write(rng.randrange(PAGES) * 4096, rng.randbytes(2048) + bytes(2048))
            (await test.publish(time_ns=now)).path.unlink()
            await test.log.publish_joins()
            await upkeep.tend(test.log, LADDER, tmp_path / "thin")
            if hour > HOURS // 2 and hour % 24 == 23:
                unique = await _needed(test.log)
                ratios.append(sum(len(one[0]) for one in store.objects.values()) / unique)
        print(f"all objects, of what is needed: {[round(one, 3) for one in ratios]}; "
              f"{(store.requests - began) / HOURS:.0f} requests and "
              f"{(store.bytes_sent - sent) / HOURS / 2064 / PER_HOUR:.1f} times the new bytes "
              "an hour")  # fmt: skip
        assert max(ratios) <= 1.15
        async with await test.log.open((await test.log.points())[-1]) as reader:
            assert bytes(await reader.read_pages(0, PAGES)) == bytes(model.data)


async def test_points_are_the_same_bytes_while_their_data_moves_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may move next to nothing: what is left is moved by later ones, which thin nothing."""
    async with moved_bit_by_bit(tmp_path, monkeypatch) as site:
        await site.thin()
        await site.collect()
        left = await site.check()
        ledger = await _ledger(site)
        untidy = [leaf for leaf in ledger.leaves if not leaf.tight]
        assert untidy
        before = sum(len(one[0]) for one in site.bench.store.objects.values())
        runs = 0
        while not all(leaf.tight for leaf in ledger.leaves):
            assert (await site.thin()).points == 0
            await site.collect()
            ledger = await _ledger(site)
            runs += 1
            assert runs < 100
        assert runs >= len(untidy)
        assert await site.check() == left
        assert sum(len(one[0]) for one in site.bench.store.objects.values()) < before
        # And then there is nothing to do.
        ledgers = (await site.record()).ledgers
        await site.thin()
        assert (await site.record()).ledgers == ledgers


@asynccontextmanager
async def moved_bit_by_bit(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    """Give a line of 100 points of which a run may move next to nothing."""
    monkeypatch.setattr("vdiskfs.catalog.rewriting.MOVE_LIMIT", 1)
    monkeypatch.setattr("vdiskfs.catalog.rewriting.REWRITE_LIMIT", 1)
    monkeypatch.setattr("vdiskfs.catalog.rewriting._PART", 1 << 40)
    async with bench() as test:
        site = Site(test, directory, random.Random(5))
        test.model.writer_options = {"inline_limit": 0, "segment_limit": 3_000}
        await site.publish(100)
        yield site


async def _needed(log: DiskLog) -> int:
    """Return the bytes of the pages in which each point there is differs from the one before."""
    await log.points()
    ledger, line = log.line.ledger, log.line
    pieces = [leaf.piece for leaf in ledger.leaves] if ledger else []
    pages = 0
    for piece in [*pieces, *(one for one in line.cover if one.from_epoch >= line.floor)]:
        opened = await log.tables.piece(piece)
        for row in await opened.rows(DATA, 0, 1 << 40):
            pages += len((await opened.entries(row)).sums)
    return pages * 2064


async def _ledger(site: Site) -> Ledger:
    log = await site.log()
    await log.points()
    assert log.line.ledger is not None
    return log.line.ledger


async def test_damage_in_what_would_be_moved_stops_no_thinning_and_leaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found in the last moment, when all else of it was stored already."""
    monkeypatch.setattr("vdiskfs.catalog.rewriting.MOVE_LIMIT", 1)
    found = []

    def hook(name: str) -> None:
        if name == "thin.moved":
            found.append(name)
            raise DamagedError("a frame is damaged")

    async with bench() as test:
        site = Site(test, tmp_path, random.Random(5))
        await site.publish(200)
        with monkeypatch.context() as patch:
            patch.setattr("vdiskfs.catalog.leaves.hook", hook)
            assert (await site.thin()).points > 50
        assert found
        stored = {one for one in test.store.objects if one.startswith("segments/")}
        assert stored
        await site.collect()
        assert not stored & set(test.store.objects)
        ledger = await _ledger(site)
        assert all(leaf.piece.level == 0 or leaf.refs for leaf in ledger.leaves)
        await site.check()


async def test_runs_that_come_to_nothing_move_the_same_data_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leaf of which a part was moved is taken up by the next run."""
    async with moved_bit_by_bit(tmp_path, monkeypatch) as site:
        stored = []
        for _ in range(3):
            with monkeypatch.context() as patch, pytest.raises(InterruptedError):
                patch.setattr(Thinner, "_commit", Mock(side_effect=InterruptedError))
                await site.thin()
            stored.append({one for one in site.bench.store.objects if one.startswith("segments/")})
        assert stored[2] == stored[0]
        await site.thin()
        assert stored[0] & (await _ledger(site)).live(site.bench.record.id)
        await site.collect()
        await site.check()


def test_the_worst_objects_go_first_and_no_more_than_there_is_room_for() -> None:
    whole = [Held(64 * MIB, 64 * MIB)] * 10
    worst, bad = Held(64 * MIB, 8 * MIB), Held(64 * MIB, 32 * MIB)
    assert choose_moved(whole, 1 << 30).moved == frozenset()
    assert choose_moved([*whole, worst], 1 << 30).moved == {10}
    assert choose_moved([bad, *whole, worst, bad], 1 << 30).moved == {11, 0}
    some = choose_moved([bad, *whole, worst, bad], 16 * MIB)
    assert (sorted(some.moved), some.bytes, some.is_all) == ([11], 8 * MIB, False)
    # What another generation needs, too, stays whatever is moved.
    shared = Held(64 * MIB, 8 * MIB, is_shared=True)
    assert choose_moved([*whole, shared], 1 << 30).moved == frozenset()
    # Little data has segments of its own, and many small objects become one.
    assert choose_moved([Held(MOVE_LIMIT // 2, MOVE_LIMIT // 2)], 0).moved == {0}
    assert choose_moved([*whole, *[Held(MIB // 2, MIB // 2)] * 64], 1 << 30).moved == frozenset()
    small = choose_moved([*whole, *[Held(MIB // 2, MIB // 2)] * 65], 1 << 30)
    assert small.moved == frozenset(range(10, 75))
    # A large leaf has a 64th of it moved in a run, however little the run may move in all.
    large = choose_moved([Held(64 * MIB, 50 * MIB)] * 640, MIB)
    assert large.bytes == 500 * MIB
    assert not large.is_all
    assert choose_moved([Held(64 * MIB, 50 * MIB)] * 640, 0).moved == frozenset()
