"""The names of days and recovery points, and of files from a vault: pure functions.

A point is called by its time of day, `01-40-05.000Z`. Of several in one millisecond the
first has that name and the others append their epoch, in as many digits as let names sort as
points do: of a clock that was set back there are thousands. A name with an epoch is also
understood where it is not needed, so that a name survives when its neighbours expire, and
with fewer zeros.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial

from vdiskfs.tree.hooks import PointRef
from vdiskfs.tree.listing import Entry, Found
from vdiskfs.units import NS

MS = NS // 1000
_DAY_NS = 86400 * NS
_DAY = re.compile(rb"(\d{4})-(\d\d)-(\d\d)", re.ASCII)
_MAX_NAME = 255
_POINT = re.compile(rb"(\d\d)-(\d\d)-(\d\d)\.(\d{3})Z(?:-(\d{1,19}))?", re.ASCII)


def day_of(time_ns: int) -> str:
    """Return the day (UTC) of a time: ``2026-11-21``."""
    return f"{datetime.fromtimestamp(time_ns // NS, UTC):%Y-%m-%d}"


def point_name(point: PointRef, *, with_epoch: bool = False) -> str:
    """Return the name of a point in its day."""
    moment = datetime.fromtimestamp(point.time_ns // NS, UTC)
    name = f"{moment:%H-%M-%S}.{point.time_ns % NS // MS:03d}Z"
    return f"{name}-{point.epoch:010}" if with_epoch else name


def day_start(day: bytes) -> int | None:
    """Return the first nanosecond of a day, or None if it is not the name of one."""
    match = _DAY.fullmatch(day)
    if match is None:
        return None
    try:
        moment = datetime(int(match[1]), int(match[2]), int(match[3]), tzinfo=UTC)
    except ValueError:
        return None
    return int(moment.timestamp()) * NS


def day_end(start_ns: int) -> int:
    """Return the first nanosecond after the day."""
    return start_ns + _DAY_NS


def parse_point_name(name: bytes) -> tuple[int, int | None] | None:
    """Return the time within the day (ns, whole milliseconds) and the epoch, if it names one."""
    match = _POINT.fullmatch(name)
    if match is None:
        return None
    hour, minute, second, milli = (int(match[i]) for i in range(1, 5))
    if hour > 23 or minute > 59 or second > 59:
        return None
    epoch = None if match[5] is None else int(match[5])
    return ((hour * 60 + minute) * 60 + second) * NS + milli * MS, epoch


class PointListing:
    """The points of a day as entries, made as they are read: a day may have 86,400."""

    def __init__(
        self, points: Sequence[PointRef], find: Callable[[PointRef], Found | None]
    ) -> None:
        self._points = points
        self._find = find
        self._cookies = [_cookie(point) for point in points]

    def after(self, cookie: int) -> Iterator[Entry]:
        """Yield the entries beyond the cookie."""
        for index in range(bisect_right(self._cookies, cookie), len(self._points)):
            point = self._points[index]
            again = index > 0 and self._points[index - 1].time_ns // MS == point.time_ns // MS
            name = point_name(point, with_epoch=again).encode()
            yield Entry(self._cookies[index], name, partial(self._find, point))


def _cookie(point: PointRef) -> int:
    """The time within the day, then the epoch: 27 + 32 bits."""
    return (point.time_ns % _DAY_NS // MS + 1) << 32 | point.epoch & 0xFFFFFFFF


def plain_name(name: str) -> bytes | None:
    """Return a name as it can stand in a directory, or None: those of a hostile vault may not."""
    try:
        plain = os.fsencode(name)
    except UnicodeEncodeError:
        return None
    stands = 0 < len(plain) <= _MAX_NAME and plain not in (b".", b"..")
    return plain if stands and not set(plain) & set(b"/\0") else None
