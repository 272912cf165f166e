"""A block device that logs all it is given: `logged_device`. Needs root.

A loop device, past the page cache, over the one file of a FUSE mount whose server puts each write
and each flush into a log before it answers. As a program, the server. It takes one request after
the other: a flush covers all that the log has before it.

QEMU's blklogwrites behind its FUSE export would be the tool, but a request that comes while
another one is written lands in that one's buffer (QEMU 7.2.22, Debian 12: an ext4 with a few
writers had no valid journal after an orderly unmount).
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyfuse3
import trio

from tests.e2e.loopdev import attached, run_tool

_HEAD = struct.Struct("<QQ")  # offset and length, or all ones and 0 for a flush
_FLUSH = 2**64 - 1
_FILE = pyfuse3.ROOT_INODE + 1
_NAME = b"device"


class Entry(NamedTuple):
    """A write, or a flush, which has no data. ``end`` is the log's length with it."""

    offset: int
    data: bytes
    end: int

    @property
    def is_flush(self) -> bool:
        """Whether all that was written before it is safe."""
        return not self.data


def read_entries(log: Path) -> list[Entry]:
    """Return what the device was given, in order."""
    data, at, found = log.read_bytes(), 0, []
    while at < len(data):
        offset, length = _HEAD.unpack_from(data, at)
        begin = at + _HEAD.size
        at = begin + length
        found.append(Entry(0 if offset == _FLUSH else offset, data[begin:at], at))
    assert at == len(data), "the log is cut short"
    return found


@contextmanager
def logged_device(image: Path, log: Path) -> Iterator[Path]:
    """Attach an image and give the device. The log is a new file."""
    mountpoint = log.with_name("export")
    mountpoint.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.devicelog", image, log, mountpoint],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n", "the server has failed"
            with attached(mountpoint / os.fsdecode(_NAME)) as device:
                yield device
            run_tool(["umount", mountpoint])
            assert server.wait(60) == 0
        finally:
            server.kill()
            subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True)
    mountpoint.rmdir()


class _Server(pyfuse3.Operations):
    def __init__(self, image: int, log: int) -> None:
        super().__init__()
        self._image = image
        self._log = log

    def _note(self, offset: int, data: bytes) -> None:
        # In one call: whoever looks at the log's length never sees half of an entry.
        entry = _HEAD.pack(offset, len(data)) + data
        if os.write(self._log, entry) != len(entry):
            raise pyfuse3.FUSEError(errno.EIO)

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        found = pyfuse3.EntryAttributes()
        found.st_ino = inode
        found.st_mode = stat.S_IFREG | 0o600
        if inode == pyfuse3.ROOT_INODE:
            found.st_mode = stat.S_IFDIR | 0o700
        else:
            found.st_size = os.fstat(self._image).st_size
        found.attr_timeout = found.entry_timeout = 300
        return found

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name != _NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(_FILE, ctx)

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=1, direct_io=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return os.pread(self._image, size, off)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        self._note(off, buf)
        return os.pwrite(self._image, buf, off)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        self._note(_FLUSH, b"")

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """A close is no flush of a disk."""


def _serve(image: str, log: str, mountpoint: str) -> None:
    files = os.open(image, os.O_RDWR), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    options = {*pyfuse3.default_options, "fsname=devicelog"}
    pyfuse3.init(_Server(*files), mountpoint, options)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    trio.run(pyfuse3.main)
    pyfuse3.close(unmount=False)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
