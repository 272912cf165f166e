"""A site whose images and state directory lie on a disk that can lose its power: `PoweredSite`.

The disk is a file with a loop device over it that writes past the page cache of that file, so
the file holds what a disk holds that was given the same requests: what was only in the host's
page cache or in the memory of a journal is not in it. Two ways to lose the power:

`lose_power`: the daemon is stopped between two system calls, and the file system shut down
(XFS_IOC_GOINGDOWN without a flush of its log, which ext4 knows too): no more reaches the disk.

`copy`: the disk's file and the folder of the vault lie in one btrfs subvolume, of which a
snapshot is taken while everything runs on. Both are as of one instant, as after a real loss:
what a disk has acknowledged as flushed is there, of the requests under way any part. All that
runs on is thrown away; the next `powered` is the copy.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.loopdev import attached, make_fs, make_image, mounted, run_tool
from tests.e2e.mounted import MountedSite

OTHER_BOOT = "00000000-0000-4000-8000-000000000000\n"
HOST = 4 << 30  # sparse
_GOINGDOWN, _NO_LOG_FLUSH = 0x8004587D, 2  # XFS_IOC_GOINGDOWN


class _AskedSite(MountedSite):
    """Asks the daemon by its socket: to start a program for each question is half of a round."""

    def json(self, *arguments: str | Path) -> Any:
        """Return the answer to ``status`` or ``point list DISK``."""
        path = "status" if arguments == ("status",) else f"disks/{arguments[2]}/points"
        transport = httpx.HTTPTransport(uds=str(self.state / "control.sock"))
        with httpx.Client(transport=transport, timeout=60) as client:
            return client.get(f"http://daemon/v1/{path}").raise_for_status().json()


class PoweredSite:
    """A site whose images and state lie on a device; its vault and mountpoint do not."""

    def __init__(self, directory: Path, kind: str, options: str, *, slots: int = 0) -> None:
        """Prepare; ``slots``: how many regions the intent log has room for, 0: as many as ever."""
        self.kind = kind
        self.root = directory / "fs"
        self._host = directory / "host.raw"
        self._now = directory / "host" / "now"
        self._then = directory / "host" / "then"
        self._disk = self._now / "disk.raw"
        self.vault = self._now / "vault"
        self.site: MountedSite = _AskedSite(
            directory, vault=f"file://{self.vault}", options=options,
            environ={"VDISKFS_INTENT_SLOTS": str(slots)},
        )  # fmt: skip
        for made in (self.site.source, self.site.root / "state"):
            if made.exists():
                made.rmdir()
        self.site.source, self.site.state = self.root / "source", self.root / "state"

    @contextmanager
    def host(self, size: int) -> Iterator[None]:
        """Make what lies below: an empty disk of ``size`` bytes, and a place for the vault."""
        make_fs("btrfs", make_image(self._host, HOST))
        # Buffered: what is simulated is a disk in this file system, not the one below it.
        with (
            attached(self._host, direct=False) as device,
            mounted(device, self._now.parent, kind="btrfs"),
        ):
            run_tool(["btrfs", "subvolume", "create", self._now])
            # Only what has no sums is written past the page cache.
            self._disk.touch()
            run_tool(["chattr", "+C", self._disk])
            os.truncate(self._disk, size)
            make_fs(self.kind, self._disk)
            yield
        self._host.unlink()

    @contextmanager
    def powered(self) -> Iterator[None]:
        """Attach and mount the disk as it is now."""
        options = ["nouuid"] if self.kind == "xfs" else []
        with (
            attached(self._disk) as device,
            mounted(device, self.root, kind=self.kind, options=options),
        ):
            try:
                yield
            finally:
                self._end_what_failed()

    def _end_what_failed(self) -> None:
        if self.site.pid:
            with contextlib.suppress(OSError):
                sys.stderr.write((self.site.state / "daemon.log").read_text()[-6000:])
            self.end_daemon()

    # ---- the loss ------------------------------------------------------------------------

    def copy(self) -> tuple[int, int]:
        """Copy disk and vault as of one instant; return the stretch of CLOCK_MONOTONIC it lies in.

        Everything runs on.
        """
        begin = time.monotonic_ns()
        run_tool(["btrfs", "subvolume", "snapshot", self._now, self._then])
        return begin, time.monotonic_ns()

    def use_copy(self, *, vault: bool) -> None:
        """Go on with the copy of the disk, and of the ``vault`` or with that as it is now.

        Nothing may be powered.
        """
        if vault:
            self._now.rename(self._now.with_name("gone"))
            self._then.rename(self._now)
        else:
            self._disk = self._then / "disk.raw"

    def lose_power(self) -> int:
        """Shut the file system down: nothing that the disk has not got now reaches it any more.

        Returns the CLOCK_MONOTONIC before that. The daemon is stopped first: an fsync that
        meets a shutdown may return success and have nothing on the disk (xfs, Linux 6.18: 17
        of 13,690 files in 60 shutdowns, each acknowledged while the shutdown went on). A
        daemon that runs on would tell the vault, and no loss of power is like that.
        """
        self._stop_daemon()
        begin = time.monotonic_ns()
        root = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(root, _GOINGDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(root)
        return begin

    def _stop_daemon(self) -> None:
        """Stop all threads of the daemon; a system call that is under way comes to its end."""
        os.kill(self.site.pid, signal.SIGSTOP)

        def stopped() -> bool:
            tasks = Path(f"/proc/{self.site.pid}/task").glob("*/stat")
            return all(task.read_text().rpartition(") ")[2][0] in "tT" for task in tasks)

        self.site.wait("the daemon is stopped", stopped)

    def end_daemon(self) -> None:
        """Kill the daemon, its keeper first: that would start a successor."""
        self.site.kill_for_good()
        self.site.pid = 0
        # Programs still have it open, and are told when they use it.
        run_tool(["umount", "-l", self.site.mountpoint])

    def note_reboot(self) -> None:
        """The kernel that runs is another one than the notes in the state directory name."""
        for note in [self.site.state / "running", *(self.site.state / "disks").glob("*/boot")]:
            assert note.stat().st_size, f"{note}: the loss took it"
            note.write_text(OTHER_BOOT)
