"""A vault in a folder of this host: ``Folder`` in threads.

At most ``_THREADS`` calls run at once. A call that has begun is finished even when the
task is cancelled (a file of at most 64 MiB), so nothing half done stays behind.

Network file systems are refused: their locks, links and syncs do not keep what the
conditional writes promise.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TypeVar

import trio

from vdiskfs.errors import AlreadyExistsError, ConflictError, UsageError, VaultUnreachableError
from vdiskfs.store.file import fill_bytes, fill_from
from vdiskfs.store.folder import Folder, LockedError
from vdiskfs.store.object import (
    READ_LIMIT,
    Bytes,
    ObjectInfo,
    Page,
    Pages,
    check_metadata,
    check_name,
    check_prefix,
    check_range,
)

_THREADS = 8
_LOCK_WAIT_S = 10.0
_LOCK_STEP_S = 0.002
_LOCK_STEP_LIMIT_S = 0.1
_NETWORK = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "gfs2", "glusterfs", "lustre", "ncpfs"}
    | {"nfs", "nfs4", "ocfs2", "orangefs", "smb3", "smbfs", "virtiofs"}
    | {"fuse.blobfuse", "fuse.blobfuse2", "fuse.ceph-fuse", "fuse.davfs2", "fuse.gcsfuse"}
    | {"fuse.glusterfs", "fuse.goofys", "fuse.juicefs", "fuse.moosefs", "fuse.rclone"}
    | {"fuse.s3fs", "fuse.sshfs"}
)

T = TypeVar("T")


class LocalStore:
    """A `Store` in a folder on a local file system."""

    def __init__(self, root: Path) -> None:
        """Name an absolute path; it need not exist.

        Raises:
            UsageError: it is on a network file system, or in a mount of vdiskfs.
        """
        refuse_network(root)
        self.requests = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self._folder = Folder(root)
        self._cleaned = False
        self._limiter = trio.CapacityLimiter(_THREADS)

    def describe(self) -> str:
        """Return the URL of the folder."""
        return f"file://{self._folder.root}"

    async def prepare(self) -> None:
        """Make the folder if it is absent, and check that it can hold a vault."""
        await self._run(self._folder.prepare)

    async def create(self, name: str, data: Bytes, *, metadata: Mapping[str, str] = {}) -> str:
        """See `Store`: two syncs, one more for each directory that is new."""
        check_name(name)
        kept = check_metadata(metadata)
        await self._clean()
        etag = await self._run(lambda: self._folder.create(name, fill_bytes(data), kept))
        self.bytes_sent += memoryview(data).nbytes
        return etag

    async def create_from_file(
        self, name: str, path: Path, *, metadata: Mapping[str, str] = {}
    ) -> str:
        """See `Store`: a second name of the file where it can have one, else the kernel copies."""
        check_name(name)
        kept = check_metadata(metadata)
        await self._clean()
        fill = fill_from(path, trio.from_thread.check_cancelled)
        etag = await self._run(lambda: self._folder.adopt(name, path, kept))
        if etag is None:
            etag = await self._run(lambda: self._folder.create(name, fill, kept))
        self.bytes_sent += int(etag.rpartition("-")[2], 16)
        return etag

    async def replace(
        self, name: str, data: Bytes, *, etag: str | None, metadata: Mapping[str, str] = {}
    ) -> str:
        """See `Store`: two syncs under the folder's lock."""
        if etag is None:
            try:
                return await self.create(name, data, metadata=metadata)
            except AlreadyExistsError:
                raise ConflictError(f"{name} exists already") from None
        check_name(name)
        kept = check_metadata(metadata)
        new = await self._locked(lambda: self._folder.replace(name, fill_bytes(data), etag, kept))
        self.bytes_sent += memoryview(data).nbytes
        return new

    async def read(self, name: str, *, limit: int = READ_LIMIT) -> tuple[bytes, ObjectInfo]:
        """See `Store`."""
        check_name(name)
        data, info = await self._run(lambda: self._folder.read(name, limit))
        self.bytes_received += len(data)
        return data, info

    async def read_range(self, name: str, offset: int, length: int) -> bytes:
        """See `Store`."""
        check_name(name)
        check_range(offset, length)
        if not length:
            return b""
        data = await self._run(lambda: self._folder.read_range(name, offset, length))
        self.bytes_received += length
        return data

    async def stat(self, name: str) -> ObjectInfo:
        """See `Store`."""
        check_name(name)
        return await self._run(lambda: self._folder.stat(name))

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """See `Store`: reads the directories that the prefix reaches, one at a time."""
        directory, slash, rest = check_prefix(prefix).rpartition("/")
        pending: list[ObjectInfo | str] = []

        async def fetch(marker: str | None) -> Page:
            where = (directory + slash, rest) if marker is None else (marker, "")
            entries = await self._run(lambda: self._folder.entries(*where))
            pending.extend(reversed(entries))
            objects: list[ObjectInfo] = []
            while pending:
                entry = pending.pop()
                if isinstance(entry, str):
                    return objects, entry
                objects.append(entry)
            return objects, None

        return Pages(fetch)

    async def delete(self, name: str) -> None:
        """See `Store`."""
        check_name(name)
        await self._locked(lambda: self._folder.delete(name))

    async def aclose(self) -> None:
        """See `Store`: nothing is kept open between calls."""
        await trio.lowlevel.checkpoint()

    async def _run(self, call: Callable[[], T]) -> T:
        self.requests += 1
        return await trio.to_thread.run_sync(call, limiter=self._limiter)

    async def _locked(self, call: Callable[[], T]) -> T:
        """Run a call that takes the folder's lock, waiting outside of the thread."""
        deadline = trio.current_time() + _LOCK_WAIT_S
        step = _LOCK_STEP_S
        while True:
            try:
                return await self._run(call)
            except LockedError:
                if trio.current_time() >= deadline:
                    break
            await trio.sleep(step)
            step = min(step * 2, _LOCK_STEP_LIMIT_S)
        raise VaultUnreachableError(
            f"{self._folder.root}: another process holds the vault's lock for {_LOCK_WAIT_S:.0f} s",
            hint="is a vdiskfs process stopped on this host?",
        )

    async def _clean(self) -> None:
        """Once for this store, before the first write."""
        if not self._cleaned:
            self._cleaned = True
            await self._run(self._folder.clean)


def refuse_network(root: Path) -> None:
    """Refuse a folder that other hosts may write, or that lies in a mount of ours.

    Raises:
        UsageError: it is one.
    """
    kind = file_system_of(root, Path("/proc/self/mountinfo").read_text(errors="replace"))
    if kind.startswith("fuse.vdiskfs"):
        raise UsageError(f"{root} lies in a mount of vdiskfs", hint="put the vault elsewhere")
    if kind in _NETWORK:
        raise UsageError(
            f"{root} is on a network file system ({kind})",
            hint="a folder vault needs a local one; for other hosts use azure://",
        )


def file_system_of(path: Path, mountinfo: str) -> str:
    """Return the kernel's name for the type of the file system that holds a path.

    Args:
        path: need not exist.
        mountinfo: the text of proc_pid_mountinfo(5). By path, not by device: a btrfs
            subvolume has a device of its own that the text does not name.
    """
    parts = Path(os.path.realpath(path)).parts
    kind, longest = "", -math.inf
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split()
        if not separator or len(fields) < 5:
            continue
        mountpoint = Path(fields[4].encode().decode("unicode_escape")).parts
        # Of two mounts at one place the later hides the earlier.
        if parts[: len(mountpoint)] == mountpoint and len(mountpoint) >= longest:
            kind, longest = after.split()[0], len(mountpoint)
    return kind
