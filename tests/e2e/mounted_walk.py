"""Kill the daemon of a mount at each durable step it passes, under a small fixed workload.

    python -m tests.e2e.mounted_walk [--every N] [--first N] [--directory DIR]

One mount serves throughout. A trial life of a daemon (taking over, then the workload) tells
which hooks are passed, and how often; then each life ends at one of them, and the keeper starts
the next. The workload knows every byte that it wrote: no call may fail, the live image and
the point made after each kill must be those bytes. Prints a JSON document, and exits with 1
if anything is wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.e2e.mounted import CommandError, MountedSite

MIB = 1 << 20
SIZE = 4 * MIB
OPTIONS = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
PATIENCE_S = 60.0
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@dataclass
class Report:
    """What was walked, and what was wrong."""

    hooks: int = 0
    names: int = 0
    passed: list[str] = field(default_factory=list)
    walked: int = 0
    reached: int = 0
    not_reached: list[str] = field(default_factory=list)
    points: int = 0
    problems: list[str] = field(default_factory=list)


class Load:
    """The workload, and the bytes that must be there."""

    def __init__(self, site: MountedSite, seed: int) -> None:
        self._site = site
        self._rng = random.Random(seed)
        self._model = bytearray(SIZE)
        self._image = os.open(site.image("web01"), os.O_RDWR)
        self._turn = 0
        self._copy = -1
        self._copied = bytearray()

    def close(self) -> None:
        os.close(self._image)
        if self._copy >= 0:
            os.close(self._copy)

    def run(self) -> None:
        """Write, sync, discard, change the size and names, make a point, and compare all.

        Raises:
            OSError, AssertionError: the machine saw an error, or bytes are wrong.
        """
        self._turn += 1
        self._change_data()
        self._change_names()
        self._make_point()
        assert self._read(self._site.image("web01")) == self._model, "the live image differs"
        assert self._read(self._site.point("web01")) == self._model, "the point differs"
        self._use_copy()

    def _change_data(self) -> None:
        rng, size = self._rng, len(self._model)
        for _ in range(6):
            offset = rng.randrange(0, size - 70_000, 512)
            data = rng.randbytes(rng.choice([512, 4096, 65536]))
            assert os.pwrite(self._image, data, offset) == len(data)
            self._model[offset : offset + len(data)] = data
        os.fdatasync(self._image)
        start = rng.randrange(0, size - MIB, 4096)
        if _libc.fallocate(self._image, _KEEP_SIZE | _PUNCH_HOLE, start, 200_000):
            raise OSError(ctypes.get_errno(), "fallocate")
        self._model[start : start + 200_000] = bytes(200_000)
        # It shrinks and grows in turn, by a path and by a descriptor.
        new = SIZE - rng.randrange(MIB) if self._turn % 2 else SIZE + rng.randrange(MIB)
        if self._turn % 4 < 2:
            os.truncate(self._site.image("web01"), new)
        else:
            os.ftruncate(self._image, new)
        del self._model[new:]
        self._model.extend(bytes(new - len(self._model)))
        os.fsync(self._image)

    def _change_names(self) -> None:
        top = self._site.mountpoint / "disks"
        name = top / f"note{self._turn}"
        name.write_text("note")
        name.rename(top / "note")
        (top / "dir").mkdir()
        (top / "dir" / "link").symlink_to("../note")
        assert (top / "dir" / "link").read_text() == "note"
        (top / "dir" / "link").unlink()
        (top / "dir").rmdir()
        (top / "note").unlink()
        assert sorted(os.listdir(top)) == ["web01.img"]

    def _make_point(self) -> None:
        self._ask("point", "create", "web01", "--wait")

    def _use_copy(self) -> None:
        """A copy of the point is made in one turn, and thrown away in the next."""
        name = f"t{self._turn // 2}"
        path = self._site.mountpoint / "failovers" / name / "web01.img"
        if self._turn % 2 == 0:
            self._ask("failover", "test", "web01", "--name", name, done=4)
            self._copy = os.open(path, os.O_RDWR)
            self._copied = bytearray(self._model)
        if self._copy < 0:
            return
        rng = self._rng
        for length in (4096, 100, 70_000):
            offset, data = rng.randrange(len(self._copied) - length), rng.randbytes(length)
            assert os.pwrite(self._copy, data, offset) == length
            self._copied[offset : offset + length] = data
        os.fsync(self._copy)
        size = len(self._copied) - rng.randrange(9000)
        os.ftruncate(self._copy, size)
        del self._copied[size:]
        assert os.pread(self._copy, size + 1, 0) == self._copied, "the copy differs"
        if self._turn % 2 == 1:
            os.close(self._copy)
            self._copy = -1
            self._ask("failover", "cleanup", name, done=3)
            assert not path.parent.exists()

    def _ask(self, *words: str, done: int = 0) -> None:
        """Run a command until it is done; exit status ``done`` says that it was already."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._site.json(*words)
            except CommandError as error:
                if error.returncode == done:
                    return
                # The daemon died under it, or the next one has not taken the disk up.
                if time.monotonic() > end:
                    raise
            else:
                return

    @staticmethod
    def _read(path: Path) -> bytes:
        return path.read_bytes()


