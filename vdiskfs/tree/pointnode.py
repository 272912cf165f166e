"""What lies in the directory of a recovery point: the image, point.json; and links to points.

A point never changes, so its nodes are known by what they show. Bytes are read through
the data plane here too: the image from the point source, point.json from memory.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable
from functools import partial
from typing import Any, TypeVar

import trio

from vdiskfs import native
from vdiskfs.errors import VaultUnreachableError
from vdiskfs.tree.handover import Identity
from vdiskfs.tree.hooks import Access, OpenPoint, PointFacts, PointRef, PointSource
from vdiskfs.tree.keyed import KeyedNode, KeyedNodes
from vdiskfs.tree.listing import Found, NameListing
from vdiskfs.tree.node import TIMEOUT_S, Attributes, Nodes, refusal
from vdiskfs.tree.static import Owner
from vdiskfs.units import CHUNK_SIZE

PATIENCE_S = 30.0
POINT_JSON = b"point.json"

T = TypeVar("T")


def point_key(kind: str, disk: str, point: PointRef) -> Identity:
    """Return what identifies a node of a point."""
    return (kind, disk, point.time_ns, point.epoch, point.generation)


class Points(KeyedNodes):
    """What all nodes of `recovery-points/` share: where points come from, and who is known."""

    def __init__(self, nodes: Nodes, core: native.Core, source: PointSource, owner: Owner) -> None:
        super().__init__(nodes, core, owner)
        self.source = source

    def image(self, disk: str, point: PointRef) -> PointImage:
        """Return the node of a point's image."""
        return self.node(point_key("image", disk, point), partial(PointImage, self, disk, point))

    def text(self, disk: str, point: PointRef) -> PointText:
        """Return the node of a point's point.json."""
        return self.node(point_key("text", disk, point), partial(PointText, self, disk, point))

    async def ask(self, question: Awaitable[T]) -> T:
        """Wait for an answer of the point source, but not for ever.

        The process that looks cannot be interrupted meanwhile, so the wait has an end.

        Raises:
            VaultUnreachableError: there was none in ``PATIENCE_S``.
        """
        try:
            with trio.fail_after(PATIENCE_S):
                return await question
        except trio.TooSlowError:
            raise VaultUnreachableError(f"no answer within {PATIENCE_S:.0f} s") from None

    def access(self, disk: str) -> Access:
        """Return who may read the disk's points: who may read it live; else who mounted."""
        owner = Access(self.owner.uid, self.owner.gid, 0o400)
        return self.source.access(disk) or owner


class PointNode(KeyedNode):
    """A node of `recovery-points/`."""

    def __init__(self, points: Points, number: int | None = None) -> None:
        super().__init__(points, number)
        self.points = points


class Link(PointNode):
    """A symbolic link to a point, relative; the next look-up of its name may find another."""

    def __init__(self, points: Points, target: str, time_ns: int) -> None:
        super().__init__(points)
        self.target = os.fsencode(target)
        self.above = 0
        self._time_ns = time_ns

    def attributes(self) -> Attributes:
        """Return the attributes; the name is not to be remembered."""
        return Attributes(
            mode=stat.S_IFLNK | 0o777, uid=self.points.owner.uid, gid=self.points.owner.gid,
            size=len(self.target), atime_ns=self._time_ns, mtime_ns=self._time_ns,
            ctime_ns=self._time_ns, entry_timeout_s=0,
        )  # fmt: skip

    @property
    def parent_id(self) -> int:
        """The id of the disk's directory."""
        return self.above or super().parent_id

    async def getattr(self) -> Attributes:
        """Return the attributes."""
        return self.attributes()

    def place(self) -> tuple[int, Any]:
        """Return its time too."""
        return (self.parent_id, self._time_ns)

    async def readlink(self) -> bytes:
        """Return the target."""
        return self.target


