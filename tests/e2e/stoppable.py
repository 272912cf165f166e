"""A folder on a file system whose server can be stopped: a vault that does not answer.

As a program, the server: the mount of tests/fs/harness.py under another type of file
system, because a folder vault in a mount of vdiskfs is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fs import harness
from vdiskfs import native


@contextlib.contextmanager
def stoppable_folder(directory: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """Give a folder, and what signals its server: SIGSTOP, SIGCONT."""
    source, mountpoint = directory / "source", directory / "mnt"
    for made in (source, mountpoint):
        made.mkdir(parents=True)
    with (
        (directory / "log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.stoppable", source, mountpoint],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            cwd=Path(__file__).parents[2],
        ) as server,
    ):  # fmt: skip
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n", (directory / "log").read_text()
            yield mountpoint / "disks", server.send_signal
        finally:
            server.send_signal(signal.SIGCONT)
            subprocess.run(["umount", "-l", mountpoint], check=False, timeout=20)
            try:
                server.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()


def _mount(mountpoint: str, source: str, flags: native.MountFlags = native.MountFlags.NONE) -> int:
    """Mount as `native.mount` does as root, under another type."""
    connection = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={connection},rootmode=40000,user_id=0,group_id=0,default_permissions"
    words = (b"server", os.fsencode(mountpoint), b"fuse.stoppable", 0, options.encode())
    if libc.mount(*words) != 0:
        raise OSError(ctypes.get_errno(), mountpoint)
    return connection


if __name__ == "__main__":
    native.mount = _mount
    harness.main()
