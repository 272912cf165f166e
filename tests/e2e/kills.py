"""Rounds of kill -9 of a mount's daemon under load, and what must hold after them.

The load of a round: threads on web01 (workload.py: direct and buffered writes, discards,
sizes), the writer in C on web02 (tests/oracle/stamper.py), random operations with a model on
web03 (fsx.py), names in disks/ (names.py), and with ``guest`` the writer in C within a guest on
web04. Every point is judged by the oracle, and web02's by its twin in C as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Self

from tests.e2e.fsx import Fsx
from tests.e2e.guest import Disk, Guest
from tests.e2e.instants import NotACutError
from tests.e2e.mounted import MountedSite
from tests.e2e.names import Names
from tests.e2e.oracle import Oracle
from tests.e2e.workload import FOREVER, Mix, Workload, WriteLog
from tests.oracle.stamper import Stamper, check, command, events, program, read_log

MIB = 1 << 20
SIZES = {"web01": 8 * MIB, "web02": 4 * MIB, "web03": MIB, "web04": 4 * MIB}
OPTIONS = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
MIX = Mix(max_size=12 * MIB, min_size=2 * MIB, truncate=0.01, extend=0.03, zero=0.06)
CHECKED = 40  # points of a disk and round; each is read whole
Counts = dict[str, int | list[float]]


class ViolationError(AssertionError):
    """A property does not hold: a bug of the product, or of the oracle."""

    def __init__(self, found: list[str], counts: Counts) -> None:
        super().__init__("\n".join(found))
        self.counts = counts


@dataclass
class Findings:
    """What a round has counted, and what it has found wrong."""

    kills: int = 0
    points: int = 0
    asked: int = 0
    writes: int = 0
    operations: int = 0
    names: int = 0
    io_errors: int = 0
    pauses_s: list[float] = field(default_factory=list)
    pauses_twice_s: list[float] = field(default_factory=list)
    stalls_s: list[float] = field(default_factory=list)  # the longest times without a write
    wrong: list[str] = field(default_factory=list)

    def judge(self, what: str, is_right: Callable[[], object]) -> None:
        """Note what is wrong and go on: one violation does not hide the others."""
        try:
            is_right()
        except AssertionError as error:
            self.wrong.append(f"{what}: {error}")

    def counts(self) -> Counts:
        """Return the counts; raise if anything is wrong.

        Raises:
            ViolationError: it is.
        """
        found: Counts = {
            key: value for key, value in vars(self).items() if key not in ("wrong", "asked")
        }
        found["violations"] = len(self.wrong)
        if self.wrong:
            raise ViolationError(self.wrong, found)
        return found


@dataclass(frozen=True)
class Asked:
    """A point that was asked for: it holds all that was completed before the call."""

    disk: str
    epoch: int
    window: tuple[int, int]


def kill_round(directory: Path, seed: int, *, kills: int = 4, guest: bool = False) -> Counts:
    """Kill the daemon ``kills`` times under load, and check everything there is to check.

    Raises:
        ViolationError: something does not hold; its message names each thing.
    """
    rng = random.Random(seed)
    findings = Findings()
    with MountedSite(directory, options=OPTIONS) as site:
        for disk, size in SIZES.items():
            site.add_image(disk, size)
        site.init().mount()
        for disk in SIZES:
            site.wait_shipped(disk)
        load = Load(site, directory, seed, guest=guest)
        asked: list[Asked] = []
        with load:
            for _ in range(kills):
                load.wait(rng)
                if rng.random() < 0.5:
                    asked.append(ask_point(site, rng.choice(["web01", "web02"])))
                if rng.random() < 0.75:
                    findings.pauses_s.append(site.kill_daemon())
                    findings.kills += 1
                else:
                    findings.pauses_twice_s.append(kill_twice(site, rng))
                    findings.kills += 2
            load.wait(rng)
        load.report(findings)
        check_all(site, load, asked, findings, rng)
    return findings.counts()


def kill_guest_round(directory: Path, seed: int) -> Counts:
    """Do a round with a guest booted from a disk of the mount."""
    return kill_round(directory, seed, kills=3, guest=True)


def parent_of(pid: int) -> int:
    """Return the parent of a process: of a daemon it is the keeper."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def children_of(pid: int) -> list[int]:
    """Return the children of a process; none if it is gone."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(word) for word in text.split()]


def kill_twice(site: MountedSite, rng: random.Random) -> float:
    """Kill the daemon, and its successor while that recovers; return the pause in seconds."""
    disks = {row["name"] for row in site.json("status")["disks"]}
    keeper = parent_of(site.pid)
    began = time.monotonic()
    os.kill(site.pid, signal.SIGKILL)

    def successors() -> list[int]:
        return [pid for pid in children_of(keeper) if pid != site.pid]

    site.wait("the keeper starts a successor", lambda: bool(successors()))
    successor = successors()[0]
    time.sleep(rng.uniform(0, 1))  # the moment is random, nothing waits for it
    os.kill(successor, signal.SIGKILL)
    with contextlib.suppress(FileNotFoundError):
        (site.mountpoint / "disks" / f"absent-{time.monotonic_ns()}").stat()
    pause = time.monotonic() - began
    site.wait_successor(successor, disks)
    return pause


def ask_point(site: MountedSite, disk: str) -> Asked:
    """Ask for a point of a disk under load."""
    before = time.monotonic_ns()
    made = site.json("point", "create", disk)["points"][0]
    return Asked(disk, made["epoch"], (before, time.monotonic_ns()))


class Load:
    """Everything that uses the mount during a round, from the beginning of the block to its end."""

    def __init__(self, site: MountedSite, directory: Path, seed: int, *, guest: bool) -> None:
        self._keeper = parent_of(site.pid)
        self.work = directory / "load"
        self.work.mkdir()
        self.seed = seed
        self.threads = Workload(site.image("web01"), seed=seed, writers=4, mix=MIX, tolerant=True)
        self.stamper = Stamper(
            site.image("web02"), self.work / "web02.log", disk=seed, size=SIZES["web02"],
            seed=seed, writers=2, buffered=seed % 2 == 1,
        )  # fmt: skip
        self.fsx = Fsx(site.image("web03"), self.work / "web03.model", seed)
        self.names = Names(site.mountpoint / "disks", seed)
        self.guest = self._guest(site.image("web04")) if guest else None
        self.guest_log = self.work / "web04.log"
        self._all = contextlib.ExitStack()

    def _guest(self, image: Path) -> Guest:
        words = command("/dev/vda", "-", disk=self.seed, size=SIZES["web04"], writers=2)
        script = f"""
        {" ".join(words)} & pid=$!
        read line
        kill $pid; wait $pid
        """
        return Guest([Disk(image)], script, self.work, programs=[program()])

    def __enter__(self) -> Self:
        actors = (self.threads, self.stamper, self.fsx, self.names)
        if self.guest is not None:
            self._all.enter_context(self.guest)
            self.guest.wait_line(r"^@C 20 ")
        for actor in actors:
            self._all.enter_context(actor)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            # Else who waits for an answer of the mount would wait for ever.
            for pid in (self._keeper, *children_of(self._keeper)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        try:
            if kind is None and self.guest is not None:
                self.guest.send("stop")
                self.guest.wait_line(r"^GUEST EXIT", 120)
                self.guest_log.write_text(self.guest.console)
        finally:
            self._all.close()

    def wait(self, rng: random.Random) -> None:
        """Wait until a random number of operations has been done from now on."""
        self.threads.wait_operations(rng.randrange(20, 400))

    def logs(self) -> Iterator[tuple[str, WriteLog, Path | None]]:
        """Yield of each disk with an oracle its log, and the file for the twin in C."""
        yield "web01", self.threads.log, None
        yield (
            "web02",
            read_log(self.stamper.log, disk=self.seed, size=SIZES["web02"]),
            (self.stamper.log),
        )
        if self.guest is not None:
            log = read_log(self.guest_log, disk=self.seed, size=SIZES["web04"])
            yield "web04", log, self.guest_log

    def report(self, findings: Findings) -> None:
        """Count what was done, and each I/O error that a program has seen."""
        errors = [f"threads on web01: {error}" for error in self.threads.errors]
        errors += [f"stamper on web02: {line}" for line in self.stamper.errors.splitlines()]
        errors += [f"names: {line}" for line in self.names.wrong]
        if self.fsx.status:
            errors.append(f"fsx on web03: exit {self.fsx.status}: {self.fsx.message}")
        if self.guest is not None and "GUEST EXIT 0" not in self.guest.console:
            errors.append(f"the guest on web04:\n{self.guest.console[-2000:]}")
        findings.wrong += errors
        findings.io_errors = len(errors)
        for _, log, _ in self.logs():
            findings.writes += sum(op.end_ns < FOREVER for op in log.operations)
        ends = sorted(e[1][1] for e in events(self.stamper.log.read_text()) if e[0] == "C")
        gaps = sorted(b - a for a, b in pairwise(ends))
        findings.stalls_s = [gap / 1e9 for gap in gaps[-len(findings.pauses_s) or len(gaps) :]]
        findings.operations = self.fsx.operations
        findings.names = self.names.done


def check_all(
    site: MountedSite, load: Load, asked: list[Asked], findings: Findings, rng: random.Random
) -> None:
    """Judge the live images, the points, those asked for, and a restored one."""
    load.names.remove_all()
    for disk in SIZES:
        site.wait_shipped(disk)
        newest = site.point(disk)
        findings.judge(f"{disk}, its last point", lambda: same(newest, site.image(disk)))
    findings.judge("the disks", lambda: only_disks(site))
    findings.judge("web03, its model", lambda: same(site.image("web03"), load.fsx.model))
    for disk, log, twin in load.logs():
        oracle = Oracle(log)
        # By the clock of the writer, which for a guest is its own.
        ended = max(op.end_ns for op in log.operations if op.end_ns < FOREVER)
        live = site.image(disk)
        findings.judge(f"{disk}, live", lambda: oracle.check(live, (ended, FOREVER)))
        images = chosen(site, disk, asked, rng)
        check_points(disk, images, oracle, asked, findings)
        if twin is not None:
            restored = restore(site, disk, rng.choice(images), load.work)
            for image in [*images, restored]:
                findings.judge(f"{disk}, {image}", lambda: twin_agrees(image, twin, log.seed))
    findings.judge(
        "the vault", lambda: site.run("vault", "check", "--read-data", "--vault", site.vault)
    )


def only_disks(site: MountedSite) -> None:
    """Find no disks in the vault but those that were made."""
    names = {row["name"] for row in site.json("disk", "list")["disks"]}
    assert names == set(SIZES), f"{sorted(names)}"


def chosen(site: MountedSite, disk: str, asked: list[Asked], rng: random.Random) -> list[Path]:
    """Return the images of at most ``CHECKED`` points, in order: those asked for, the last."""
    images = site.point_images(disk)[1:]
    epochs = {a.epoch for a in asked if a.disk == disk}
    must = {image for image in images if epoch_of(image) in epochs} | {images[-1]}
    others = [image for image in images if image not in must]
    must |= set(rng.sample(others, min(len(others), CHECKED)))
    return [image for image in images if image in must]


def epoch_of(image: Path) -> int:
    """Return the epoch of a point, by its document."""
    return int(json.loads((image.parent / "point.json").read_text())["epoch"])


def check_points(
    disk: str, images: list[Path], oracle: Oracle, asked: list[Asked], findings: Findings
) -> None:
    """Judge the points of one disk, oldest first: each a cut, and none before another."""
    windows = {a.epoch: a.window for a in asked if a.disk == disk}
    earliest = 0
    for image in images:
        epoch = epoch_of(image)
        low, high = windows.pop(epoch, (0, FOREVER))
        try:
            cut = oracle.check(image, (max(low, earliest), high))
            earliest = cut.instants[0][0]
        except NotACutError as error:
            findings.wrong.append(f"{disk}, epoch {epoch}: {error.kind}: {error}")
        findings.points += 1
    findings.asked += len(windows)
    if windows:
        findings.wrong.append(f"{disk}: points asked for are missing: epochs {sorted(windows)}")


def twin_agrees(image: Path, log: Path, disk: int) -> None:
    """Let the checker in C judge, too."""
    verdict = check(image, log, disk=disk)
    assert verdict.is_cut, verdict.text


def restore(site: MountedSite, disk: str, image: Path, directory: Path) -> Path:
    """Restore a point to a file."""
    epoch = epoch_of(image)
    target = directory / f"{disk}-{epoch}.img"
    site.run("-m", site.mountpoint, "point", "restore", f"{disk}@{epoch}", target)
    return target


def same(one: Path, other: Path) -> None:
    """Compare two files of some MiB."""
    a, b = one.read_bytes(), other.read_bytes()
    assert len(a) == len(b), f"{len(a)} bytes, not {len(b)}"
    at = next((i for i in range(0, len(a), 512) if a[i : i + 512] != b[i : i + 512]), None)
    assert at is None, f"differs from byte {at} on"
