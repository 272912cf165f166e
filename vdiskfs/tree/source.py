"""The source directory: its nodes, their descriptors, their attributes.

A node is known by device and inode, so hard links share one. It is reached by an
O_PATH|O_NOFOLLOW descriptor, opened relative to its directory's when first needed and
compared with what was looked up; nothing is ever reached by a path from the root, so a
symbolic link leads nowhere on the host side and `--over` can hide the directory.

At most ``descriptors`` are open for nodes that nobody uses; the longest unused is closed
first and opened again by name when needed. `ESTALE` where the name leads elsewhere by
then (the kernel looks up again).
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from vdiskfs import native
from vdiskfs.tree.handover import Identity, Known
from vdiskfs.tree.node import ROOT_ID, Attributes, Changes, Node, Nodes, refusal

if TYPE_CHECKING:
    from vdiskfs.tree.hooks import DiskHooks

_O_NODE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
DESCRIPTORS = 4096

Key = tuple[int, int]


def key_of(status: os.stat_result) -> Key:
    """Return what tells one file of the source from another."""
    return (status.st_dev, status.st_ino)


def source_identity(key: Key, kind: int) -> Identity:
    """Return what a successor knows a file of the source by."""
    return ("source", *key, kind)


class SourceNode(Node):
    """Anything in the source. Symbolic links, FIFOs and sockets are nothing more."""

    def __init__(self, source: Source, key: Key, kind: int, number: int | None = None) -> None:
        super().__init__(source.nodes, number)
        self.source = source
        self.key = key
        self.kind = kind  # S_IFMT of the mode: never changes
        self.directory: SourceNode | None = None  # with name: where it was last seen
        self.name = b""
        self.has_name = True  # the name led here when it was last looked at
        self._fd: int | None = None

    # -- where it is ------------------------------------------------------

    @property
    def path(self) -> str:
        """The path below the source directory by which the node was last seen; `` for the source.

        A file without a name keeps its last one.
        """
        parts: list[bytes] = []
        node: SourceNode | None = self
        while node is not None and node.name:
            parts.append(node.name)
            node = node.directory
        return os.fsdecode(b"/".join(reversed(parts)))

    def settle_at(self, directory: SourceNode, name: bytes) -> None:
        """Note a name that leads to the node."""
        moved = self.directory is not directory or self.name != name
        self.directory, self.name, self.has_name = directory, name, True
        if moved and self.is_logged:
            self.is_logged = False
            self.nodes.named(self)

    @property
    def known_by(self) -> Identity:
        """Device, inode and kind."""
        return source_identity(self.key, self.kind)

    @property
    def holder(self) -> Node | None:
        """The directory."""
        return self.directory

    def place(self) -> tuple[int, Any]:
        """Return the directory's id, and the name there."""
        if self.directory is None:
            return (ROOT_ID, "")
        self.nodes.named(self.directory)
        return (self.directory.id, os.fsdecode(self.name))

    def keep_for_successor(self) -> None:
        """The node is about to lose its name: a successor needs its descriptor if it is in use."""
        if stat.S_ISREG(self.kind) and (self.users or self.pins or self.is_inherited):
            self.nodes.handover.keep_file(self.id, self.descriptor)

    @property
    def descriptor(self) -> int:
        """An O_PATH descriptor; valid until the next await, unless the node is pinned."""
        if self._fd is None:
            self._fd = self._reopen()
        self.source.used(self)
        return self._fd

    @property
    def can_reopen(self) -> bool:
        """The descriptor may be closed: nobody uses it, and a name leads back to the node."""
        return not (self.users or self.pins) and self.has_name and self.directory is not None

    @property
    def proc_path(self) -> str:
        """A path to the node itself, for calls that take no O_PATH descriptor."""
        return f"/proc/self/fd/{self.descriptor}"

    def adopt(self, fd: int) -> None:
        """Take over a descriptor of the node."""
        if self._fd is not None:
            os.close(fd)
        else:
            self._fd = fd
        self.source.used(self)

    def _reopen(self) -> int:
        if self.directory is None:
            raise refusal(errno.ESTALE)
        try:
            fd = os.open(self.name, _O_NODE, dir_fd=self.directory.descriptor)
        except (FileNotFoundError, NotADirectoryError):
            raise refusal(errno.ESTALE) from None
        if key_of(os.fstat(fd)) != self.key:
            os.close(fd)
            raise refusal(errno.ESTALE)
        return fd

    def close_descriptor(self) -> None:
        """Close the descriptor; it is opened again by name."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def gone(self) -> None:
        """Close the descriptor and let the source forget the node.

        Of a file without a name it may be the last one: freeing its blocks can take long.
        """
        self.source.dropped(self)
        self.nodes.handover.drop_file(self.id)
        fd, self._fd = self._fd, None
        if fd is None:
            return
        if os.fstat(fd).st_nlink == 0:
            self.nodes.handover.forget(self.known_by)
            trio.lowlevel.start_thread_soon(partial(os.close, fd), lambda _: None)
        else:
            os.close(fd)

    # -- attributes -------------------------------------------------------

    def status(self) -> os.stat_result:
        """Return what the host says of the file now."""
        return os.fstat(self.descriptor)

    def identity(self) -> native.FileIdentity:
        """Return device, inode and birth time, which the state directory knows disks by."""
        return native.file_identity(self.descriptor)

    async def getattr(self) -> Attributes:
        """Return the attributes as they are now."""
        return Attributes.of(self.status())

    async def setattr(self, changes: Changes) -> Attributes:
        """Change size, owner, mode and times, in this order, and return all attributes."""
        if changes.size is not None:
            await self.truncate(changes.size)
        self._change(changes)
        return await self.getattr()

    def _change(self, changes: Changes) -> None:
        if changes.uid is not None or changes.gid is not None:
            os.chown(self.proc_path, _or_keep(changes.uid), _or_keep(changes.gid))
        if changes.mode is not None:
            Path(self.proc_path).chmod(stat.S_IMODE(changes.mode))
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            now = self.status()
            atime = now.st_atime_ns if changes.atime_ns is None else changes.atime_ns
            mtime = now.st_mtime_ns if changes.mtime_ns is None else changes.mtime_ns
            os.utime(self.proc_path, ns=(atime, mtime))

    async def truncate(self, size: int) -> None:
        """Change the size; only regular files have one to change."""
        raise refusal(errno.EINVAL)

    async def readlink(self) -> bytes:
        """Return what the symbolic link says."""
        if not stat.S_ISLNK(self.kind):
            raise refusal(errno.EINVAL)
        return os.readlink(b"", dir_fd=self.descriptor)

    def getxattr(self, name: bytes) -> bytes:
        """Return an extended attribute of the source's file."""
        return os.getxattr(self.proc_path, name)

    def listxattr(self) -> list[bytes]:
        """Return the names of the extended attributes of the source's file."""
        return [os.fsencode(name) for name in os.listxattr(self.proc_path)]

    def setxattr(self, name: bytes, value: bytes) -> None:
        """Set an extended attribute of the source's file."""
        os.setxattr(self.proc_path, name, value)

    def removexattr(self, name: bytes) -> None:
        """Take away an extended attribute of the source's file."""
        os.removexattr(self.proc_path, name)


