"""What thinning might take away from somebody who has just chosen it."""

from __future__ import annotations

import random
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import trio

from tests.catalog.harness import bench, content, is_joined
from tests.catalog.test_thinning import Site, published
from tests.delta.model import T0
from tests.vaults import BOTH, newcomer
from vdiskfs.catalog import check
from vdiskfs.catalog.garbage import ClockError
from vdiskfs.catalog.ledger import LEAF_LEVEL
from vdiskfs.catalog.moves import Fork, fork_off
from vdiskfs.catalog.owners import Claim, add_branch
from vdiskfs.catalog.proofs import Proof, write_proof
from vdiskfs.catalog.records import Branch, Moved, Owner
from vdiskfs.catalog.retention import kept, parse_ladder
from vdiskfs.catalog.upkeep import Upkeep, hold_point
from vdiskfs.delta.layout import Flags
from vdiskfs.delta.names import joined_name, parse_joined
from vdiskfs.delta.rehead import rehead
from vdiskfs.errors import ConflictError, NotFoundError
from vdiskfs.units import NS

COARSE = parse_ladder("100s for 4000s")


def upkeep(site: Site, ahead_s: int = 0) -> Upkeep:
    vault = newcomer(site.bench.vault)
    return Upkeep(vault, "cc" * 16, clock=lambda: site.now_ns + ahead_s * NS)


@BOTH
async def test_a_failover_begins_where_a_point_was_dropped_and_stays_readable(
    tmp_path: Path,
) -> None:
    """Chosen, then thinned out of the list at the horizon, then forked from, then thinned on."""
    async with published(tmp_path, 249, seed=1) as site:
        test = site.bench
        chosen = await (await site.log()).find("latest")
        log = await site.log()
        await site.publish(1)
        await site.thinner().run(COARSE, site.now_ns)
        await site.publish(3)
        with pytest.raises(NotFoundError):
            await hold_point(test.vault, log, chosen, "too late")
        owner = Owner("here", "dd" * 16, "", "x")
        moved = Moved("f" * 32, "ab" * 16, "unplanned", "FailedOver", "there", "x", 1, owner)
        record = await fork_off(
            test.vault, await site.record(), Fork(1, chosen.epoch, 1, moved),
            Claim("there", "ee" * 16, "ff" * 16, ()), log=lambda one: test.vault.log(one, 1),
            scratch=tmp_path / "fence",
        )  # fmt: skip
        assert record.parents[record.generation] == (1, chosen.epoch)
        site.bench.log.adopt(record)
        await site.thinner().run(COARSE, site.now_ns + 3600 * NS)
        record = await site.record()
        fresh = newcomer(test.vault).log(record)
        assert (await fresh.tip()).epoch == chosen.epoch


async def test_a_branch_is_not_begun_where_its_line_was_thinned_since_it_was_looked_at(
    tmp_path: Path,
) -> None:
    async with published(tmp_path, 249, seed=1) as site:
        test = site.bench
        seen = await site.record()
        await site.publish(1)
        await site.thinner().run(COARSE, site.now_ns)
        branch = Branch("away", "away", "dd" * 16, "t1", "x")
        with pytest.raises(ConflictError, match="was thinned just now"):
            await add_branch(test.vault, seen, (1, 249), branch)
        assert not (await site.record()).branches
        _, number = await add_branch(test.vault, await site.record(), (1, 250), branch)
        assert number == 2


async def test_points_that_were_asked_for_are_not_crowded_out(tmp_path: Path) -> None:
    async with bench() as test:
        site = Site(test, tmp_path, random.Random(2))
        for number in range(6):
            await test.publish(flags=Flags.APPLICATION if number in (1, 4) else Flags(0))
            await site.publish(50)
        await site.thinner().run(COARSE, site.now_ns)
        points = await (await site.log()).points()
        assert sum(one.consistency == "application" for one in points) == 2


