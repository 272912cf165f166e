"""A disk is written and thinned at every step of a check and a repair: both end, and are right."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.catalog.damage import Site, kind_of, site, thin
from vdiskfs.catalog import walk
from vdiskfs.catalog.look import look

pytestmark = [
    pytest.mark.usefixtures("each_vault"),
    pytest.mark.parametrize("each_vault", ["plain"], indirect=True),
]


class Thinning:
    """Publishes a point and thins the disk each time when a check looks at a delta."""

    def __init__(self, one: Site, directory: Path) -> None:
        self._one, self._directory = one, directory
        self._rng = random.Random(5)
        self.looks = self.ledgers = 0

    async def step(self) -> None:
        self.looks += 1
        if self.looks > 150:
            return  # whoever begins again and again is found by the count
        test = self._one.bench
        before = (await test.vault.disk(test.record.id)).ledgers
        test.model.churn(self._rng, writes=1, pages=64)
        await test.publish()
        await test.log.publish_joins()
        await thin(test, self._directory)
        self.ledgers += (await test.vault.disk(test.record.id)).ledgers != before


@contextmanager
def meanwhile(step: Callable[[], Awaitable[None]]) -> Iterator[None]:
    async def looked(*args: Any) -> Any:
        await step()
        return await look(*args)

    with mock.patch.object(walk, "look", looked):
        yield


async def test_a_check_does_not_miss_what_was_thinned_away_meanwhile(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        thinning = Thinning(one, tmp_path)
        with meanwhile(thinning.step):
            report = await one.checked()
        assert thinning.ledgers > 10
        assert set(one.whole) - set(one.bench.store.objects), "and it was collected"
        assert report.problems == []


async def test_a_ledger_that_is_replaced_before_it_is_read_is_no_damage(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        thinning, vault = Thinning(one, tmp_path), one.vault()
        read = vault.store.read

        async def late(name: str, **rest: Any) -> Any:
            if ".ledger/" in name and not thinning.looks:
                await thinning.step()
            return await read(name, **rest)

        with (
            mock.patch.object(one.bench.store, "read", late),
            mock.patch.object(Site, "vault", return_value=vault),
        ):
            report = await one.checked()
        assert thinning.ledgers == 1
        assert report.problems == []
        assert report.points > 10


async def test_what_is_still_named_is_healed_while_the_disk_is_thinned_at_every_step(
    tmp_path: Path,
) -> None:
    async with site(tmp_path) as one:
        # The first leaf stays, what is newest is thinned away: the source has neither's index.
        kept = one.names("leaf")[0]
        for name in [kept, *one.names("slot")[-3:-1]]:
            one.damage(name, random.Random(1), "flip")
        thinning = Thinning(one, tmp_path)
        with meanwhile(thinning.step):
            report = await one.repaired()
        assert thinning.ledgers > 10
        assert thinning.looks < 200, "it looked at all deltas once for each time that it healed"
        checked = await one.checked()
        assert {left.problem.object for left in report.left} == {
            problem.object for problem in checked.problems
        }
        messages = {one.problem.object: one.problem.message for one in report.healed}
        assert "points are read without it" not in messages[kept]
        assert all(kind_of(left.problem.object) != "slot" for left in report.left)
