"""A line that cannot be thinned is tried again and again, and the vault does not grow by it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.catalog.harness import bench
from tests.catalog.test_thinning import Site
from vdiskfs.errors import DamagedError, NotFoundError


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
