"""A line that cannot be thinned is tried again and again, and the vault does not grow by it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import trio

from tests.catalog.harness import Bench, bench
from tests.catalog.test_thinning import Site
from tests.catalog.test_upkeep import Tender
from vdiskfs.catalog.garbage import GRACE_S
from vdiskfs.catalog.ledger import write_ledger
from vdiskfs.catalog.remains import OLD_S
from vdiskfs.catalog.upkeep import SWEEP_S
from vdiskfs.delta.names import segment_name
from vdiskfs.errors import ConflictError, DamagedError, NotFoundError


@pytest.mark.parametrize("how", ["flipped", "missing"])
async def test_what_runs_that_failed_have_stored_is_taken_up(tmp_path: Path, how: str) -> None:
    """A damaged slot ends each run; when it is whole again nothing of them is left over."""
    async with bench() as test:
        site = Site(test, tmp_path, random.Random(7))
        for _ in range(300):
            test.model.churn(site.rng, writes=2, pages=48)
            await test.publish()
        await test.log.publish_joins()
        victim = next(name for name in test.store.objects if name.endswith(f"/{200:016x}"))
        data, metadata, _ = test.store.objects[victim]
        broken = bytearray(data)
        broken[len(data) - 520] ^= 1
        if how == "flipped":
            test.store.put(victim, broken, metadata)
        else:
            # Not the joined delta that has its frames: the leaf that ends there needs the slot.
            del test.store.objects[victim]
        counts = []
        for _ in range(6):
            with pytest.raises((DamagedError, NotFoundError)):
                await site.thin()
            counts.append(len(test.store.objects))
        stored = set(test.store.objects)
        assert counts[0] > 320, "leaves were stored before the damage was met"
        assert len(set(counts)) == 1
        test.store.put(victim, data, metadata)
        assert (await site.thin()).points > 150
        log = await site.log()
        await log.line.load()
        assert log.line.ledger is not None
        live = log.line.ledger.live(test.record.id)
        assert len(live & stored - {victim}) > 20, "they are leaves now"
        await site.check()
        await site.collect()
        await site.check()
        report = {name for name in test.store.objects if name.startswith("segments/")}
        assert report <= live


async def test_what_is_doomed_is_not_taken_up(tmp_path: Path) -> None:
    """Nor a delta whose segments are: somebody may delete them at any moment."""
    async with bench() as test:
        site = Site(test, tmp_path, random.Random(8))
        await site.publish(120)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr("vdiskfs.catalog.thinning.write_ledger", _cut_off)
            await site.thin()
        left = {name for name in test.store.objects if name.startswith("segments/")}
        assert left
        # A segment of one of them is gone: as if a run that was stopped had stored it late.
        gone = min(left)
        del test.store.objects[gone]
        await site.thin()
        log = await site.log()
        await log.line.load()
        assert log.line.ledger is not None
        live = log.line.ledger.live(test.record.id)
        assert gone not in live
        assert left & live, "the others are taken up"
        assert not live & log.line.ledger.doomed.keys()
        await site.check()


async def _cut_off(*_: object) -> str:
    raise InterruptedError


async def test_what_a_killed_run_has_moved_is_collected_without_its_directory(
    tmp_path: Path,
) -> None:
    """As `vault gc` on another host leaves it: after a week, and not what a writer stored."""
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(9)), Tender(test, tmp_path)
        await site.publish(80)
        tender.at(81)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr("vdiskfs.catalog.leaves.hook", Mock(side_effect=InterruptedError))
            await site.thin()
        (lost,) = _segments(test)
        shutil.rmtree(tmp_path / "thin")
        # A writer's, of a pass that takes its time, and of another line's thinning.
        kept = {segment_name(test.record.id, f"{number:032x}") for number in (1, 2)}
        for name, metadata in zip(sorted(kept), ({}, {"leaf": "2"}), strict=True):
            test.store.put(name, b"data", metadata)
        await tender.tend(ladder="10s for 10y")
        live = _segments(test) - {lost} - kept
        assert live
        tender.at(81 + OLD_S - SWEEP_S)
        await tender.tend(ladder="10s for 10y")
        assert {lost, *kept, *live} <= _segments(test)
        tender.at(81 + OLD_S + 60)
        await tender.tend(ladder="10s for 10y")
        tender.at(81 + OLD_S + GRACE_S + 120)
        assert (await tender.tend(ladder="10s for 10y")).collected.deleted == 2, "a ledger, too"
        assert lost not in test.store.objects
        assert kept | live <= _segments(test)
        await site.check()
        # And once a day is enough: with nothing else to do it is one listing more.
        counts = []
        for second in (180, 240, SWEEP_S + 300):
            tender.at(81 + OLD_S + GRACE_S + second)
            before = test.store.lists
            await tender.tend(ladder="10s for 10y")
            counts.append(test.store.lists - before)
        assert counts[2] == counts[1] + 1


async def test_a_run_that_slept_for_a_week_loses_to_who_collected_what_it_had_stored(
    tmp_path: Path,
) -> None:
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(10)), Tender(test, tmp_path / "other")
        await site.publish(80)
        tender.at(81)
        stopped, goes_on = trio.Event(), trio.Event()

        async def sleep(*args: Any) -> str:
            stopped.set()
            await goes_on.wait()
            return await write_ledger(*args)

        async def sleeper() -> None:
            with pytest.raises(ConflictError):
                await site.thin()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vdiskfs.catalog.thinning.write_ledger", sleep)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sleeper)
                await stopped.wait()
                patch.undo()
                mine = _segments(test)
                tender.at(81 + OLD_S + 60)
                # Another ladder: nothing of that is taken up.
                await tender.tend(ladder="7s for 10y")
                tender.at(81 + OLD_S + 120 + GRACE_S)
                await tender.tend(ladder="7s for 10y")
                assert not mine & _segments(test)
                goes_on.set()
        await site.check()


def _segments(test: Bench) -> set[str]:
    return {name for name in test.store.objects if name.startswith("segments/")}
