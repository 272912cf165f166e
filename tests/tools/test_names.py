"""vdiskfs_tools.names: how a point is named."""

import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdiskfs.errors import UsageError
from vdiskfs_tools.names import (
    PointName,
    check_time,
    iso_time,
    parse_disk,
    parse_point,
    parse_time_range,
)

NS = 1_000_000_000


@pytest.mark.parametrize(
    ("text", "disk", "point"),
    [
        ("web01@latest", "web01", "latest"),
        ("web01@latest-application-consistent", "web01", "latest-application-consistent"),
        ("web01@latest-proven", "web01", "latest-proven"),
        ("web01@-15m", "web01", "-15m"),
        ("web01@-1.5h", "web01", "-1.5h"),
        ("web01@2026-11-21T01:40:05Z", "web01", "2026-11-21T01:40:05Z"),
        ("web01@2026-11-21T01:40:05.123+02:00", "web01", "2026-11-21T01:40:05.123+02:00"),
        ("web01@#123", "web01", 123),
        ("web01@123", "web01", 123),
        ("web01@0", "web01", 0),
        ("a@b@latest", "a@b", "latest"),
        ("my disk@1", "my disk", 1),
    ],
)
def test_a_point_is_named(text: str, disk: str, point: str | int) -> None:
    assert parse_point(text) == PointName(disk, point)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "web01",
        "@latest",
        "web01@",
        "web01@#",
        "web01@#-1",
        "web01@newest",
        "web01@-15",
        "web01@-15q",
        "web01@+15m",
        "web01@2026-13-01T00:00:00Z",
        "web01@9223372036854775808",
        "web01@99999999999999999999",
        "web01@-" + "9" * 400 + "y",
        "web01@0001-01-01T00:00:00Z",
        "a/b@latest",
        "a\x00b@latest",
        "a\nb@latest",
        "x" * 256 + "@latest",
        "web01@\u0661\u0662",
    ],
)
def test_what_is_no_point_is_wrong_use(text: str) -> None:
    with pytest.raises(UsageError):
        parse_point(text)


@given(st.text())
def test_any_text_is_a_point_or_wrong_use(text: str) -> None:
    for form in (text, f"web01@{text}"):
        with suppress(UsageError):
            assert isinstance(parse_point(form), PointName)


def test_a_disk_has_a_name() -> None:
    for name in ("", "a/b", "a\x1b", "\ud800"):
        with pytest.raises(UsageError):
            parse_disk(name)


def test_a_whole_second_is_in_a_range_whole() -> None:
    start, end = parse_time_range("2026-11-21T01:40:05Z", "2026-11-21T01:40:05Z")
    assert start is not None
    assert end is not None
    assert start % NS == 0
    assert end - start == NS - 1


@pytest.mark.parametrize(("text", "length"), [("05", NS), ("05.1", NS // 10), ("05.123", 10**6)])
def test_a_time_is_as_long_as_its_digits(text: str, length: int) -> None:
    moment = f"2026-11-21T01:40:{text}Z"
    start, end = parse_time_range(moment, moment)
    assert start is not None
    assert end is not None
    assert end - start == length - 1


def test_a_span_counts_back_from_now() -> None:
    start, _ = parse_time_range("-15m", None)
    assert start is not None
    assert abs(time.time_ns() - 900 * NS - start) < 60 * NS


def test_a_range_that_is_empty_is_wrong_use() -> None:
    with pytest.raises(UsageError):
        parse_time_range("-1m", "-2m")


@given(st.integers(0, 4 * 10**18))
def test_the_daemon_reads_the_same_microsecond(time_ns: int) -> None:
    text = iso_time(time_ns)
    assert text is not None
    assert check_time(text, first=True) == time_ns // 1000 * 1000 == check_time(text) - 999
    assert check_time(text) == time_ns // 1000 * 1000 + 999


def test_a_command_that_is_offered_names_disks_and_groups_as_a_shell_takes_them() -> None:
    """A name is anybody's who may write to the vault: $(...) in one is not to be run."""
    bare = re.compile(r"vdiskfs [a-z -]+\{[a-z_.]*(disk|group)[a-z_.]*\}")
    found = [
        f"{path.name}: {line.strip()}"
        for top in ("vdiskfs", "tools")
        for path in sorted((Path(__file__).parents[2] / top).rglob("*.py"))
        for line in path.read_text().splitlines()
        if bare.search(line)
    ]
    assert found == []
