"""The points of a disk: published once, listed, found, opened."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.catalog.harness import bench, content_at, is_joined, is_slot
from tests.delta.model import T0, DiskModel
from tests.vaults import PLAIN, given
from vdiskfs.catalog import IndexCache, Vault
from vdiskfs.delta import EpochFacts, Flags, open_spooled, remove_spooled
from vdiskfs.delta.layout import NO_FLAGS
from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    DamagedError,
    NotFoundError,
    SegmentsGoneError,
    UsageError,
)
from vdiskfs.units import format_time

pytestmark = pytest.mark.usefixtures("each_vault")

SECOND = 1_000_000_000


async def test_the_tip_of_an_empty_disk_is_epoch_0() -> None:
    async with bench() as test:
        tip = await test.log.tip()
        assert (tip.epoch, tip.digest, tip.size) == (0, test.model.digest, 0)


async def test_points_are_listed_newest_last_as_they_were_published() -> None:
    async with bench() as test:
        await test.churn(40)
        await test.publish(label="before the upgrade", flags=Flags.APPLICATION)
        for log in (test.log, test.fresh_log()):
            points = await log.points()
            assert [point.epoch for point in points] == list(range(1, 42))
            assert [point.time_ns for point in points] == list(test.model.times.values())
            assert [point.size for point in points] == [
                len(test.model.states[point.epoch]) for point in points
            ]
            assert (points[-1].label, points[-1].consistency) == (
                "before the upgrade",
                "application",
            )
            assert points[0].proof == "stored"
            tip = await log.tip()
            assert (tip.epoch, tip.digest) == (41, test.model.digest)


async def test_a_list_can_be_cut_by_time_and_number() -> None:
    async with bench() as test:
        await test.churn(40)
        log = test.fresh_log()
        low, high = T0 + 10 * SECOND, T0 + 20 * SECOND
        assert [p.epoch for p in await log.points(low, high)] == list(range(10, 21))
        assert [p.epoch for p in await log.points(low, high, limit=3)] == [18, 19, 20]
        assert [p.epoch for p in await log.points(limit=2)] == [39, 40]
        assert await log.points(until_ns=T0) == []
        assert await log.points(since_ns=T0 + 50 * SECOND) == []


async def test_a_time_finds_the_newest_point_at_or_before_it() -> None:
    async with bench() as test:
        await test.churn(40)
        log = test.fresh_log()
        for epoch in range(1, 41):
            moment = T0 + epoch * SECOND
            assert (await log.find(format_time(moment))).epoch == epoch
            assert (await log.find("-500ms", now_ns=moment + SECOND)).epoch == epoch
            assert (await log.find(str(epoch))).epoch == epoch
            assert (await log.find(epoch)).epoch == epoch
        assert (await log.find("2100-01-01T00:00:00Z")).epoch == 40
        assert (await log.find("latest")).epoch == 40
        with pytest.raises(NotFoundError, match="no point of it is proven"):
            await log.find("latest-proven")


async def test_a_time_before_the_first_point_names_the_first_point() -> None:
    async with bench() as test:
        await test.churn(3)
        with pytest.raises(
            NotFoundError, match=f"no point at or before.*{format_time(T0 + SECOND)}"
        ):
            await test.log.find(format_time(T0))


async def test_a_disk_without_points_says_so() -> None:
    async with bench() as test:
        with pytest.raises(NotFoundError, match="no points yet"):
            await test.log.find("latest")


@pytest.mark.parametrize(
    "spec", ["yesterday", "", "-15", "1e5", "9" * 30, "\x1b[31m", "-99999999y"]
)
async def test_what_names_no_point_is_wrong_use(spec: str) -> None:
    async with bench() as test:
        await test.churn(1)
        with pytest.raises((UsageError, NotFoundError)):
            await test.log.find(spec)


async def test_the_newest_application_consistent_point_is_found_behind_others() -> None:
    async with bench() as test:
        await test.churn(5)
        await test.publish(flags=Flags.APPLICATION)
        await test.churn(40, seed=2)
        assert (await test.fresh_log().find("latest-application-consistent")).epoch == 6


async def test_publishing_again_recognises_its_own() -> None:
    """The first try landed and its answer was lost: the second one is a success."""
    async with bench() as test:
        test.model.write(0, b"x" * 9000)
        spooled = test.model.seal()
        first = await test.log.publish(spooled)
        assert await test.fresh_log().publish(open_spooled(spooled.path)) == first


async def test_a_slot_of_another_writer_displaces() -> None:
    async with bench() as test:
        await test.churn(2)
        other = DiskModel(
            test.model.spool, vault_id=test.vault.vault_id, disk_id=test.record.id,
            writer_id="ee" * 16,
        )  # fmt: skip
        other.write(0, b"other")
        with pytest.raises(ConflictError, match="displaced"):
            await test.log.publish(other.seal())
        assert await content_at(test.fresh_log(), 2) == test.model.states[2]


async def test_a_point_is_not_published_without_its_segments() -> None:
    """The spool lost a segment that the vault never got: the slot is not created."""
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0}
        test.model.write(0, random.Random(1).randbytes(99_000))
        spooled = test.model.seal()
        spooled.segments[0].path.unlink()
        with pytest.raises(SegmentsGoneError, match="is not there"):
            await test.log.publish(open_spooled(spooled.path))
        assert not any(is_slot(name) for name in test.store.objects)


async def test_segments_stored_by_an_earlier_try_are_kept() -> None:
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0, "segment_limit": 100_000}
        test.model.write(0, random.Random(1).randbytes(400_000))
        spooled = test.model.seal(per_batch=1)
        assert len(spooled.segments) > 2
        sent: list[int] = []
        await test.log.publish(spooled, sent.append)
        assert sum(sent) == spooled.head.stored_bytes
        del test.store.objects[next(name for name in test.store.objects if is_slot(name))]
        await test.fresh_log().publish(spooled)
        remove_spooled(spooled)
        assert list(test.model.spool.iterdir()) == []
        assert await content_at(test.fresh_log(), 1) == test.model.states[1]


async def test_a_fence_ends_a_generation() -> None:
    async with bench() as test:
        await test.churn(3)
        model = test.model
        facts = model.facts(flags=Flags.FENCE)
        fence = model.writer().finish(replace(facts, to_epoch=facts.from_epoch))
        await test.log.publish(fence)
        tip = await test.fresh_log().tip()
        assert (tip.epoch, tip.fenced) == (3, True)
        model.write(0, b"late")
        with pytest.raises(ConflictError, match="holds a fence"):
            await test.log.publish(model.seal())


async def test_a_generation_goes_on_from_its_parents_point() -> None:
    """Points of the parent up to the fork are listed and opened; later ones are not."""
    async with bench() as test:
        await test.churn(20)
        fork, record = 18, await test.vault.update_disk(
            test.record.id,
            lambda old: replace(old, generation=2, parents={1: None, 2: (1, 18)}),
        )  # fmt: skip
        model, states = test.model, dict(test.model.states)
        log = test.vault.log(record)
        tip = await log.tip()
        assert tip.epoch == fork
        model.generation, model.epoch, model.digest = 2, fork, tip.digest
        model.data = bytearray(states[fork])
        model.cut = model.from_size = tip.size
        rng = random.Random(5)
        for _ in range(30):
            model.churn(rng, pages=64)
            await log.publish(model.seal())
            await log.publish_joins()
        for seen in (log, test.vault.log(record)):
            points = await seen.points()
            assert [point.epoch for point in points] == list(range(1, 49))
            assert [point.generation for point in points] == [1] * 18 + [2] * 30
            for epoch in (1, 17, 18):
                assert await content_at(seen, epoch) == states[epoch]
            for epoch in (19, 33, 48):
                assert await content_at(seen, epoch) == model.states[epoch]
        old = test.vault.log(record, 1)
        assert await content_at(old, 20) == states[20]


async def test_joins_are_made_once_per_block() -> None:
    """16 epochs make one joined delta, 256 one more; calling again makes none."""
    async with bench() as test:
        await test.churn(15)
        assert await test.log.publish_joins() == 0
        await test.churn(1, joins=False)
        assert await test.log.publish_joins() == 1
        assert await test.log.publish_joins() == 0
        await test.churn(240, seed=3)
        names = [name for name in test.store.objects if is_joined(name)]
        assert len([name for name in names if ".1/" in name]) == 16
        assert len([name for name in names if ".2/" in name]) == 1
        assert await test.fresh_log().publish_joins() == 0


async def test_joins_left_undone_are_made_later() -> None:
    """Whoever was away, or crashed between slot and join, finds what is due by listing."""
    async with bench() as test:
        await test.churn(300, joins=False)
        made = await test.fresh_log().publish_joins()
        assert made == 18 + 1
        assert await content_at(test.fresh_log(), 300) == test.model.states[300]


async def test_a_join_made_by_another_is_taken() -> None:
    """Two that join at the same time make the same object; the second sees it there."""
    async with bench() as test:
        await test.churn(15)
        one, two = test.fresh_log(), test.fresh_log()
        await test.churn(1, joins=False)
        await one.points(), await two.points()
        assert await one.publish_joins() == 1
        before = dict(test.store.objects)
        assert await two.publish_joins() == 1
        assert test.store.objects == before


@PLAIN
async def test_a_large_delta_is_a_gap_that_is_read_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What lies on both sides of it is joined, and every point is still right."""
    monkeypatch.setattr("vdiskfs.catalog.tables.SLOT_INDEX_LIMIT", 1200)
    async with bench() as test:
        rng = random.Random(4)
        for epoch in range(1, 65):
            if epoch in {1, 20, 33, 48}:
                test.model.write(0, rng.randbytes(150 * 4096))
            else:
                test.model.write(rng.randrange(100) * 4096, rng.randbytes(4096))
            await test.publish()
            await test.log.publish_joins()
        gaps = [name for name in test.store.objects if is_slot(name)
                and int(test.store.objects[name][1]["tail"]) > 1200]  # fmt: skip
        assert len(gaps) == 4
        joined = sorted(name for name in test.store.objects if is_joined(name))
        assert any("0000000000000010-0000000000000013" in name for name in joined)
        assert any("0000000000000014-0000000000000020" in name for name in joined)
        log = test.fresh_log()
        assert [point.epoch for point in await log.points()] == list(range(1, 65))
        for epoch in (1, 2, 19, 20, 21, 33, 47, 48, 49, 64):
            assert await content_at(log, epoch) == test.model.states[epoch]


