"""Nodes: what a name in the mount stands for, and the table of those the kernel knows.

A node answers for itself: every request is a method, and what a kind of node does not
allow is refused here (`EROFS` for changes, so a recovery point is read-only for root
as well). Counting look-ups and turning errors into errnos is the matter of ``fs``.

Methods raise `OSError` with the errno to answer, or an error of ``vdiskfs.errors``.
Everything runs in the trio thread; what may block the disk for long goes to a worker
thread with the node pinned.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from vdiskfs.tree.handover import Handover, Identity, Known

if TYPE_CHECKING:
    from vdiskfs.tree.listing import Listing

NodeT = TypeVar("NodeT", bound="Node")

ROOT_ID = 1
DISKS_ID = 2
POINTS_ID = 3
FAILOVERS_ID = 4
FIRST_ID = 16
"""Ids below it are given once for all; a successor gives the same."""

# The source can change behind the mount and live images grow in C: nothing is believed longer.
TIMEOUT_S = 1.0


def refusal(number: int) -> OSError:
    """Return the `OSError` of this errno, to be raised."""
    return OSError(number, os.strerror(number))


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) says of a node. ``entry_timeout_s`` is for the name that led to it."""

    mode: int
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    size: int = 0
    blksize: int = 4096
    blocks: int = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    entry_timeout_s: float = TIMEOUT_S
    attr_timeout_s: float = TIMEOUT_S

    @staticmethod
    def of(status: os.stat_result) -> Attributes:
        """Return the attributes that the host gave."""
        return Attributes(
            mode=status.st_mode, nlink=status.st_nlink, uid=status.st_uid, gid=status.st_gid,
            rdev=status.st_rdev, size=status.st_size, blksize=status.st_blksize,
            blocks=status.st_blocks, atime_ns=status.st_atime_ns, mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Changes:
    """The attributes that a SETATTR changes; None is left alone."""

    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: new names get its user, group and umask."""

    uid: int
    gid: int
    umask: int


class Node:
    """One object of the mount. Read-only, and not a directory, unless a subclass says more."""

    def __init__(self, nodes: Nodes, number: int | None = None) -> None:
        self.nodes = nodes
        self.lookups = 0  # how often the kernel was given this node, less what it forgot
        self.users = 0  # open handles
        self.pins = 0  # whoever else needs it
        self.cached: Listing | None = None
        self.is_logged = False  # with its place
        self.is_inherited = False  # a predecessor named it: how often, is not known
        self.id = nodes.add(self, number)

    @property
    def is_idle(self) -> bool:
        """Nobody needs the node any more."""
        return not (self.lookups or self.users or self.pins or self.is_inherited)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Keep the node, and its descriptor, over the block."""
        self.pins += 1
        try:
            yield
        finally:
            self.pins -= 1
            self.nodes.settle(self)

    def gone(self) -> None:
        """The table dropped the node: free what it holds."""

    @property
    def known_by(self) -> Identity:
        """What tells the node from every other, for a successor."""
        raise NotImplementedError

    def place(self) -> tuple[int, Any]:
        """Return where it is found: an id that is logged already, and what JSON can say."""
        raise NotImplementedError

    @property
    def holder(self) -> Node | None:
        """The node that `place` is told by, if it is looked for there."""
        return None

    async def serve(self) -> None:
        """Let the data plane answer for the node, which the kernel has open from a predecessor."""
        raise refusal(errno.EBADF)

    async def getattr(self) -> Attributes:
        """Return the attributes as they are now."""
        raise refusal(errno.ENOTSUP)

    async def setattr(self, changes: Changes) -> Attributes:
        """Change attributes and return all of them."""
        raise refusal(errno.EROFS)

    # -- directories ------------------------------------------------------

    async def child(self, name: bytes) -> Node:
        """Return the node that the name leads to."""
        raise refusal(errno.ENOTDIR)

    async def listing(self) -> Listing:
        """Return the names of the directory as they are now."""
        raise refusal(errno.ENOTDIR)

    @property
    def parent_id(self) -> int:
        """The id of the directory above."""
        return ROOT_ID

    async def opendir(self) -> None:
        """Count one more reader of the directory."""
        self.users += 1

    async def page(self, start: int) -> Listing:
        """Return the names to read on from cookie ``start``; 0 reads the directory anew."""
        if start == 0 or self.cached is None:
            self.cached = await self.listing()
        return self.cached

    async def releasedir(self) -> None:
        """Count one reader less."""
        # Of what a predecessor opened nobody counted the handles here.
        self.users = max(0, self.users - 1)
        if self.users == 0:
            self.cached = None

    async def sync_directory(self, datasync: bool) -> None:
        """Return when the names are durable; there is nothing to do where they cannot change."""

    async def create(self, name: bytes, mode: int, flags: int, caller: Caller) -> Node:
        """Make a regular file and open it."""
        raise refusal(errno.EROFS)

    async def mknod(self, name: bytes, mode: int, caller: Caller) -> Node:
        """Make a file that is not opened: regular, FIFO or socket."""
        raise refusal(errno.EROFS)

    async def mkdir(self, name: bytes, mode: int, caller: Caller) -> Node:
        """Make a directory."""
        raise refusal(errno.EROFS)

    async def symlink(self, name: bytes, target: bytes, caller: Caller) -> Node:
        """Make a symbolic link."""
        raise refusal(errno.EROFS)

    async def link(self, node: Node, name: bytes) -> None:
        """Give the node one more name, in this directory."""
        raise refusal(errno.EROFS)

    async def unlink(self, name: bytes) -> None:
        """Take away a name that is not a directory's."""
        raise refusal(errno.EROFS)

    async def rmdir(self, name: bytes) -> None:
        """Take away an empty directory."""
        raise refusal(errno.EROFS)

    async def rename(self, name: bytes, directory: Node, new_name: bytes, flags: int) -> None:
        """Move a name of this directory to another, with the flags of renameat2(2)."""
        raise refusal(errno.EROFS)

    # -- files and links --------------------------------------------------

    async def open(self, flags: int) -> None:
        """Count one more handle; on return the data plane answers for the node."""
        raise refusal(errno.EISDIR if self.is_directory else errno.ENOTSUP)

    async def release(self) -> None:
        """Count one handle less; the last one detaches the image."""

    async def readlink(self) -> bytes:
        """Return what the symbolic link says."""
        raise refusal(errno.EINVAL)

    is_directory = False

    # -- extended attributes ----------------------------------------------

    def getxattr(self, name: bytes) -> bytes:
        """Return an extended attribute."""
        raise refusal(errno.ENODATA)

    def listxattr(self) -> list[bytes]:
        """Return the names of the extended attributes."""
        return []

    def setxattr(self, name: bytes, value: bytes) -> None:
        """Set an extended attribute."""
        raise refusal(errno.EROFS)

    def removexattr(self, name: bytes) -> None:
        """Take away an extended attribute."""
        raise refusal(errno.EROFS)


class Nodes:
    """The nodes that somebody needs, by id. Ids count up and are never given twice.

    What a predecessor named keeps its id (`make`), and is made when it is asked for (`get`)
    by the one of ``revive`` for its kind.
    """

    def __init__(self, handover: Handover | None = None) -> None:
        self.handover = handover or Handover()
        self.revive: dict[str, Callable[[int, Known], Node]] = {}
        self._by_id: dict[int, Node] = {}
        self._last = max(FIRST_ID - 1, self.handover.highest)
        self._given: int | None = None

    def __len__(self) -> int:
        """How many nodes there are."""
        return len(self._by_id)

    def add(self, node: Node, number: int | None) -> int:
        """Enter a node, under its fixed number or the next free one, and return the id."""
        if number is None:
            number, self._given = self._given, None
        if number is None:
            self._last += 1
            number = self._last
        self._by_id[number] = node
        return number

    def make(self, identity: Identity, build: Callable[[], NodeT]) -> NodeT:
        """Build one node; under the id that a predecessor gave it, where one has."""
        number = self.handover.number_of(identity)
        if number is None or number in self._by_id:
            return build()
        self._given = number
        node = build()
        node.is_inherited = True
        return node

    def named(self, node: Node) -> None:
        """The kernel is about to be told of the node: it is in the log on return."""
        if node.id >= FIRST_ID and not node.is_logged and self.handover.active:
            self.handover.named(node.id, node.known_by, node.place())
            node.is_logged = True

    def records(self) -> Iterator[list[Any]]:
        """Give the log's records of all nodes that are in it."""
        given = set()
        for one in list(self._by_id.values()):
            node: Node | None = one
            # Directories above may be forgotten by the kernel, and still be the way to it.
            while node is not None and node.is_logged and node.id not in given:
                given.add(node.id)
                yield ["node", node.id, node.known_by, node.place()]
                node = node.holder

    def get(self, number: int) -> Node:
        """Return the node; `ESTALE` if there is none."""
        node = self._by_id.get(number)
        if node is not None:
            return node
        known = self.handover.known(number)
        if known is None:
            raise refusal(errno.ESTALE)
        return self.revive[known.identity[0]](number, known)

    def forget(self, number: int, count: int) -> None:
        """The kernel gave back ``count`` of the look-ups it was told of."""
        node = self._by_id.get(number)
        if node is not None:
            # More than this daemon has told of: also all that its predecessor had.
            node.is_inherited = node.is_inherited and count <= node.lookups
            node.lookups = max(0, node.lookups - count)
            self.settle(node)

    def settle(self, node: Node) -> None:
        """Drop the node if nobody needs it."""
        if node.is_idle and node.id != ROOT_ID and self._by_id.pop(node.id, None) is not None:
            node.gone()

    async def forget_all(self) -> None:
        """The mount is gone: end what is open, and drop every node that nobody else holds."""
        for node in list(self._by_id.values()):
            node.lookups, node.is_inherited = 0, False
            while node.users:
                await (node.releasedir() if node.is_directory else node.release())
            self.settle(node)


def directory_attributes(uid: int, gid: int, time_ns: int) -> Attributes:
    """Return the attributes of a directory that nobody may change."""
    return Attributes(
        mode=stat.S_IFDIR | 0o555, nlink=2, uid=uid, gid=gid,
        atime_ns=time_ns, mtime_ns=time_ns, ctime_ns=time_ns,
    )  # fmt: skip
