"""Deltas with large indexes: joined in parts, so that few objects lead to any point."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.catalog.harness import bench, content
from tests.catalog.test_thinning import Site, published
from tests.vaults import BOTH, PLAIN
from vdiskfs.catalog import indexes, leaves
from vdiskfs.catalog.remains import Remains
from vdiskfs.catalog.retention import parse_ladder
from vdiskfs.catalog.tables import tail_bytes
from vdiskfs.units import NS

HALF = parse_ladder("2s for 4000s")
FEW = parse_ladder("1s for 40s, 30s for 4000s")


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every index is large, and of no two as much as they are is held."""
    for module in ("tables", "indexes", "leaves", "ways"):
        monkeypatch.setattr(f"vdiskfs.catalog.{module}.SLOT_INDEX_LIMIT", 1)
    for module in ("joins", "indexes", "leaves", "ways"):
        monkeypatch.setattr(f"vdiskfs.catalog.{module}.JOIN_LIMIT", 2_000)
    monkeypatch.setattr("vdiskfs.catalog.indexes._PART_LEAST", 300)


async def most_objects(site: Site, step: int = 1) -> int:
    """Open points, each from nothing known; return the objects that the worst one took."""
    log = await site.log()
    worst = 0
    for point in (await log.points())[::-step]:
        async with await log.open(point) as reader:
            worst = max(worst, reader.objects)
            assert await content(reader) == site.bench.model.states[point.epoch]
    return worst


@BOTH
async def test_few_objects_lead_to_any_point_where_every_index_is_large(tmp_path: Path) -> None:
    """On a line that was never thinned, on one that keeps much, on one that drops most."""
    async with published(tmp_path, 150, seed=1) as site:
        assert await most_objects(site, 10) <= 48
        await site.thinner().run(HALF, site.now_ns, thin_ns=site.now_ns - 700 * NS)
        assert len(await (await site.log()).points()) in (75, 76)
        assert await most_objects(site, 5) <= 48
        site.bench.log.adopt(await site.record())
        for _ in range(3):
            await site.publish(60)
            await site.thinner().run(FEW, site.now_ns)
            site.bench.log.adopt(await site.record())
            await site.collect()
        assert len(await site.check()) < 200
        assert await most_objects(site, 5) <= 48
        ledger = (await site.log()).line.ledger
        assert ledger is None or len(ledger.leaves) <= len(ledger.points) + 8


@BOTH
async def test_a_large_index_in_segments_is_joined_with_those_that_follow(tmp_path: Path) -> None:
    async with bench() as test:
        site = Site(test, tmp_path, random.Random(7))
        test.model.writer_options = {"inline_limit": 0, "segment_limit": 3_000}
        test.model.write(0, random.Random(2).randbytes(4096 * 500))
        await test.publish()
        test.model.writer_options = {}
        await site.publish(299)
        await site.thinner().run(parse_ladder("256s for 4000s"), site.now_ns)
        log = await site.log()
        await log.points()
        assert log.line.ledger is not None
        assert log.line.ledger.leaves[0].piece.to_epoch > 1
        await site.collect()
        await site.check()


@PLAIN
async def test_no_more_than_a_part_of_a_large_index_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vdiskfs.delta.builder.BLOCK_RAW", 1_000)
    monkeypatch.setattr("vdiskfs.point.piece.WHOLE", 0)
    monkeypatch.setattr("vdiskfs.point.piece.TAIL", 0)
    monkeypatch.setattr("vdiskfs.catalog.indexes._PART_LEAST", 1_500)
    async with bench() as test:
        for _ in range(4):
            test.model.write(0, random.Random(1).randbytes(4096 * 1000))
            await test.publish()
        asked: list[int] = []
        read = test.store.read_range

        async def watched(name: str, offset: int, length: int) -> bytes:
            asked.append(length)
            return await read(name, offset, length)

        way = await test.log.line.listed(0, (0, 4))
        monkeypatch.setattr(test.store, "read_range", watched)
        writer = leaves.LeafWriter(test.log.tables, 1, "cc" * 16, 1, tmp_path, Remains([], None))
        piece = await writer.make_join(way)
        assert tail_bytes(piece) < indexes.index_bound(way)
        assert sum(asked) > 4 * 8_000
        assert max(asked) <= 1_500 < min(map(tail_bytes, way)) / 5
