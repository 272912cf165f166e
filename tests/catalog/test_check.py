"""The check finds what is damaged, and names exactly the points that are hurt."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from tests.catalog.harness import Bench, bench, content_at, is_joined, is_slot
from tests.vaults import PLAIN, is_encrypted, newcomer
from vdiskfs.catalog import CheckReport, check
from vdiskfs.delta import Flags
from vdiskfs.delta.blocks import OBJECTS
from vdiskfs.delta.layout import HEAD_SIZE, LIMIT, decode_head
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.point import BlockCache, PieceInfo, open_piece
from vdiskfs.sealed.names import is_bulk
from vdiskfs.store import ObjectInfo

pytestmark = pytest.mark.usefixtures("each_vault")


async def hurt_points(test: Bench, epochs: int) -> set[int]:
    """Return the points that cannot be read whole: the truth, by reading them all."""
    hurt = set()
    for epoch in range(1, epochs + 1):
        try:
            assert await content_at(test.fresh_log(), epoch) == test.model.states[epoch]
        except (DamagedError, NotFoundError):
            hurt.add(epoch)
    return hurt


async def checked(test: Bench, *, read_data: bool = True) -> CheckReport:
    vault = newcomer(test.vault)
    return await check(vault, read_data=read_data)


def named(report: CheckReport) -> set[int]:
    return {epoch for _, _, epoch in report.hurt}


async def test_a_whole_vault_is_found_whole() -> None:
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 8000, "segment_limit": 50_000}
        await test.churn(40, pages=60)
        steps: list[tuple[str, int, int]] = []
        report = await check(test.vault, read_data=True, progress=lambda *step: steps.append(step))
        assert report.ok
        assert (report.disks, report.points, report.deltas, report.joined) == (1, 40, 40, 2)
        assert report.segments > 0
        assert report.unused_segments == 0
        assert report.read_bytes > 0
        assert steps[-1] == ("web01", 42, 42)


async def test_every_kind_of_damage_is_named_with_exactly_its_points() -> None:
    """Each object flipped at random, cut, lost: the report equals what reading finds."""
    rng = random.Random(5)
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 6000, "segment_limit": 30_000}
        await test.churn(19, pages=40)
        objects = dict(test.store.objects)
        names = sorted(filter(is_bulk, objects))
        for name in names:
            data, metadata, _ = objects[name]
            for kind in ("flip", "cut", "lost"):
                if kind == "flip":
                    flipped = bytearray(data)
                    flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                    test.store.put(name, bytes(flipped), metadata)
                elif kind == "cut":
                    test.store.put(name, data[: rng.randrange(len(data))], metadata)
                else:
                    del test.store.objects[name]
                report = await checked(test)
                wanted = await hurt_points(test, 19)
                if is_slot(name) and name.endswith("12") and kind == "lost":
                    # The newest slot lost: the vault itself cannot know of it.
                    assert report.ok
                else:
                    assert named(report) == wanted, (name, kind)
                    found = [problem.object for problem in report.problems]
                    # A joined delta that is gone is not missed: it is an addition.
                    gone = is_joined(name) and kind == "lost"
                    assert found == ([] if gone else [name])
                test.store.objects = dict(objects)


@pytest.mark.parametrize("seed", range(6))
async def test_several_damages_at_once_are_named(seed: int) -> None:
    rng = random.Random(seed)
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 6000, "segment_limit": 30_000}
        await test.churn(40, pages=40, seed=seed)
        objects = dict(test.store.objects)
        names = sorted(filter(is_bulk, objects))
        for _ in range(3):
            chosen = rng.sample(names[:-1], 3)
            for name in chosen:
                data, metadata, _ = objects[name]
                if name.startswith("segments/") and rng.random() < 0.3:
                    del test.store.objects[name]
                else:
                    flipped = bytearray(data)
                    flipped[rng.randrange(len(data))] ^= 0x01
                    test.store.put(name, bytes(flipped), metadata)
            report = await checked(test)
            wanted = await hurt_points(test, 40)
            if any(is_joined(name) for name in chosen):
                # A slot and a join over it: the report may name points that could be saved.
                assert named(report) >= wanted, chosen
            else:
                assert named(report) == wanted, chosen
            test.store.objects = dict(objects)


async def test_a_slot_and_its_segment_hurt_what_is_read_past_the_slot() -> None:
    """Where the index is damaged only the joined delta over it says what is in the segment."""
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 6000, "segment_limit": 30_000}
        pairs = []
        for number in range(18):
            before = set(test.store.objects)
            await test.churn(1, pages=40, seed=number)
            new = sorted(set(test.store.objects) - before)
            if len(new) > 1 and new[-1].startswith("segments/") and number % 4 == 3:
                pairs.append((next(filter(is_slot, new)), new[-1]))
        past, objects = 0, dict(test.store.objects)
        for pair in pairs:
            for name, share in zip(pair, (1.0, 0.5), strict=True):
                data, metadata, _ = objects[name]
                hurt = bytearray(data)
                hurt[int(len(data) * share) - 600] ^= 1
                test.store.put(name, bytes(hurt), metadata)
            report, wanted = await checked(test), await hurt_points(test, 18)
            assert named(report) == wanted, pair
            assert pair[1] in {problem.object for problem in report.problems} or max(wanted) < 16
            past += max(wanted) >= 16
            test.store.objects = dict(objects)
        assert past


@PLAIN
async def test_a_segment_whose_slot_cannot_name_it_is_read_all_the_same() -> None:
    """What the slot says of its objects is damaged; points past it are read by a joined delta."""
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0}
        await test.churn(18, pages=40)
        names = sorted(filter(is_slot, test.store.objects))
        found = {name: await segments_of(test, name) for name in names[:16]}
        slot, row, segment = next(
            (name, *found[name][0]) for name in reversed(names[:16]) if found[name]
        )
        for name, at in ((slot, int(row["offset"]) + 9), (segment, 5000)):
            data, metadata, _ = test.store.objects[name]
            test.store.put(name, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], metadata)
        report, wanted = await checked(test), await hurt_points(test, 18)
        assert {slot, segment} <= {problem.object for problem in report.problems}
        assert named(report) == wanted


async def segments_of(test: Bench, slot: str) -> list[tuple[np.void, str]]:
    """Return the segments that a slot names, each with the block of the index that says it."""
    data, _, _ = test.store.objects[slot]
    head = decode_head(data[:HEAD_SIZE])
    info = PieceInfo(slot, 1, 0, head.from_epoch, head.to_epoch, len(data))
    piece = await open_piece(
        test.store, BlockCache(1 << 20), info, vault_id=test.vault.vault_id, disk_id=head.disk_id
    )
    refs = [(row, await piece.object_ref(int(row["first"])))
            for row in await piece.rows(OBJECTS, 0, LIMIT - 1)]  # fmt: skip
    return [(row, ref.name(head.disk_id)) for row, ref in refs]


async def test_a_damaged_joined_delta_hurts_no_point() -> None:
    async with bench() as test:
        await test.churn(20)
        name = next(name for name in test.store.objects if is_joined(name))
        data, metadata, _ = test.store.objects[name]
        test.store.put(name, data[:-600] + bytes([data[-600] ^ 1]) + data[-599:], metadata)
        report = await checked(test, read_data=False)
        assert [problem.object for problem in report.problems] == [name]
        assert "read without it" in report.problems[0].message
        assert report.hurt == []


async def test_without_reading_data_a_flipped_frame_is_not_seen_and_a_lost_segment_is() -> None:
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0}
        test.model.write(0, random.Random(1).randbytes(99_000))
        await test.publish()
        name = next(name for name in test.store.objects if name.startswith("segments/"))
        data, metadata, _ = test.store.objects[name]
        test.store.put(name, data[:5000] + bytes([data[5000] ^ 1]) + data[5001:], metadata)
        assert (await checked(test, read_data=False)).ok
        assert not (await checked(test, read_data=True)).ok
        test.store.put(name, data[:-1], metadata)
        report = await checked(test, read_data=False)
        assert "bytes where" in report.problems[0].message
        del test.store.objects[name]
        report = await checked(test, read_data=False)
        assert (report.problems[0].object, report.problems[0].message) == (name, "is missing")
        assert named(report) == {1}


async def test_segments_that_nothing_refers_to_are_counted() -> None:
    async with bench() as test:
        await test.churn(2)
        await test.vault.store.create(f"segments/{test.record.id}/{'9' * 32}", bytes(777))
        report = await checked(test)
        assert report.ok
        assert (report.unused_segments, report.unused_bytes) == (1, 777)


async def test_generations_are_checked_with_their_parents() -> None:
    """Damage before the fork hurts the younger generation too, damage after it does not."""
    async with bench() as test:
        await test.churn(6, joins=False)
        facts = test.model.facts(flags=Flags.FENCE)
        fence = test.model.writer().finish(replace(facts, to_epoch=facts.from_epoch))
        await test.log.publish(fence)
        record = await test.vault.update_disk(
            test.record.id, lambda old: replace(old, generation=2, parents={1: None, 2: (1, 4)})
        )
        log = test.vault.log(record)
        tip = await log.tip()
        model = test.model
        model.generation, model.epoch, model.digest = 2, 4, tip.digest
        model.data, model.dirty = bytearray(model.states[4]), set()
        model.cut = model.from_size = tip.size
        for number in range(3):
            model.write(number * 4096, bytes([number + 1]) * 4096)
            await log.publish(model.seal())
        assert (await checked(test)).ok
        slots = sorted(name for name in test.store.objects if is_slot(name))
        objects = dict(test.store.objects)
        del test.store.objects[slots[5]]
        assert (await checked(test)).hurt == [("web01", 1, 6)]
        test.store.objects = dict(objects)
        del test.store.objects[slots[2]]
        report = await checked(test)
        assert report.hurt == [("web01", 1, 3), ("web01", 1, 4), ("web01", 1, 5), ("web01", 1, 6),
                               ("web01", 2, 5), ("web01", 2, 6), ("web01", 2, 7)]  # fmt: skip


async def test_a_damaged_disk_document_is_reported() -> None:
    async with bench() as test:
        await test.churn(1)
        test.store.put(f"disks/{test.record.id}/disk.json", b"{")
        report = await checked(test)
        assert not report.ok
        expected = "is cut short" if is_encrypted() else "not a document"
        assert expected in report.problems[0].message


async def test_one_disk_can_be_checked_alone() -> None:
    async with bench() as test:
        await test.churn(1)
        await test.vault.create_disk("other", file="f", size=0, site="s")
        assert (await check(test.vault)).disks == 2
        assert (await check(test.vault, ["web01"])).disks == 1
        with pytest.raises(NotFoundError):
            await check(test.vault, ["nobody"])


async def test_a_delta_that_is_stored_while_it_looks_is_not_damage() -> None:
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 0}
        listed = test.store.list

        async def publishing(prefix: str) -> AsyncIterator[ObjectInfo]:
            found = [info async for info in listed(prefix)]
            if prefix.startswith(("segments/", "disks/")):
                test.model.write(0, random.Random(test.model.epoch).randbytes(20_000))
                await test.publish()
            for info in found:
                yield info

        test.store.list = publishing  # type: ignore[method-assign]
        report = await checked(test)
        assert test.model.epoch > 5
        assert report.problems == []