class Walk:
    """One mount, and the lives of its daemons."""

    def __init__(self, directory: Path, every: int, first: int) -> None:
        self._directory = directory
        self._every = every
        self._first = first
        self.report = Report()

    def run(self) -> Report:
        """Look which hooks there are, then die at each."""
        try:
            plan = self._look()
            self._walk(plan)
        except (AssertionError, CommandError, OSError, TimeoutError) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.report.problems.append(f"{type(error).__name__}: {error}, at {where.line}")
        return self.report

    def _look(self) -> list[str]:
        """Return ``NAME:N`` for each hook that one life passes."""
        log = self._directory / "hooks"
        directory = self._directory / "trial"
        directory.mkdir()
        with self._mounted(directory, VDISKFS_CRASH_LOG=str(log)) as site:
            load = Load(site, seed=1)
            try:
                load.run()
                site.kill_daemon()
                start = log.stat().st_size
                load.run()
                end = log.stat().st_size
            finally:
                load.close()
            passed = log.read_bytes()[start:end].decode().split()
        counts: Counter[str] = Counter()
        plan = []
        for name in passed:
            counts[name] += 1
            plan.append(f"{name}:{counts[name]}")
        self.report.hooks, self.report.names = len(plan), len(counts)
        self.report.passed = sorted(counts)
        return plan[self._first :: self._every]

    def _walk(self, plan: list[str]) -> None:
        directory = self._directory / "walk"
        directory.mkdir()
        self.report.walked = len(plan)
        # The first daemon has mounted, which is another life: it dies by hand.
        with self._mounted(directory, VDISKFS_CRASH=",".join(["none:1", *plan])) as site:
            load = Load(site, seed=2)
            try:
                site.kill_daemon()
                tries = 0
                while (died := deaths(site)) <= len(plan):
                    load.run()
                    self.report.points += 1
                    tries = tries + 1 if deaths(site) == died else 0
                    if tries == 2:
                        self.report.not_reached.append(plan[died - 1])
                        site.pid = int(site.json("status")["pid"])
                        site.kill_daemon()
                        tries = 0
                load.run()
                self.report.points += 1
            finally:
                load.close()
                self.report.reached = max(0, deaths(site) - 1 - len(self.report.not_reached))
            site.wait_successor(0, {"web01"})

    def _mounted(self, directory: Path, **environ: str) -> MountedSite:
        site = MountedSite(directory, options=OPTIONS, environ=environ)
        site.add_image("web01", SIZE)
        site.init().mount().wait_shipped("web01")
        return site


def deaths(site: MountedSite) -> int:
    """Return how many daemons were killed so far."""
    text = (site.state / "daemon.log").read_text()
    return text.count(f"the daemon was killed by signal {signal.SIGKILL:d}")


def main() -> int:
    """Walk, print the report, and return the exit status."""
    parser = argparse.ArgumentParser(description="Kill a mounted daemon at each of its hooks.")
    parser.add_argument("--every", type=int, default=1, help="only each n-th hook")
    parser.add_argument("--first", type=int, default=0, help="begin at this one")
    parser.add_argument("--directory", type=Path, help="where to work, a temporary one otherwise")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        report = Walk(Path(directory), given.every, given.first).run()
    print(json.dumps(asdict(report), indent=2))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
