"""When lines are tended, and when not: clocks, open points, immutable containers, policies."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.catalog.harness import Bench, bench
from tests.catalog.test_thinning import LADDER, Site
from tests.delta.model import T0
from tests.vaults import BOTH, edited, newcomer
from vdiskfs.catalog import Owner, SiteRecord, Vault
from vdiskfs.catalog.garbage import GRACE_S, SKEW_S, STEP_S, ClockError, thinning_time_ns
from vdiskfs.catalog.leaves import Take
from vdiskfs.catalog.policy import (
    PRESETS,
    Policy,
    changed_policy,
    list_policies,
    read_policy,
    set_policy,
)
from vdiskfs.catalog.records import (
    DiskRecord,
    Handover,
    Moved,
    decode_disk,
    decode_site,
    encode_disk,
    encode_site,
)
from vdiskfs.catalog.retention import parse_ladder
from vdiskfs.catalog.upkeep import Tended, Upkeep, hold_point, release_point
from vdiskfs.errors import FormatError, NotFoundError, RefusedError, UsageError
from vdiskfs.units import NS, format_time


async def names_in(vault: Vault) -> set[str]:
    return {info.name async for info in vault.store.list("")}


class Tender:
    """Tends the disk of a bench; clocks are moved by hand."""

    def __init__(self, test: Bench, directory: Path) -> None:
        self.test = test
        self.directory = directory
        self.local_ns = self.store_ns = T0
        self.upkeep = Upkeep(newcomer(test.vault), "cc" * 16, clock=lambda: self.local_ns)

    def at(self, seconds: float, *, skew_s: float = 0) -> None:
        self.store_ns = T0 + int(seconds * NS)
        self.local_ns = self.store_ns + int(skew_s * NS)
        self.test.store.now_ns = self.store_ns

    async def tend(
        self, *, dry_run: bool = False, ladder: str = "", take: Take | None = None
    ) -> Tended:
        rungs = parse_ladder(ladder) if ladder else LADDER
        log = self.upkeep.vault.log(await self.test.vault.disk(self.test.record.id))
        return await self.upkeep.tend(
            log, rungs, self.directory / "thin", dry_run=dry_run, take=take
        )


class NotSentError(Exception):
    """What was to be sent is not."""


@BOTH
async def test_what_a_dry_run_says_is_what_is_done(tmp_path: Path) -> None:
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(1)), Tender(test, tmp_path)
        await site.publish(120)
        tender.at(121)
        before = await names_in(test.vault)
        said = await tender.tend(dry_run=True)
        assert await names_in(test.vault) == before | {"clock.json"}
        done = await tender.tend()
        assert (said.thinned.points, said.thinned.bytes) == (
            done.thinned.points,
            done.thinned.bytes,
        )
        assert said.thinned.points > 50
        assert said.thinned.oldest_ns == done.thinned.oldest_ns
        assert len(await site.check()) == done.thinned.left


@BOTH
async def test_what_thinning_sends_waits_for_its_turn(tmp_path: Path) -> None:
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(3)), Tender(test, tmp_path)
        await site.publish(120)
        tender.at(121)
        turns: list[int] = []

        async def take(size: int) -> None:
            assert await names_in(test.vault) == names, "nothing is sent before its turn"
            turns.append(size)
            raise NotSentError

        names = await names_in(test.vault) | {"clock.json"}
        with pytest.raises(NotSentError):
            await tender.tend(take=take)
        before, store = await names_in(test.vault), tender.upkeep.vault.store
        sent = store.bytes_sent

        async def count(size: int) -> None:
            turns.append(size)

        turns.clear()
        await tender.tend(take=count)
        made = await names_in(test.vault) - before
        assert any(name.startswith("segments/") for name in made)
        # The ledger, disk.json and clock.json are no part of it; what encryption adds is not, too.
        assert 0.8 * (store.bytes_sent - sent) < sum(turns) <= store.bytes_sent - sent


@BOTH
@pytest.mark.parametrize("skew_s", [-301, 301])
async def test_clocks_that_disagree_stop_it(tmp_path: Path, skew_s: int) -> None:
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(2)), Tender(test, tmp_path)
        await site.publish(60)
        tender.at(10_000, skew_s=skew_s)
        with pytest.raises(ClockError):
            await tender.tend()
        assert len(await site.check()) == 60


@BOTH
async def test_a_clock_a_year_ahead_does_not_delete_the_year(tmp_path: Path) -> None:
    """All clocks agree, and are wrong: the points are thinned for one day, not for a year."""
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(3)), Tender(test, tmp_path)
        await site.publish(60)
        ladder = "1s for 2d, 1m for 1y"
        tender.at(61)
        await tender.tend(ladder=ladder)
        year = 366 * 86400
        tender.at(61 + year)
        assert (await tender.tend(ladder=ladder)).thinned.points == 0
        tender.at(62)
        with pytest.raises(ClockError, match="before the last thinning"):
            await tender.tend(ladder=ladder)
        assert len(await site.check()) == 60
        # A host that really was off for a year is caught up with, a day at a time.
        for day in range(1, 5):
            tender.at(61 + year + day)
            await tender.tend(ladder=ladder)
        assert len(await site.check()) < 10
        assert STEP_S == 86400


@BOTH
async def test_nothing_is_deleted_within_the_grace_period(tmp_path: Path) -> None:
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(4)), Tender(test, tmp_path)
        await site.publish(100)
        before = {name for name in test.store.objects if name != "clock.json"}
        tender.at(101)
        await tender.tend()
        tender.at(101 + GRACE_S - 1)
        await tender.tend()
        assert before <= set(test.store.objects)
        tender.at(103 + GRACE_S)
        assert (await tender.tend()).collected.deleted > 50
        assert not before <= set(test.store.objects)
        await site.check()


@BOTH
async def test_what_is_open_somewhere_stays_as_long_as_that_site_lives(tmp_path: Path) -> None:
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(5)), Tender(test, tmp_path)
        await site.publish(100)

        async def beat(uses: tuple[tuple[str, int, int], ...], seconds: float) -> None:
            await test.vault.write_site(SiteRecord(
                site="b", host="b", time=format_time(T0 + int(seconds * NS)), version="1",
                disks=(), pid=1, started="", writer="dd" * 16, uses=uses,
            ))  # fmt: skip

        use = (test.record.id, 1, 13)
        tender.at(101)
        await tender.tend()
        assert 13 not in await site.check()
        # Opened just before it was thinned away: nothing is deleted while it is open.
        await beat((use,), 102)
        for later_s in (GRACE_S, 6 * 86400):
            tender.at(110 + later_s)
            assert (await tender.tend()).collected.deleted == 0
        # The site is silent for more than a week: it does not count any more.
        tender.at(110 + 8 * 86400)
        assert (await tender.tend()).collected.deleted > 50


@BOTH
async def test_what_an_immutability_policy_keeps_is_waited_for(tmp_path: Path) -> None:
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(6)), Tender(test, tmp_path)
        await site.publish(100)
        tender.at(101)
        await tender.tend()
        delete = test.store.delete

        asked = []

        async def refuse(name: str) -> None:
            asked.append(name)
            raise RefusedError("the vault refused: BlobImmutableDueToPolicy")

        test.store.delete = refuse  # type: ignore[method-assign]
        tender.at(105 + GRACE_S)
        first = (await tender.tend()).collected
        assert first.refused > 50
        assert first.deleted == 0
        assert len(asked) < 30  # the others are not even asked for
        test.store.delete = delete  # type: ignore[method-assign]
        second = (await tender.tend()).collected
        assert second.deleted == first.refused
        await site.check()


async def test_what_cannot_be_deleted_fills_no_ledger_and_a_few_hold_up_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ledger that grew for ever could one day not be read: then no point could be."""
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(1)), Tender(test, tmp_path)
        monkeypatch.setattr("vdiskfs.catalog.upkeep.DOOMED_MOST", 60)
        delete, kept = test.store.delete, set[str]()

        async def refuse(name: str) -> None:
            if not kept or name in kept:
                raise RefusedError("the vault refused: BlobImmutableDueToPolicy")
            await delete(name)

        test.store.delete = refuse  # type: ignore[method-assign]
        sizes = []
        for number in range(1, 8):
            await site.publish(100)
            tender.at(100 * number + GRACE_S)
            await tender.tend()
            log = await site.log()
            await log.line.load()
            assert log.line.ledger is not None
            sizes.append(len(log.line.ledger.doomed))
        assert 60 < sizes[-1] == sizes[2] < 400
        await site.check()
        # Of most the time is over, and 20 are held: the rest goes, in some turns.
        ledger = log.line.ledger
        assert ledger is not None
        before = set(ledger.doomed)
        kept |= set(sorted(before)[:20])
        for number in range(40):
            tender.at(800 + 2 * GRACE_S + 7 * number)
            await tender.tend()
        assert before & set(test.store.objects) == kept
        assert len(tender.upkeep.gone[test.record.id, 1]) <= len(before)
        await site.check()


