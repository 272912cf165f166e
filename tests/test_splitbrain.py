"""Forced split-brains, step by step; see `tests.splitbrain`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest

from tests.splitbrain import split_round

# A soak runner plays other seeds: VDISKFS_SPLITBRAINS rounds from VDISKFS_SPLITBRAINS_SEED on.
ROUNDS = int(os.environ.get("VDISKFS_SPLITBRAINS", "120"))
FIRST = int(os.environ.get("VDISKFS_SPLITBRAINS_SEED", "1"))
PART = 40
HAPPENED = (
    "answer lost", "request lost", "cut off", "written while displaced", "forced", "refused",
    "rolled back", "lied to", "displaced", "came back", "crash at request", "crash at waiting",
    "to the tip", "to an older point", "taken planned", "taken unplanned", "taken failback",
    "unplanned change-point", "unplanned reprotect", "planned reprotect", "rolled back move",
    "failed back", "failover refused", "passed failover.taken", "passed failover.returned",
    "passed failover.told", "passed handover.asked", "passed handover.stopping",
    "passed handover.noted", "passed handover.fenced", "passed handover.released",
    "passed handover.withdrawn", "passed takeover.fenced", "passed takeover.generation",
    "passed branch.started", "passed branch.moved",
)  # fmt: skip


_all: Counter[str] = Counter()  # of the parts played so far


@pytest.mark.slow
@pytest.mark.parametrize("start", range(FIRST, FIRST + ROUNDS, PART))
def test_a_split_brain_has_one_owner_and_every_divergent_write_is_a_point(
    start: int, tell: Callable[[str], None]
) -> None:
    total: Counter[str] = Counter()
    for seed in range(start, min(start + PART, FIRST + ROUNDS)):
        total += split_round(seed)
    tell(f"split-brains, seeds {start} to {seed}: {dict(sorted(total.items()))}")
    _all.update(total)
    _all["played"] += seed + 1 - start
    if _all["played"] == ROUNDS >= 3 * PART:  # what is rare is in some part of them
        assert [what for what in HAPPENED if not _all[what]] == []
    assert total["points"] + total["thrown away"] >= total["epochs"] > 0


def test_a_point_is_changed_to_one_of_a_line_that_was_left() -> None:
    """Found by seed 230: the point's generation is no ancestor of the one that was current."""
    assert split_round(230)["points"]
