"""Several tasks use the points of one disk at once."""

from __future__ import annotations

import random

import pytest
import trio

from tests.catalog.harness import bench


@pytest.mark.parametrize("seed", range(8))
async def test_tasks_may_use_a_log_at_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One surveys the line while another looks in it, a third publishes and joins."""
    async with bench() as test:
        await test.churn(15 if seed % 2 else 60, joins=False)
        log, known = test.fresh_log(), test.model.epoch
        rng = random.Random(seed)

        async def slow() -> None:
            for _ in range(rng.randrange(1, 9)):
                await trio.lowlevel.checkpoint()

        monkeypatch.setattr(test.store, "_request", slow)

        async def look() -> None:
            for _ in range(6):
                wanted = rng.randrange(1, known + 1)
                assert (await log.find(wanted)).epoch == wanted
                assert (await log.find("latest")).epoch >= known
                assert len(await log.points()) >= known
                assert (await log.tip()).epoch >= known
                async with await log.open(known) as reader:
                    assert reader.epoch == known

        async def write() -> None:
            await log.tip()
            for _ in range(6):
                test.model.churn(rng, pages=64)
                await log.publish(test.model.seal())
                await log.publish_joins()

        async with trio.open_nursery() as nursery:
            for task in (look, look, look, write):
                nursery.start_soon(task)
        epochs = list(range(1, test.model.epoch + 1))
        assert [point.epoch for point in await log.points()] == epochs
        assert [point.epoch for point in await test.fresh_log().points()] == epochs
