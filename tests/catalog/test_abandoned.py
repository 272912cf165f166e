"""Segments that nothing names: whose they may still become, and when they go."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.catalog.harness import bench, content_at, is_slot
from tests.catalog.memory import MemoryStore
from tests.catalog.test_thinning import Site
from tests.catalog.test_upkeep import Tender
from tests.catalog.writing import DAY_S, MONTH, Writer, look, record_of, stored
from tests.delta.model import T0
from tests.vaults import newcomer
from vdiskfs.catalog import Branch, DiskLog, Vault
from vdiskfs.catalog.abandoned import DOUBT_S, sweep
from vdiskfs.catalog.batches import YOUNG_S
from vdiskfs.catalog.garbage import Collected
from vdiskfs.catalog.records import CLAIMED, DOUBTED, GIVEN_UP, Batch, DiskRecord
from vdiskfs.catalog.remains import OLD_S
from vdiskfs.catalog.retention import parse_ladder
from vdiskfs.delta import Spooled
from vdiskfs.delta.names import segment_name
from vdiskfs.delta.segments import batch_of
from vdiskfs.errors import ConflictError, DamagedError, SegmentsGoneError
from vdiskfs.units import NS

pytestmark = pytest.mark.usefixtures("each_vault")


async def test_a_first_replication_whose_host_never_comes_back_is_collected(
    tmp_path: Path,
) -> None:
    """It takes two looks, a month apart; the disk has no point, no policy and no ledger."""
    async with bench() as test:
        writer, tender = Writer(test, random.Random(1)), Tender(test, tmp_path)
        tender.at(0)
        await test.log.claims.need([writer.batch])
        await look(test, tender, 0.1)
        assert (await record_of(test)).batches[writer.batch].state == DOUBTED, "it has nothing yet"
        await test.fresh_log().claims.need([writer.batch])
        for _ in range(3):
            await writer.store_part()
        assert (await record_of(test)).batches == {writer.batch: Batch(CLAIMED)}
        done = await look(test, tender, 1)
        assert (done.deleted, done.waiting) == (0, 3)
        assert (await record_of(test)).batches[writer.batch].state == DOUBTED
        for day in (2, 20, 30.9):
            assert (await look(test, tender, day)).deleted == 0
        assert stored(test) == writer.names
        said = await tender.upkeep.sweep(test.record.id, dry_run=True)
        assert (said.deleted, said.waiting) == (0, 3)
        tender.at(31.1 * DAY_S)
        said = await tender.upkeep.sweep(test.record.id, dry_run=True)
        assert (said.deleted, stored(test)) == (3, writer.names)
        assert (await look(test, tender, 31.1)).deleted == 3
        assert not stored(test)
        assert (await record_of(test)).batches[writer.batch].state == GIVEN_UP
        # That is known for a year, to those who may come back and store it again.
        await look(test, tender, 390)
        assert (await record_of(test)).batches[writer.batch].state == GIVEN_UP
        await look(test, tender, 400)
        assert not (await record_of(test)).batches


async def test_a_writer_that_goes_on_keeps_what_it_has_stored(tmp_path: Path) -> None:
    """For months: each time it is doubted it claims it again, and at last it publishes it."""
    async with bench() as test:
        writer, tender = Writer(test, random.Random(2)), Tender(test, tmp_path)
        tender.at(0)
        for day in range(1, 100, 9):
            log = newcomer(test.vault).log(await record_of(test))
            await log.claims.need([writer.batch])
            await writer.store_part()
            await look(test, tender, day)
            assert (await record_of(test)).batches[writer.batch].state == DOUBTED
        await test.log.publish(writer.seal())
        assert writer.names == stored(test)
        assert await content_at(test.fresh_log(), 1) == test.model.states[1]
        # Claimed by the call that published it; spent, as what is named says.
        assert (await record_of(test)).batches[writer.batch].state == CLAIMED
        for day in range(100, 200, 9):
            await look(test, tender, day)
        assert writer.names == stored(test)
        assert not (await record_of(test)).batches
        assert await content_at(test.fresh_log(), 1) == test.model.states[1]


async def test_what_was_given_up_is_never_named(tmp_path: Path) -> None:
    """Neither before it is deleted nor afterwards; the point does not exist."""
    async with bench() as test:
        writer, tender = Writer(test, random.Random(3)), Tender(test, tmp_path)
        tender.at(0)
        await writer.store_part()
        delta = writer.seal()
        await look(test, tender, 8)
        with patch("vdiskfs.catalog.abandoned.collect_names", lost):
            await look(test, tender, 8.1 + DOUBT_S / DAY_S)
        assert stored(test) == writer.names
        for day in (40, 41):
            with pytest.raises(SegmentsGoneError):
                await newcomer(test.vault).log(await record_of(test)).publish(delta)
            await look(test, tender, day)
            assert not stored(test)
        assert not [name for name in test.store.objects if is_slot(name)]
        # Said no more, as nothing is left of it; what is missing says it.
        await look(test, tender, 500)
        assert not (await record_of(test)).batches
        with pytest.raises(SegmentsGoneError):
            await newcomer(test.vault).log(await record_of(test)).publish(delta)


async def test_what_is_stored_again_is_not_named_either(tmp_path: Path) -> None:
    """A delta of the spool, with its segments, whose writer comes back after months."""
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0}
        tender = Tender(test, tmp_path)
        tender.at(0)
        test.model.write(0, random.Random(4).randbytes(65536))
        delta = test.model.seal()
        (segment,) = delta.segments
        name = segment_name(test.record.id, segment.id)
        metadata = segment.metadata()
        await test.vault.store.create_from_file(name, segment.path, metadata=metadata)
        for day in (8, 40):
            await look(test, tender, day)
        assert not stored(test)
        for day in (41, 42):
            with pytest.raises(SegmentsGoneError):
                await newcomer(test.vault).log(await record_of(test)).publish(delta)
            assert stored(test) == {name}, "it was stored before anybody could know"
            assert (await look(test, tender, day)).deleted == 1
            assert not stored(test)


async def lost(_: object, names: list[str]) -> Collected:
    return Collected()


async def test_a_claim_that_comes_between_look_and_verdict_wins(tmp_path: Path) -> None:
    async with bench() as test:
        writer, tender = Writer(test, random.Random(4)), Tender(test, tmp_path)
        tender.at(0)
        await test.log.claims.need([writer.batch])
        await writer.store_part()
        await look(test, tender, 1)
        other = newcomer(test.vault)
        update = type(test.vault).update_disk
        delta = writer.seal()

        async def claim_first(vault: object, *given: object) -> object:
            await other.log(await record_of(test)).publish(delta)
            return await update(vault, *given)  # type: ignore[arg-type]

        tender.at(40 * DAY_S)
        with (
            patch.object(type(test.vault), "update_disk", claim_first),
            pytest.raises(ConflictError),
        ):
            await sweep(other, test.record.id, tender.store_ns)
        assert stored(test) == writer.names
        assert await content_at(test.fresh_log(), 1) == test.model.states[1]


async def test_claims_that_came_and_went_are_seen(tmp_path: Path) -> None:
    """What the record says is the same again; that it was claimed meanwhile is counted."""
    async with bench() as test:
        writer, tender = Writer(test, random.Random(5)), Tender(test, tmp_path)
        tender.at(0)
        await writer.store_part()
        await look(test, tender, 8)
        before = await record_of(test)
        delta, update = writer.seal(), type(test.vault).update_disk

        async def in_between(
            vault: object, disk_id: str, change: Callable[..., DiskRecord]
        ) -> object:
            await test.fresh_log().publish(delta)

            def again(found: DiskRecord) -> DiskRecord:
                return DiskRecord(**{
                    name: getattr(before if name == "batches" else found, name)
                    for name in DiskRecord.__dataclass_fields__
                })  # fmt: skip

            await update(test.vault, disk_id, again)
            return await update(test.vault, disk_id, change)

        tender.at(60 * DAY_S)
        with (
            patch.object(type(test.vault), "update_disk", in_between),
            pytest.raises(ConflictError),
        ):
            await sweep(test.vault, test.record.id, tender.store_ns)
        assert stored(test) == writer.names


async def test_of_two_looks_at_once_one_loses_and_a_lost_answer_is_none(tmp_path: Path) -> None:
    """What one has said must not be taken back by another that has looked before."""
    async with bench() as test:
        writer, tender = Writer(test, random.Random(5)), Tender(test, tmp_path)
        tender.at(0)
        await writer.store_part()
        update = type(test.vault).update_disk

        async def in_between(vault: Vault, *given: Any) -> DiskRecord:
            with patch.object(type(test.vault), "update_disk", update):
                await sweep(newcomer(test.vault), test.record.id, tender.store_ns)
            tender.at(tender.store_ns / NS - T0 / NS + 1)
            return await update(vault, *given)

        async def twice(vault: Vault, *given: Any) -> DiskRecord:
            await update(vault, *given)
            return await update(vault, *given)

        tender.at(8 * DAY_S)
        with patch.object(type(test.vault), "update_disk", twice):
            await sweep(test.vault, test.record.id, tender.store_ns)
        assert (await record_of(test)).batches == {writer.batch: Batch(DOUBTED, tender.store_ns)}
        before = await record_of(test)
        other = Writer(test, random.Random(6))
        await other.store_part()
        tender.at(20 * DAY_S)
        late = tender.store_ns + 60 * NS
        with (
            patch.object(type(test.vault), "update_disk", in_between),
            pytest.raises(ConflictError),
        ):
            await sweep(test.vault, test.record.id, late)
        said = (await record_of(test)).batches
        assert (await record_of(test)).claims == before.claims
        assert said[other.batch].since < late


async def test_a_clock_that_was_set_back_begins_anew(tmp_path: Path) -> None:
    """What is doubted since a time to come is doubted since now, or it might never end."""
    async with bench() as test:
        writer, tender = Writer(test, random.Random(5)), Tender(test, tmp_path)
        tender.at(0)
        await writer.store_part()
        await look(test, tender, 500)
        await look(test, tender, 10)
        assert (await look(test, tender, 39)).deleted == 0
        assert (await look(test, tender, 41)).deleted == 1


async def test_only_so_many_are_doubted_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vdiskfs.catalog.abandoned._DOUBTED_MOST", 2)
    async with bench() as test:
        tender = Tender(test, tmp_path)
        tender.at(0)
        for seed in range(3):
            await Writer(test, random.Random(seed)).store_part()
        for day, count in ((8, 2), (9, 3)):
            await look(test, tender, day)
            assert len((await record_of(test)).batches) == count


async def test_what_any_generation_names_stays(tmp_path: Path) -> None:
    """That of the lineage, and that of branches."""
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0}
        tender = Tender(test, tmp_path)
        tender.at(0)
        rng = random.Random(1)

        async def publish(log: DiskLog) -> None:
            test.model.write(0, rng.randbytes(65536))
            await log.publish(test.model.seal())

        await publish(test.log)
        parents = {1: None, 2: (1, 1), 3: (1, 1)}
        branch = Branch("b-3", "here", "aa" * 16, "bb" * 16, "now")
        record = await test.vault.update_disk(
            test.record.id,
            lambda found: replace(found, parents=parents, generation=2, branches={3: branch}),
        )
        digest, size = test.model.digest, test.model.from_size
        for number in (2, 3):
            test.model.generation, test.model.epoch = number, 1
            test.model.digest, test.model.from_size = digest, size
            await publish(test.vault.log(record, number))
        names = stored(test)
        assert len(names) == 3
        for day in (8, 40, 80):
            assert (await look(test, tender, day)).waiting == 0
        assert stored(test) == names


async def test_a_delta_that_is_there_and_has_lost_a_segment_is_damaged() -> None:
    """It is not to be stored anew under its name; many segments are looked for at once."""
    async with bench() as test:
        writer = Writer(test, random.Random(1))
        for _ in range(9):
            await writer.store_part()
        delta, lists = writer.seal(), test.store.lists
        with patch.object(MemoryStore, "stat", side_effect=AssertionError):
            await test.log.publish(delta)
        assert test.store.lists == lists + 1
        del test.store.objects[min(writer.names)]
        with pytest.raises(DamagedError) as failed:
            await test.fresh_log().publish(delta)
        assert not isinstance(failed.value, SegmentsGoneError)


async def test_only_what_its_writer_claims_is_looked_at(tmp_path: Path) -> None:
    """Not what thinning stored, nor programs that claim nothing, nor what is young or doomed."""
    async with bench() as test:
        tender = Tender(test, tmp_path)
        tender.at(0)
        store, disk_id = test.vault.store, test.record.id
        ids = [f"{number:016x}" * 2 for number in range(1, 5)]
        metadata = [
            {"segment": ids[0], "leaf": "1"}, {"segment": ids[1]},
            {"segment": ids[2], "batch": "ff" * 8}, {"segment": ids[3], "batch": batch_of(ids[3])},
        ]  # fmt: skip
        for segment_id, beside in zip(ids, metadata, strict=True):
            await store.create(segment_name(disk_id, segment_id), b"data", metadata=beside)
        assert (await look(test, tender, OLD_S / DAY_S - 0.1)).waiting == 0
        assert (await look(test, tender, OLD_S / DAY_S + 0.1)).waiting == 1
        assert set((await record_of(test)).batches) == {batch_of(ids[3])}
        assert (await look(test, tender, MONTH + 1)).deleted == 1
        assert stored(test) == {segment_name(disk_id, one) for one in ids[:3]}


async def test_what_a_ledger_has_doomed_is_its_own_matter(tmp_path: Path) -> None:
    """Large deltas are thinned: their segments wait for the hour, for leases, for the ledger."""
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0}
        site, tender = Site(test, tmp_path, random.Random(6)), Tender(test, tmp_path)
        await site.publish(60)
        tender.at(61)
        ladder = parse_ladder("20s for 10y")
        log = tender.upkeep.vault.log(await record_of(test))
        await tender.upkeep.tend(log, ladder, tmp_path / "thin")
        await log.line.load()
        assert log.line.ledger is not None
        doomed = {name for name in log.line.ledger.doomed if name in stored(test)}
        assert doomed
        for day in (40, 80, 120):
            done = await look(test, tender, day)
            assert (done.deleted, done.waiting) == (0, 0)
        assert doomed <= stored(test)
        await site.check()


async def test_nothing_is_decided_where_a_delta_is_missing_or_damaged(tmp_path: Path) -> None:
    """It may name what nothing else does, and be healed."""
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0}
        site, tender = Site(test, tmp_path, random.Random(7)), Tender(test, tmp_path)
        await site.publish(4)
        names = stored(test)
        slots = sorted(name for name in test.store.objects if is_slot(name))
        for victim in slots[1:3]:
            data, metadata, _ = test.store.objects[victim]
            for broken in (None, bytes(data[:-600]) + bytes(600)):
                test.store.objects.pop(victim, None)
                if broken is not None:
                    test.store.put(victim, broken, metadata)
                for day in (40, 80, 120):
                    with pytest.raises(DamagedError):
                        await look(test, tender, day)
                assert stored(test) == names
            test.store.put(victim, data, metadata)
        assert (await look(test, tender, 200)).waiting == 0


async def test_segments_that_were_stored_just_now_need_no_claim(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of an earlier try, or of an upload that took longer than an hour, do."""
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0}
        rng = random.Random(8)

        def large() -> Spooled:
            test.model.write(0, rng.randbytes(65536))
            return test.model.seal()

        await test.log.publish(large())
        assert not (await record_of(test)).batches
        second = large()
        await test.vault.store.create_from_file(
            segment_name(test.record.id, second.segments[0].id), second.segments[0].path
        )
        await test.log.publish(second)
        assert set((await record_of(test)).batches) == {batch_of(second.segments[0].id)}
        clock = [0.0]
        monkeypatch.setattr("vdiskfs.catalog.publish.boottime_s", lambda: clock[0])
        third = large()
        real = type(test.vault.store).create_from_file

        async def slow(*given: object, **named: object) -> object:
            clock[0] += YOUNG_S + 1
            return await real(*given, **named)  # type: ignore[arg-type]

        with patch.object(type(test.vault.store), "create_from_file", slow):
            await test.log.publish(third)
        # What was published is claimed no more, when something else is.
        assert set((await record_of(test)).batches) == {batch_of(third.segments[0].id)}
