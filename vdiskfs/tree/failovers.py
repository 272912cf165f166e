"""`failovers/`: the writable copies of recovery points.

    failovers/web01-test-1/web01.img    the disk at the point, and what was written since

Directories appear and go by what the administrator asks for, never by a file operation.
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from functools import partial

import trio

from vdiskfs import native
from vdiskfs.tree.handover import Known
from vdiskfs.tree.hooks import CopyRef, FailoverRef, FailoverSource, OpenCopy
from vdiskfs.tree.keyed import KeyedNode, KeyedNodes
from vdiskfs.tree.listing import Found, NameListing
from vdiskfs.tree.node import FAILOVERS_ID, Attributes, Changes, Node, Nodes, refusal
from vdiskfs.tree.static import Owner


class Shared(KeyedNodes):
    """What all nodes of `failovers/` share."""

    def __init__(
        self, nodes: Nodes, core: native.Core, source: FailoverSource, owner: Owner
    ) -> None:
        super().__init__(nodes, core, owner)
        self.source = source

    def find(self, failover_id: str) -> FailoverRef:
        """Return a failover; `ENOENT` if it is gone."""
        for one in self.source.failovers():
            if one.id == failover_id:
                return one
        raise refusal(errno.ENOENT)

    def directory(self, failover_id: str) -> FailoverDirectory:
        """Return the node of a failover."""
        key = ("failover", failover_id)
        return self.node(key, partial(FailoverDirectory, self, failover_id))

    def copy(self, failover_id: str, disk_id: str) -> CopyFile:
        """Return the node of a copy."""
        key = ("copy", failover_id, disk_id)
        return self.node(key, partial(CopyFile, self, failover_id, disk_id))


class _Node(KeyedNode):
    """A node of a failover. A successor finds it by its key alone."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self.shared = shared


class FailoversDirectory(Node):
    """`failovers/`."""

    is_directory = True

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared.nodes, FAILOVERS_ID)
        self._shared = shared
        for kind in ("failover", "copy"):
            self.nodes.revive[kind] = self._revive

    def _revive(self, _: int, known: Known) -> Node:
        kind, failover_id, *rest = known.identity
        if kind == "failover":
            return self._shared.directory(failover_id)
        return self._shared.copy(failover_id, *rest)

    async def getattr(self) -> Attributes:
        """Return the attributes; asks nobody."""
        return self._shared.owner.directory()

    async def child(self, name: bytes) -> Node:
        """Return the failover of the name."""
        for one in self._shared.source.failovers():
            if os.fsencode(one.name) == name:
                return self._shared.directory(one.id)
        raise refusal(errno.ENOENT)

    async def listing(self) -> NameListing:
        """Return the failovers' names."""
        return NameListing(
            (os.fsencode(one.name), partial(self._found, one))
            for one in self._shared.source.failovers()
        )

    def _found(self, one: FailoverRef) -> Found:
        node = self._shared.directory(one.id)
        return node, node.attributes(one)


class FailoverDirectory(_Node):
    """`web01-test-1/`: one failover."""

    is_directory = True

    def __init__(self, shared: Shared, failover_id: str) -> None:
        super().__init__(shared)
        self.failover_id = failover_id

    @property
    def parent_id(self) -> int:
        """The id of `failovers/`."""
        return FAILOVERS_ID

    async def getattr(self) -> Attributes:
        """Return the attributes: the time it was begun."""
        return self.attributes(self.shared.find(self.failover_id))

    def attributes(self, ref: FailoverRef) -> Attributes:
        """Return them; the name is looked up each time: it is gone as soon as the failover is."""
        return replace(self.shared.owner.directory(ref.time_ns), entry_timeout_s=0)

    async def child(self, name: bytes) -> Node:
        """Return the copy of the name."""
        for one in self.shared.find(self.failover_id).copies:
            if os.fsencode(one.file) == name:
                return self.shared.copy(self.failover_id, one.disk_id)
        raise refusal(errno.ENOENT)

    async def listing(self) -> NameListing:
        """Return the copies' names."""
        ref = self.shared.find(self.failover_id)
        return NameListing((os.fsencode(one.file), partial(self._found, one)) for one in ref.copies)

    def _found(self, one: CopyRef) -> Found:
        node = self.shared.copy(self.failover_id, one.disk_id)
        return node, node.attributes()


class CopyFile(_Node):
    """`web01.img` of a failover: writable, its bytes come when they are asked for."""

    def __init__(self, shared: Shared, failover_id: str, disk_id: str) -> None:
        super().__init__(shared)
        self.failover_id = failover_id
        self.disk_id = disk_id
        self._attached: OpenCopy | None = None
        self._turn = trio.Lock()

    @property
    def parent_id(self) -> int:
        """The id of the failover's directory."""
        return self.shared.directory(self.failover_id).id

    @property
    def holder(self) -> Node | None:
        """The failover's directory."""
        return self.shared.directory(self.failover_id)

    def _copy(self) -> OpenCopy:
        copy = self._attached or self.shared.source.copy(self.failover_id, self.disk_id)
        if copy is None:
            raise refusal(errno.ESTALE)
        return copy

    def attributes(self) -> Attributes:
        """Return the attributes of the file it lies in; its blocks are what is here."""
        copy = self._copy()
        found = Attributes.of(os.fstat(copy.fd))
        # A file without a block is taken for a single hole by some.
        return replace(found, nlink=1, size=copy.image.size(), blocks=max(1, found.blocks))

    async def getattr(self) -> Attributes:
        """Return the attributes as they are now."""
        return self.attributes()

    async def setattr(self, changes: Changes) -> Attributes:
        """Change size, mode, owner or times."""
        copy = self._copy()
        if changes.size is not None:
            await copy.truncate(changes.size)
        if changes.uid is not None or changes.gid is not None:
            os.fchown(
                copy.fd,
                -1 if changes.uid is None else changes.uid,
                -1 if changes.gid is None else changes.gid,
            )
        if changes.mode is not None:
            os.fchmod(copy.fd, changes.mode & 0o777)
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            now = os.fstat(copy.fd)
            atime = now.st_atime_ns if changes.atime_ns is None else changes.atime_ns
            mtime = now.st_mtime_ns if changes.mtime_ns is None else changes.mtime_ns
            os.utime(copy.fd, ns=(atime, mtime))
        return self.attributes()

    async def open(self, flags: int) -> None:
        """Count one more handle; the first one attaches the image."""
        if flags & os.O_ACCMODE != os.O_RDONLY and self._copy().image.refuses:
            raise refusal(errno.EROFS)
        with self.pinned():
            async with self._turn:
                copy = self._attach()
                self.users += 1
        if flags & os.O_TRUNC:
            try:
                await copy.truncate(0)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self.release()
                raise

    async def serve(self) -> None:
        """Attach the image for handles that a predecessor opened."""
        with self.pinned():
            async with self._turn:
                self._attach()

    def _attach(self) -> OpenCopy:
        copy = self._copy()
        if self._attached is None:
            self.shared.core.attach(self.id, copy.image)
            self._attached = copy
            copy.users += 1
        return copy

    async def release(self) -> None:
        """Count one handle less; the last one detaches the image."""
        with self.pinned():
            async with self._turn:
                self.users = max(0, self.users - 1)  # as SourceFile.release
                if self.users == 0 and self._attached is not None:
                    self.shared.core.detach(self.id)
                    self._attached.users -= 1
                    self._attached = None
