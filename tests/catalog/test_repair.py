"""What is damaged in a vault is healed from where its bytes are still known."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.catalog.damage import Site, site

pytestmark = pytest.mark.usefixtures("each_vault")


def named(one: Site, report_hurt: list[tuple[str, int, int]]) -> set[int]:
    assert {disk for disk, _, _ in report_hurt} <= {"web01"}
    return {epoch for _, _, epoch in report_hurt}


async def test_of_100_random_damages_those_are_healed_whose_pages_the_source_has(
    tmp_path: Path,
) -> None:
    """The check names exactly the points hurt, the repair heals them to the same bytes."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    tally: Counter[str] = Counter()
    async with site(tmp_path) as one:
        assert await one.hurt() == set()
        newest = one.names("slot")[-1]
        for _ in range(100):
            name = rng.choice(one.names(rng.choice(["slot", "slot", "segment", "leaf", "joined"])))
            kind, span = one.damage(name, rng, "flip" if name == newest else "")
            hurt = await one.hurt()
            report = await one.checked()
            assert named(one, report.hurt) == hurt, (name, kind)
            done = await one.repaired()
            left = await one.hurt()
            assert left <= hurt
            assert {epoch for rest in done.left for epochs in rest.problem.points.values()
                    for epoch in epochs} == left, (name, kind)  # fmt: skip
            if one.has(name, span):
                tally["healable"] += bool(report.problems)
                tally["healed"] += bool(report.problems) and done.ok and not left
            else:
                tally["gone"] += 1
                tally["reported"] += bool(done.left)
            tally["points hurt"] += len(hurt)
            tally["points left"] += len(left)
            one.restore()
    print(dict(tally))
    assert tally["healable"] > 30
    assert tally["healed"] >= 0.95 * tally["healable"]
