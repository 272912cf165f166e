"""The FUSE side of names: pyfuse3's handlers, look-up counts, errnos. Nothing else.

Each handler finds the node and asks it; READ, WRITE, FSYNC and FLUSH never come here,
because the data plane answers them on every regular file. A handle is the id of its node. The
process id of a request is its number instead (native/src/names.c).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from typing import NoReturn

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileInfo,
    FUSEError,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from vdiskfs.fs.guard import handler
from vdiskfs.tree import REQUEST, RESENT, Attributes, Caller, Changes, Namespace, Node

log = logging.getLogger(__name__)

# The kernel sends one request per waiting process; those that wait for the vault must not
# keep the others out.
MAX_TASKS = 1000
OPTIONS = frozenset({"default_permissions", "fsname=vdiskfs", "subtype=vdiskfs"})


class Operations(pyfuse3.Operations):
    """The handlers of one mount."""

    supports_dot_lookup = False  # no NFS export: a node is known while the kernel knows it
    enable_writeback_cache = False  # it would acknowledge writes that nobody saw
    enable_acl = True  # the access control lists of the source hold in the mount

    def __init__(self, namespace: Namespace) -> None:
        super().__init__()
        self._namespace = namespace
        self._nodes = namespace.nodes

    # -- look-ups ---------------------------------------------------------

    @handler
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name."""
        return await self._entry(await self._nodes.get(parent_inode).child(name))

    async def _entry(self, node: Node) -> EntryAttributes:
        """Give a node to the kernel: the look-up counts from here, before anything waits."""
        node.lookups += 1
        self._nodes.named(node)
        try:
            return _entry_attributes(node, await node.getattr())
        except BaseException:
            self._nodes.forget(node.id, 1)
            raise

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Take look-ups back; must not raise."""
        for number, count in inode_list:
            try:
                self._nodes.forget(number, count)
            except Exception:
                log.exception("forget of node %d", number)

    @handler
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Read attributes."""
        node = self._nodes.get(inode)
        return _entry_attributes(node, await node.getattr())

    @handler
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:  # fmt: skip
        """Change attributes."""
        node = self._nodes.get(inode)
        changes = Changes(
            size=attr.st_size if fields.update_size else None,
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        with node.pinned():
            return _entry_attributes(node, await node.setattr(changes))

    @handler
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Read a symbolic link."""
        return await self._nodes.get(inode).readlink()

    # -- changes of names -------------------------------------------------

    @handler
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make and open a regular file."""
        REQUEST.set(ctx.pid)
        directory = self._nodes.get(parent_inode)
        with directory.pinned():
            node = await directory.create(name, mode, flags, _caller(ctx))
        try:
            return FileInfo(fh=node.id), await self._entry(node)
        except BaseException:
            await node.release()
            raise

    @handler
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a file."""
        REQUEST.set(ctx.pid)
        directory = self._nodes.get(parent_inode)
        with directory.pinned():
            return await self._entry(await directory.mknod(name, mode, _caller(ctx)))

    @handler
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a directory."""
        REQUEST.set(ctx.pid)
        directory = self._nodes.get(parent_inode)
        with directory.pinned():
            return await self._entry(await directory.mkdir(name, mode, _caller(ctx)))

    @handler
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a symbolic link."""
        REQUEST.set(ctx.pid)
        directory = self._nodes.get(parent_inode)
        with directory.pinned():
            return await self._entry(await directory.symlink(name, target, _caller(ctx)))

    @handler
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Give a file one more name."""
        REQUEST.set(ctx.pid)
        node, directory = self._nodes.get(inode), self._nodes.get(new_parent_inode)
        with node.pinned(), directory.pinned():
            await directory.link(node, new_name)
            return await self._entry(node)

    @handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Take a name away."""
        REQUEST.set(ctx.pid)
        directory = self._nodes.get(parent_inode)
        with directory.pinned():
            await directory.unlink(name)

    @handler
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Take an empty directory away."""
        REQUEST.set(ctx.pid)
        directory = self._nodes.get(parent_inode)
        with directory.pinned():
            await directory.rmdir(name)

    @handler
    async def rename(  # noqa: PLR0917 - pyfuse3's signature
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes,
        flags: int, ctx: RequestContext,
    ) -> None:  # fmt: skip
        """Move a name."""
        REQUEST.set(ctx.pid)
        old, new = self._nodes.get(parent_inode_old), self._nodes.get(parent_inode_new)
        with old.pinned(), new.pinned():
            await old.rename(name_old, new, name_new, flags)

    # -- files ------------------------------------------------------------

    @handler
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file: its image answers from now on, and the core says how it is opened."""
        await self._nodes.get(inode).open(flags)
        return FileInfo(fh=inode)

    @handler
    async def release(self, fh: int) -> None:
        """Close a handle."""
        await self._nodes.get(fh).release()

    @handler
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Never called: the data plane answers."""
        _misrouted("READ", fh)

    @handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Never called: the data plane answers."""
        _misrouted("WRITE", fh)

    @handler
    async def flush(self, fh: int) -> None:
        """Never called: the data plane answers."""
        _misrouted("FLUSH", fh)

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Never called: the data plane answers."""
        _misrouted("FSYNC", fh)

    # -- directories ------------------------------------------------------

    @handler
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory."""
        await self._nodes.get(inode).opendir()
        return inode

    @handler
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """Give names beyond a position, with their attributes; each counts as a look-up."""
        directory = self._nodes.get(fh)
        listing = await directory.page(start_id)
        own = await directory.getattr()
        for position, name, number in ((1, b".", fh), (2, b"..", directory.parent_id)):
            dots = _entry_attributes(directory, own, number)
            if start_id < position and not pyfuse3.readdir_reply(token, name, dots, position):
                return
        for entry in listing.after(max(start_id, 2)):
            found = entry.find()
            if found is None:  # gone meanwhile
                continue
            node, attributes = found
            self._nodes.named(node)
            reply = _entry_attributes(node, attributes)
            if not pyfuse3.readdir_reply(token, entry.name, reply, entry.cookie):
                self._nodes.settle(node)
                return
            node.lookups += 1

    @handler
    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        await self._nodes.get(fh).releasedir()

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Make the names of a directory durable."""
        directory = self._nodes.get(fh)
        with directory.pinned():
            await directory.sync_directory(datasync)

    # -- the rest ---------------------------------------------------------

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Say how full the source's file system is."""
        host = self._namespace.statfs()
        data = StatvfsData()
        for field in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree",
            "f_favail", "f_namemax",
        ):  # fmt: skip
            setattr(data, field, getattr(host, field))
        return data

    @handler
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Never called: default_permissions lets the kernel decide."""
        _misrouted("ACCESS", inode)

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """Read an extended attribute."""
        return self._nodes.get(inode).getxattr(name)

    @handler
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """List extended attributes."""
        return self._nodes.get(inode).listxattr()

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute."""
        self._nodes.get(inode).setxattr(name, value)

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Take an extended attribute away."""
        try:
            self._nodes.get(inode).removexattr(name)
        except OSError as error:
            if error.errno != errno.ENODATA or not ctx.pid & RESENT:
                raise


def _misrouted(what: str, number: int) -> NoReturn:
    log.error("%s of node %d came to the names: no image is attached", what, number)
    raise FUSEError(errno.EIO)


def _caller(ctx: RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.umask)


def _entry_attributes(
    node: Node, attributes: Attributes, number: int | None = None
) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = node.id if number is None else number
    entry.generation = 0
    entry.entry_timeout = attributes.entry_timeout_s
    entry.attr_timeout = attributes.attr_timeout_s
    entry.st_mode = attributes.mode
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_size = attributes.size
    entry.st_blksize = attributes.blksize
    entry.st_blocks = attributes.blocks
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    return entry
