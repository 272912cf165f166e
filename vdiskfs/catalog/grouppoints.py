"""Points of several disks at one instant: which they are, and how that is known for certain.

Disks that are sealed together get one time, later than that of any point they have, and the
random number of that seal in the heads of their deltas (vdiskfs-format(5), "Head"). The
tables of points, which listings give, have the times: equal ones are candidates. The number
in the head is the proof: no two seals have the same, so that neither a clock that was set back
nor an accident makes points of two instants look like one.
"""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from vdiskfs.catalog.log import DiskLog
from vdiskfs.catalog.points import Point, parse_spec
from vdiskfs.catalog.proofs import is_proven, list_proven, mark_proven
from vdiskfs.delta.layout import HEAD_SIZE, NO_ID, decode_head
from vdiskfs.errors import DamagedError, NotFoundError, UsageError
from vdiskfs.point.fetch import first_error

FindLog = Callable[[str], Awaitable[DiskLog]]

_FIRST = 64
"""Points of each disk that are looked at first: group points are mostly the newest ones."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """A point, and the epoch that its delta starts from: that names its slot."""

    point: Point
    from_epoch: int


async def group_points(
    find_log: FindLog, names: Sequence[str], spec: str, now_ns: int
) -> list[Point]:
    """Return the newest points that all these disks share, in the order of the names.

    Args:
        find_log: gives the points of a disk by its name.
        names: of the disks, all of them: the members of a group as they are now.
        spec: ``latest``, ``-15m``, a time: the newest instant at or before it.
        now_ns: what ``-15m`` is counted from.

    Raises:
        NotFoundError: they share none.
        UsageError: no name of a point, or an epoch: that is one disk's.
    """
    wanted = parse_spec(spec, now_ns)
    if wanted.epoch is not None:
        raise UsageError(
            f"{spec} is an epoch of one disk, and means nothing of several",
            hint="use a time such as 2026-11-21T01:40:05Z, -15m, or latest",
        )
    if wanted.proven:
        return await _newest_proven(find_log, names)
    found = await shared_points(
        find_log, names, until_ns=wanted.until_ns, limit=1, application=wanted.application
    )
    if not found:
        when = "" if spec.strip().startswith("latest") else f" at or before {spec}"
        raise NotFoundError(
            f"{', '.join(names)}: no recovery point{when} that all of them share",
            hint="make one: vdiskfs point create " + shlex.join(names),
        )
    return list(found[-1])


async def _newest_proven(find_log: FindLog, names: Sequence[str]) -> list[Point]:
    logs = [await find_log(name) for name in names]
    proven = [await list_proven(one.store, one.record.id) for one in logs]
    for generation, epoch in sorted(proven[0] if proven else (), reverse=True):
        try:
            point = await logs[0].find(epoch)
        except NotFoundError:
            continue  # it was thinned since
        moment = point.time_ns
        for shared in await shared_points(find_log, names, since_ns=moment, until_ns=moment):
            marked = [
                mark_proven(one, places.get((one.generation, one.epoch)))
                for one, places in zip(shared, proven, strict=True)
            ]
            if shared[0].generation == generation and all(map(is_proven, marked)):
                return marked
    raise NotFoundError(
        f"{', '.join(names)}: no recovery point that all of them share is proven of each",
        hint="vdiskfs point prove DISK@POINT, for each of them",
    )


async def shared_points(
    find_log: FindLog, names: Sequence[str], *, since_ns: int | None = None,
    until_ns: int | None = None, limit: int | None = None, application: bool = False,
) -> list[tuple[Point, ...]]:  # fmt: skip
    """Return the instants of which every disk has a point, newest last.

    Between two times, both included; with a limit the newest so many.
    """
    if not names:
        return []
    logs = [await find_log(name) for name in names]
    search = _Search(logs, since_ns or 0, limit, application=application)
    count = _FIRST + (limit or 0)
    while True:
        found = await search.run([await log.points(None, until_ns, count) for log in logs], count)
        if found is not None:
            return found[::-1]
        count *= 8


class _Search:
    """Looks through lists of points that get longer; asks the vault once for each head."""

    def __init__(
        self, logs: Sequence[DiskLog], since_ns: int, limit: int | None, *, application: bool
    ) -> None:
        self._logs = logs
        self._since_ns = since_ns
        self._limit = limit
        self._application = application
        self._proven: dict[int, tuple[Point, ...] | None] = {}

    async def run(self, lists: list[list[Point]], count: int) -> list[tuple[Point, ...]] | None:
        """Return what was found, newest first; None: longer lists are needed to tell."""
        placed = [_placed(points, whole=len(points) < count) for points in lists]
        times = set.intersection(*(set(one) for one in placed))
        found: list[tuple[Point, ...]] = []
        for time_ns in sorted(times, reverse=True):
            if time_ns < self._since_ns:
                return found
            if time_ns not in self._proven:
                self._proven[time_ns] = await self._prove([one[time_ns] for one in placed])
            points = self._proven[time_ns]
            if points is not None:
                found.append(points)
                if len(found) == self._limit:
                    return found
        return found if self._is_all(lists, count) else None

    def _is_all(self, lists: list[list[Point]], count: int) -> bool:
        """Say whether no older instant can be shared that these lists do not show."""
        cut = [points[0].time_ns for points in lists if len(points) >= count]
        if not cut or max(cut) < self._since_ns:
            return True
        whole = [points for points in lists if len(points) < count]
        return any(not points or points[0].time_ns > max(cut) for points in whole)

    async def _prove(self, candidates: list[_Placed]) -> tuple[Point, ...] | None:
        """Return the points, if one seal made them all."""
        points = tuple(one.point for one in candidates)
        if self._application and any(one.consistency != "application" for one in points):
            return None
        if len(points) == 1:
            return points
        seals: set[str] = set()

        async def ask(log: DiskLog, one: _Placed) -> None:
            seals.add(await _seal_of(log, one))

        try:
            async with trio.open_nursery() as nursery:
                for log, one in zip(self._logs, candidates, strict=True):
                    nursery.start_soon(ask, log, one)
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        return points if len(seals) == 1 and NO_ID not in seals else None


async def _seal_of(log: DiskLog, one: _Placed) -> str:
    """Return the number of the seal that made a point; NO_ID: it is not known, or a disk's own."""
    point = one.point
    name = log.delta_name(point, one.from_epoch)
    try:
        head = decode_head(await log.store.read_range(name, 0, HEAD_SIZE), where=name)
    except (DamagedError, NotFoundError):
        return NO_ID
    said = (head.disk_id, head.generation, head.to_epoch, head.time_ns)
    meant = (log.record.id, point.generation, point.epoch, point.time_ns)
    return head.group_id if said == meant else NO_ID


def _placed(points: list[Point], *, whole: bool) -> dict[int, _Placed]:
    """Return the first point of each time, with the epoch of the one before it.

    A seal of several disks is later than all before it: of points with one time only the first
    can be its. Of the oldest of a list that is not ``whole`` it is not known what was before.
    """
    found: dict[int, _Placed] = {}
    before: int | None = 0 if whole else None
    unknown = None if whole or not points else points[0].time_ns
    for point in points:
        if before is not None and point.time_ns != unknown:
            found.setdefault(point.time_ns, _Placed(point, before))
        before = point.epoch
    return found
