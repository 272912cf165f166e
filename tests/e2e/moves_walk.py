"""Kill the daemons of two sites at each durable step of a planned failover and of a failback.

    python -m tests.e2e.moves_walk [--every N] [--first N] [--seed N] [--directory DIR]

A trial round tells which hooks each site passes; then every life of a daemon ends at the next one
of them, and its keeper starts the next. The commands are given again until they have done what
they say. At the end of each round every byte must be where it belongs, each generation must have
been started once, and each machine have been started once. Prints a JSON document, and exits
with 1 if anything is wrong. `moves_round` is its short form, for a soak: eight rounds whose seeds
follow each other walk each step once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from tests.e2e.gauges import write_at
from tests.e2e.kills import ViolationError
from tests.e2e.mounted import MountedSite
from tests.e2e.mounted_walk import deaths
from tests.vaults import disk_records
from vdiskfs.machines import Hooks, Machine, MachineDisk

MIB = 1 << 20
SIZE = 4 * MIB
DISK = "web01"
PATIENCE_S = 120.0
SHORT = 8
PREFIXES = ("failover.", "failback.", "handover.", "job.", "home.", "owner.", "takeover.",
            "disk.", "branch.", "machine.")  # fmt: skip
SCRIPT = """#!/bin/sh
# A machine that is a file: what counts is how often it is started.
cd "$VDISKFS_DIRECTORY" || exit 1
case "$1" in
start) echo "$VDISKFS_MACHINE" >> started; touch runs ;;
stop|kill) rm -f runs ;;
status) test -e runs || exit 3 ;;
esac
"""


@dataclass
class Report:
    """What was walked, and what was wrong."""

    hooks: dict[str, int] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    kills: int = 0
    rounds: int = 0
    problems: list[str] = field(default_factory=list)


class Round:
    """One disk goes away and comes home."""

    def __init__(self, home: MountedSite, away: MountedSite, seed: int) -> None:
        self._home, self._away = home, away
        self._rng = random.Random(seed)
        self._name = f"round-{seed}"

    def play(self) -> None:
        home, away = self._home, self._away
        self._write(home, home.image(DISK))
        content = home.image(DISK).read_bytes()
        start = ("failover", "start", DISK, "--name", self._name)
        found = self._until(away, self._name, "FailedOver", *start)
        copy = Path(found["disks"][0]["path"])
        assert copy.read_bytes() == content, "the copy is not what home had"
        self._check_started(found)
        self._until(away, self._name, "Committed", "failover", "commit", self._name)
        self._write(away, copy)
        self._until(away, self._name, "FailbackReady", "reprotect", DISK)
        self._write(away, copy)
        failback = f"{DISK}-failback-{self._rounds() + 1}"
        self._until(home, failback, "FailingBack", "failback", "start", DISK, done=True)
        self._write(away, copy)
        content = copy.read_bytes()
        found = self._until(
            home, failback, "FailbackUncommitted", "failback", "complete", DISK
        )  # fmt: skip
        assert home.image(DISK).read_bytes() == content, "home is not what the copy was"
        self._check_started(found)
        self._until(home, failback, "FailedBack", "failback", "commit", DISK)
        self._again(away, lambda: away.json("failover", "cleanup", self._name),
                    lambda: not self._has(away, self._name))  # fmt: skip
        self._settle()

    def _rounds(self) -> int:
        return sum(one["kind"] == "failback" for one in self._all(self._home))

    def _settle(self) -> None:
        """Home has it, replicates it, and nothing was done twice."""
        home = self._home
        self._write(home, home.image(DISK))
        self._again(home, lambda: home.wait_shipped(DISK), lambda: False)
        self._again(home, lambda: _same(home), lambda: False)
        # The machine is stopped, as its owner would: the next round begins with it down.
        for one in self._all(home):
            (Path(one["machine"]["directory"]) / "runs").unlink(missing_ok=True)

    def _write(self, site: MountedSite, image: Path) -> None:
        """Write something, as soon as it can be written."""
        data, at = self._rng.randbytes(4096), self._rng.randrange(SIZE // 4096) * 4096
        self._again(site, lambda: write_at(image, at, data), lambda: False)

    def _until(
        self, site: MountedSite, name: str, state: str, *command: str, done: bool = False
    ) -> dict[str, Any]:
        """Give a command again and again until the failover is in a state; return it."""

        def is_there() -> bool:
            found = [one for one in self._all(site) if one["name"] == name]
            if not found or found[0]["state"] != state:
                return False
            return bool(found[0]["job"]["state"] == "done")

        self._again(site, lambda: site.json(*command), is_there)
        shown: dict[str, Any] = {}

        def show() -> None:
            shown.update(site.json("failover", "show", name))
            started = state in ("FailedOver", "FailbackUncommitted")
            assert not started or shown["health"], "its machine is judged by nobody"

        self._again(site, show, lambda: False)
        return shown

    def _again(
        self, site: MountedSite, act: Callable[[], object], is_done: Callable[[], bool]
    ) -> None:
        """Do it until it succeeds, or what it is for is there."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                act()
                return
            except (AssertionError, OSError, TimeoutError) as error:
                if time.monotonic() > end:
                    raise AssertionError(f"{site.name}: never done: {error}") from error
            try:
                if is_done():
                    return
            except (AssertionError, OSError):
                pass
            time.sleep(0.2)

    @staticmethod
    def _all(site: MountedSite) -> list[dict[str, Any]]:
        return list(site.json("failover", "list")["failovers"])

    def _has(self, site: MountedSite, name: str) -> bool:
        return any(one["name"] == name for one in self._all(site))

    @staticmethod
    def _check_started(found: dict[str, Any]) -> None:
        started = (Path(found["machine"]["directory"]) / "started").read_text().split()
        assert len(started) == 1, f"the machine was started {len(started)} times"