class Source:
    """The source directory: which nodes stand for which files, and who is told of changes."""

    def __init__(
        self, nodes: Nodes, core: native.Core, hooks: DiskHooks, *, descriptors: int = 0
    ) -> None:
        self.nodes = nodes
        self.core = core
        self.hooks = hooks
        self._turn = trio.Lock()
        soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.descriptors = descriptors or max(16, min(DESCRIPTORS, soft // 4))
        self._by_key: dict[Key, SourceNode] = {}
        self._open: OrderedDict[int, SourceNode] = OrderedDict()  # longest unused first
        self.build: Callable[[Key, int], SourceNode] = lambda key, kind: SourceNode(self, key, kind)
        nodes.revive["source"] = self._revive

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Change names, and tell of it, over the block: one change at a time, none by halves.

        So hooks hear of changes in the order in which they happened, also at the end.
        """
        async with self._turn:
            with trio.CancelScope(shield=True):
                yield

    def known(self, key: Key, kind: int) -> SourceNode | None:
        """Return the node of this file, if there is one.

        An inode that is used again for another kind of file is another file.
        """
        node = self._by_key.get(key)
        return node if node is not None and node.kind == kind else None

    def enter(self, node: SourceNode) -> None:
        """From now on the node stands for its file."""
        self._by_key[node.key] = node

    def node(self, key: Key, kind: int) -> SourceNode:
        """Return the node of this file, made if there is none."""
        node = self.known(key, kind)
        if node is None:
            node = self.nodes.make(source_identity(key, kind), lambda: self.build(key, kind))
            self.enter(node)
        return node

    def _revive(self, number: int, known: Known) -> SourceNode:
        """Return the node that a predecessor named, found again; `ESTALE`: it is not."""
        _, device, inode, kind = known.identity
        key = (device, inode)
        kept = self.nodes.handover.take_file(number)
        for above, name in reversed(known.places):
            try:
                directory = self.nodes.get(above)
                if not isinstance(directory, SourceNode):
                    continue
                fd = os.open(name, _O_NODE, dir_fd=directory.descriptor)
            except OSError:
                continue
            if key_of(os.fstat(fd)) == key:
                node = self.node(key, kind)
                node.adopt(fd)
                node.settle_at(directory, os.fsencode(name))
                if kept is not None:
                    os.close(kept)
                return node
            os.close(fd)
        if kept is None:
            raise refusal(errno.ESTALE)
        node = self.node(key, kind)
        node.adopt(kept)
        node.has_name = False
        for above, name in known.places[-1:]:
            with suppress(OSError):
                directory = self.nodes.get(above)
                if isinstance(directory, SourceNode):
                    # Its last name, for messages; it does not lead here any more.
                    node.directory, node.name = directory, os.fsencode(name)
        return node

    def dropped(self, node: SourceNode) -> None:
        """The node stands for nothing any more."""
        self._open.pop(node.id, None)
        if self._by_key.get(node.key) is node:
            del self._by_key[node.key]

    def used(self, node: SourceNode) -> None:
        """The node's descriptor was used; close the longest unused ones beyond the limit."""
        fresh = node.id not in self._open
        self._open[node.id] = node
        self._open.move_to_end(node.id)
        if fresh and len(self._open) > self.descriptors:
            self._close_unused(keep=node)

    def _close_unused(self, keep: SourceNode) -> None:
        for node in list(self._open.values())[:8]:
            if node is keep or not node.can_reopen:
                self._open.move_to_end(node.id)
            else:
                del self._open[node.id]
                node.close_descriptor()

    @property
    def open_descriptors(self) -> int:
        """How many descriptors are open."""
        return len(self._open)


def _or_keep(number: int | None) -> int:
    return -1 if number is None else number