async def test_a_broken_chain_is_not_joined() -> None:
    async with bench() as test:
        await test.churn(16, joins=False)
        name = sorted(name for name in test.store.objects if is_slot(name))[5]
        data, metadata, _ = test.store.objects[name]
        test.store.put(name, data[:-1] + bytes([data[-1] ^ 1]), metadata)
        with pytest.raises(DamagedError, match=name):
            await test.fresh_log().publish_joins()
        assert not any(is_joined(name) for name in test.store.objects)


async def test_the_owner_reads_nothing_back_to_join(tmp_path: Path) -> None:
    """With a cache of indexes 256 epochs are published and joined without one read."""
    async with bench() as test:
        log = test.vault.log(test.record, cache=IndexCache(tmp_path / "indexes"))
        await log.tip()
        rng = random.Random(2)
        before = test.store.bytes_received
        for _ in range(256):
            test.model.write(rng.randrange(64) * 4096, rng.randbytes(4096))
            await log.publish(test.model.seal())
            await log.publish_joins()
        assert test.store.bytes_received == before
        assert await content_at(test.fresh_log(), 256) == test.model.states[256]


async def test_a_cache_that_lies_is_not_believed(tmp_path: Path) -> None:
    async with bench() as test:
        cache = IndexCache(tmp_path)
        log = test.vault.log(test.record, cache=cache)
        await log.tip()
        rng = random.Random(2)
        for _ in range(15):
            test.model.write(rng.randrange(64) * 4096, rng.randbytes(4096))
            await log.publish(test.model.seal())
        for path in tmp_path.iterdir():
            path.write_bytes(bytes(path.stat().st_size))
        test.model.write(0, b"z" * 4096)
        await log.publish(test.model.seal())
        assert await log.publish_joins() == 1
        assert await content_at(test.fresh_log(), 16) == test.model.states[16]