@BOTH
async def test_the_newest_proven_point_stays(tmp_path: Path) -> None:
    async with published(tmp_path, 150, seed=3) as site:
        test = site.bench
        log = await site.log()
        for epoch in (17, 31):
            proof = Proof("hashed", "pass", "", "2026-11-22T00:00:00Z", 1.0, "here")
            await write_proof(test.vault.store, log.record.id, (1, epoch), proof)
        test.store.now_ns = site.now_ns
        await upkeep(site).tend(log, COARSE, tmp_path / "thin")
        left = [one.epoch for one in await log.points()]
        assert 31 in left
        assert 17 not in left


def test_points_of_one_time_stay_or_go_together() -> None:
    """They were sealed while a clock that had been ahead was put back."""
    times = np.array([10, 60, 60, 60, 130], np.uint64) * np.uint64(NS) + np.uint64(T0 // NS * NS)
    epochs = np.arange(1, 6, dtype=np.uint64)
    stays = kept(epochs, times, parse_ladder("1m for 1h"), int(times[-1]))
    assert stays[1] == stays[2] == stays[3]
    assert stays[1:4].all()


@BOTH
async def test_a_clock_that_was_ahead_at_the_last_seal_stops_thinning(tmp_path: Path) -> None:
    async with published(tmp_path, 150, seed=4) as site:
        site.bench.store.now_ns = site.now_ns - 86400 * NS
        with pytest.raises(ClockError, match="its newest point is of"):
            await upkeep(site, -86400).tend(await site.log(), COARSE, tmp_path / "thin")


async def test_many_that_open_what_was_collected_all_find_the_new_way(tmp_path: Path) -> None:
    async with published(tmp_path, 200, seed=5) as site:
        log = await site.log()
        points = await log.points()
        await site.thinner().run(COARSE, site.now_ns)
        await site.collect()
        left = {one.epoch for one in await (await site.log()).points()}
        wanted = [one for one in points if one.epoch in left]
        assert wanted

        async def read(number: int) -> None:
            point = wanted[number % len(wanted)]
            async with await log.open(point) as reader:
                assert await content(reader) == site.bench.model.states[point.epoch]

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(read, number)


async def test_joins_that_lie_across_a_horizon_go_with_what_they_join(tmp_path: Path) -> None:
    """Made by a writer that had not heard of the horizon; no reader looks at them."""
    async with published(tmp_path, 25, seed=5) as site:
        test = site.bench
        await site.thinner().run(COARSE, site.now_ns)
        assert (await site.record()).ledgers[1].horizon == 24
        await site.publish(15)
        across = [name for name in test.store.objects if name.endswith("10-0000000000000020.0")]
        assert len(across) == 1
        await site.publish(20)
        test.log.adopt(await site.record())
        for _ in range(2):
            await site.thinner().run(COARSE, site.now_ns, gone=site.gone)
            await site.collect()
        log = await site.log()
        await log.line.load()
        assert log.line.ledger is not None
        below = {name for name in test.store.objects if is_joined(name)
                 and (parts := parse_joined(name)) and parts[2] < log.line.floor}  # fmt: skip
        assert below <= log.line.ledger.live(test.record.id)
        assert not below & set(across)
        await site.check()


@BOTH
async def test_what_two_killed_runs_have_moved_is_collected(tmp_path: Path) -> None:
    """Also where the second was killed before it came to decide what goes."""
    async with published(tmp_path, 80, seed=6) as site:
        test = site.bench
        for hook in ("leaves.hook", "leaves.LeafWriter.make_leaf"):
            with (
                pytest.MonkeyPatch.context() as patch,
                pytest.raises(InterruptedError),
            ):
                patch.setattr(f"vdiskfs.catalog.{hook}", Mock(side_effect=InterruptedError))
                await site.thin()
        moved = {name for name in test.store.objects if name.startswith("segments/")}
        assert moved
        await site.thin()
        await site.collect()
        assert not moved & set(test.store.objects)
        assert not list(tmp_path.glob("thin/*"))
        await site.check()


async def test_a_slot_whose_index_lies_in_segments_is_left_to_itself(tmp_path: Path) -> None:
    """As that of the first delta of a disk of more than 32 GiB does: joining and thinning go on."""
    async with bench() as test:
        site = Site(test, tmp_path, random.Random(7))
        test.model.writer_options = {"inline_limit": 0, "segment_limit": 3_000}
        test.model.write(0, random.Random(2).randbytes(4096 * 500))
        await test.publish()
        test.model.writer_options = {}
        opened = await test.log.tables.piece(test.log.line.cover[0])
        assert (row := await opened.next_row(1, 0)) is not None
        assert int(row["object"]) > 0
        await site.publish(60)
        assert [piece.to_epoch for piece in test.log.line.cover][:4] == [1, 16, 32, 48]
        await site.thin()
        await site.collect()
        assert await site.check()


async def test_few_deltas_lead_to_any_point_of_a_stretch_that_is_not_over(tmp_path: Path) -> None:
    """Of 250 s every other second is kept, as leaves that no join of slots covers."""
    async with published(tmp_path, 380, seed=8) as site:
        ladder = parse_ladder("2s for 4000s")
        await site.thinner().run(ladder, site.now_ns, thin_ns=site.now_ns - 700 * NS)
        log = await site.log()
        points = await log.points()
        assert len(points) in (190, 191)
        for point in points[::10]:
            async with await log.open(point) as reader:
                assert reader.objects <= 64
                assert await content(reader) == site.bench.model.states[point.epoch]


async def test_a_name_that_was_doomed_is_never_given_again(tmp_path: Path) -> None:
    """Another site has lost against this one, with a higher revision; what it left is deleted."""
    async with published(tmp_path, 80, seed=9) as site:
        test = site.bench
        epochs, store = (39, 49), test.store
        lost = joined_name(test.record.id, 1, LEAF_LEVEL, epochs, 2)
        store.put(lost, b"what came to nothing")
        await site.thin()
        await site.collect()
        assert lost not in store.objects
        site.gone.clear()
        await site.publish(60)
        await site.thin()
        log = await site.log()
        await log.line.load()
        assert log.line.ledger is not None
        made = [piece for piece in log.line.ledger.pieces if piece.level == LEAF_LEVEL]
        assert epochs in [(piece.from_epoch, piece.to_epoch) for piece in made]
        assert {piece.revision for piece in made} == {3, 4}, "above the one that was lost"
        await site.check()


async def test_what_a_branch_has_in_common_with_its_line_stays_when_that_is_thinned(
    tmp_path: Path,
) -> None:
    """A delta that was moved into a branch has the segments of what it was."""
    async with published(tmp_path, 20, seed=8) as site:
        test, state = site.bench, site.bench.model
        fork, digest = (1, state.epoch), state.digest
        state.writer_options = {"inline_limit": 0, "segment_limit": 60_000}
        state.write(0, site.rng.randbytes(4096 * 40))
        spooled = state.seal()
        # As it was where another site took the disk, and the answer to this was lost.
        moved = rehead(spooled, 2, digest, tmp_path)
        await test.log.publish(spooled)
        branch = Branch("here", "here", "dd" * 16, "t1", "2026-11-21T01:40:05Z")
        record, number = await add_branch(test.vault, test.record, fork, branch)
        await test.vault.log(record, number).publish(moved)
        test.log.adopt(record)
        state.write(0, site.rng.randbytes(4096 * 40))
        await site.publish(30)
        await site.thinner().run(COARSE, site.now_ns)
        assert await site.collect() > 0
        report = await check(newcomer(test.vault), read_data=True)
        assert not report.problems
        log = newcomer(test.vault).log(await site.record(), number)
        async with await log.open(await log.find(moved.head.to_epoch)) as reader:
            assert await content(reader) == state.states[moved.head.to_epoch]
