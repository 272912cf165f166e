"""Rounds of kill -9 of a mount's daemon under load, and what must hold after them.

The load of a round: threads on web01 (workload.py: direct and buffered writes, discards,
sizes), the writer in C on web02 (tests/oracle/stamper.py), random operations with a model on
web03 (fsx.py), names in disks/ (names.py), and with ``guest`` the writer in C within a guest on
web04. Every point is judged by the oracle, and web02's by its twin in C as well.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.e2e.fsx import Fsx
from tests.e2e.guest import Disk, Guest
from tests.e2e.instants import NotACutError
from tests.e2e.mounted import MountedSite
from tests.e2e.names import Names
from tests.e2e.oracle import Oracle
from tests.e2e.test_restart import kill_daemon
from tests.e2e.workload import FOREVER, Mix, Workload, WriteLog
from tests.oracle.stamper import Stamper, check, command, program, read_log

MIB = 1 << 20
SIZES = {"web01": 8 * MIB, "web02": 4 * MIB, "web03": MIB, "web04": 4 * MIB}
OPTIONS = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
MIX = Mix(max_size=12 * MIB, min_size=2 * MIB, truncate=0.01, extend=0.03, zero=0.06)
KEPT = False
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
            for turn in range(kills):
                load.wait(rng)
                if rng.random() < 0.5:
                    asked.append(ask_point(site, rng.choice(["web01", "web02"])))
                if not KEPT and turn == kills - 1:
                    break
                if KEPT:
                    findings.pauses_s.append(kill_and_wait(site))
                    findings.kills += 1
            if KEPT:
                load.wait(rng)
            else:
                kill_daemon(site)
        if not KEPT:
            before = time.monotonic()
            site.run("umount", site.mountpoint)
            site.pid = 0
            site.mount()
            findings.pauses_s.append(time.monotonic() - before)
            findings.kills += 1
        load.report(findings)
        check_all(site, load, asked, findings, rng)
    return findings.counts()


def ask_point(site: MountedSite, disk: str) -> Asked:
    """Ask for a point of a disk under load."""
    before = time.monotonic_ns()
    made = site.json("point", "create", disk)["points"][0]
    return Asked(disk, made["epoch"], (before, time.monotonic_ns()))


def kill_and_wait(site: MountedSite) -> float:
    """Kill the daemon, wait until the mount answers; return how long that took, in seconds."""
    raise NotImplementedError


class Load:
    """Everything that uses the mount during a round, from the beginning of the block to its end."""

    def __init__(self, site: MountedSite, directory: Path, seed: int, *, guest: bool) -> None:
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
        self.end_ns = 0

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
        try:
            if kind is None and self.guest is not None:
                if KEPT:
                    self.guest.send("stop")
                self.guest.wait_line(r"^GUEST EXIT", 120)
                self.guest_log.write_text(self.guest.console)
        finally:
            self._all.close()
        self.end_ns = time.monotonic_ns()

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
        if KEPT:
            findings.wrong += errors
        findings.io_errors = len(errors)
        for _, log, _ in self.logs():
            findings.writes += sum(op.end_ns < FOREVER for op in log.operations)
        findings.operations = self.fsx.operations
        findings.names = self.names.done


def check_all(
    site: MountedSite, load: Load, asked: list[Asked], findings: Findings, rng: random.Random
) -> None:
    """Judge the live images, the points, those asked for, and a restored one."""
    if KEPT:
        load.names.remove_all()
    for disk in SIZES:
        site.wait_shipped(disk)
        live, latest = site.image(disk), site.point(disk)
        findings.judge(f"{disk}, its last point", lambda: same(latest, live))
    if KEPT:
        findings.judge("web03, its model", lambda: same(site.image("web03"), load.fsx.model))
    for disk, log, twin in load.logs():
        oracle = Oracle(log)
        now = (load.end_ns, FOREVER)
        findings.judge(f"{disk}, live", lambda: oracle.check(site.image(disk), now))
        images = site.point_images(disk)[1:]
        check_points(disk, images, oracle, asked, findings)
        if twin is not None:
            restored = restore(site, disk, rng.choice(images), load.work)
            for image in [*images, restored]:
                findings.judge(f"{disk}, {image}", lambda: twin_agrees(image, twin, log.seed))
    findings.judge(
        "the vault", lambda: site.run("vault", "check", "--read-data", "--vault", site.vault)
    )


def check_points(
    disk: str, images: list[Path], oracle: Oracle, asked: list[Asked], findings: Findings
) -> None:
    """Judge the points of one disk, oldest first: each a cut, and none before another."""
    windows = {a.epoch: a.window for a in asked if a.disk == disk}
    earliest = 0
    for image in images:
        epoch = int(json.loads((image.parent / "point.json").read_text())["epoch"])
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
    epoch = json.loads((image.parent / "point.json").read_text())["epoch"]
    target = directory / f"{disk}-{epoch}.img"
    site.run("-m", site.mountpoint, "point", "restore", f"{disk}@{epoch}", target)
    return target


def same(one: Path, other: Path) -> None:
    """Compare two files of some MiB."""
    a, b = one.read_bytes(), other.read_bytes()
    assert len(a) == len(b), f"{len(a)} bytes, not {len(b)}"
    at = next((i for i in range(0, len(a), 512) if a[i : i + 512] != b[i : i + 512]), None)
    assert at is None, f"differs from byte {at} on"