async def test_a_small_cache_drops_the_oldest(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path, limit=1000)
    for number in range(10):
        cache.put(f"n{number}", bytes(300))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000
    assert cache.get("n9") == bytes(300)
    assert cache.get("n0") is None


async def test_a_store_that_lost_the_metadata_lists_the_same() -> None:
    """Metadata is a hint: without it heads are read."""
    async with bench() as test:
        await test.churn(40)
        wanted = await test.log.points()
        for name, (data, _, _) in list(test.store.objects.items()):
            if is_slot(name) or is_joined(name):
                test.store.put(name, data)
        assert await test.fresh_log().points() == wanted
        for epoch in (5, 16, 39, 40):
            assert await content_at(test.fresh_log(), epoch) == test.model.states[epoch]


@pytest.mark.parametrize(
    "change",
    [{"to": "7"}, {"time": "5"}, {"digest": "00" * 32}, {"tail": "1"}, {"tail": "99999999"},
     {"size": "1"}, {"flags": "1"}, {"label": "%00"}, {"first": "1"}],
)  # fmt: skip
@PLAIN
async def test_metadata_that_lies_is_found_out(change: dict[str, str]) -> None:
    """When the delta is read its head is compared with what the listing said."""
    async with bench() as test:
        await test.churn(3)
        name = sorted(name for name in test.store.objects if is_slot(name))[-1]
        data, metadata, _ = test.store.objects[name]
        test.store.put(name, data, {**metadata, **change})
        with pytest.raises(DamagedError):
            await (await test.fresh_log().open(3 if "to" not in change else 7)).aclose()


