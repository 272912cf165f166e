"""QEMU's own FUSE export of an image, to compare with."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.guest import Disk, block_options


@contextmanager
def exported(image: Path, mountpoint: Path, *, direct: bool = False) -> Iterator[Path]:
    """Export a raw image with qemu-storage-daemon; give the file to open.

    The mountpoint is a regular file, made here, as the daemon mounts over a file. The daemon is
    ended by its process id first: left running it spins once its export is unmounted.
    """
    mountpoint.touch()
    pid_file = mountpoint.with_name(mountpoint.name + ".pid")
    export = f"type=fuse,id=e0,node-name=n0,mountpoint={mountpoint},writable=on"
    command = ["qemu-storage-daemon", "--daemonize", "--pidfile", str(pid_file)]
    command += block_options("n0", Disk(image, direct=direct))
    # Returns once the export is mounted.
    subprocess.run([*command, "--export", export], check=True)
    pid = int(pid_file.read_text(encoding="ascii"))
    try:
        yield mountpoint
    finally:
        _end(pid)
        subprocess.run(["umount", "-l", mountpoint], stderr=subprocess.DEVNULL, check=False)
        mountpoint.unlink()
        pid_file.unlink(missing_ok=True)


def _end(pid: int) -> None:
    """Ask a process that is not our child to end, wait, and insist after ten seconds."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(handle, number)
            if _has_ended(handle, 10):
                return
    finally:
        os.close(handle)


def _has_ended(handle: int, timeout_s: float) -> bool:
    """Wait until the process is gone: its descriptor is readable then."""
    return bool(select.select([handle], [], [], timeout_s)[0])
