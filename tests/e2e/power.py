"""Losses of the host's power, for tests and for the soak: ``power_loss_round``.

As a program: ``python -m tests.e2e.power [--losses N] [--seed N] [--how HOW] [--kind KIND]
[--slots N]``.

Writers with a log of their own go on, and flush, while at a random instant the power is lost
(``HOWS``; what that is here is told in poweredsite.py). The disk is attached anew, its file
system replays its journal, and vdiskfs is started on it as after a reboot: the boot id noted
in the state directory is another one.

copy: disk and vault as they were at one instant, whatever ran on.
shutdown: the daemon stops between two system calls, then the file system does.
ahead: the disk as it was, and the vault as it became: its newest points were shipped after the
instant. A disk that keeps what it has acknowledged cannot come to that; one that lies about its
cache, or is restored from a copy, does.

What this does not show is a disk that loses or tears what it was given after the last flush:
replays.py does, and native/tests/test_intent.c tears the log's records.

Checked, by the letters of the fault model: what was flushed is in the image (L); every point
sealed before the loss is the disk at one instant (P), is listed as before, and has the bytes it
had (I); the next point is the live image byte for byte, and so is the one after more was
written (T). What was compared is the regions of the intent log and no more, and nothing of a
disk that nobody wrote to; the vault's line goes on in its generation. ``ahead`` starts the next
generation instead, and compares all of the disk that was written to since.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.e2e.gauges import assert_same, data_objects
from tests.e2e.mounted import MountedSite
from tests.e2e.oracle import Oracle
from tests.e2e.poweredsite import PoweredSite
from tests.e2e.workload import Kind, Mix, Workload, WriteLog
from tests.vaults import disk_records
from vdiskfs.native import INTENT_REGION
from vdiskfs.units import PAGE_SIZE, parse_time

MIB = 1 << 20
DEVICE = 512 * MIB  # from there on ext4 has blocks of 4 KiB
SIZE = 24 * MIB
QUIET_SIZE = 4 * MIB
OPTIONS = "epoch_interval_s = 0.2\nheartbeat_s = 1\n"
DISK, QUIET = "web01", "quiet01"
MIX = Mix(max_length=64 << 10, max_size=32 * MIB, min_size=16 * MIB, truncate=0.004)
HOWS = ("copy", "shutdown", "ahead")
KINDS = ("ext4", "xfs")
REGIONS = r"disk {}: the host died; .* in (\d+) regions that were active are compared"
MARKED = r"disk {}: (\d+) pages were marked changed"
COMPARED = r"disk {}: .*pages compared so far: (\d+), differing: (\d+)"


@dataclass(frozen=True)
class PowerLoss:
    """What one loss came to. Counts are of pages where not said otherwise."""

    seed: int
    how: str
    operations: int  # of the writers
    flushes: int  # of those that had to survive
    points: int  # checked by the oracle
    regions: int  # of the intent log that were active
    left: int  # at least so many had been, and had left it
    spans: bool  # a truncation or a large discard was not settled
    compared: int
    differing: int
    marked: int  # changed, by the bitmaps
    generations: int  # started


def found_of(log: Path, disk: str = DISK) -> tuple[int, int, int, int]:
    """Return regions, pages compared, differing and marked, from what the daemon has said."""
    text = log.read_text()
    regions = re.findall(REGIONS.format(disk), text)
    assert regions, f"the intent log was not believed:\n{text[-3000:]}"
    compared, marked = compared_of(log, disk), re.findall(MARKED.format(disk), text)
    return int(regions[-1]), *compared, int(marked[-1])


def compared_of(log: Path, disk: str = DISK) -> tuple[int, int]:
    """Return how many pages a pass has compared, and how many of them differed."""
    found = re.findall(COMPARED.format(disk), log.read_text())
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def generations(vault: Path) -> dict[str, int]:
    """Return the generation of each disk, as the vault has it."""
    return {record["name"]: int(record["generation"]) for record in disk_records(vault)}


def digest_of(site: MountedSite, number: int) -> str:
    """Return the digest of the bytes of a point, counted from the oldest."""
    with site.point_images(DISK)[number].open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def told(points: list[dict[str, Any]]) -> dict[object, object]:
    """Return what points are listed as, by what tells one from another."""
    return {point["epoch"]: point["time"] for point in points}


@contextmanager
def flushing(image: Path, choice: random.Random, log: WriteLog) -> Iterator[None]:
    """Flush the image again and again meanwhile, as a guest does; ends where the mount does.

    Each flush that was acknowledged is noted in the log.
    """
    over = threading.Event()
    pauses = [choice.expovariate(8) for _ in range(1000)]

    def flush() -> None:
        with contextlib.suppress(OSError), image.open("rb") as file:
            for pause in pauses:
                if over.wait(pause):
                    break
                begin = time.monotonic_ns()
                os.fdatasync(file.fileno())
                log.flushes.append((begin, time.monotonic_ns()))

    thread = threading.Thread(target=flush, name="flush")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Round:
    """One loss: `before`, then `after`, which hold what the first has seen."""

    def __init__(self, powered: PoweredSite, seed: int, how: str, slots: int) -> None:
        self._choice = random.Random(f"power/{seed}")
        self._powered = powered
        self._site = powered.site
        self._seed = seed
        self._how = how
        self._slots = slots
        self._log = WriteLog(0, 0)
        self._cut = (0, 0)  # CLOCK_MONOTONIC before and after the instant
        self._until_ns = 0  # by the wall clock: points sealed before were sealed under load
        self._points: dict[object, object] = {}
        self._digest = ""
        self._generations: dict[str, int] = {}

    def before(self) -> None:
        """Write under power until it is lost."""
        powered, site, choice = self._powered, self._site, self._choice
        site.source.mkdir()
        site.add_image(DISK, SIZE)
        site.add_image(QUIET, QUIET_SIZE, choice.randbytes(QUIET_SIZE))
        site.init().mount()
        for disk in (DISK, QUIET):
            site.wait_shipped(disk)
        mix = MIX if choice.random() < 0.5 else replace(MIX, truncate=0)
        load = Workload(
            site.image(DISK), seed=self._seed, writers=choice.randrange(1, 5), mix=mix,
            tolerant=True,
        )  # fmt: skip
        with load, flushing(site.image(DISK), choice, load.log):
            load.wait_operations(choice.randrange(50, 500))
            points = site.points(DISK)
            self._points, self._digest = told(points), digest_of(site, len(points) - 1)
            self._generations = generations(powered.vault)
            load.wait_operations(choice.randrange(1, 2500))
            self._lose(load)
        self._log = load.log
        self._until_ns = time.time_ns()

    def _lose(self, load: Workload) -> None:
        powered, site = self._powered, self._site
        if self._how == "shutdown":
            self._cut = (powered.lose_power(), time.monotonic_ns())
        else:
            self._cut = powered.copy()
            load.wait_operations(self._choice.randrange(20, 200))
        if self._how == "ahead":
            stored = len(data_objects(powered.vault))

            def newer() -> bool:
                load.wait_operations(20)
                return len(data_objects(powered.vault)) > stored + 1

            site.wait("the vault is ahead", newer)
        powered.end_daemon()

    def after(self) -> PowerLoss:
        """Recover, and check everything."""
        powered, site, log = self._powered, self._site, self._site.state / "daemon.log"
        powered.note_reboot()
        log.unlink(missing_ok=True)
        site.mount()
        flushes = [pair for pair in self._log.flushes if pair[1] <= self._cut[0]]
        known = WriteLog(self._log.seed, self._log.initial_size, self._log.operations, flushes)
        oracle = Oracle(known)
        oracle.check_flushed(site.image(DISK))
        for disk in (DISK, QUIET):
            site.wait_shipped(disk)
            assert_same(site.point(disk), site.image(disk))
        regions, compared, differing, marked = self._check_bound(log)
        points = self._check_points(oracle)
        # And tracking goes on from there.
        with Workload(site.image(DISK), seed=self._seed + 1, writers=2, mix=MIX) as more:
            more.wait_operations(50)
        site.wait_shipped(DISK)
        assert_same(site.point(DISK), site.image(DISK))
        spans = "distrusted" in log.read_text()
        started = generations(powered.vault)[DISK] - self._generations[DISK]
        powered.end_daemon()
        return PowerLoss(
            self._seed, self._how, len(known.operations), len(flushes), points, regions,
            self._count_left(), spans, compared, differing, marked, started,
        )  # fmt: skip

    def _count_left(self) -> int:
        """Return how many regions the log had no room for of those that were written to."""
        done = [
            op for op in self._log.operations
            if op.kind != Kind.TRUNCATE and op.end_ns <= self._cut[0]
        ]  # fmt: skip
        written = {op.offset // INTENT_REGION for op in done}
        return max(0, len(written) - self._slots) if self._slots else 0

    def _check_points(self, oracle: Oracle) -> int:
        """Check each point that was sealed under load, and return how many."""
        site = self._site
        points = site.points(DISK)
        assert told(points).items() >= self._points.items(), "a point is gone"
        again = digest_of(site, len(self._points) - 1)
        assert again == self._digest, "a point has other bytes"
        checked = 0
        for point, image in zip(points, site.point_images(DISK), strict=True):
            if parse_time(point["time"], 0) < self._until_ns:
                oracle.check(image)
                checked += 1
        return checked

    def _check_bound(self, log: Path) -> tuple[int, int, int, int]:
        """Check how much was compared, and which lines of the vault go on."""
        assert compared_of(log, QUIET) == (0, 0), "nobody wrote to it"
        expected = dict(self._generations)
        if self._how == "ahead":
            expected[DISK] += 1
            found = (0, *compared_of(log), 0)
        else:
            found = found_of(log)
            spans = "distrusted" in log.read_text()
            assert not self._slots or found[0] <= self._slots
            allowed = found[0] * INTENT_REGION // PAGE_SIZE
            assert spans or found[1] <= allowed, f"{found[1]} pages of {found[0]} regions"
        assert generations(self._powered.vault) == expected, (
            f"{generations(self._powered.vault)}, not {expected}"
        )
        return found


def power_loss_round(
    directory: Path, seed: int, kind: str = "ext4", how: str = "copy", *, slots: int = 0
) -> PowerLoss:
    """Lose the power once at a random instant under load, recover, check everything.

    With ``slots`` the intent log has room for so many regions, and others have to leave it.
    The directory must exist and is left empty. Raises AssertionError (NotACutError among
    them) where something is wrong; everything random follows from ``seed`` but for the
    machine's own timing.
    """
    powered = PoweredSite(directory, kind, OPTIONS, slots=slots)
    one = Round(powered, seed, how, slots)
    with powered.host(DEVICE), powered.site:
        with powered.powered():
            one.before()
        if how != "shutdown":
            powered.use_copy(vault=how == "copy")
        with powered.powered():
            return one.after()


def main() -> None:
    """Lose the power again and again, and print what each loss came to."""
    parser = argparse.ArgumentParser(prog="tests.e2e.power")
    parser.add_argument("--losses", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, default="ext4")
    parser.add_argument("--how", choices=HOWS, default="copy")
    parser.add_argument("--slots", type=int, default=0, help="of the intent log; 0: as ever")
    words = parser.parse_args()
    for seed in range(words.seed, words.seed + words.losses):
        with tempfile.TemporaryDirectory() as directory:
            options = f"--how {words.how} --kind {words.kind} --slots {words.slots}"
            print(f"python -m tests.e2e.power --losses 1 --seed {seed} {options}")
            begin_s = time.monotonic()
            loss = power_loss_round(Path(directory), seed, words.kind, words.how, slots=words.slots)
            print(f"{loss}, {time.monotonic() - begin_s:.1f} s", flush=True)


if __name__ == "__main__":
    main()
