"""Two writers and more, step by step; see `tests.races`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.races import race_round
from vdiskfs.ownernote import Note, Remembered

# A soak runner plays other seeds: VDISKFS_RACES rounds from VDISKFS_RACES_SEED on.
ROUNDS = int(os.environ.get("VDISKFS_RACES", "200"))
FIRST = int(os.environ.get("VDISKFS_RACES_SEED", "1"))
PART = 40
HAPPENED = (
    "answer lost", "request lost", "cloned", "rolled back", "forced", "refused", "lied to",
    "crash at request", "crash at answer", "passed owner.noted", "passed owner.claimed",
    "passed owner.kept", "passed takeover.fenced", "passed takeover.generation",
    "passed branch.started", "passed branch.noted", "passed branch.moved",
    "passed branch.shipped",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("start", range(FIRST, FIRST + ROUNDS, PART))
def test_nothing_is_lost_mixed_or_owned_twice_in_a_race_of_writers(
    start: int, tell: Callable[[str], None]
) -> None:
    total: Counter[str] = Counter()
    for seed in range(start, min(start + PART, FIRST + ROUNDS)):
        total += race_round(seed)
    tell(f"races of two writers, seeds {start} to {seed}: {dict(sorted(total.items()))}")
    if seed == start + PART - 1:
        assert [what for what in HAPPENED if not total[what]] == []
    assert total["points"] == total["epochs"] > 0


def test_what_left_the_spool_before_a_crash_is_not_forgotten() -> None:
    """The newest epoch was another one for who emptied the spool than for who came after it."""
    race_round(1583)
    early, late = Remembered(4, 1, "aa"), Remembered(4, 2, "bb")
    note = Note()
    for lasts in ((late, early), (late,)):
        note = replace(note, spent=note.spend(*lasts))
    assert note.has_spent(early)
    assert note.has_spent(late)
    assert not note.has_spent(Remembered(4, 3, "bb"))


def test_a_writer_that_comes_back_while_a_generation_begins_looks_again() -> None:
    """Its own takeover was lost for it, and a copy of it had begun the next one."""
    race_round(6061)
