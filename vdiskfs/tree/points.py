"""`recovery-points/`: disks and days as directories; read-only for everybody.

    recovery-points/web01/2026-11-21/01-40-05.000Z/web01.img    the disk at that instant
                                                  /point.json
    recovery-points/web01/latest -> 2026-11-21/01-40-05.000Z    also latest-application-consistent,
                                                                latest-proven, where there is one
    recovery-points/web01/@2026-11-21T01:40:07Z -> ...          any instant, also @-15m: not listed

Links and `@` names are looked up each time, because what they lead to changes; a link
once found keeps its target.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from functools import partial
from typing import Any

from vdiskfs.errors import NotFoundError, UsageError
from vdiskfs.tree.handover import Known
from vdiskfs.tree.hooks import DiskName, PointKind, PointRef
from vdiskfs.tree.listing import Found, Listing, NameListing
from vdiskfs.tree.node import Attributes, refusal
from vdiskfs.tree.pointnames import (
    MS,
    PointListing,
    day_end,
    day_of,
    day_start,
    parse_point_name,
    plain_name,
    point_name,
)  # fmt: skip
from vdiskfs.tree.pointnode import (
    POINT_JSON,
    Link,
    PointDirectory,
    PointNode,
    Points,
    point_key,
)  # fmt: skip

LINKS: dict[bytes, PointKind] = {
    b"latest": "any",
    b"latest-application-consistent": "application-consistent",
    b"latest-proven": "proven",
}
_MAX_TEXT = 64


class PointsDirectory(PointNode):
    """`recovery-points/`: the disks of the vault."""

    is_directory = True

    def __init__(self, points: Points, number: int | None = None) -> None:
        super().__init__(points, number)
        for kind in ("disk", "day", "link", "point", "image", "text"):
            self.nodes.revive[kind] = self._revive

    def _revive(self, _: int, known: Known) -> PointNode:
        """Return the node that a predecessor named; asks nobody."""
        kind, name, *rest = known.identity
        disk = self._disk_node(name)
        if kind == "disk":
            disk.file = os.fsencode(known.places[-1][1])
            return disk
        if kind == "day":
            return disk.day(rest[0])
        if kind == "link":
            return disk.link_to(os.fsencode(rest[0]), known.places[-1][1], rest[1])
        above, more = known.places[-1]
        point = PointRef(*rest)
        if kind == "image":
            return self.points.image(name, point)
        if kind == "text":
            return self.points.text(name, point)
        make = partial(PointDirectory, self.points, name, os.fsencode(more), point)
        node = self.points.node(known.identity, make)
        node.above = above
        return node

    async def getattr(self) -> Attributes:
        """Return the attributes."""
        return self.points.owner.directory()

    async def child(self, name: bytes) -> DiskDirectory:
        """Return the disk's directory."""
        disk = (await self._disks()).get(name)
        if disk is None:
            raise refusal(errno.ENOENT)
        return self._disk(disk)

    async def listing(self) -> NameListing:
        """Return the disks' names."""
        disks = await self._disks()
        return NameListing((name, partial(self._found, disk)) for name, disk in disks.items())

    async def _disks(self) -> dict[bytes, DiskName]:
        disks = await self.points.ask(self.points.source.disks())
        named = ((plain_name(disk.name), disk) for disk in disks)
        return {name: disk for name, disk in named if name is not None}

    def _found(self, disk: DiskName) -> Found:
        return self._disk(disk), self.points.owner.directory()

    def _disk(self, disk: DiskName) -> DiskDirectory:
        node = self._disk_node(disk.name)  # its file may have another name by now
        node.file = _image_name(disk)
        return node

    def _disk_node(self, name: str) -> DiskDirectory:
        make = partial(DiskDirectory, self.points, name, self.id)
        node = self.points.node(("disk", name), make)
        if not node.file:  # it is made for a day, or a link, that a predecessor named
            known = self.nodes.handover.place_of(("disk", name))
            node.file = os.fsencode(known or f"{name}.img")
        return node


