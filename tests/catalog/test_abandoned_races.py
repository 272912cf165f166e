"""Writers, looks, thinning and kills in any order: no published point loses a segment."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.catalog.harness import Bench, bench, content_at
from tests.catalog.test_interleavings import Hooks, killed_or_done
from tests.catalog.test_thinning import LADDER
from tests.catalog.test_upkeep import Tender
from tests.catalog.writing import DAY_S, Writer, look, record_of, stored
from tests.vaults import newcomer
from vdiskfs.catalog import DiskLog
from vdiskfs.catalog.abandoned import sweep
from vdiskfs.catalog.garbage import ClockError
from vdiskfs.errors import ConflictError, SegmentsGoneError

pytestmark = pytest.mark.usefixtures("each_vault")

ROUNDS = int(os.environ.get("VDISKFS_INTERLEAVINGS", "300"))


class Steps(Hooks):
    """What a look passes, and a writer that claims and publishes."""

    MODULES = ("abandoned", "batches", "garbage", "publish")


async def test_killed_at_any_step_the_same_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: Callable[[str], None]
) -> None:
    """batch.claimed, batches.judged, garbage.deleted, slot.published: each, and again."""
    steps = Steps(monkeypatch)
    number, done = 0, False
    while not done:
        number += 1
        steps.left = number
        async with bench() as test:
            tender = Tender(test, tmp_path)
            tender.at(0)
            lost, kept = (Writer(test, random.Random(seed)) for seed in (1, 2))
            for writer in (lost, kept, kept, lost):
                await writer.store_part()
            delta = kept.seal()
            work: list[Callable[[], Awaitable[object]]] = [
                lambda: test.fresh_log().claims.need([lost.batch, kept.batch]),
                partial(look, test, tender, 8),
                lambda: test.fresh_log().claims.need([kept.batch]),
                partial(look, test, tender, 20),
                partial(look, test, tender, 45),
                lambda: test.fresh_log().publish(delta),
                partial(look, test, tender, 60),
                partial(look, test, tender, 100),
            ]
            for action in work:
                if await killed_or_done(action):
                    await action()
            done = steps.left > 0
            steps.left = 0
            assert stored(test) == kept.names
            log = test.fresh_log()
            async with await log.open(1) as reader:
                await reader.read_pages(0, reader.pages)
            assert kept.batch not in (await record_of(test)).batches
    assert {"batch.claimed", "batches.judged", "garbage.deleted", "slot.published"} <= steps.killed
    tell(f"looks for abandoned segments: killed at {number - 1} steps, {sorted(steps.killed)}")


@pytest.mark.timeout(1200)
async def test_whoever_comes_between_no_published_point_loses_a_segment(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """ROUNDS steps of writers, sweeps that are stopped anywhere, thinning, clocks that jump."""
    seed = int(os.environ.get("VDISKFS_SEED", random.randrange(1 << 30)))
    tell(f"abandoned segments, VDISKFS_SEED={seed}")
    rng, done = random.Random(seed), dict.fromkeys(("published", "gone", "deleted", "lost"), 0)
    async with bench() as test:
        tender = Tender(test, tmp_path)
        now = [0.0]
        tender.at(0)
        sites: list[tuple[Writer, DiskLog]] = []

        async def one_sweep(late: int = 0) -> None:
            for _ in range(late):
                await trio.lowlevel.checkpoint()
            try:
                found = await sweep(tender.upkeep.vault, test.record.id, tender.store_ns)
                done["deleted"] += found.deleted
            except ConflictError:
                done["lost"] += 1

        async def publish(writer: Writer, log: DiskLog) -> None:
            # What of it is not stored, or not any more, is what the disk was before.
            before = (test.model.epoch, test.model.digest, test.model.from_size, test.model.cut)
            delta = writer.seal()
            try:
                await log.publish(delta)
                done["published"] += 1
            except SegmentsGoneError:
                done["gone"] += 1
                model = test.model
                del model.states[model.epoch]
                model.epoch, model.digest, model.from_size, model.cut = before
                model.data[:] = model.states[model.epoch]

        for _ in range(ROUNDS):
            now[0] += rng.choice([0, 0, 1, 8, 40]) * DAY_S * rng.random()
            tender.at(now[0] + rng.choice([0, 0, 0, 400, -400]) * DAY_S)
            step = rng.choice(
                ["begin", "begin", "part", "part", "sweep", "race", "race", "end", "thin"]
            )
            if step == "begin" and not sites:
                writer = Writer(test, rng)
                log = newcomer(test.vault).log(await record_of(test))
                if rng.random() < 0.7:
                    await log.claims.need([writer.batch])
                sites.append((writer, log))
            elif step == "part" and sites:
                await sites[0][0].store_part()
            elif step == "sweep":
                await one_sweep()
            elif step == "race" and sites and sites[0][0].parts:
                writer, log = sites.pop()
                async with trio.open_nursery() as nursery:
                    for _ in range(2):
                        nursery.start_soon(one_sweep, rng.randrange(20))
                    nursery.start_soon(partial(publish, writer, log))
            elif step == "end" and sites and rng.random() < 0.3:
                writer, _ = sites.pop()
                model = test.model
                model.data[:] = model.states[model.epoch]
            elif step == "thin":
                log = tender.upkeep.vault.log(await record_of(test))
                with contextlib.suppress(ClockError):
                    await tender.upkeep.tend(log, LADDER, tmp_path / "thin")
            if rng.random() < 0.2:
                await check(test)
        await check(test)
        await Writer(test, rng).store_part()
        for _ in range(4):
            now[0] += 40 * DAY_S
            tender.at(now[0])
            await one_sweep()
        await check(test)
        assert (await tender.upkeep.sweep(test.record.id)).waiting == 0
    tell(f"  {done}")
    assert done["published"] > ROUNDS // 60
    assert done["deleted"]


async def check(test: Bench) -> None:
    log = test.fresh_log()
    for point in await log.points():
        assert await content_at(log, point.epoch) == test.model.states[point.epoch]
