"""Which points a ladder keeps."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdiskfs.catalog.retention import (
    Ladder,
    Rung,
    format_ladder,
    kept,
    next_change_ns,
    parse_ladder,
)
from vdiskfs.errors import UsageError
from vdiskfs.units import NS

DEFAULT = parse_ladder("1s for 1h, 1m for 1d, 1h for 15d, 1d for 1y")
T0 = 1_790_000_000 * NS


def choose(
    points: dict[int, int], ladder: Ladder, now_ns: int, protected: Collection[int] = ()
) -> dict[int, int]:
    epochs = sorted(points)
    stays = kept(
        np.array(epochs, np.uint64), np.array([points[one] for one in epochs], np.uint64),
        ladder, now_ns, protected,
    )  # fmt: skip
    return {epoch: points[epoch] for epoch, stay in zip(epochs, stays, strict=True) if stay}


@st.composite
def ladders(draw: st.DrawFn) -> Ladder:
    steps = sorted(draw(st.sets(st.integers(1, 5000), min_size=1, max_size=4)))
    spans = sorted(draw(st.sets(st.integers(5000, 200_000), min_size=len(steps),
                                max_size=len(steps))))  # fmt: skip
    return tuple(Rung(a * NS, b * NS) for a, b in zip(steps, spans, strict=True))


@st.composite
def histories(draw: st.DrawFn) -> dict[int, int]:
    steps = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 900)), max_size=80))
    epoch, time_ns, points = 0, T0, {}
    for more, seconds in steps:
        epoch, time_ns = epoch + more, time_ns + seconds * NS // 2
        points[epoch] = time_ns
    return points


@given(histories(), ladders(), st.lists(st.integers(0, 400_000), min_size=1, max_size=6), st.data())
def test_it_does_not_matter_how_often_a_ladder_is_applied(
    points: dict[int, int], ladder: Ladder, waits: list[int], data: st.DataObject
) -> None:
    protected = set(data.draw(st.lists(st.sampled_from(sorted(points)), max_size=3))) \
        if points else set()  # fmt: skip
    left, now_ns = dict(points), T0 + 40_000 * NS
    for wait in sorted(waits):
        now_ns = T0 + 40_000 * NS + wait * NS
        left = choose(left, ladder, now_ns, protected)
    assert left == choose(points, ladder, now_ns, protected)


@given(histories(), ladders(), st.integers(1, 40), st.integers(0, 100_000))
def test_what_is_thinned_while_points_come_is_what_is_thinned_at_the_end(
    points: dict[int, int], ladder: Ladder, part: int, wait: int
) -> None:
    left: dict[int, int] = {}
    for index, (epoch, time_ns) in enumerate(points.items()):
        left[epoch] = time_ns
        if index % part == 0:
            left = choose(left, ladder, time_ns)
    now_ns = max(points.values(), default=T0) + wait * NS
    assert choose(left, ladder, now_ns) == choose(points, ladder, now_ns)


@given(histories(), ladders(), st.integers(0, 400_000))
def test_the_newest_and_the_protected_stay_and_every_bucket_has_its_newest(
    points: dict[int, int], ladder: Ladder, wait: int
) -> None:
    now_ns = max(points.values(), default=T0) + wait * NS
    protected = set(list(points)[:2])
    left = choose(points, ladder, now_ns, protected)
    assert protected <= set(left)
    if points:
        assert max(points) in left
    for rung in ladder:
        for epoch, time_ns in points.items():
            bucket = time_ns // rung.step_ns
            newest = max(one for one, when in points.items() if when // rung.step_ns == bucket)
            if now_ns - points[newest] <= rung.span_ns and epoch == newest:
                assert epoch in left


@given(histories(), ladders(), st.integers(0, 200_000), st.integers(0, 200_000))
def test_nothing_leaves_before_it_is_said_to(
    points: dict[int, int], ladder: Ladder, wait: int, later: int
) -> None:
    now_ns = max(points.values(), default=T0) + wait * NS
    left = choose(points, ladder, now_ns)
    times = np.array([left[one] for one in sorted(left)], np.uint64)
    change = next_change_ns(times, ladder, now_ns)
    until = now_ns + later * NS
    if change is None or until < change:
        assert choose(left, ladder, until) == left


def test_a_year_of_seconds_is_the_points_that_the_ladder_says() -> None:
    now = T0 + 400 * 86400 * NS
    seconds = np.arange(3 * 86400, dtype=np.uint64) * np.uint64(NS) + np.uint64(
        now - 3 * 86400 * NS
    )
    stays = kept(np.arange(1, len(seconds) + 1, dtype=np.uint64), seconds, DEFAULT, now)
    # An hour of seconds, a day of minutes, three days of hours; the minutes of the hour are
    # seconds, too.
    assert 3600 + 23 * 60 + 48 <= stays.sum() <= 3600 + 23 * 60 + 48 + 5


@pytest.mark.parametrize(
    "text", ["1s for 1h, 1m for 1d, 1h for 15d, 1d for 1y", "all", "5m for 72h"]
)
def test_a_ladder_is_written_as_it_is_read(text: str) -> None:
    assert parse_ladder(format_ladder(parse_ladder(text))) == parse_ladder(text)


@pytest.mark.parametrize(
    "text",
    ["", "1s", "1s for", "1m for 1h, 1s for 1d", "1s for 1d, 1m for 1h", "1h for 1m", "0s for 1h"],
)
def test_what_is_no_ladder_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_ladder(text)


def test_the_longest_rung_keeps_what_it_says() -> None:
    """Its length, and that much after a time, are numbers of 64 bits."""
    ladder = parse_ladder("1s for 1h, 1d for 500y")
    times = np.array([NS, 2 * NS, 86400 * NS, 1_800_000_000 * NS], np.uint64)
    stays = kept(np.arange(1, 5, dtype=np.uint64), times, ladder, 1_800_000_000 * NS)
    assert stays.tolist() == [False, True, True, True]
    for text in ("1d for 501y", "1d for 585y", f"1d for {'9' * 400}y"):
        with pytest.raises(UsageError, match="not a retention ladder"):
            parse_ladder(text)


def test_a_point_that_is_newer_than_now_is_of_age_0() -> None:
    """Clocks may differ by minutes."""
    times = {epoch: T0 + epoch * 60 * NS for epoch in range(1, 6)}
    assert choose(times, parse_ladder("1s for 2m"), T0 + 3 * 60 * NS) == times