@BOTH
async def test_a_hold_keeps_a_point_until_it_is_released(tmp_path: Path) -> None:
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(7)), Tender(test, tmp_path)
        await site.publish(100)
        log = await site.log()
        point = await log.find(17)
        assert not point.held
        await hold_point(test.vault, log, point, "why")
        assert (await log.find(17)).held
        tender.at(101)
        await tender.tend()
        left = await site.check()
        assert 17 in left
        assert 16 not in left
        await release_point(test.vault, await site.log(), point)
        with pytest.raises(NotFoundError, match="not held"):
            await release_point(test.vault, await site.log(), point)
        await tender.tend()
        assert 17 not in await site.check()
        with pytest.raises(NotFoundError):
            await hold_point(test.vault, await site.log(), point, "too late")


async def test_a_dry_run_deletes_nothing(tmp_path: Path) -> None:
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(7)), Tender(test, tmp_path)
        await site.publish(60)
        tender.at(61)
        await tender.tend()
        tender.at(62 + GRACE_S)
        before = set(test.store.objects)
        assert (await tender.tend(dry_run=True)).collected.deleted == 0
        assert set(test.store.objects) == before
        assert (await tender.tend()).collected.deleted > 0


async def test_a_point_that_is_thinned_away_at_that_moment_is_not_held(tmp_path: Path) -> None:
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(7)), Tender(test, tmp_path)
        await site.publish(60)
        tender.at(61)
        log, record = await site.log(), await site.record()
        point = await log.find(16)

        async def late(*args: Any) -> DiskRecord:
            await tender.tend()
            return await test.vault.update_disk(*args)

        vault = cast("Any", SimpleNamespace(disk=test.vault.disk, update_disk=late))
        with pytest.raises(NotFoundError, match="no point"):
            await hold_point(vault, log, point, "")
        assert (await site.record()).holds == record.holds == ()


