"""A month of points: what it stores, what it asks of the vault, what opening a point takes.

The clock is the points' own. A disk changes 0.1 % an hour, page by page, a change every few
seconds: epochs without a change are not sealed. Short by default; VDISKFS_DAYS=30 for all of it.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.catalog.memory import MemoryStore
from tests.delta.model import T0, DiskModel
from tests.vaults import given, newcomer
from vdiskfs.catalog import DiskLog, Vault
from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.catalog.retention import kept, parse_ladder
from vdiskfs.catalog.upkeep import Upkeep
from vdiskfs.units import NS

PAGES = 16384
"""64 MiB: 0.1 % an hour are 16 pages."""

HOURS = int(float(os.environ.get("VDISKFS_DAYS", "0.5")) * 24)
LADDER = parse_ladder("1s for 1h, 1m for 1d, 1h for 15d, 1d for 1y")
TEND_S = 900
PER_HOUR = 17

REQUESTS_PER_EPOCH = 8.0
"""The budget: the slot, its part of joins and leaves, reading it back once for each rung that
it passes, deleting it."""

REQUESTS_PER_TURN = 40.0
"""And for each look at a line, every quarter of an hour: what is listed, the ledger, its swap."""


@dataclass
class Month:
    store: MemoryStore
    vault: Vault
    model: DiskModel
    log: DiskLog
    directory: Path
    now_ns: int = T0
    times: dict[int, int] = None  # type: ignore[assignment]

    async def hour(self, rng: random.Random, upkeep: Upkeep) -> None:
        moments = sorted(rng.sample(range(3600), PER_HOUR))
        begin = self.now_ns
        for start in range(0, 3600, TEND_S):
            for second in [one for one in moments if start <= one < start + TEND_S]:
                self.now_ns = self.store.now_ns = begin + second * NS
                page = rng.randrange(PAGES)
                self.model.write(page * 4096, rng.randbytes(2048) + bytes(2048))
                spooled = self.model.seal(time_ns=self.now_ns)
                await self.log.publish(spooled)
                spooled.path.unlink()
                await self.log.publish_joins()
            self.now_ns = self.store.now_ns = begin + (start + TEND_S) * NS
            await upkeep.tend(self.log, LADDER, self.directory / "thin")


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_a_month_of_points_stays_small_and_flat(tmp_path: Path) -> None:
    rng = random.Random(11)
    store = MemoryStore()
    store.now_ns = T0
    vault = await Vault.init(store, given())
    record = await vault.create_disk("web01", file="a", size=0, site="here")
    spool = tmp_path / "spool"
    spool.mkdir()
    model = DiskModel(spool, vault_id=vault.vault_id, disk_id=record.id)
    log = vault.log(record, cache=IndexCache(tmp_path / "indexes"))
    month = Month(store, vault, model, log, tmp_path)
    upkeep = Upkeep(vault, "cc" * 16, clock=lambda: month.now_ns)
    model.remembers = False  # the disk at each of 12,000 points
    model.truncate(PAGES * 4096)
    for page in range(0, PAGES, 8):
        model.write(page * 4096, rng.randbytes(2048) + bytes(2048))
    await log.publish(model.seal(time_ns=T0))
    began = store.requests
    for _ in range(HOURS):
        await month.hour(rng, upkeep)
    epochs = HOURS * PER_HOUR
    budget = epochs * REQUESTS_PER_EPOCH + HOURS * 4 * REQUESTS_PER_TURN
    assert store.requests - began <= budget, (store.requests - began) / HOURS
    # The ladder's points are there, and not many more.
    fresh = newcomer(vault).log(await vault.disk(record.id))
    points = await fresh.points()
    times = np.array(sorted(model.times.values()), np.uint64)
    wanted = kept(np.array(sorted(model.times), np.uint64), times, LADDER, month.now_ns)
    assert {int(epoch) for epoch in np.array(sorted(model.times))[wanted]} <= {
        point.epoch for point in points
    }
    assert len(points) <= wanted.sum() + 256
    # Any instant is opened through few objects, and is right.
    worst = 0
    last = points[-1]
    for point in [last, *rng.sample(points, min(40, len(points)))]:
        async with await fresh.open(point) as reader:
            worst = max(worst, reader.objects)
    assert worst <= 64
    async with await fresh.open(last) as reader:
        assert bytes(await reader.read_pages(0, PAGES)) == bytes(model.data)
    # What is stored for the changes that stay, once nothing waits to be deleted.
    month.now_ns = store.now_ns = month.now_ns + 3700 * NS
    await upkeep.tend(log, LADDER, tmp_path / "thin")
    month.now_ns = store.now_ns = month.now_ns + 3700 * NS
    await upkeep.tend(log, LADDER, tmp_path / "thin")
    unique, stored = await _bytes(fresh, log)
    print(f"{HOURS} h, {epochs} epochs: {(store.requests - began) / HOURS:.0f} requests/h, "
          f"{len(points)} points, {worst} objects, frames {stored / unique:.3f} of unique")  # fmt: skip
    assert stored <= 1.15 * unique


async def _bytes(fresh: DiskLog, log: DiskLog) -> tuple[int, int]:
    """Return the bytes of frames that the points need, and the bytes that frames take.

    Needed: of each kept point the pages that differ from the kept point before.
    """
    unique = 0
    await log.tip()
    ledger = log.line.ledger
    assert ledger is not None
    pieces = [leaf.piece for leaf in ledger.leaves]
    pieces += [piece for piece in log.line.cover if piece.from_epoch >= log.line.floor]
    for piece in pieces:
        opened = await log.tables.piece(piece)
        for row in await opened.rows(1, 0, 1 << 40):
            entries = await opened.entries(row)
            # One page of half random bytes compresses alike wherever it lies.
            unique += int(np.bitwise_count(entries.mask).sum()) * 2064
    stored = 0
    for info in [one async for one in fresh.store.list("")]:
        if info.name.startswith("segments/"):
            stored += info.size
        elif info.name.startswith("disks/") and "/g00000001/" in info.name:
            stored += info.size - int(info.metadata["tail"])
    return unique, stored