@pytest.mark.parametrize("value", ["", "-1", "x", "9" * 19, "9" * 40, "١"])  # noqa: RUF001
async def test_metadata_that_is_nonsense_is_left_aside(value: str) -> None:
    async with bench() as test:
        await test.churn(3)
        for name, (data, metadata, _) in list(test.store.objects.items()):
            if is_slot(name):
                test.store.put(name, data, {**metadata, "time": value})
        assert [point.epoch for point in await test.fresh_log().points()] == [1, 2, 3]


async def test_a_missing_slot_at_the_tip_is_damage_not_the_end() -> None:
    async with bench() as test:
        await test.churn(5)
        del test.store.objects[sorted(name for name in test.store.objects if is_slot(name))[2]]
        with pytest.raises(DamagedError, match="0000000000000002: the delta is missing"):
            await test.fresh_log().tip()


async def test_what_others_publish_is_seen_by_a_refresh() -> None:
    """A site that only watches follows the tip with one request when nothing is new."""
    async with bench() as test:
        await test.churn(20)
        watcher = test.fresh_log()
        await watcher.tip()
        await test.churn(7, seed=9)
        assert (await watcher.tip()).epoch == 27
        before = test.store.lists
        assert (await watcher.refresh()).epoch == 27
        assert test.store.lists - before == 1
        await test.churn(300, seed=10)
        assert (await watcher.tip()).epoch == 327
        assert [point.epoch for point in await watcher.points()] == list(range(1, 328))


async def test_what_was_saved_is_listed_without_a_request(tmp_path: Path) -> None:
    async with bench() as test:
        await test.churn(40)
        await test.publish(label="kept")
        wanted = await test.log.points()
        test.log.save(tmp_path / "points")
        log = test.fresh_log()
        assert log.load(tmp_path / "points")
        before = test.store.requests
        assert await log.points() == wanted
        assert test.store.requests == before
        await test.churn(3, seed=8)
        assert (await log.tip()).epoch == 44
        assert await content_at(log, 20) == test.model.states[20]


@pytest.mark.parametrize("damage", ["flip", "short", "empty", "absent", "other"])
async def test_a_saved_file_that_is_damaged_is_left_aside(tmp_path: Path, damage: str) -> None:
    async with bench() as test:
        await test.churn(5)
        path = tmp_path / "points"
        test.log.save(path)
        data = path.read_bytes()
        if damage == "absent":
            path.unlink()
        elif damage == "other":
            other = await test.vault.create_disk("x", file="x", size=0, site="s")
            test.vault.log(other).save(path)
        else:
            path.write_bytes({"flip": data[:-1] + b"?", "short": data[:50], "empty": b""}[damage])
        log = test.fresh_log()
        assert not log.load(path)
        assert len(await log.points()) == 5


async def test_a_label_of_any_letters_comes_back() -> None:
    label = "vor dem Umzug  ✓ %41 \x1b[31m"
    async with bench() as test:
        await test.publish(label=label)
        await test.churn(16)
        assert (await test.fresh_log().points())[0].label == label


async def test_a_label_that_is_too_long_is_refused() -> None:
    async with bench() as test:
        with pytest.raises(ValueError, match="longer than 120"):
            test.model.seal(label="ü" * 61)


async def test_a_store_that_creates_twice_is_no_vault() -> None:
    """Guards the double: the fake refuses a second create like a real store."""
    async with bench() as test:
        name = next(iter(test.store.objects))
        with pytest.raises(AlreadyExistsError):
            await test.store.create(name, b"")


def test_facts_have_no_flags_unless_said() -> None:
    assert EpochFacts(1, 0, 1, 1, 1, 1, 0, b"").flags == NO_FLAGS


@PLAIN
async def test_a_slot_under_another_epochs_name_is_refused() -> None:
    async with bench() as test:
        await test.churn(3)
        names = sorted(name for name in test.store.objects if is_slot(name))
        data, metadata, _ = test.store.objects[names[0]]
        test.store.put(names[1], data, {**metadata, "to": "2"})
        with pytest.raises(DamagedError, match="not the object|another thing") as caught:
            await test.fresh_log().tip()
            await test.fresh_log().open(3)
        assert names[1] in str(caught.value)


async def test_an_open_vault_gives_logs_of_known_generations_only() -> None:
    async with bench() as test:
        with pytest.raises(NotFoundError, match="no generation 5"):
            (await Vault.open(test.store, given())).log(test.record, 5)