def test_a_time_that_was_thinned_for_is_never_taken_back() -> None:
    for later_s in (-SKEW_S, -1, 0):
        assert thinning_time_ns(T0 + later_s * NS, T0) == T0


@pytest.mark.parametrize("way", ["moved", "handover"])
async def test_a_disk_on_its_way_is_left_as_it_is(tmp_path: Path, way: str) -> None:
    """A failback compares with what is there."""
    to = Handover("ab" * 16, "there", "cd" * 16, "2026-01-01T00:00:00Z")
    owner = Owner("here", "cd" * 16, "ef" * 16, to.asked)
    moved = Moved(to.id, "12" * 16, "planned", "FailedOver", "there", to.asked, 1, owner)
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(7)), Tender(test, tmp_path)
        await site.publish(60)
        tender.at(61)
        for value, is_left in ((moved if way == "moved" else to, True), (None, False)):
            change: dict[str, Any] = {way: value}
            await test.vault.update_disk(test.record.id, partial(replace, **change))
            done = await tender.tend()
            assert (done.thinned.points == 0, done.thinned.left == 60) == (is_left, is_left)


@pytest.mark.parametrize(
    ("key", "fine", "wrong"),
    [
        ("epoch_interval", "50ms 1h", "49ms 61m -1s"),
        ("application_interval", "10s 12h", "9s 721m"),
        ("rpo_error", "5m 6m", "299s never"),  # the warning is at 5 minutes
        ("compression_level", "0 19", "20 0020 -1 1900 fast"),
        ("bandwidth_limit", "1MiB", "fast"),
        ("resync_window", "22:00-06:00", "22"),
    ],
)
def test_a_setting_of_a_policy_is_within_its_bounds(key: str, fine: str, wrong: str) -> None:
    base = Policy("p", rpo_warning="5m", rpo_error="")
    for text in fine.split():
        assert str(getattr(changed_policy(base, {key: text}), key)) == text
    for text in wrong.split():
        with pytest.raises(UsageError):
            changed_policy(base, {key: text})


