"""Looks for segments that nothing names, where others change what names them meanwhile."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.catalog.harness import Bench, bench, content_at, is_joined, is_slot
from tests.catalog.test_upkeep import Tender
from tests.catalog.writing import DAY_S, Writer, look, record_of, stored
from tests.delta.model import T0
from tests.vaults import newcomer
from vdiskfs.catalog import abandoned, rewriting
from vdiskfs.catalog.garbage import Collected
from vdiskfs.catalog.records import DOUBTED, GIVEN_UP
from vdiskfs.catalog.retention import parse_ladder
from vdiskfs.delta import Spooled
from vdiskfs.errors import ConflictError, DamagedError, SegmentsGoneError

T0_S = T0 / 1e9

pytestmark = pytest.mark.usefixtures("each_vault")


async def with_a_part_too_many(test: Bench) -> tuple[Writer, Spooled]:
    """Return a writer of two parts, of which its delta will have one; and the other one."""
    writer = Writer(test, random.Random(2))
    await writer.store_part()
    await writer.store_part()
    return writer, writer.parts.pop()


@pytest.mark.parametrize("given_up", [False, True])
async def test_thinning_during_a_long_look_takes_no_segment_from_a_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, given_up: bool
) -> None:
    """It ends later than the slots that it should have read: they were thinned away meanwhile.

    Their batch is doubted, or given up, because part of it was never named.
    """
    monkeypatch.setattr(rewriting, "MOVE_LIMIT", 0)
    async with bench() as test:
        tender = Tender(test, tmp_path)
        tender.at(0)
        writer, _ = await with_a_part_too_many(test)
        await test.log.publish(writer.seal())
        await look(test, tender, 8)
        assert (await record_of(test)).batches[writer.batch].state == DOUBTED
        if given_up:
            with patch.object(abandoned, "collect_names", _nothing):
                await look(test, tender, 39)
            assert (await record_of(test)).batches[writer.batch].state == GIVEN_UP
        above = abandoned._above_horizons

        async def late(logs: Any) -> set[str]:
            for page in (40, 41):
                test.model.write(page * 4096, b"x" * 4096)
                await test.publish()
            for _ in range(3):
                log = tender.upkeep.vault.log(await record_of(test))
                await tender.upkeep.tend(log, parse_ladder("20s for 10y"), tmp_path / "thin")
                tender.at(tender.store_ns / 1e9 - T0_S + 7200)
            return await above(logs)

        tender.at(40 * DAY_S)
        with patch.object(abandoned, "_above_horizons", late), contextlib.suppress(ConflictError):
            await abandoned.sweep(newcomer(test.vault), test.record.id, tender.store_ns)
        log = test.fresh_log()
        await log.learn()
        assert log.record.ledgers, "it was thinned"
        for point in await log.points():
            await content_at(log, point.epoch)


async def _nothing(*_: object) -> Any:
    return Collected()


async def test_what_a_joined_delta_names_stays_where_its_slot_is_lost(tmp_path: Path) -> None:
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0}
        tender = Tender(test, tmp_path)
        tender.at(0)
        await test.churn(40)
        joined = [name for name in test.store.objects if is_joined(name)]
        assert joined
        slots = sorted(name for name in test.store.objects if is_slot(name))
        names = stored(test)
        del test.store.objects[slots[3]]
        assert await content_at(test.fresh_log(), 40) == test.model.states[40]
        for day in (10, 50, 90):
            with contextlib.suppress(DamagedError):
                await look(test, tender, day)
        assert stored(test) == names
        assert await content_at(test.fresh_log(), 40) == test.model.states[40]


async def test_that_a_batch_was_given_up_is_not_forgotten_by_who_has_published_of_it(
    tmp_path: Path,
) -> None:
    """A copy of its directory may have parts of the same batch."""
    async with bench() as test:
        tender = Tender(test, tmp_path)
        tender.at(0)
        writer, lost = await with_a_part_too_many(test)
        await test.log.claims.need([writer.batch])
        await test.log.publish(writer.seal())
        writer.parts = [lost]
        await look(test, tender, 8)
        await look(test, tender, 40)
        assert not writer.names & stored(test)
        await test.log.claims.need(["ab" * 8])
        with pytest.raises(SegmentsGoneError):
            await test.fresh_log().claims.need([writer.batch])


async def test_a_delta_that_is_there_is_not_damaged_by_what_it_does_not_name(
    tmp_path: Path,
) -> None:
    """Its answer was lost, for so long that the rest of its batch was given up."""
    async with bench() as test:
        tender = Tender(test, tmp_path)
        tender.at(0)
        writer, _ = await with_a_part_too_many(test)
        delta = writer.seal()
        await test.log.publish(delta)
        await look(test, tender, 8)
        await look(test, tender, 40)
        assert stored(test) == writer.names
        assert (await record_of(test)).batches[writer.batch].state == GIVEN_UP
        await test.fresh_log().publish(delta)


@pytest.mark.parametrize("kept", [False, True])
async def test_a_writer_that_slept_before_its_slot_looks_again_behind_it(
    monkeypatch: pytest.MonkeyPatch, *, kept: bool
) -> None:
    """What it had claimed was collected in its sleep: stored again, or said."""
    clock = [0.0]
    monkeypatch.setattr("vdiskfs.catalog.publish.boottime_s", lambda: clock[0])
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0}
        test.model.write(0, random.Random(1).randbytes(65536))
        delta = test.model.seal()

        def sleep() -> None:
            clock[0] += 40 * DAY_S
            for name in stored(test):
                del test.store.objects[name]
            if not kept:
                delta.segments[0].path.unlink()

        with contextlib.nullcontext() if kept else pytest.raises(DamagedError):
            await test.log.publish(delta, offered=sleep)
        if kept:
            assert await content_at(test.fresh_log(), 1) == test.model.states[1]


async def test_a_look_with_nothing_loose_reads_no_delta(tmp_path: Path) -> None:
    """Not for the year in which it is known what was given up, either."""
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0}
        tender = Tender(test, tmp_path)
        tender.at(0)
        await Writer(test, random.Random(1)).store_part()
        for day in (8, 40):
            await look(test, tender, day)
        tender.at(40 * DAY_S)
        counts = []
        for epochs in (3, 30):
            for _ in range(epochs):
                test.model.write(0, random.Random(test.model.epoch).randbytes(65536))
                await test.publish()
            before = test.store.requests
            assert (await look(test, tender, 41)).waiting == 0
            counts.append(test.store.requests - before)
        assert (await record_of(test)).batches
        assert counts[1] <= counts[0] + 3, counts
