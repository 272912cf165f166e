"""Directories of the source: looking up, listing and changing names.

Every change is made under ``Source.changing`` and told to the hooks before the next one.
New files belong to the caller; the mode is set last, because a daemon that is not root
could not open a file that its owner may not write.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import trio

from vdiskfs import native
from vdiskfs.crash import hook
from vdiskfs.tree.handover import Act, Identity
from vdiskfs.tree.listing import Found, NameListing
from vdiskfs.tree.node import Attributes, Caller, Node, refusal
from vdiskfs.tree.source import Source, SourceNode, key_of, source_identity
from vdiskfs.tree.sourcefile import SourceFile

RENAME_EXCHANGE = 2
_KINDS = {stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK}
_PRIVATE = 0o600


class SourceDirectory(SourceNode):
    """A directory of the source, or the source itself (``name`` empty)."""

    is_directory = True

    @property
    def parent_id(self) -> int:
        """The id of the directory above; the root's for the source itself."""
        return super().parent_id if self.directory is None else self.directory.id

    # -- looking ----------------------------------------------------------

    async def child(self, name: bytes) -> SourceNode:
        """Return the node that the name leads to."""
        return self.find(name)

    def find(self, name: bytes) -> SourceNode:
        """Return the node that the name leads to, and note that it does."""
        return self._node(name, os.stat(name, dir_fd=self.descriptor, follow_symlinks=False))

    def _node(self, name: bytes, status: os.stat_result) -> SourceNode:
        node = self.source.node(key_of(status), stat.S_IFMT(status.st_mode))
        node.settle_at(self, name)
        return node

    def _act(
        self, kind: str, name: bytes, more: tuple[Any, ...] = ()
    ) -> tuple[Act | None, Identity | None]:
        """Log a change of names before it is made.

        Returns:
            The act as a predecessor logged it, if this request is sent again, and what the
            name leads to now. Neither, where no successor would read it.
        """
        handover = self.nodes.handover
        if not handover.active:
            return None, None
        now = self._identity(name)
        self.nodes.named(self)
        return handover.act(kind, self.id, name, now, more), now

    def _identity(self, name: bytes) -> Identity | None:
        try:
            status = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return source_identity(key_of(status), stat.S_IFMT(status.st_mode))

    async def listing(self) -> NameListing:
        """Return the names as the host gives them now; their attributes are read one by one."""
        with self.pinned():
            names = await trio.to_thread.run_sync(self._names)
        return NameListing((name, partial(self._entry, name)) for name in names)

    def _names(self) -> list[bytes]:
        fd = os.open(self.proc_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with os.scandir(fd) as entries:
                return [os.fsencode(entry.name) for entry in entries]
        finally:
            os.close(fd)

    def _entry(self, name: bytes) -> Found | None:
        try:
            status = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return self._node(name, status), Attributes.of(status)

    async def sync_directory(self, datasync: bool) -> None:
        """Return when the names are durable."""
        fd = os.open(self.proc_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            await trio.to_thread.run_sync(os.fdatasync if datasync else os.fsync, fd)
        finally:
            os.close(fd)

    # -- making -----------------------------------------------------------

    async def create(self, name: bytes, mode: int, flags: int, caller: Caller) -> SourceNode:
        """Make a regular file and open it; without O_EXCL one that is there is opened."""
        async with self.source.changing():
            earlier, now = self._act("create", name)
            if _is_made(earlier, now):
                return await self._finish_file(name, mode, flags, caller)
            try:
                os.close(self._make_file(name))
                hook("create.made")
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
            else:
                return await self._finish_file(name, mode, flags, caller)
        node = self.find(name)
        await node.open(flags)
        return node

    def _make_file(self, name: bytes) -> int:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, _PRIVATE, dir_fd=self.descriptor)

    async def _finish_file(self, name: bytes, mode: int, flags: int, caller: Caller) -> SourceNode:
        node = self.find(name)
        assert isinstance(node, SourceFile)
        with node.pinned():
            try:
                await self.source.hooks.created(node)
                # Before its mode is set: see the module's docstring.
                await node.open(flags & ~os.O_TRUNC | os.O_RDWR)
                self._give(node, mode, caller)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._take_back(node, name)
                raise
        return node

    async def _take_back(self, node: SourceFile, name: bytes) -> None:
        path = node.path
        os.unlink(name, dir_fd=self.descriptor)
        await self.source.hooks.unlinked(node, path, last=True)
        if node.is_open:
            await node.release()

    def _give(self, node: SourceNode, mode: int, caller: Caller) -> None:
        """Set owner, group and mode of what was just made."""
        above = self.status()
        gid = above.st_gid if above.st_mode & stat.S_ISGID else caller.gid
        status = node.status()
        if (status.st_uid, status.st_gid) != (caller.uid, gid):
            os.chown(node.proc_path, caller.uid, gid)
        if not stat.S_ISLNK(node.kind):
            bits = stat.S_IMODE(mode) & ~caller.umask
            if node.is_directory and above.st_mode & stat.S_ISGID:
                bits |= stat.S_ISGID
            Path(node.proc_path).chmod(bits)

    async def mknod(self, name: bytes, mode: int, caller: Caller) -> SourceNode:
        """Make a regular file, FIFO or socket; `EPERM` for devices."""
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind not in _KINDS:
            raise refusal(errno.EPERM)
        make = partial(os.mknod, name, kind | _PRIVATE, dir_fd=self.descriptor)
        return await self._make(name, make, mode, caller)

    async def mkdir(self, name: bytes, mode: int, caller: Caller) -> SourceNode:
        """Make a directory."""
        make = partial(os.mkdir, name, 0o700, dir_fd=self.descriptor)
        return await self._make(name, make, mode, caller)

    async def symlink(self, name: bytes, target: bytes, caller: Caller) -> SourceNode:
        """Make a symbolic link; the host never follows it."""
        make = partial(os.symlink, target, name, dir_fd=self.descriptor)
        return await self._make(name, make, 0o777, caller)

    async def _make(
        self, name: bytes, make: Callable[[], None], mode: int, caller: Caller
    ) -> SourceNode:
        async with self.source.changing():
            earlier, now = self._act("make", name)
            if not _is_made(earlier, now):
                make()
                hook("make.made")
            node = self.find(name)
            try:
                self._give(node, mode, caller)
            except BaseException:
                remove = os.rmdir if node.is_directory else os.unlink
                remove(name, dir_fd=self.descriptor)
                self.nodes.settle(node)
                raise
            if isinstance(node, SourceFile):
                with node.pinned():
                    await self.source.hooks.created(node)
            return node

    async def link(self, node: Node, name: bytes) -> None:
        """Give a file of the source one more name, here."""
        if not isinstance(node, SourceNode):
            raise refusal(errno.EXDEV)
        async with self.source.changing():
            earlier, now = self._act("link", name)
            if not (_is_made(earlier, now) and now == node.known_by):
                os.link(node.proc_path, name, dst_dir_fd=self.descriptor, follow_symlinks=True)
                hook("link.made")
            node.settle_at(self, name)
            if isinstance(node, SourceFile):
                await self.source.hooks.linked(node, node.path)

    # -- taking away ------------------------------------------------------

    async def unlink(self, name: bytes) -> None:
        """Take away a file's name; a disk's history stays."""
        async with self.source.changing():
            earlier, now = self._act("unlink", name)
            if earlier is not None and earlier.before != now:
                return
            node = self.find(name)
            node.keep_for_successor()
            with node.pinned(), self.pinned():
                path = node.path
                directory, _ = self.descriptor, node.descriptor  # both open, and both stay
                await trio.to_thread.run_sync(partial(os.unlink, name, dir_fd=directory))
                hook("unlink.made")
                node.has_name = False
                if isinstance(node, SourceFile):
                    await self.source.hooks.unlinked(node, path, last=_is_unlinked(node))

    async def rmdir(self, name: bytes) -> None:
        """Take away an empty directory."""
        async with self.source.changing():
            earlier, now = self._act("rmdir", name)
            if earlier is not None and earlier.before != now:
                return
            node = self.find(name)
            with node.pinned():
                _ = node.descriptor
                os.rmdir(name, dir_fd=self.descriptor)
                hook("rmdir.made")

    async def rename(self, name: bytes, directory: Node, new_name: bytes, flags: int) -> None:
        """Move a name; hooks hear of the file that lost its name before the one that took it."""
        if not isinstance(directory, SourceDirectory):
            raise refusal(errno.EROFS)
        async with self.source.changing():
            if self._is_moved(name, directory, new_name, flags):
                return
            moved, target = self.find(name), directory.find_or_none(new_name)
            old_path = moved.path
            if target is not None and target is not moved and not flags & RENAME_EXCHANGE:
                target.keep_for_successor()
            with ExitStack() as pins:
                for node in (self, directory, moved, target):
                    if node is not None:
                        pins.enter_context(node.pinned())
                        _ = node.descriptor
                await trio.to_thread.run_sync(
                    native.rename, self.descriptor, os.fsdecode(name),
                    directory.descriptor, os.fsdecode(new_name), flags,
                )  # fmt: skip
                hook("rename.made")
                if target is moved:  # two names of one file: POSIX leaves both
                    return
                moved.settle_at(directory, new_name)
                await self._tell_target(target, name, old_path, moved.path, flags)
                await self._tell_moved(moved, old_path, moved.path)

    def _is_moved(
        self, name: bytes, directory: SourceDirectory, new_name: bytes, flags: int
    ) -> bool:
        """Log a rename, with both places of what moves; True: a predecessor has made it."""
        handover = self.nodes.handover
        if not handover.active:
            return False
        self.nodes.named(directory)
        there = directory._identity(new_name)
        earlier, here = self._act("rename", name, (directory.id, os.fsdecode(new_name), there))
        if earlier is not None:
            return earlier.before == there and (here, there) != (earlier.before, earlier.more[2])
        places = [(here, directory.id, new_name)]
        if flags & RENAME_EXCHANGE:
            places.append((there, self.id, name))
        for identity, above, last in places:
            node = None if identity is None else self.source.known(identity[1:3], identity[3])
            if node is not None and node.is_logged:
                handover.named(node.id, node.known_by, (above, os.fsdecode(last)))
        return False

    def find_or_none(self, name: bytes) -> SourceNode | None:
        """Return the node that the name leads to, or None."""
        try:
            return self.find(name)
        except FileNotFoundError:
            return None

    async def _tell_target(
        self, target: SourceNode | None, name: bytes, old_path: str, new_path: str, flags: int
    ) -> None:
        if target is None:
            return
        if flags & RENAME_EXCHANGE:
            target.settle_at(self, name)
            await self._tell_moved(target, new_path, old_path)
            return
        target.has_name = False
        if isinstance(target, SourceFile):
            await self.source.hooks.replaced(target, new_path, last=_is_unlinked(target))

    async def _tell_moved(self, node: SourceNode, old_path: str, new_path: str) -> None:
        if isinstance(node, SourceFile):
            await self.source.hooks.renamed(node, old_path, new_path)
        elif node.is_directory:
            await self.source.hooks.directory_renamed(old_path, new_path)


def node_of(source: Source, key: tuple[int, int], kind: int) -> SourceNode:
    """Return a new node of the class that this kind of file needs."""
    if kind == stat.S_IFREG:
        return SourceFile(source, key)
    if kind == stat.S_IFDIR:
        return SourceDirectory(source, key, kind)
    return SourceNode(source, key, kind)


def _is_made(earlier: Act | None, now: Identity | None) -> bool:
    """A predecessor found nothing under the name, and there is something: it made it."""
    return earlier is not None and earlier.before is None and now is not None


def _is_unlinked(node: SourceNode) -> bool:
    return node.status().st_nlink == 0
