"""A day of outages: nothing unreadable, nothing wrong, nothing left over."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.replicate.outages import KINDS, outage_round


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1])
def test_a_day_of_outages_ends_with_every_point_right(
    seed: int, expect_log: Callable[[str], None], tell: Callable[[str], None]
) -> None:
    expect_log(r"disk web01: ")
    counts = outage_round(seed)
    tell(f"./run soak --scenario outage --seed {seed}: {dict(counts)}")
    for kind in KINDS:
        assert counts[kind], f"{kind} did not happen"
    for fired in ("throttled fired", "lost fired", "refused fired", "countdowns", "critical"):
        assert counts[fired], f"{fired}: none"
    assert counts["resyncs"], "the threshold was never reached"
    assert counts["points"] > 100
