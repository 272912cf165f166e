"""Walks over every crash hook that a scenario passes, and again over its recovery.

    python -m tests.crash.walk SCENARIO... [--every N] [--second-every N] [--known NAMES]
                               [--directory DIR]

For n = 1, 2, ... the scenario's act runs in a child that dies at the nth hook of Python,
then at the nth of the C core, until it completes. After each death the next daemon starts
and is killed at its own mth hook, then one is left alone; what it leaves is checked:

    L  the image holds what was acknowledged, and of a change under way each sector or not
    T  the next point equals the live image, byte for byte
    P  every point holds the bytes of the instant of its seal
    I  every point that was stored before, and not thinned, is still there; nothing is leaked
       nobody started a generation, spool and pass are empty, another restart stores nothing

Children are forked from this process, which has no threads, so that one costs milliseconds.
Prints one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path

import trio

from tests.crash.scenarios import SCENARIOS, Actor, Scenario, acting
from vdiskfs import crash, lineclaims, native, ownership

SIDES = ("python", "c")


@dataclass
class Report:
    """What was walked; the numbers count runs.

    ``hooks`` has the names that were passed, by side, ``walked`` those for whose own sake the
    act was killed.
    """

    scenario: str
    hooks: dict[str, list[str]] = field(default_factory=dict)
    walked: list[str] = field(default_factory=list)
    crashes: int = 0
    second_crashes: int = 0
    problems: list[str] = field(default_factory=list)


class CheckError(AssertionError):
    """A promise does not hold."""


# ---- what runs in children ---------------------------------------------------------------


async def recover(actor: Actor) -> None:
    """Be the next daemon: start, seal what is marked, ship it."""
    await actor.open()
    await actor.ship()
    if actor.ledger.lines("tended"):
        await actor.tend()


async def verify(actor: Actor) -> None:
    """Check all that must hold once a daemon has gone on undisturbed."""
    await recover(actor)
    one, ledger = actor.one, actor.ledger
    live = one.path.read_bytes()
    check_live(live, *actor.expected())
    points = await one.points()
    sealed = {(int(g), int(e)): digest for g, e, digest in ledger.lines("sealing")}
    for key, data in points.items():
        if sealed.get(key) != sha256(data).hexdigest():
            seals = ledger.lines("sealing")
            raise CheckError(f"point {key} does not hold what was sealed: {seals}")
    dropped = {int(epoch) for line in ledger.lines("dropped") for epoch in line}
    stored = {int(epoch) for (epoch,) in ledger.lines("stored")}
    lost = stored - dropped - {epoch for _, epoch in points}
    if lost:
        raise CheckError(f"epochs {sorted(lost)} were stored and are gone")
    if points[max(points)] != live:
        raise CheckError(f"the newest point {max(points)} is not the live image")
    if one.replicator.end.generation != 1 and not ledger.lines("next-generation"):
        raise CheckError("a new generation was started, and all was compared, for nothing")
    if dropped and (leaked := await actor.leaked()):
        raise CheckError(f"nothing will ever delete {sorted(leaked)}")
    counts = one.replicator.live.counts()
    if counts.changed or counts.suspect_pages or counts.frozen_pages:
        raise CheckError(f"still marked: {counts}")
    disk = one.state.disk(one.disk.disk_id)
    places = (disk.spool, disk.pass_)
    left = [one.name for place in places for one in place.iterdir() if one.name != "base"]
    if left:
        raise CheckError(f"left behind: {left}")
    before = stored_objects(actor.root)
    await one.kill()
    await recover(actor)
    if await one.points() != points or stored_objects(actor.root) != before:
        raise CheckError("a second restart was not idle")


def check_live(live: bytes, before: bytes, after: bytes) -> None:
    """Check that each sector, and the size, is from before or after the change under way."""
    if len(live) not in (len(before), len(after)):
        raise CheckError(f"the image has {len(live)} bytes")
    for at in range(0, len(live), 512):
        sector = live[at : at + 512]
        known = [
            one[at : at + 512].ljust(len(sector), b"\0")[: len(sector)] for one in (before, after)
        ]
        if sector not in known:
            raise CheckError(f"an acknowledged write is missing at byte {at}")


def stored_objects(root: Path) -> dict[str, int]:
    """Return the objects that hold data, and when they were made."""
    vault = root / "vault"
    found = [*vault.glob("disks/*/g*/*"), *vault.glob("segments/**/*")]
    return {str(path.relative_to(vault)): path.stat().st_mtime_ns for path in found}


# ---- children ------------------------------------------------------------------------------


def run_child(work: Callable[[Actor], Awaitable[None]], root: Path, plan: tuple[str, int] | None,
              log: Path | None = None) -> str:  # fmt: skip
    """Run it in a child; "" if it ended well, "killed" at its hook, or what went wrong."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _be_child(work, root, plan, log, write)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and plan is not None:
        return "killed"
    return "" if status == 0 else said or f"status {status}"


def _be_child(work: Callable[[Actor], Awaitable[None]], root: Path, plan: tuple[str, int] | None,
              log: Path | None, pipe: int) -> None:  # fmt: skip
    status = 1
    try:
        # Only the process dies here, not the host: syncs would cost time and show nothing.
        for name in ("fsync", "fdatasync"):
            setattr(os, name, lambda _: None)
        # A run has a copy of a directory, and stands for who goes on in the directory itself.
        for module in (lineclaims, ownership):
            vars(module)["place_of"] = lambda _: "here"
        text = f"*:{plan[1]}" if plan else ""
        side = plan[0] if plan else ""
        crash.arm(text if side == "python" else "", f"{log}.python" if log else "")
        native.crash_arm(text if side == "c" else "", f"{log}.c" if log else "")
        trio.run(_act, work, root)
        status = 0
    except BaseException:  # noqa: BLE001 (the parent has to hear of everything)
        os.write(pipe, traceback.format_exc().encode())
    finally:
        os._exit(status)