class PointFile(PointNode):
    """A file of a point. Subclasses say which image answers for it."""

    def __init__(self, points: Points, disk: str, point: PointRef) -> None:
        super().__init__(points)
        self.disk = disk
        self.point = point
        self._turn = trio.Lock()
        self._attached = False

    async def getattr(self) -> Attributes:
        """Return the attributes; may read the vault."""
        return self.attributes(await self.size())

    def attributes(self, size: int | None) -> Attributes:
        """Return the attributes; with the size not known yet they are not to be remembered.

        The blocks are one fewer than the size has: cp and tar then ask for the holes, and
        none takes the file for a single one.
        """
        access = self.points.access(self.disk)
        when = self.point.time_ns
        return Attributes(
            mode=stat.S_IFREG | access.mode, uid=access.uid, gid=access.gid, size=size or 0,
            blksize=CHUNK_SIZE, blocks=max(1, size // 512 - 1) if size else 0,
            atime_ns=when, mtime_ns=when, ctime_ns=when,
            attr_timeout_s=0 if size is None else TIMEOUT_S,
        )  # fmt: skip

    async def facts(self) -> PointFacts:
        """Return what the point source says of the point."""
        return await self.points.ask(self.points.source.describe(self.disk, self.point))

    async def size(self) -> int:
        """Return the size in bytes."""
        raise NotImplementedError

    async def open(self, flags: int) -> None:
        """Count one more handle; the first one attaches the image."""
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise refusal(errno.EROFS)
        with self.pinned():
            async with self._turn:
                await self._attach()
                self.users += 1

    async def serve(self) -> None:
        """Attach the image for handles that a predecessor opened."""
        with self.pinned():
            async with self._turn:
                await self._attach()

    async def _attach(self) -> None:
        if not self._attached:
            self.points.core.attach(self.id, await self.image())
            self._attached = True

    async def release(self) -> None:
        """Count one handle less; the last one detaches the image."""
        with self.pinned():
            async with self._turn:
                self.users = max(0, self.users - 1)  # as SourceFile.release
                if self.users == 0 and self._attached:
                    self._attached = False
                    self.points.core.detach(self.id)
                    await self.close_image()

    async def image(self) -> native.Image:
        """Return the image for the handles to come."""
        raise NotImplementedError

    async def close_image(self) -> None:
        """The image is not needed any more."""
        raise NotImplementedError


class PointImage(PointFile):
    """The disk at one instant; its bytes come from the vault as they are read."""

    def __init__(self, points: Points, disk: str, point: PointRef) -> None:
        super().__init__(points, disk, point)
        self._size: int | None = None
        self._opened: OpenPoint | None = None

    def known(self) -> Attributes:
        """Return the attributes without asking anybody."""
        return self.attributes(self._size)

    async def size(self) -> int:
        """Return the size of the disk at that instant."""
        if self._size is None:
            self._size = (await self.facts()).size
        return self._size

    async def image(self) -> native.Image:
        """Return the image that hydrates on read."""
        source = self.points.source
        self._opened = await self.points.ask(source.open_point(self.disk, self.point))
        return self._opened.image

    async def close_image(self) -> None:
        """Give it back."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await self.points.source.close_point(opened)


class PointText(PointFile):
    """point.json: what is known of the point."""

    _image: native.Image | None = None

    async def size(self) -> int:
        """Return the length of the text; it may grow when more is proven."""
        return len((await self.facts()).json)

    async def image(self) -> native.Image:
        """Return an image over the text in memory."""
        text = (await self.facts()).json
        fd = os.memfd_create("point.json", os.MFD_CLOEXEC)
        try:
            os.write(fd, text)
            self._image = native.Image(self.points.core, fd, native.ImageFlags.READONLY, 0)
        finally:
            os.close(fd)
        return self._image

    async def close_image(self) -> None:
        """Free the memory."""
        if self._image is not None:
            self._image.close()
            self._image = None


class PointDirectory(PointNode):
    """`01-40-05.000Z/`: one recovery point."""

    is_directory = True

    def __init__(self, points: Points, disk: str, file: bytes, point: PointRef) -> None:
        super().__init__(points)
        self.disk = disk
        self.point = point
        self.file = file
        self.above = 0

    @property
    def parent_id(self) -> int:
        """The id of the day's directory."""
        return self.above or super().parent_id

    def place(self) -> tuple[int, Any]:
        """Return the image's name too."""
        return (self.parent_id, os.fsdecode(self.file))

    def attributes(self) -> Attributes:
        """Return the attributes: the times are the point's."""
        return self.points.owner.directory(self.point.time_ns)

    async def getattr(self) -> Attributes:
        """Return the attributes."""
        return self.attributes()

    async def child(self, name: bytes) -> PointFile:
        """Return the image or point.json."""
        if name == self.file:
            return self._image()
        if name == POINT_JSON:
            return self._text()
        raise refusal(errno.ENOENT)

    async def listing(self) -> NameListing:
        """Return both names; asks nobody."""
        return NameListing([(self.file, self._found_image), (POINT_JSON, self._found_text)])

    def _found_image(self) -> Found:
        image = self._image()
        return image, image.known()

    def _found_text(self) -> Found:
        text = self._text()
        return text, text.attributes(None)

    def _image(self) -> PointImage:
        return self.points.image(self.disk, self.point)

    def _text(self) -> PointText:
        return self.points.text(self.disk, self.point)
