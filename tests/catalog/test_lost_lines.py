"""Where what tells of a line or a disk is lost, check names its points, and commands say damage."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.catalog.damage import thin
from tests.catalog.harness import Bench, bench
from tests.vaults import newcomer
from vdiskfs.catalog import Point, check
from vdiskfs.errors import DamagedError, NotFoundError

RECORD = "/disk.json"
LEDGER = ".ledger/"
NAME = "names/"


async def forked(test: Bench, directory: Path) -> list[Point]:
    """Thin a line of 90 points, fork off below its horizon; return all points there are."""
    rng = random.Random(3)
    for _ in range(90):
        test.model.churn(rng, writes=2, pages=16)
        await test.publish()
    await thin(test, directory)
    parent = await test.log.points()
    assert test.log.line.ledger is not None
    fork = parent[2].epoch
    assert fork < test.log.line.ledger.horizon
    record = await test.vault.update_disk(
        test.record.id, lambda old: replace(old, generation=2, parents={1: None, 2: (1, fork)})
    )
    log, model = test.vault.log(record), test.model
    tip = await log.tip()
    model.generation, model.epoch, model.digest = 2, fork, tip.digest
    model.data, model.dirty = bytearray(model.states[fork]), set()
    model.cut = model.from_size = tip.size
    for number in range(3):
        model.write(number * 4096, bytes([number + 1]) * 4096)
        await log.publish(model.seal())
    return [*parent, *(one for one in await log.points() if one.generation == 2)]


async def unreadable(test: Bench, points: list[Point]) -> list[tuple[str, int, int]]:
    """Return the points that cannot be opened: the truth, by opening them all."""
    found = []
    for point in points:
        vault = newcomer(test.vault, test.store)
        try:
            log = vault.log(await vault.disk(test.record.id), point.generation)
            async with await log.open(await log.find(point.epoch)) as reader:
                await reader.read_pages(0, reader.pages)
        except (DamagedError, NotFoundError):
            found.append(("web01", point.generation, point.epoch))
    return found


async def test_check_names_exactly_the_points_that_a_lost_document_hurts(tmp_path: Path) -> None:
    async with bench() as test:
        points = await forked(test, tmp_path)
        objects = dict(test.store.objects)
        for what, how in itertools.product((LEDGER, RECORD, NAME), ("lost", "flipped")):
            [name] = [name for name in objects if what in name]
            data, metadata, _ = objects[name]
            if how == "lost":
                del test.store.objects[name]
            else:
                test.store.put(name, data[:30] + bytes([data[30] ^ 1]) + data[31:], metadata)
            vault = newcomer(test.vault, test.store)
            report = await check(vault)
            hurt = await unreadable(test, points)
            assert len(hurt) == (0 if what == NAME else len(points))
            assert report.hurt == hurt, (what, how)
            [seen] = [one.object for one in report.problems]
            assert test.vault.stored_name(seen) == name
            if what != NAME:
                with pytest.raises(DamagedError) as told:
                    await (await vault.find_log("web01")).points()
                assert name in told.value.message
                assert "vdiskfs vault repair" in told.value.hint
            test.store.objects = dict(objects)
