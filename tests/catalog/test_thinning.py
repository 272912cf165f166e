"""Lines are thinned: every point that stays is the same bytes, whatever comes in between."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.catalog.harness import Bench, bench, content
from tests.delta.model import T0
from tests.vaults import BOTH, newcomer
from vdiskfs.catalog import DiskLog, check
from vdiskfs.catalog.garbage import GRACE_S, collect
from vdiskfs.catalog.grouppoints import _Placed, _seal_of
from vdiskfs.catalog.records import DiskRecord, Hold, LedgerRef
from vdiskfs.catalog.retention import kept, parse_ladder
from vdiskfs.catalog.thinning import Thinned, Thinner
from vdiskfs.errors import ConflictError, DamagedError, NotFoundError
from vdiskfs.units import NS

LADDER = parse_ladder("1s for 40s, 10s for 400s, 100s for 4000s")


@dataclass
class Site:
    """A site that publishes, thins and collects one disk of a vault in memory."""

    bench: Bench
    directory: Path
    rng: random.Random
    gone: set[str] = field(default_factory=set)
    scratches: int = 0

    @property
    def now_ns(self) -> int:
        return T0 + self.bench.model.epoch * NS

    async def publish(self, count: int) -> None:
        for _ in range(count):
            self.bench.model.churn(self.rng, writes=2, pages=48)
            await self.bench.publish()
            await self.bench.log.publish_joins()

    def thinner(self) -> Thinner:
        vault = newcomer(self.bench.vault)
        log = vault.log(self.bench.record)
        return Thinner(vault, log, writer_id="cc" * 16, scratch=self.directory / "thin")

    async def thin(self, **options: object) -> Thinned:
        outcome = await self.thinner().run(LADDER, self.now_ns, gone=self.gone, **options)  # type: ignore[arg-type]
        self.bench.log.adopt(await self.record())
        return outcome

    async def record(self) -> DiskRecord:
        return await self.bench.vault.disk(self.bench.record.id)

    async def log(self) -> DiskLog:
        return newcomer(self.bench.vault).log(await self.record())

    async def collect(self, later_s: int = GRACE_S + 1) -> int:
        log = await self.log()
        await log.line.load()
        if log.line.ledger is None:
            return 0
        done = await collect(self.bench.store, log.line.ledger, self.now_ns + later_s * NS)
        self.gone |= done.gone
        return done.deleted

    async def check(self) -> list[int]:
        """Read all points there are, each from nothing known; return their epochs."""
        log = await self.log()
        points = await log.points()
        for point in points:
            async with await log.open(point) as reader:
                assert await content(reader) == self.bench.model.states[point.epoch]
                assert reader.objects <= 64
            assert (await log.find(point.epoch)).time_ns == self.bench.model.times[point.epoch]
        vault = newcomer(self.bench.vault)
        report = await check(vault, read_data=True)
        assert not report.problems
        assert report.points == len(points)
        return [point.epoch for point in points]


@asynccontextmanager
async def published(directory: Path, count: int, *, seed: int) -> AsyncIterator[Site]:
    """Give a site whose disk has so many points."""
    async with bench() as test:
        site = Site(test, directory, random.Random(seed))
        await site.publish(count)
        yield site


@BOTH
async def test_points_that_stay_are_the_same_bytes_and_the_others_are_gone(tmp_path: Path) -> None:
    async with published(tmp_path, 600, seed=1) as site:
        test = site.bench
        outcome = await site.thin()
        assert outcome.points > 350
        left = await site.check()
        times = test.model.times
        assert set(left) >= {epoch for epoch in times if times[epoch] % (100 * NS) == 99 * NS}, (
            "the newest of each coarse bucket"
        )
        assert len(left) == outcome.left
        assert max(left) == 600
        with pytest.raises(NotFoundError):
            await (await site.log()).find(5)
        before = len(test.store.objects)
        assert await site.collect() > 350
        assert await site.check() == left
        assert len(test.store.objects) < before * 0.6
        # Applied again, at the same time, it finds nothing to do.
        assert (await site.thin()).points == 0
        assert await site.check() == left


async def test_a_line_that_was_thinned_goes_on(tmp_path: Path) -> None:
    async with bench() as test:
        site = Site(test, tmp_path, random.Random(2))
        for _ in range(7):
            await site.publish(80)
            await site.thin()
            await site.collect()
        left = await site.check()
        epochs = sorted(test.model.times)
        stays = kept(
            np.array(epochs, np.uint64),
            np.array([test.model.times[one] for one in epochs], np.uint64), LADDER, site.now_ns,
        )  # fmt: skip
        wanted = {epoch for epoch, stay in zip(epochs, stays, strict=True) if stay}
        # What is above the horizon is thinned by the next run.
        assert {one for one in left if one <= 560 - 256} == {
            one for one in wanted if one <= 560 - 256
        }
        assert wanted <= set(left)


async def test_the_thinned_line_is_reached_from_what_was_known_before(tmp_path: Path) -> None:
    async with published(tmp_path, 500, seed=3) as site:
        test = site.bench
        stale = test.fresh_log()
        kept_epoch, dropped = 480, 13
        reader = await stale.open(kept_epoch)
        reader_of_dropped = await stale.open(dropped)
        await site.thin()
        await site.publish(300)
        await site.thin()
        await site.collect()
        left = await site.check()
        assert dropped not in left
        survivor = max(epoch for epoch in left if epoch <= 500)
        assert (await stale.find(survivor)).epoch == survivor
        late = await stale.open(survivor)
        assert await content(late) == test.model.states[survivor]
        with pytest.raises(NotFoundError, match="thinned away"):
            await content(reader_of_dropped)
        if kept_epoch in left:
            assert await content(reader) == test.model.states[kept_epoch]
        assert (await stale.tip()).epoch == 800


async def test_holds_and_open_points_stay(tmp_path: Path) -> None:
    async with published(tmp_path, 400, seed=4) as site:
        test = site.bench

        def hold(record: DiskRecord) -> DiskRecord:
            return replace(record, holds=(Hold(1, 17, "mine", "2026-01-01T00:00:00Z"),))

        await test.vault.update_disk(test.record.id, hold)
        await site.thin(leased={(1, 23)})
        await site.collect()
        left = await site.check()
        assert {17, 23} <= set(left)
        assert not {16, 18, 22, 24} & set(left)


async def test_a_hold_in_the_last_moment_stops_the_commit(tmp_path: Path) -> None:
    async with published(tmp_path, 400, seed=5) as site:
        test = site.bench
        thinner = site.thinner()
        commit = thinner._commit

        async def late(plan: object, ledger: object) -> None:
            def hold(record: DiskRecord) -> DiskRecord:
                return replace(record, holds=(Hold(1, 17, "", "2026-01-01T00:00:00Z"),))

            await test.vault.update_disk(test.record.id, hold)
            await commit(plan, ledger)  # type: ignore[arg-type]

        thinner._commit = late  # type: ignore[method-assign]
        with pytest.raises(ConflictError, match="holds"):
            await thinner.run(LADDER, site.now_ns)
        assert len(await site.check()) == 400
        await site.thin()
        await site.collect()
        assert 17 in await site.check()
        # What the run wrote that came to nothing is garbage that was found.
        assert not [name for name in test.store.objects if ".8/" in name and name.endswith(".0")]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"parents": {1: None, 2: (1, 17)}}, "forks"),
        ({"policy": "other"}, "policy"),
        ({"ledgers": {1: LedgerRef("a" * 32, 9)}}, "another site"),
    ],
)
async def test_what_was_decided_is_void_once_the_disk_is_another(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    async with published(tmp_path, 150, seed=5) as site:
        thinner, test = site.thinner(), site.bench
        commit = thinner._commit

        async def late(plan: object, ledger: object) -> None:
            await test.vault.update_disk(test.record.id, lambda found: replace(found, **change))
            await commit(plan, ledger)  # type: ignore[arg-type]

        thinner._commit = late  # type: ignore[method-assign]
        with pytest.raises(ConflictError, match=match):
            await thinner.run(LADDER, site.now_ns)
        assert (await site.record()).ledgers == change.get("ledgers", {})


@BOTH
async def test_a_slot_that_was_collected_is_not_filled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with published(tmp_path, 100, seed=6) as site:
        test = site.bench
        stale = test.fresh_log()
        await stale.tip()
        sealed = test.model
        sealed.churn(site.rng, pages=48)
        spooled = sealed.seal()
        twin = spooled.path.with_name("twin.delta")
        twin.write_bytes(spooled.path.read_bytes())
        await test.log.publish(spooled)
        await site.publish(400)
        await site.thin()
        await site.collect()
        # The stale writer was stopped for long: its slot is empty, and it fills it.
        monkeypatch.setattr("vdiskfs.catalog.log.FRESH_S", -1.0)
        with pytest.raises(ConflictError, match="below the horizon"):
            await stale.publish(replace(spooled, path=twin))
        await site.check()


@BOTH
async def test_a_damaged_delta_stops_thinning_and_nothing_is_lost(tmp_path: Path) -> None:
    async with bench() as test:
        site = Site(test, tmp_path, random.Random(7))
        for _ in range(400):
            test.model.churn(site.rng, writes=2, pages=48)
            await test.publish()
        victim = next(name for name in test.store.objects if name.endswith(f"{9:016x}"))
        data, metadata, _ = test.store.objects[victim]
        broken = bytearray(data)
        broken[len(data) - 520] ^= 1
        test.store.put(victim, bytes(broken), metadata)
        before = set(test.store.objects)
        with pytest.raises(DamagedError):
            await site.thin()
        assert before <= set(test.store.objects)
        assert not (await site.record()).ledgers


async def test_points_of_several_disks_are_known_as_one_instant_once_thinned(
    tmp_path: Path,
) -> None:
    async with published(tmp_path, 99, seed=9) as site:
        test = site.bench
        model, number = test.model, "ee" * 16
        model.churn(site.rng, writes=2, pages=48)
        writer = model.writer()
        for batch in model.batches(sorted(model.dirty), 64):
            writer.add(batch)
        spooled = model.sealed(writer.finish(replace(model.facts(), group_id=number)))
        await test.log.publish(spooled)
        await site.publish(150)
        await site.thin(leased={(1, 100)})
        await site.collect()
        log = await site.log()
        point = await log.find(100)
        assert await _seal_of(log, _Placed(point, 99)) == number
        other = max(epoch for epoch in await site.check() if epoch < 200 and epoch != 100)
        assert await _seal_of(log, _Placed(await log.find(other), other - 1)) == "00" * 16
