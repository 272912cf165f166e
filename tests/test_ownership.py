"""One disk's line: crash at every step of a takeover and of a displacement, and once more."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import trio

from tests.catalog.memory import MemoryStore
from tests.races import CrashError, Host, Local, Race, silence, verify
from vdiskfs import leftovers, lineclaims, ownership
from vdiskfs.catalog import Vault, moves, owners
from vdiskfs.errors import StateError
from vdiskfs.state import LastEnd


@dataclass
class Hooks:
    """Ends the process at the hook number ``at``; remembers what it passed."""

    at: int = 0
    passed: list[str] = field(default_factory=list)

    def __call__(self, name: str) -> None:
        self.passed.append(name)
        if self.at:
            self.at -= 1
            if not self.at:
                raise CrashError(name)


@contextmanager
def hooked() -> Iterator[Hooks]:
    hooks = Hooks()
    with (
        mock.patch.object(owners, "hook", hooks),
        mock.patch.object(ownership, "hook", hooks),
        mock.patch.object(lineclaims, "hook", hooks),
        mock.patch.object(moves, "hook", hooks),
        mock.patch.object(leftovers, "hook", hooks),
    ):
        yield hooks


async def two_hosts(root: Path) -> tuple[Race, Host, Host]:
    """A disk of host a, with points in the vault and some in its spool; and host b."""
    race = Race(random.Random(1), root, MemoryStore(), faults=False)
    race.turn = trio.lowlevel.checkpoint  # type: ignore[method-assign]
    vault = await Vault.init(cast("Any", race.store))
    record = await vault.create_disk("web01", file="web01.img", size=0, site="a")
    race.vault_id, race.disk_id = vault.vault_id, record.id
    for name in ("a", "b"):
        host = Host(race, name, f"{ord(name):032x}", Local())
        (host.directory / "spool").mkdir(parents=True)
        race.hosts.append(host)
    a, b = race.hosts
    await a.start()
    for _ in range(3):
        await a.write()
        await a.seal()
    await a.ship()
    b.local.data = a.local.data
    return race, a, b


async def until_done(
    hooks: Hooks, host: Host, crash_at: list[int], action: Callable[[], Awaitable[None]]
) -> int:
    """Do it, with a crash at these hooks of successive runs; return how many crashes came."""
    crashes = 0
    for at in [*crash_at, 0]:
        hooks.at = at
        try:
            await action()
        except CrashError:
            crashes += 1
            host.line, host.last_end = None, LastEnd.DAEMON_DIED
        else:
            hooks.at = 0
            return crashes
    raise AssertionError("it never ended")


async def walk(root: Path, play: Callable[[Path, list[int]], Awaitable[int]]) -> tuple[int, int]:
    """Crash at hook 1, 2, ... until it ends without; and at each, at 1, 2, ... of the next run."""
    walked = points = 0
    for first in range(1, 100):
        for second in range(1, 100):
            walked += 1
            crashes = await play(root / f"{first}-{second}", [first, second])
            points = max(points, first)
            if crashes < 2:
                break
        if not crashes:
            return first - 1, walked
    raise AssertionError("it never ends")


async def finish(race: Race) -> None:
    for step in (Host.drain, Host.come_back):
        for host in race.hosts:
            await step(host)
    await verify(race)


@pytest.mark.slow
async def test_a_takeover_killed_at_any_step_and_once_more_goes_on(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    async def play(root: Path, crash_at: list[int]) -> int:
        with hooked() as hooks:
            race, a, b = await two_hosts(root)
            crashes = await until_done(hooks, b, crash_at, lambda: b.start(force=True))
            record = await Vault(cast("Any", race.store), race.vault_id, "").disk(race.disk_id)
            assert record.owner is not None
            assert record.owner.writer == b.writer
            assert record.generation > 1
            assert b.line is not None
            assert b.line.points.generation == record.generation
            await b.write()
            await b.seal()
            await b.ship()
            await a.ship()  # into a branch
            assert a.line is not None
            assert a.line.displaced is not None
            await finish(race)
            return crashes

    with silence():
        hooks, walked = await walk(tmp_path, play)
    tell(f"a takeover passes {hooks} hooks; {walked} walks")
    assert hooks >= 4


@pytest.mark.slow
async def test_a_displaced_writer_killed_at_any_step_and_once_more_loses_nothing(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    async def play(root: Path, crash_at: list[int]) -> int:
        with hooked() as hooks:
            race, a, b = await two_hosts(root)
            await b.start(force=True)

            async def drain() -> None:
                if a.line is None:
                    await a.start()
                while a.queue:
                    await a.ship()

            crashes = await until_done(hooks, a, crash_at, drain)
            assert a.line is not None
            assert a.line.displaced is not None
            assert a.line.displaced.by == "site b"
            await finish(race)
            return crashes

    with silence():
        hooks, walked = await walk(tmp_path, play)
    tell(f"a displacement passes {hooks} hooks; {walked} walks")
    assert hooks >= 4


@pytest.mark.slow
async def test_a_spool_left_by_a_refused_start_killed_at_any_step_is_a_branch(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    async def play(root: Path, crash_at: list[int]) -> int:
        with hooked() as hooks:
            race, a, b = await two_hosts(root)
            await a.stop()
            await b.start(force=True)

            async def refused() -> None:
                await a.start()
                assert a.line is None

            async def start() -> None:
                a.last_end = LastEnd.HOST_DIED
                await refused()

            crashes = await until_done(hooks, a, crash_at, start)
            assert not list((a.directory / "spool").glob("*.delta"))
            await finish(race)
            return crashes

    with silence():
        hooks, walked = await walk(tmp_path, play)
    tell(f"a refused start passes {hooks} hooks; {walked} walks")
    assert hooks >= 3


async def test_two_copies_that_begin_one_branch_at_once_keep_what_each_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with silence(), hooked() as hooks:
        race, a, b = await two_hosts(tmp_path)
        await a.stop()
        await b.start(force=True)
        hooks.at = 1
        a.last_end = LastEnd.HOST_DIED
        with pytest.raises(CrashError, match=r"branch\.started"):
            await a.start()
        await a.clone()
        twin = race.hosts[-1]
        twin.last_end = a.last_end = LastEnd.HOST_DIED
        begun = leftovers.begun

        async def late(*args: Any) -> int | None:
            """The copy has written the branch that was found here."""
            found = await begun(*args)
            monkeypatch.setattr(ownership, "begun", begun)
            await twin.start()
            return found

        monkeypatch.setattr(ownership, "begun", late)
        await a.start()
        for host in (a, twin):
            assert not list((host.directory / "spool").glob("*.delta"))
            assert not (host.directory / "set-aside").exists()
        record = await Vault(cast("Any", race.store), race.vault_id, "").disk(race.disk_id)
        assert len(record.branches) == 2
        await finish(race)


async def test_a_fence_whose_takeover_never_finished_is_passed_by_the_owner(
    tmp_path: Path, expect_log: Callable[..., None]
) -> None:
    expect_log("never finished")
    race, a, b = await two_hosts(tmp_path)
    with hooked() as hooks:
        hooks.at = 2  # noted, fenced
        with pytest.raises(CrashError, match=r"takeover\.fenced"):
            await b.start(force=True)
    await a.ship()
    assert a.line is not None
    assert a.line.displaced is None
    assert a.line.points.generation == 2
    await finish(race)


async def test_a_fence_that_is_there_at_the_start_is_passed_and_nothing_is_suspect(
    tmp_path: Path,
) -> None:
    race, a, b = await two_hosts(tmp_path)
    with hooked() as hooks:
        hooks.at = 2
        with pytest.raises(CrashError):
            await b.start(force=True)
    await a.act(a.kill)
    a.last_end, a.local.dirty = LastEnd.DAEMON_DIED, frozenset()
    await a.start()
    assert a.line is not None
    assert (a.line.points.generation, len(a.queue)) == (2, 2)
    assert len(a.local.dirty) == 0
    await finish(race)


async def test_a_vault_that_lacks_what_it_had_is_refused_until_that_is_accepted(
    tmp_path: Path,
) -> None:
    race, a, _ = await two_hosts(tmp_path)
    older = dict(race.store.objects)
    while a.queue:
        await a.ship()
    await a.stop()
    race.store.objects = older
    with pytest.raises(StateError, match="lacks epoch 3 of generation 1"):
        await a.start()
