"""Walks over every crash hook of an image's way home, and again over what goes on with it.

    python -m tests.crash.homewalk [SCENARIO...] [--second-every N] [--directory DIR]

For n = 1, 2, ... a child moves an image and dies at the nth hook. What the note promises of the
image must hold then, and where it promises nothing, anything is put (as a power cut may do).
Another child goes on, towards the same point or a newer one, and dies at its own mth hook; then
one is left alone, and all bytes are compared. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import trio

from tests.catalog.lines import Lines, Place, act, differing, lines
from vdiskfs import crash
from vdiskfs.catalog import Vault
from vdiskfs.homeward import HomeMover, prepare_home, read_home
from vdiskfs.homeward import mover as mover_module
from vdiskfs.store import open_store

PIECE, MARK_PIECES = 6, 3


@dataclass(frozen=True)
class Scenario:
    """From which point (None: nobody knows), to which, and where who goes on is going."""

    name: str
    start: Place | None
    to: Place
    onward: Place


SCENARIOS = {
    one.name: one
    for one in (
        Scenario("same-target", (1, 3), (2, 6), (2, 6)),
        Scenario("newer-target", (1, 3), (2, 6), (2, 8)),
        Scenario("back", (2, 8), (1, 3), (2, 8)),
        Scenario("full", None, (2, 6), (2, 6)),
        Scenario("full-newer", None, (2, 6), (2, 8)),
    )
}


@dataclass
class Report:
    """What was walked; the numbers count runs."""

    scenario: str
    hooks: list[str] = field(default_factory=list)
    crashes: int = 0
    second_crashes: int = 0
    problems: list[str] = field(default_factory=list)


async def make_vault(directory: Path) -> dict[Place, bytes]:
    """Make a folder vault with a line and a branch; return the bytes of all points."""
    (directory / "spools").mkdir()
    rng = random.Random(11)
    async with lines(directory / "spools") as test:
        test.models[1].write(0, rng.randbytes(60 * 4096))
        await _grow(test, 1, 5, rng)
        test.fork((1, 4))
        await _grow(test, 2, 4, rng)
        record = test.bench.record
        store = open_store(f"file://{directory / 'vault'}")
        await store.prepare()
        for name, (data, metadata, _) in test.bench.store.objects.items():
            await store.create(name, data, metadata=metadata)
        await store.aclose()
        vault = Vault(open_store(f"file://{directory / 'vault'}"), test.bench.vault.vault_id, "")
        await vault.update_disk(record.id, lambda _: record)
        await vault.store.aclose()
        (directory / "disk").write_text(record.id)
        return dict(test.states)


async def _grow(test: Lines, generation: int, epochs: int, rng: random.Random) -> None:
    for _ in range(epochs):
        for _ in range(3):
            act(test.models[generation], rng, pages=70)
        await test.publish(generation)


async def move(directory: Path, place: Path, to: Place) -> None:
    """Be the process that moves the image of a place."""
    store = open_store(f"file://{directory / 'vault'}")
    vault = await Vault.open(store)

    async def make_log(generation: int) -> Any:
        record = await vault.disk((directory / "disk").read_text())
        return vault.log(record, generation)

    await HomeMover(place / "image", place / "note", make_log, verify=True).move(to)
    await store.aclose()


def in_child(work: Callable[[], Awaitable[None]], number: int, log: Path | None = None) -> str:
    """Run it in a child; "" if it ended well, "killed" at its hook, or what went wrong."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _be_child(work, number, log, write)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and number:
        return "killed"
    return "" if status == 0 else said or f"status {status}"


def _be_child(
    work: Callable[[], Awaitable[None]], number: int, log: Path | None, pipe: int
) -> None:
    status = 1
    try:
        # Only the process dies here; what a power cut may do is put there by the parent.
        for name in ("fsync", "fdatasync"):
            setattr(os, name, lambda _: None)
        crash.arm(f"*:{number}" if number else "", str(log) if log else "")
        trio.run(_with_limit, work)
        status = 0
    except BaseException:  # noqa: BLE001 (the parent has to hear of everything)
        os.write(pipe, traceback.format_exc().encode())
    finally:
        os._exit(status)


async def _with_limit(work: Callable[[], Awaitable[None]]) -> None:
    with trio.fail_after(60):
        await work()