def _same(home: MountedSite) -> None:
    assert home.point(DISK).read_bytes() == home.image(DISK).read_bytes()


class Walk:
    """Two mounts, and the lives of their daemons."""

    def __init__(self, directory: Path, every: int, first: int, seed: int = 1) -> None:
        self._directory = directory
        self._every = every
        self._first = first
        self._seeds = count(seed)  # of what the rounds write, and where
        self.report = Report()

    def run(self) -> Report:
        """Look which hooks there are, then die at each."""
        try:
            plans = self._look()
            self._walk(plans)
        except (AssertionError, OSError, TimeoutError) as error:
            self.report.problems.append(f"{type(error).__name__}: {error}")
        return self.report

    def _look(self) -> dict[str, list[str]]:
        """Return ``NAME:N`` for each hook that a site passes in a round."""
        directory = self._directory / "trial"
        directory.mkdir()
        logs = {name: directory / f"{name}.hooks" for name in ("home", "away")}
        home, away = _sites(directory, {
            name: {"VDISKFS_CRASH_LOG": str(log)} for name, log in logs.items()
        })  # fmt: skip
        with home, away:
            _begin(home, away)
            starts = {name: log.stat().st_size for name, log in logs.items()}
            Round(home, away, next(self._seeds)).play()
            self._check_generations(directory, 1)
        plans: dict[str, list[str]] = {}
        names: set[str] = set()
        for name, log in logs.items():
            counts: Counter[str] = Counter()
            passed = log.read_bytes()[starts[name] :].decode().split()
            plan = []
            for one in passed:
                if one.startswith(PREFIXES):
                    counts[one] += 1
                    # A life begins anew: the first time that it passes this step.
                    if counts[one] == 1:
                        plan.append(f"{one}:1")
            names |= set(counts)
            self.report.hooks[name] = len(plan)
            plans[name] = plan[self._first :: self._every]
        self.report.passed = sorted(names)
        return plans

    def _walk(self, plans: dict[str, list[str]]) -> None:
        directory = self._directory / "walk"
        directory.mkdir()
        home, away = _sites(directory, {
            name: {"VDISKFS_CRASH": ",".join(["none:1", *plan])} for name, plan in plans.items()
        })  # fmt: skip
        with home, away:
            _begin(home, away)
            for site in (home, away):
                site.kill_daemon()
            wanted = sum(map(len, plans.values())) + 2
            for number in range(1, 6):
                Round(home, away, next(self._seeds)).play()
                self.report.rounds = number
                self._check_generations(directory, number)
                if deaths(home) + deaths(away) >= wanted:
                    break
            self.report.kills = deaths(home) + deaths(away) - 2
            for site in (home, away):
                site.wait_successor(0, set())
        if self.report.kills < wanted - 2:
            self.report.problems.append(f"{self.report.kills} kills of {wanted - 2}")

    @staticmethod
    def _check_generations(directory: Path, rounds: int) -> None:
        [record] = disk_records(directory / "vault")
        assert len(record["parents"]) == 1 + 2 * rounds, f"generations: {record['parents']}"
        assert not record["branches"], f"branches: {record['branches']}"
        assert (record["moved"], record["handover"]) == (None, None), record


def _sites(root: Path, environs: dict[str, dict[str, str]]) -> tuple[MountedSite, MountedSite]:
    hooks = root / "hooks"
    hooks.mkdir(mode=0o755)
    (hooks / "ctl").write_text(SCRIPT)
    (hooks / "ctl").chmod(0o755)
    options = (
        "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
        f'[machines]\nhooks_directory = "{hooks}"\nshutdown_s = 20\n'
    )
    home, away = (
        MountedSite(root, vault=f"file://{root}/vault", name=name, environ=environs[name],
                    options=options)
        for name in ("home", "away")
    )  # fmt: skip
    return home, away


def _begin(home: MountedSite, away: MountedSite) -> None:
    home.add_image(DISK, SIZE, os.urandom(SIZE))
    home.init().mount().wait_shipped(DISK)
    machine = Machine(
        "shop", 64 << 20, (MachineDisk(DISK),), runner="hooks",
        hooks=Hooks(*(("ctl", word) for word in ("start", "stop", "kill", "status"))),
    )  # fmt: skip
    definition = home.state.parent / "shop.toml"
    definition.write_text(machine.to_toml())
    home.json("machine", "set", "shop", "--file", str(definition), "--vault", home.vault)
    away.mount(recovery=True)


def moves_round(directory: Path, seed: int) -> Mapping[str, int]:
    """Walk each eighth step, from one on that the seed says: the short form.

    Raises:
        ViolationError: something is wrong.
    """
    report = Walk(directory, SHORT, seed % SHORT, seed).run()
    counts = {"kills": report.kills, "moves": report.rounds, "violations": len(report.problems)}
    if report.problems:
        raise ViolationError(report.problems, dict(counts))
    return counts


def main() -> int:
    """Walk, print the report, and return the exit status."""
    parser = argparse.ArgumentParser(description="Kill two daemons at each step of a move.")
    parser.add_argument("--every", type=int, default=1, help="only each n-th hook")
    parser.add_argument("--first", type=int, default=0, help="begin at this one")
    parser.add_argument("--directory", type=Path, help="where to work, a temporary one otherwise")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        report = Walk(Path(directory), given.every, given.first, given.seed).run()
    print(json.dumps(asdict(report), indent=2))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
