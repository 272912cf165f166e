"""Positions in directories, and the names of points: properties."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vdiskfs.tree import PointRef
from vdiskfs.tree.listing import FIRST_COOKIE, NameListing, cookie_of
from vdiskfs.tree.pointnames import (
    PointListing,
    day_end,
    day_of,
    day_start,
    parse_point_name,
    point_name,
)

NAMES = st.sets(st.binary(min_size=1, max_size=20), max_size=60)
TIMES = st.integers(0, 4_102_444_800 * 10**9)


def listing_of(names: set[bytes]) -> NameListing:
    return NameListing((name, lambda: None) for name in names)


@given(NAMES, NAMES, NAMES, st.integers(1, 7))
def test_names_that_stay_are_given_once_whatever_comes_and_goes(
    lasting: set[bytes], going: set[bytes], coming: set[bytes], page: int
) -> None:
    """A position taken from one listing goes on rightly in another of the same directory."""
    at, given_names = 0, []
    listing = listing_of(lasting | going)
    while rest := list(listing.after(at))[:page]:
        given_names += [entry.name for entry in rest]
        at = rest[-1].cookie
        listing = listing_of(lasting | coming)
    assert len(given_names) == len(set(given_names))
    assert lasting <= set(given_names)


@given(st.binary(max_size=255))
def test_a_cookie_is_positive_and_leaves_room_for_the_dots(name: bytes) -> None:
    assert FIRST_COOKIE <= cookie_of(name) < 1 << 62


@given(TIMES, st.integers(1, 2**62))
def test_a_point_name_says_day_time_and_epoch(time_ns: int, epoch: int) -> None:
    point = PointRef(time_ns, epoch, 1)
    start_ns = day_start(day_of(time_ns).encode())
    assert start_ns is not None
    assert start_ns <= time_ns < day_end(start_ns)
    for with_epoch in (False, True):
        parsed = parse_point_name(point_name(point, with_epoch=with_epoch).encode())
        assert parsed == (
            (time_ns - start_ns) // 10**6 * 10**6,
            epoch if with_epoch else None,
        )


@given(st.lists(st.integers(0, 5_000_000), max_size=50), st.integers(1, 5))
def test_the_points_of_a_day_have_distinct_names_and_positions_in_order(
    offsets: list[int], page: int
) -> None:
    points = [PointRef(when, number + 1, 1) for number, when in enumerate(sorted(offsets))]
    listing = PointListing(points, lambda point: None)
    at, names = 0, []
    while rest := list(listing.after(at))[:page]:
        names += [entry.name for entry in rest]
        at = rest[-1].cookie
    assert len(names) == len(points) == len(set(names))
    assert names == sorted(names), "as a person sees them"