class HomeWalk:
    """One scenario's walk below a directory that has the vault."""

    def __init__(
        self, scenario: Scenario, directory: Path, states: dict[Place, bytes], second_every: int
    ) -> None:
        self.scenario = scenario
        self.directory = directory
        self.states = states
        self.second_every = second_every
        self.place = directory / "place"
        self.crashed = directory / "crashed"
        self.report = Report(scenario.name)

    def run(self) -> Report:
        """Walk; problems are in the report."""
        log = self.directory / f"hooks-{self.scenario.name}"
        self._begin()
        self._expect(self._move(self.scenario.to, 0, log), "unharmed")
        self._compare(self.scenario.to, "unharmed")
        self.report.hooks = sorted(set(log.read_text().split()))
        for number in count(1):
            self._begin()
            if not self._die(self.scenario.to, number):
                return self.report
            self.report.crashes += 1
            shutil.copytree(self.place, self.crashed)
            self._finish(f"at {number}")
            second = 1 + number % self.second_every
            while self._again(number, second):
                second += self.second_every
            shutil.rmtree(self.crashed)
        return self.report

    def _again(self, number: int, second: int) -> bool:
        shutil.rmtree(self.place)
        shutil.copytree(self.crashed, self.place)
        if not self._die(self.scenario.onward, second):
            return False
        self.report.second_crashes += 1
        self._finish(f"at {number}, then at {second}")
        return True

    def _begin(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        start = self.scenario.start
        data = random.Random(3).randbytes(75 * 4096) if start is None else self.states[start]
        (self.place / "image").write_bytes(data)
        prepare_home(self.place / "note", (self.directory / "disk").read_text(), start)

    def _move(self, to: Place, number: int, log: Path | None = None) -> str:
        return in_child(partial(move, self.directory, self.place, to), number, log)

    def _die(self, to: Place, number: int) -> bool:
        """Die at a hook; False: the move came to its end before."""
        said = self._move(to, number)
        if said != "killed":
            self._expect(said, f"hook {number}")
            return False
        self._check_note(f"hook {number}")
        self._tear(number)
        return True

    def _finish(self, what: str) -> None:
        self._expect(self._move(self.scenario.onward, 0), what)
        self._compare(self.scenario.onward, what)

    def _loose(self) -> tuple[set[int], int | None]:
        """Return the pages of which the note promises nothing, and from where on it knows none."""
        note = read_home(self.place / "note")
        states = [self.states[place] for place in note.path]
        pairs = zip(states, states[1:], strict=False)
        return {page for one, two in pairs for page in differing(one, two)}, note.known

    def _check_note(self, what: str) -> None:
        note = read_home(self.place / "note")
        loose, known = self._loose()
        if not note.path:
            return
        wrong = differing((self.place / "image").read_bytes(), self.states[note.path[0]])
        broken = [page for page in wrong if page not in loose and (known is None or page < known)]
        if broken:
            self._expect(f"the note {note} does not hold for pages {broken}", what)

    def _tear(self, seed: int) -> None:
        rng = random.Random(seed)
        data = bytearray((self.place / "image").read_bytes())
        loose, known = self._loose()
        loose |= set() if known is None else set(range(known, len(data) // 4096 + 1))
        for page in loose:
            end = min(len(data), (page + 1) * 4096)
            if rng.random() < 0.3 and page * 4096 < end:
                data[page * 4096 : end] = rng.randbytes(end - page * 4096)
        (self.place / "image").write_bytes(data)

    def _compare(self, to: Place, what: str) -> None:
        if (self.place / "image").read_bytes() != self.states[to]:
            self._expect("the image is not the point", what)
        if read_home(self.place / "note").at != to:
            self._expect("the note does not say which point it is", what)

    def _expect(self, said: str, what: str) -> None:
        if said:
            self.report.problems.append(f"{self.scenario.name}: {what}: {said}")


def main() -> int:
    """Walk and print; the exit status is 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="tests.crash.homewalk")
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--second-every", type=int, default=1)
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mover_module.PIECE, mover_module.MARK_PIECES = PIECE, MARK_PIECES
    reports = []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        states = trio.run(make_vault, Path(name))
        # What is here before a fork is not looked through, and so not copied, in each child.
        gc.collect()
        gc.freeze()
        for scenario in arguments.scenarios:
            walk = HomeWalk(
                SCENARIOS[scenario], Path(name), states, second_every=arguments.second_every
            )
            reports.append(walk.run())
    json.dump([asdict(one) for one in reports], sys.stdout, indent=1)
    print()
    return int(any(one.problems for one in reports))


if __name__ == "__main__":
    sys.exit(main())
