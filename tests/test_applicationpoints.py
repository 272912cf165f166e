"""applicationpoints: when a point is due, by a clock that is not the host's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdiskfs.applicationpoints import LATE_S, ApplicationPoints, Schedule, Unit
from vdiskfs.catalog import Policy

IDS = [f"{number:032x}" for number in range(40)]
HOUR = 3600.0


def run(
    schedule: Schedule, ids: list[str], begin_s: float, end_s: float
) -> list[tuple[float, str]]:
    """Live from one time to another, waiting as the schedule says."""
    found, now_s = [], begin_s
    while now_s < end_s:
        found += [(now_s, one) for one in schedule.due(ids, now_s)]
        wait_s = schedule.wait_s(now_s)
        assert wait_s >= 0
        now_s += max(wait_s, 0.001)
    return found


@given(begin_s=st.floats(0, 4e9), interval_s=st.sampled_from([10.0, 600.0, HOUR, 12 * HOUR]))
def test_each_is_due_once_an_interval_at_its_own_time(begin_s: float, interval_s: float) -> None:
    found = run(Schedule(interval_s), IDS[:5], begin_s, begin_s + 3.0 * interval_s)
    count = Counter(one for _, one in found)
    assert all(count[one] in (2, 3) for one in IDS[:5])
    for one in IDS[:5]:
        times = [at_s for at_s, who in found if who == one]
        for first, second in zip(times, times[1:], strict=False):
            assert abs(second - first - interval_s) < 1


def test_the_times_are_spread_over_the_interval() -> None:
    found = run(Schedule(HOUR), IDS, 0, HOUR + 1)
    quarters = Counter(int(at_s % HOUR // (HOUR / 4)) for at_s, _ in found)
    assert len(found) >= len(IDS) - 1
    assert min(quarters[quarter] for quarter in range(4)) >= 4


def test_a_restart_changes_no_time() -> None:
    whole = {one: round(at_s) for at_s, one in run(Schedule(HOUR), IDS, 7e8, 7e8 + HOUR)}
    later = run(Schedule(HOUR), IDS, 7e8 + HOUR / 3, 7e8 + HOUR)
    assert later
    assert all(whole[one] == round(at_s) for at_s, one in later)


def test_what_was_missed_is_not_made_up() -> None:
    """A host that slept for a day makes no burst; one that was busy for a moment loses nothing."""
    schedule = Schedule(HOUR)
    assert schedule.due(IDS, 1000.0) == []
    assert schedule.due(IDS, 1000.0 + 24 * HOUR) in ([], *([one] for one in IDS))
    found = run(schedule, IDS, 1000.0 + 24 * HOUR, 1000.0 + 26 * HOUR)
    assert max(Counter(one for _, one in found).values()) <= 3
    schedule = Schedule(HOUR)
    schedule.due(IDS[:1], 1000.0)
    at_s = next(at for at, _ in run(Schedule(HOUR), IDS[:1], 1000.0, 1000.0 + HOUR + 1))
    assert schedule.due(IDS[:1], at_s + LATE_S - 1) == IDS[:1]


def test_a_clock_that_is_put_back_stops_nothing() -> None:
    schedule = Schedule(600.0)
    schedule.due(IDS, 1e9)
    found = run(schedule, IDS, 1e9 - 1e6, 1e9 - 1e6 + 700)
    assert {one for _, one in found} == set(IDS)


@pytest.mark.parametrize(
    ("mount", "policies", "interval_s"),
    [(0.0, [""], 0.0), (HOUR, [""], HOUR), (HOUR, ["4h"], 4 * HOUR), (0.0, ["30m"], HOUR / 2),
     (0.0, ["", "1h", "2h"], HOUR), (HOUR, ["", "30m"], HOUR / 2)],
)  # fmt: skip
def test_a_policy_says_how_often_and_in_a_group_the_shortest_counts(
    mount: float, policies: list[str], interval_s: float
) -> None:
    made = [Policy("p", application_interval=one) if one else None for one in policies]
    disks = tuple(cast("Any", SimpleNamespace(policy=one)) for one in made)
    points = cast("Any", SimpleNamespace(_options=SimpleNamespace(application_interval_s=mount)))
    assert ApplicationPoints._interval_s(points, Unit("id", "name", disks)) == interval_s


def test_what_an_earlier_run_has_left_frozen_is_not_frozen_anew(tmp_path: Path) -> None:
    points = cast("Any", SimpleNamespace(_notes=tmp_path))
    (tmp_path / "a.json").write_text('{"disks": [{"name": "web01"}]}')
    assert "not said that it is thawed" in ApplicationPoints._left(points, {"web01", "db01"})
    assert ApplicationPoints._left(points, {"db01"}) == ""
    (tmp_path / "a.json").write_text("{")
    assert "cannot be read" in ApplicationPoints._left(points, {"db01"})