@BOTH
async def test_policies_are_kept_in_the_vault(tmp_path: Path) -> None:
    async with bench() as test:
        store = test.store
        assert {one.name for one in (await list_policies(store))[0]} == set(PRESETS)
        assert (await read_policy(store, "default")).ladder == parse_ladder(
            "1s for 1h, 1m for 1d, 1h for 15d, 1d for 1y"
        )
        made = await set_policy(
            store,
            "shop",
            lambda one: changed_policy(one, {"retention": "1s for 1h", "rpo_error": "5m"}),
        )
        assert (
            await read_policy(store, "shop")
            == made
            == Policy("shop", retention="1s for 1h", rpo_error="5m")
        )
        assert {one.name for one in (await list_policies(store))[0]} == {*PRESETS, "shop"}
        with pytest.raises(NotFoundError):
            await read_policy(store, "other")
        with pytest.raises(UsageError, match="no 'speed'"):
            changed_policy(made, {"speed": "1"})
        with pytest.raises(UsageError, match="above rpo_error"):
            changed_policy(made, {"rpo_warning": "6m"})
        data, metadata, _ = store.objects["policies/shop.json"]
        body = {**made.to_body(), "retention": "1s for 1s for"}
        store.put("policies/shop.json", edited(data, policy=body), metadata)
        with pytest.raises(FormatError):
            await read_policy(store, "shop")


async def test_a_policy_is_changed_from_what_it_is_to_what_makes_sense() -> None:
    async with bench() as test:
        store, found = test.store, []
        made = await set_policy(store, "shop", lambda one: replace(one, retention="1s for 1h"))
        data, metadata, _ = store.objects["policies/shop.json"]
        other = edited(data, policy=replace(made, retention="1m for 2h").to_body())

        def change(one: Policy) -> Policy:
            found.append(one.retention)
            if len(found) == 1:
                store.put("policies/shop.json", other, metadata)
            return replace(one, rpo_error="9m")

        changed = await set_policy(store, "shop", change)
        assert found == ["1s for 1h", changed.retention] == ["1s for 1h", "1m for 2h"]
        with pytest.raises(UsageError):
            await set_policy(store, "shop", lambda one: replace(one, retention="often"))
        store.put("policies/copy.json", data, metadata)
        with pytest.raises(FormatError, match="another policy"):
            await read_policy(store, "copy")


async def test_records_say_again_what_was_written(tmp_path: Path) -> None:
    async with bench() as test:
        site, tender = Site(test, tmp_path, random.Random(8)), Tender(test, tmp_path)
        await site.publish(60)
        log = await site.log()
        await hold_point(test.vault, log, await log.find(9), "why")
        tender.at(200)
        await tender.tend()
        record = replace(await site.record(), policy="default")
        assert record.ledgers
        assert record.holds
        assert decode_disk(encode_disk(record), record.id, where="x") == record
        heart = SiteRecord("a", "b", "", "1", (), 1, "", uses=((record.id, 1, 5),))
        assert decode_site(encode_site(heart), where="x") == heart
