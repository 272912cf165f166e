"""Where two points differ, whichever of a disk's lines they lie in."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.catalog.harness import bench, is_joined
from tests.catalog.lines import Lines, Place, act, differing, lines
from tests.delta.model import PAGE
from tests.point.test_reader import Sparse
from tests.vaults import newcomer
from vdiskfs.catalog import differences, open_differences
from vdiskfs.delta import genesis_digest
from vdiskfs.delta.layout import decode_head
from vdiskfs.errors import DamagedError

pytestmark = pytest.mark.usefixtures("each_vault")


async def found_runs(test: Lines, one: Place, two: Place) -> list[tuple[int, int]]:
    log_a, a = await test.point(one)
    log_b, b = await test.point(two)
    async with await open_differences(log_a, a, log_b, b) as found:
        return [run async for run in found.runs()]


async def assert_exact(test: Lines, one: Place, two: Place) -> None:
    runs = await found_runs(test, one, two)
    wanted = differing(test.states[one], test.states[two])
    assert [page for first, count in runs for page in range(first, first + count)] == wanted
    assert all(sum(a) < b[0] for a, b in zip(runs, runs[1:], strict=False))


async def grow(test: Lines, generation: int, epochs: int, rng: random.Random) -> None:
    for _ in range(epochs):
        for _ in range(rng.randrange(4)):
            act(test.models[generation], rng, pages=80)
        await test.publish(generation)
        if rng.random() < 0.3:
            await test.join(generation)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), plan=st.lists(st.integers(1, 40), min_size=1, max_size=5))
async def test_the_difference_is_exact_across_lines(seed: int, plan: list[int]) -> None:
    """Lines of random lengths fork off at random points of each other, joined at random."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        async with lines(Path(place)) as test:
            for number, epochs in enumerate(plan):
                generation = test.fork(rng.choice(sorted(test.states))) if number else 1
                await grow(test, generation, epochs, rng)
            for _ in range(8):
                one, two = (rng.choice(sorted(test.states)) for _ in range(2))
                await assert_exact(test, one, two)
            tips = [(generation, model.epoch) for generation, model in test.models.items()]
            known = [tip for tip in tips if tip in test.states]
            await assert_exact(test, rng.choice(known), rng.choice(known))


async def test_a_fork_may_lie_inside_a_joined_delta(tmp_path: Path) -> None:
    """The line went on, and was joined over the fork: only what follows it is looked at."""
    async with lines(tmp_path) as test:
        rng = random.Random(7)
        test.models[1].write(0, rng.randbytes(200 * PAGE))
        await test.publish(1)
        for _ in range(6):
            test.models[1].write(rng.randrange(200) * PAGE, rng.randbytes(PAGE))
            await test.publish(1)
        branch = test.fork((1, 7))
        for _ in range(13):
            test.models[1].write(rng.randrange(100) * PAGE, rng.randbytes(PAGE))
            await test.publish(1)
        await test.join(1)
        assert any(is_joined(name) for name in test.bench.store.objects)
        test.models[branch].write(150 * PAGE, rng.randbytes(3 * PAGE))
        await test.publish(branch)
        await assert_exact(test, (1, 20), (branch, 8))
        await assert_exact(test, (branch, 8), (1, 20))
        await assert_exact(test, (branch, 8), (1, 3))
        log_a, a = await test.point((1, 20))
        log_b, b = await test.point((branch, 8))
        async with await open_differences(log_a, a, log_b, b) as found:
            assert found.fork == (1, 7)


async def test_the_same_point_does_not_differ(tmp_path: Path) -> None:
    async with lines(tmp_path) as test:
        await grow(test, 1, 20, random.Random(3))
        assert await found_runs(test, (1, 20), (1, 20)) == []
        branch = test.fork((1, 20))
        await test.publish(branch)
        assert await found_runs(test, (1, 20), (branch, 21)) == []


async def test_what_was_changed_and_changed_back_does_not_differ(tmp_path: Path) -> None:
    async with lines(tmp_path) as test:
        model = test.models[1]
        model.write(0, b"a" * 8 * PAGE)
        await test.publish(1)
        model.write(0, b"b" * 4 * PAGE)
        model.discard(6 * PAGE, PAGE)
        await test.publish(1)
        model.write(0, b"a" * 3 * PAGE)
        model.write(6 * PAGE, b"a" * PAGE)
        await test.publish(1)
        assert await found_runs(test, (1, 1), (1, 3)) == [(3, 1)]


@pytest.mark.parametrize("after", [0, 5 * PAGE, 5 * PAGE + 100, 30 * PAGE])
async def test_sizes_may_differ(tmp_path: Path, after: int) -> None:
    """What one disk has beyond the end of the other differs where it is not zero."""
    async with lines(tmp_path) as test:
        model = test.models[1]
        model.write(0, random.Random(1).randbytes(12 * PAGE))
        model.truncate(20 * PAGE)
        await test.publish(1)
        model.truncate(after)
        await test.publish(1)
        model.truncate(40 * PAGE)
        await test.publish(1)
        for one in (1, 2, 3):
            for two in (1, 2, 3):
                await assert_exact(test, (1, one), (1, two))