class DiskDirectory(PointNode):
    """`recovery-points/web01/`: its days, and links to its newest points."""

    is_directory = True

    def __init__(self, points: Points, disk: str, above: int) -> None:
        super().__init__(points)
        self.disk = disk
        self.file = b""
        self._above = above

    @property
    def parent_id(self) -> int:
        """The id of `recovery-points/`."""
        return self._above

    def place(self) -> tuple[int, Any]:
        """Return the image's name too."""
        return (self._above, os.fsdecode(self.file))

    async def getattr(self) -> Attributes:
        """Return the attributes."""
        return self.points.owner.directory()

    async def child(self, name: bytes) -> PointNode:
        """Return a link to a point, or a day."""
        if name in LINKS:
            newest = await self._latest(LINKS[name])
            if newest is None:
                raise refusal(errno.ENOENT)
            return await self._link(name, newest)
        if name.startswith(b"@"):
            return await self._link(name, await self._find(name[1:]))
        start_ns = day_start(name)
        if start_ns is not None and name.decode() in await self._days():
            return self.day(start_ns)
        raise refusal(errno.ENOENT)

    async def listing(self) -> NameListing:
        """Return the days, and the links that lead somewhere."""
        newest = {name: await self._latest(kind) for name, kind in LINKS.items()}
        links = [
            (name, partial(self._link_found, name, point, await self._target(point)))
            for name, point in newest.items()
            if point is not None
        ]
        starts = [(day.encode(), day_start(day.encode())) for day in await self._days()]
        days = [(name, partial(self._found, start)) for name, start in starts if start is not None]
        return NameListing([*links, *days])

    async def _days(self) -> Iterable[str]:
        return await self.points.ask(self.points.source.days(self.disk))

    async def _find(self, text: bytes) -> PointRef:
        try:
            if len(text) > _MAX_TEXT:
                raise refusal(errno.ENOENT)
            words = text.decode("ascii")
            point = await self.points.ask(self.points.source.find(self.disk, words))
        except (ValueError, UsageError, NotFoundError):
            point = None
        if point is None:
            raise refusal(errno.ENOENT)
        return point

    async def _latest(self, kind: PointKind) -> PointRef | None:
        return await self.points.ask(self.points.source.latest(self.disk, kind))

    async def _link(self, name: bytes, point: PointRef) -> Link:
        return self.link_to(name, point.time_ns, await self._target(point))

    async def _target(self, point: PointRef) -> str:
        """The way to the point from here; its epoch is named only where others share its name."""
        since_ns = point.time_ns // MS * MS
        beside = await self.points.ask(
            self.points.source.points(self.disk, since_ns, since_ns + MS)
        )
        shared = bool(beside) and beside[0] != point
        return f"{day_of(point.time_ns)}/{point_name(point, with_epoch=shared)}"

    def link_to(self, name: bytes, time_ns: int, target: str) -> Link:
        """Return the node of a link to the point of that time."""
        make = partial(Link, self.points, target, time_ns)
        node = self.points.node(("link", self.disk, os.fsdecode(name), target), make)
        node.above = self.id
        return node

    def _link_found(self, name: bytes, point: PointRef, target: str) -> Found:
        link = self.link_to(name, point.time_ns, target)
        return link, link.attributes()

    def _found(self, start_ns: int) -> Found:
        return self.day(start_ns), self.points.owner.directory(start_ns)

    def day(self, start_ns: int) -> DayDirectory:
        """Return the node of a day."""
        make = partial(DayDirectory, self.points, self, start_ns)
        return self.points.node(("day", self.disk, start_ns), make)


class DayDirectory(PointNode):
    """`2026-11-21/`: the points of a day."""

    is_directory = True

    def __init__(self, points: Points, disk: DiskDirectory, start_ns: int) -> None:
        super().__init__(points)
        self._disk = disk
        self._start_ns = start_ns

    @property
    def parent_id(self) -> int:
        """The id of the disk's directory."""
        return self._disk.id

    async def getattr(self) -> Attributes:
        """Return the attributes."""
        return self.points.owner.directory(self._start_ns)

    async def child(self, name: bytes) -> PointDirectory:
        """Return the point of the name."""
        parsed = parse_point_name(name)
        if parsed is None:
            raise refusal(errno.ENOENT)
        offset_ns, epoch = parsed
        since_ns = self._start_ns + offset_ns
        source = self.points.source
        for point in await self.points.ask(source.points(self._disk.disk, since_ns, since_ns + MS)):
            if epoch is None or point.epoch == epoch:
                return self._point(point)
        raise refusal(errno.ENOENT)

    async def listing(self) -> Listing:
        """Return the points in the order of time."""
        source = self.points.source
        points = await self.points.ask(
            source.points(self._disk.disk, self._start_ns, day_end(self._start_ns))
        )
        return PointListing(points, self._found)

    def _found(self, point: PointRef) -> Found:
        node = self._point(point)
        return node, node.attributes()

    def _point(self, point: PointRef) -> PointDirectory:
        disk = self._disk
        make = partial(PointDirectory, self.points, disk.disk, disk.file, point)
        node = self.points.node(point_key("point", disk.disk, point), make)
        node.file, node.above = disk.file, self.id
        return node


def _image_name(disk: DiskName) -> bytes:
    """The name of the image in points: the live file's, where that can stand there."""
    name = plain_name(disk.file.rpartition("/")[2])
    return os.fsencode(f"{disk.name}.img") if name in (None, POINT_JSON) else name
