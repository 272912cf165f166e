"""A failover's copy as the file of a protected disk."""

from __future__ import annotations

import os

from vdiskfs import native
from vdiskfs.failover.copy import WritableCopy
from vdiskfs.tree import Access


class CopyFile:
    """What `disk.ProtectedDisk` asks of a copy: see `disk.DiskFile`."""

    def __init__(self, copy: WritableCopy, path: str) -> None:
        """Take the copy, which stays the caller's, and its name for people."""
        self._copy = copy
        self.path = path

    @property
    def is_open(self) -> bool:
        """Whether a program has it open."""
        return self._copy.users > 0

    def identity(self) -> native.FileIdentity:
        """Return which file it is, its size and its times."""
        return native.file_identity(self._copy.fd)

    def access(self) -> Access:
        """Return who may read it."""
        status = os.fstat(self._copy.fd)
        return Access(status.st_uid, status.st_gid, status.st_mode & 0o444)