async def test_lines_without_a_common_point_are_compared(tmp_path: Path) -> None:
    """Of a generation that began with the empty disk everything is looked at."""
    async with lines(tmp_path) as test:
        await grow(test, 1, 5, random.Random(2))
        test.states[1, 0] = b""
        test.digests[1, 0] = test.bench.model.digest
        other = test.fork((1, 5))
        record = test.bench.record
        model = test.models[other]
        model.data, model.epoch, model.cut, model.from_size = bytearray(), 0, 0, 0
        model.digest = genesis_digest(test.bench.vault.vault_id, record.id)
        object.__setattr__(record, "parents", {**record.parents, other: None})
        await grow(test, other, 5, random.Random(9))
        await assert_exact(test, (1, 5), (other, 5))


@pytest.mark.parametrize("part", ["root", "blocks"])
async def test_damage_of_joined_deltas_is_gone_round(tmp_path: Path, part: str) -> None:
    """What joined deltas join is still there: the difference stays exact."""
    async with lines(tmp_path) as test:
        await grow(test, 1, 30, random.Random(5))
        await test.join(1)
        vault = newcomer(test.bench.vault)
        joined = [name for name in test.bench.store.objects if is_joined(name)]
        assert joined
        for name in joined:
            data, info = await vault.store.read(name)
            head = decode_head(data[:512])
            blocks = (head.tail_offset, head.root_offset)
            start, end = blocks if part == "blocks" else (head.root_offset, len(data) - 512)
            await vault.store.delete(name)
            hurt = data[:start] + bytes(end - start) + data[end:]
            await vault.store.create(name, hurt, metadata=info.metadata)
        await assert_exact(test, (1, 30), (1, 2))
        await assert_exact(test, (1, 5), (1, 30))
        branch = test.fork((1, 18))
        test.models[branch].truncate(3 * PAGE)
        await test.publish(branch)
        await assert_exact(test, (branch, 19), (1, 30))


async def test_a_damaged_delta_is_named(tmp_path: Path) -> None:
    async with lines(tmp_path) as test:
        for page in (1, 2, 3):
            test.models[1].write(page * PAGE, b"x" * PAGE)
            await test.publish(1)
        name = sorted(one for one in test.bench.store.objects if one.startswith("disks/"))[1]
        data, metadata, _ = test.bench.store.objects[name]
        test.bench.store.put(name, data[:-700] + bytes(700), metadata)
        with pytest.raises(DamagedError, match="web01@"):
            await found_runs(test, (1, 1), (1, 3))


async def test_batches_hold_across_their_borders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiny blocks and batches every step ends somewhere in the middle."""
    monkeypatch.setattr("vdiskfs.delta.builder.BLOCK_RAW", 700)
    monkeypatch.setattr("vdiskfs.delta.builder.DIRECT_ROWS", 2)
    monkeypatch.setattr("vdiskfs.delta.builder.ROWS_PER_PAGE", 3)
    monkeypatch.setattr("vdiskfs.delta.builder.ZEROS_PER_BLOCK", 2)
    monkeypatch.setattr(differences, "BATCH", 3)
    async with lines(tmp_path) as test:
        rng = random.Random(4)
        test.models[1].write(0, rng.randbytes(400 * PAGE))
        await test.publish(1)
        branch = test.fork((1, 1))
        for generation in (1, branch):
            model = test.models[generation]
            for _ in range(60):
                model.write(rng.randrange(400) * PAGE, rng.randbytes(PAGE))
                model.discard(rng.randrange(400) * PAGE, 2 * PAGE)
            if generation == 1:
                model.truncate(300 * PAGE + 10)
            await test.publish(generation)
        await assert_exact(test, (1, 2), (branch, 2))
        await assert_exact(test, (1, 1), (branch, 2))


async def cost(size: int, changes: list[int]) -> tuple[int, int, float]:
    """Return requests, differing pages, processor seconds, for a sparse disk of a size."""
    rng = random.Random(1)
    async with bench() as test:
        model = test.model
        data = Sparse(size)
        model.data = data  # type: ignore[assignment]

        def write(pages: list[int]) -> None:
            model.dirty = set(pages)
            for page in pages:
                data.pages[page] = rng.randbytes(PAGE)

        write(list(range(2000)))
        await test.publish()
        write(changes)
        await test.publish()
        # A discard of all that follows: there is nothing in it.
        model.dirty = set(range(5000, 5100))
        await test.publish()
        log = test.fresh_log()
        a, b = await log.find(1), await log.find(3)
        before, began = test.store.requests, time.process_time()
        async with await open_differences(log, a, log, b) as found:
            total = await found.count()
        return test.store.requests - before, total, time.process_time() - began


async def test_the_cost_does_not_grow_with_the_disk() -> None:
    """The same changes on sparse disks of 1 GiB to 4 TiB: the same requests."""
    costs = {}
    for shift in (30, 34, 38, 42):
        costs[shift] = await cost(1 << shift, list(range(100, 300)))
        # The same number of changes, over the whole disk.
        step = (1 << shift) // PAGE // 200
        requests, total, _ = await cost(
            1 << shift, list(range(0, (1 << shift) // PAGE, step))[:200]
        )
        assert total == 200
        assert requests <= costs[shift][0] + 2
    print({f"2^{shift}": found for shift, found in costs.items()})
    assert {found[:2] for found in costs.values()} == {costs[30][:2]}
