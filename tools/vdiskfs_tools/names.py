"""DISK@POINT: how the command line names a recovery point."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from vdiskfs.errors import UsageError
from vdiskfs.units import NS, parse_time

LATEST = ("latest", "latest-application-consistent", "latest-proven")
_FORMS = "use latest, -15m, 2026-11-21T01:40:05Z or #123, an epoch"


@dataclass(frozen=True)
class PointName:
    """A disk and a point of it, as the user named them; the vault knows whether they exist."""

    disk: str
    point: str | int

    def __str__(self) -> str:
        """As it may be typed again."""
        return f"{self.disk}@{self.point}"


def parse_disk(text: str) -> str:
    """Return a disk's name, checked.

    Raises:
        UsageError: it is empty, or holds what no name can.
    """
    if not text or len(text) > 255 or re.search(r"[\x00-\x1f\x7f/\ud800-\udfff]", text):
        raise UsageError(f"not a disk's name: {text!r}", hint="vdiskfs disk list shows the names")
    return text


def parse_point(text: str) -> PointName:
    """Return what ``web01@latest``, ``web01@-15m``, ``web01@TIME`` or ``web01@#123`` names.

    Raises:
        UsageError: it is none of these.
    """
    disk, sign, point = text.rpartition("@")
    if not sign:
        raise UsageError(f"not DISK@POINT: {text!r}", hint=_FORMS)
    parse_disk(disk)
    if point in LATEST:
        return PointName(disk, point)
    epoch = re.fullmatch(r"#?([0-9]{1,19})", point, re.ASCII)
    if epoch is not None and int(epoch[1]) < 1 << 63:
        return PointName(disk, int(epoch[1]))
    check_time(point)
    return PointName(disk, point)


def parse_time_range(since: str | None, until: str | None) -> tuple[int | None, int | None]:
    """Return the range, in nanoseconds, that two texts of a user mean.

    What the digits of a time name, a second or a part of one, is in the range whole.

    Raises:
        UsageError: one is not a time, or the range is empty.
    """
    start = check_time(since, first=True) if since is not None else None
    end = check_time(until) if until is not None else None
    if start is not None and end is not None and start > end:
        raise UsageError("--since is later than --until")
    return start, end


def iso_time(time_ns: int | None) -> str | None:
    """Write a time so that the daemon reads back the same microsecond."""
    if time_ns is None:
        return None
    moment = datetime.fromtimestamp(time_ns // NS, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{time_ns % NS // 1000:06d}Z"


def check_time(text: str, *, first: bool = False) -> int:
    """Return the time, in nanoseconds since 1970, that a user's text means.

    A time means the end of what its digits name; with ``first``, the beginning.

    Raises:
        UsageError: it is not a time, or none that a point can have.
    """
    try:
        found = parse_time(text, time.time_ns())
    except (ValueError, OverflowError):
        found = -1
    if not 0 <= found < 1 << 63:
        raise UsageError(f"not a point or a time: {text!r}", hint=_FORMS)
    if first and not text.strip().startswith("-"):
        digits = re.search(r"[.,](\d{1,6})", text)
        found -= 10 ** (9 - (len(digits[1]) if digits else 0)) - 1
    return found
