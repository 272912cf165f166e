"""Regular files of the source: what opens and closes them, and who may read them.

READ, WRITE and the like never come here: the data plane answers them through the image
that is attached while handles are open.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from vdiskfs import native
from vdiskfs.tree.hooks import Access
from vdiskfs.tree.source import Key, Source, SourceNode

_ACL = "system.posix_acl_access"


class SourceFile(SourceNode):
    """A regular file. The daemon keeps one by `hold` for as long as it protects it."""

    def __init__(self, source: Source, key: Key) -> None:
        super().__init__(source, key, stat.S_IFREG)
        self.image: native.Image | None = None  # while attached
        self._writable = False
        self._turn = trio.Lock()

    def hold(self) -> None:
        """Keep the node and its descriptor until `drop`."""
        self.pins += 1

    def drop(self) -> None:
        """End one `hold`."""
        self.pins -= 1
        self.nodes.settle(self)

    @property
    def is_open(self) -> bool:
        """A handle is open."""
        return self.users > 0 or self.image is not None

    def open_file(self, *, writable: bool) -> tuple[int, bool]:
        """Return a new descriptor, and whether it can be written; the caller's to close.

        It is read-write wherever the host allows, also where only reading was asked for:
        the image serves later handles as well.

        Raises:
            OSError: the host refused.
        """
        try:
            return os.open(self.proc_path, os.O_RDWR | os.O_CLOEXEC), True
        except OSError as error:
            if writable or error.errno not in (
                errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY
            ):  # fmt: skip
                raise
        return os.open(self.proc_path, os.O_RDONLY | os.O_CLOEXEC), False

    def access(self) -> Access:
        """Return who may read the file by its own mode and those of the directories above.

        Where that cannot be said with an owner, a group and a mode (access control lists,
        a directory closed to the file's owner or group) only the owner of the mount may.
        """
        status = self.status()
        access = Access(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode) & 0o444)
        nobody = Access(os.getuid(), os.getgid(), 0o400)
        if self._has_acl(self):
            return nobody
        directory = self.directory
        while directory is not None:
            above = directory.status()
            if self._has_acl(directory):
                return nobody
            access = _through(access, above)
            directory = directory.directory
        return access if access.mode else nobody

    @staticmethod
    def _has_acl(node: SourceNode) -> bool:
        try:
            os.getxattr(node.proc_path, _ACL)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                return False
            raise
        return True

    # -- handles ----------------------------------------------------------

    async def open(self, flags: int) -> None:
        """Count one more handle; the first one gets the image and attaches it.

        With O_TRUNC the file is empty on return.
        """
        writable = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        image = await self._take(writable=writable)
        if flags & os.O_TRUNC:
            try:
                await trio.to_thread.run_sync(image.truncate, 0)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self.release()
                raise

    async def _take(self, *, writable: bool) -> native.Image:
        with self.pinned():
            async with self._turn:
                if self.image is None or (writable and not self._writable):
                    await self._attach(writable=writable)
                assert self.image is not None
                self.users += 1
                return self.image

    async def _attach(self, *, writable: bool) -> None:
        image = await self.source.hooks.image_for(self, writable=writable)
        if image is not self.image:
            self.source.core.attach(self.id, image)
        self.image, self._writable = image, writable

    async def serve(self) -> None:
        """Attach the image for handles that a predecessor opened."""
        with self.pinned():
            async with self._turn:
                if self.image is None:
                    await self._attach(writable=False)

    async def release(self) -> None:
        """Count one handle less; the last one detaches the image and tells the hooks."""
        with self.pinned():
            async with self._turn:
                # Of what a predecessor opened nobody counted the handles here; if one is left,
                # its next request brings the image back (`serve`).
                self.users = max(0, self.users - 1)
                if self.users == 0 and self.image is not None:
                    self.image, self._writable = None, False
                    self.source.core.detach(self.id)
                    await self.source.hooks.closed_last(self)

    @asynccontextmanager
    async def opened(self, *, writable: bool) -> AsyncIterator[native.Image]:
        """Have the image over the block, as by a handle."""
        image = await self._take(writable=writable)
        try:
            yield image
        finally:
            with trio.CancelScope(shield=True):
                await self.release()

    async def truncate(self, size: int) -> None:
        """Change the size, through the image: the change is tracked."""
        async with self.opened(writable=True) as image:
            await trio.to_thread.run_sync(image.truncate, size)


def _through(access: Access, above: os.stat_result) -> Access:
    """Return what is left of the access of a file in a directory with these permissions."""
    if above.st_mode & stat.S_IXOTH and above.st_mode & stat.S_IXGRP:
        return access
    group_passes = above.st_gid == access.gid and above.st_mode & stat.S_IXGRP
    owner_passes = above.st_uid == access.uid and above.st_mode & stat.S_IXUSR
    mode = access.mode & ~0o004
    if not group_passes:
        mode &= ~0o040
    if not owner_passes:
        mode &= ~0o400
    return Access(access.uid, access.gid, mode)
