"""Losses of the host's power, for tests and for the soak: ``power_loss_round``.

As a program: ``python -m tests.e2e.power [--losses N] [--seed N] [--kind ext4|xfs]``.

A file system on a loop device holds the images and the state directory; the vault lies elsewhere,
as it does in life. Writers with a log of their own go on, and flush, while at a random instant
the file system is shut down (XFS_IOC_GOINGDOWN without a flush of its log, which ext4 knows too):
from that instant on nothing reaches the device, which writes past the page cache of its file. So
the file holds what a disk holds that keeps what it was given in the order given; what was only in
the host's page cache or the journal's memory is gone. The daemon and its keeper are killed, the
file is attached anew, the file system replays its journal, and vdiskfs is started on it as after
a reboot: the boot id noted in the state directory is another one.

What this does not show is a disk that loses or tears what it was given after the last flush:
native/tests/test_intent.c tears the log's records.

Checked: every point sealed before the loss is the disk at one instant; the next point is the
live image byte for byte; what was compared is the regions of the intent log and no more.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import random
import re
import select
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.e2e.gauges import assert_same
from tests.e2e.loopdev import attached, make_fs, make_image, mounted, run_tool
from tests.e2e.mounted import MountedSite
from tests.e2e.oracle import Oracle
from tests.e2e.workload import Mix, Workload
from vdiskfs.native import INTENT_REGION
from vdiskfs.units import PAGE_SIZE, parse_time

MIB = 1 << 20
DEVICE = 1024 * MIB
SIZE = 160 * MIB
OPTIONS = "epoch_interval_s = 0.2\nheartbeat_s = 1\n"
DISK = "web01"
MIX = Mix(max_length=64 << 10, max_size=200 * MIB, min_size=120 * MIB, truncate=0.004)
OTHER_BOOT = "00000000-0000-4000-8000-000000000000\n"
_GOINGDOWN, _NO_LOG_FLUSH = 0x8004587D, 2  # XFS_IOC_GOINGDOWN
REGIONS = re.compile(r"the host died; .* in (\d+) regions that were active are compared")
MARKED = re.compile(r": (\d+) pages were marked changed")
COMPARED = re.compile(r"pages compared so far: (\d+), differing: (\d+)")


@dataclass(frozen=True)
class PowerLoss:
    """What one loss came to. Counts are of pages where not said otherwise."""

    seed: int
    operations: int  # of the writers, before the loss
    points: int  # checked by the oracle
    regions: int  # of the intent log that were active
    spans: bool  # a truncation or a large discard was not settled
    compared: int
    differing: int
    marked: int  # changed, by the bitmaps


class PoweredSite:
    """A site whose images and state lie on a device; its vault and mountpoint do not."""

    def __init__(self, directory: Path, kind: str, options: str = OPTIONS) -> None:
        self.directory = directory
        self.kind = kind
        self.disk = directory / "disk.raw"
        self.root = directory / "fs"
        self.site = MountedSite(directory, options=options)
        for made in (self.site.source, self.site.root / "state"):
            if made.exists():
                made.rmdir()
        self.site.source, self.site.state = self.root / "source", self.root / "state"

    def make(self, size: int) -> None:
        """Make the file system, with an empty image, and the vault."""
        make_fs(self.kind, make_image(self.disk, size))

    @contextmanager
    def powered(self) -> Iterator[None]:
        """Attach and mount the disk as it is now."""
        options = ["nouuid"] if self.kind == "xfs" else []
        with (
            attached(self.disk) as device,
            mounted(device, self.root, kind=self.kind, options=options),
        ):
            try:
                yield
            finally:
                self._end_what_failed()

    def _end_what_failed(self) -> None:
        site = self.site
        if site.pid:
            with contextlib.suppress(OSError):
                sys.stderr.write((site.state / "daemon.log").read_text()[-6000:])
            self.end_daemon()

    def lose_power(self) -> None:
        """Let the host die: nothing that the disk has not got now reaches it any more."""
        root = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(root, _GOINGDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(root)
        self.end_daemon()

    def end_daemon(self) -> None:
        """Kill the daemon, its keeper first: that would start a successor."""
        site = self.site
        keeper = int(Path(f"/proc/{site.pid}/stat").read_text().rpartition(") ")[2].split()[1])
        handles = [os.pidfd_open(pid) for pid in (keeper, site.pid)]
        try:
            for handle in handles:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            for handle in handles:
                assert select.select([handle], [], [], 60)[0], "killed, and still there"
        finally:
            for handle in handles:
                os.close(handle)
        site.pid = 0
        # Programs still have it open, and are told when they use it.
        run_tool(["umount", "-l", site.mountpoint])

    def note_reboot(self) -> None:
        """The kernel that runs is another one than the notes in the state directory name."""
        for note in [self.site.state / "running", *(self.site.state / "disks").glob("*/boot")]:
            note.write_text(OTHER_BOOT)


def found_of(log: Path) -> tuple[int, int, int, int]:
    """Return regions, pages compared, differing and marked, from what the daemon has said."""
    text = log.read_text()
    regions, marked = REGIONS.findall(text), MARKED.findall(text)
    assert regions, f"the intent log was not believed:\n{text[-3000:]}"
    compared = [(int(a), int(b)) for a, b in COMPARED.findall(text)] or [(0, 0)]
    return int(regions[-1]), compared[-1][0], compared[-1][1], int(marked[-1])


def check_points(site: MountedSite, oracle: Oracle, until_ns: int) -> int:
    """Prove that each point sealed before is the disk at one instant; return how many."""
    checked = 0
    for point, image in zip(site.points(DISK), site.point_images(DISK), strict=True):
        if parse_time(point["time"], 0) < until_ns:
            oracle.check(image)
            checked += 1
    return checked


@contextmanager
def flushing(image: Path, choice: random.Random) -> Iterator[None]:
    """Flush the image again and again meanwhile, as a guest does; ends where the mount does."""
    over = threading.Event()
    pauses = [choice.expovariate(4) for _ in range(1000)]

    def flush() -> None:
        with contextlib.suppress(OSError), image.open("rb") as file:
            for pause in pauses:
                if over.wait(pause):
                    break
                os.fdatasync(file.fileno())

    thread = threading.Thread(target=flush, name="flush")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def power_loss_round(directory: Path, seed: int, kind: str = "ext4") -> PowerLoss:
    """Lose the power once at a random instant under load, recover, check everything.

    The directory must exist and is left empty. Raises AssertionError (NotACutError among
    them) where something is wrong; everything random follows from ``seed`` but for the
    machine's own timing.
    """
    choice = random.Random(f"power/{seed}")
    powered = PoweredSite(directory, kind)
    site = powered.site
    with site:
        powered.make(DEVICE)
        with powered.powered():
            site.source.mkdir()
            site.add_image(DISK, SIZE)
            site.init().mount().wait_shipped(DISK)
            mix = MIX if seed % 2 else replace(MIX, truncate=0)
            load = Workload(
                site.image(DISK), seed=seed, writers=choice.randrange(1, 5), mix=mix, tolerant=True
            )
            with load, flushing(site.image(DISK), choice):
                load.wait_operations(choice.randrange(100, 2000))
                lost_ns = time.time_ns()
                powered.lose_power()
        with powered.powered():
            powered.note_reboot()
            (site.state / "daemon.log").unlink(missing_ok=True)
            site.mount()
            site.wait_shipped(DISK)
            regions, compared, differing, marked = found_of(site.state / "daemon.log")
            points = check_points(site, Oracle(load.log), lost_ns)
            assert_same(site.point(DISK), site.image(DISK))
            spans = (site.state / "daemon.log").read_text().count("distrusted")
            allowed = regions * INTENT_REGION // PAGE_SIZE
            assert spans or compared <= allowed, f"{compared} pages of {regions} regions"
            # And tracking goes on from there.
            with Workload(site.image(DISK), seed=seed + 1, writers=2, mix=MIX) as more:
                more.wait_operations(50)
            site.wait_shipped(DISK)
            assert_same(site.point(DISK), site.image(DISK))
            site.umount()
        powered.disk.unlink()
    return PowerLoss(
        seed, len(load.log.operations), points, regions, bool(spans), compared, differing,
        marked,
    )  # fmt: skip


def main() -> None:
    """Lose the power again and again, and print what each loss came to."""
    parser = argparse.ArgumentParser(prog="tests.e2e.power")
    parser.add_argument("--losses", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=("ext4", "xfs"), default="ext4")
    arguments = parser.parse_args()
    for seed in range(arguments.seed, arguments.seed + arguments.losses):
        with tempfile.TemporaryDirectory() as directory:
            print(f"python -m tests.e2e.power --losses 1 --seed {seed} --kind {arguments.kind}")
            print(power_loss_round(Path(directory), seed, arguments.kind), flush=True)


if __name__ == "__main__":
    main()
