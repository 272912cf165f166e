"""Files, mounts and threads of this host, as the core knows them. Part of ``vdiskfs.native``."""

from __future__ import annotations

import os
import threading
from typing import Any

from vdiskfs._native import ffi, lib
from vdiskfs.native.flags import MountFlags
from vdiskfs.native.records import FileIdentity


def check(result: int, what: str) -> int:
    """Return what a call of the core returned; raise the OSError that a negative one is."""
    if result < 0:
        raise OSError(-result, os.strerror(-result), what)
    return int(result)


class UnreadableError(OSError):
    """The disk of an image does not give back a page; ``offset`` is its first byte."""

    def __init__(self, error: int, offset: int) -> None:
        """An error's number, and where."""
        super().__init__(error, os.strerror(error))
        self.offset = offset


def file_identity(fd: int) -> FileIdentity:
    """Return the identity of the open file."""
    out = ffi.new("vdf_identity *")
    check(lib.vdf_file_identity(fd, out), "statx")
    return FileIdentity(out.device, out.inode, out.birth_ns, out.change_ns, out.modify_ns, out.size)


def rename(old_dir: int, old: str, new_dir: int, new: str, flags: int = 0) -> None:
    """Call renameat2(2): names relative to directory descriptors."""
    check(lib.vdf_rename(old_dir, os.fsencode(old), new_dir, os.fsencode(new), flags), "rename")


def punch(fd: int, offset: int, length: int) -> None:
    """Make a range of a file a hole, in bytes; its size stays. OSError EOPNOTSUPP: it cannot."""
    check(lib.vdf_punch(fd, offset, length), "punch")


def mount(mountpoint: str, source: str, flags: MountFlags = MountFlags.NONE) -> int:
    """Mount, and return the descriptor of the FUSE connection (the caller's)."""
    out = ffi.new("int *")
    check(lib.vdf_mount(os.fsencode(mountpoint), os.fsencode(source), flags, out), mountpoint)
    return int(out[0])


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount; OSError with EBUSY while something uses the mount."""
    check(lib.vdf_unmount(os.fsencode(mountpoint), int(lazy)), mountpoint)


_steps_back = threading.local()


def background() -> None:
    """Let this thread step back behind guests' requests; once done it stays so."""
    if not getattr(_steps_back, "done", False):
        check(lib.vdf_thread_background(), "priority")
        _steps_back.done = True


_crash_strings: list[Any] = []


def crash_arm(plan: str, log: str) -> None:
    """Arm the crash hooks of the C core, for tests; see ``vdiskfs.crash.arm``."""
    kept = [ffi.new("char[]", text.encode()) if text else ffi.NULL for text in (plan, log)]
    lib.vdf_crash_arm(*kept)
    _crash_strings[:] = kept
