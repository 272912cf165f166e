"""Calls that Python lacks, and other users, for the tests of names."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

NOBODY = 65534
KEEP_SIZE, PUNCH, ZERO = 1, 2, 16
RENAME_EXCHANGE = 2
RENAME_NOREPLACE = 1
UMOUNT = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
LIBC = ctypes.CDLL(None, use_errno=True)


def listdir(path: Path) -> list[str]:
    """Names as `os.listdir` gives them; undecodable bytes escaped."""
    with os.scandir(path) as entries:
        return [entry.name for entry in entries]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    call = LIBC.fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if call(fd, mode, offset, length) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def renameat2(old: Path, new: Path, flags: int) -> None:
    if LIBC.renameat2(-100, bytes(old), -100, bytes(new), flags) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
    setpriv = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    return subprocess.run(
        [*setpriv, *command], capture_output=True, text=True, timeout=20, check=False
    )