async def _act(work: Callable[[Actor], Awaitable[None]], root: Path) -> None:
    async with acting(root) as actor:
        with trio.fail_after(60):
            await work(actor)


# ---- the walk ------------------------------------------------------------------------------


@contextmanager
def copied(template: Path) -> Iterator[Path]:
    """Give a copy of a directory, sparse files and all, that goes away."""
    place = template.with_name("run")
    shutil.copytree(template, place, symlinks=True)
    try:
        yield place
    finally:
        shutil.rmtree(place)


def hooks_in(log: Path) -> list[str]:
    """Return the names of the hooks that were passed, in order."""
    return log.read_text().split() if log.exists() else []


class Walk:
    """One scenario's walk below a directory of its own."""

    def __init__(
        self, scenario: Scenario, directory: Path, *, every: int, second_every: int,
        known: frozenset[str],
    ) -> None:  # fmt: skip
        self.scenario = scenario
        self.known = known
        self.template = directory / "template"
        self.crashed = directory / "crashed"
        self.every = every
        self.second_every = second_every
        self.report = Report(scenario.name)
        self.first: dict[str, set[int]] = {}

    def run(self) -> Report:
        """Walk; problems are in the report."""
        self._make_past()
        self._list_hooks()
        for side in SIDES:
            # Each name where it is passed first, and each so many hooks whatever their names.
            for number in count(1):
                chosen = number in self.first[side] or (number - 1) % self.every == 0
                if chosen and not self._crash_at(side, number):
                    break
        return self.report

    def _make_past(self) -> None:
        self.template.mkdir()
        if said := run_child(self.scenario.past, self.template, None):
            raise AssertionError(f"{self.scenario.name}: the past failed: {said}")

    def try_one(self, side: str, number: int, second: str = "", step: int = 0) -> None:
        """Crash at one place, perhaps at one of the recovery too: to look at it."""
        self._make_past()
        with copied(self.template) as place:
            print(run_child(self.scenario.act, place, (side, number)))
            if second:
                print(run_child(recover, place, (second, step)))
            print(run_child(verify, place, None))
            print((place / "ledger").read_text())

    def _list_hooks(self) -> None:
        acted, checked = (self.template.with_name(name) for name in ("acted", "checked"))
        with copied(self.template) as place:
            self._expect(run_child(self.scenario.act, place, None, acted), "unharmed")
            self._expect(run_child(verify, place, None, checked), "unharmed, then checked")
        for side in SIDES:
            passed = hooks_in(Path(f"{acted}.{side}"))
            self.first[side] = {passed.index(name) + 1 for name in {*passed} - self.known}
            self.report.walked += sorted({*passed} - self.known)
            names = {*passed, *hooks_in(Path(f"{checked}.{side}"))}
            self.report.hooks[side] = sorted(names)

    def _expect(self, said: str, what: str) -> None:
        if said:
            self.report.problems.append(f"{self.scenario.name}: {what}: {said}")

    def _crash_at(self, side: str, number: int) -> bool:
        """Crash once; False: the act came to its end before the hook."""
        with copied(self.template) as place:
            said = run_child(self.scenario.act, place, (side, number))
            if said != "killed":
                self._expect(said, f"{side}:{number}")
                return False
            self.report.crashes += 1
            shutil.copytree(place, self.crashed, symlinks=True)
            self._expect(run_child(verify, place, None), f"{side}:{number}")
        try:
            for second in SIDES:
                # Not always the same ones of the recovery: each crash begins elsewhere.
                step = 1 + (number * 7) % self.second_every
                while self._crash_again(f"{side}:{number}", second, step):
                    step += self.second_every
        finally:
            shutil.rmtree(self.crashed)
        return True

    def _crash_again(self, first: str, side: str, number: int) -> bool:
        with copied(self.crashed) as place:
            said = run_child(recover, place, (side, number))
            if said != "killed":
                self._expect(said, f"{first} then {side}:{number}")
                return False
            self.report.second_crashes += 1
            self._expect(run_child(verify, place, None), f"{first} then {side}:{number}")
        return True


def walk(
    name: str, *, every: int = 1, second_every: int = 1, known: frozenset[str] = frozenset(),
    directory: Path | None = None,
) -> Report:  # fmt: skip
    """Walk over one scenario.

    Args:
        name: the scenario's.
        every: each so many hooks, and each name once.
        second_every: each so many hooks of the recoveries.
        known: names that need not be walked for their own sake.
        directory: where to work.
    """
    with tempfile.TemporaryDirectory(dir=directory) as place:
        return Walk(
            SCENARIOS[name], Path(place), every=every, second_every=second_every, known=known
        ).run()


def main() -> int:
    """Walk and print; the exit status is 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="tests.crash.walk")
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--second-every", type=int, default=1)
    parser.add_argument("--known", default="", help="names that were walked elsewhere")
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    make = partial(
        walk, every=arguments.every, second_every=arguments.second_every,
        directory=arguments.directory, known=frozenset(arguments.known.split(",")),
    )  # fmt: skip
    # What is here before a fork is not looked through, and so not copied, in each child.
    gc.collect()
    gc.freeze()
    reports = [make(name) for name in arguments.scenarios]
    json.dump([asdict(one) for one in reports], sys.stdout, indent=1)
    print()
    return int(any(one.problems for one in reports))


if __name__ == "__main__":
    sys.exit(main())
