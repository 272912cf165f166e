"""restarting: a machine that was stopped is started once, when all its disks are back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio.testing

from tests.catalog.memory import MemoryStore
from vdiskfs.errors import LocalError
from vdiskfs.machines import Machine, MachineDisk, write_machine
from vdiskfs.restarting import FIRST_AGAIN_S, StoppedMachines
from vdiskfs.stopping import was_stopped


@dataclass
class Commands:
    """In place of ``start_command``: what was started, and how often it is to fail."""

    started: list[str] = field(default_factory=list)
    fails: int = 0
    can_start: bool = True

    async def start(self, disk: str, path: str) -> None:
        await trio.sleep(1)
        self.started.append(disk)
        if self.fails:
            self.fails -= 1
            raise LocalError(f"disk {disk}: start_command ended with 1")


class NoFailovers:
    async def runs_on(self, disk_id: str) -> bool | None:
        return None

    async def start_for(self, disk_id: str) -> bool:
        raise AssertionError


def disk(tmp_path: Path, name: str) -> Any:
    (tmp_path / name).mkdir(exist_ok=True)
    line = SimpleNamespace(displaced=None, handed=False, asked=None)
    return SimpleNamespace(disk_id=name, name=name, line=line, image=SimpleNamespace(refuses=False))


def stopped(
    tmp_path: Path, store: MemoryStore, disks: Sequence[Any], commands: Commands
) -> tuple[StoppedMachines, list[str]]:
    told: list[str] = []

    async def nobody(disk: Any) -> str:
        await trio.lowlevel.checkpoint()
        return ""

    site: Any = SimpleNamespace(
        vault=SimpleNamespace(store=store),
        state=SimpleNamespace(disk=lambda name: SimpleNamespace(directory=tmp_path / name)),
    )
    protection: Any = SimpleNamespace(disks=lambda: disks)
    events: Any = SimpleNamespace(tell=lambda code, subject, text, **_: told.append(code))
    stopper: Any = commands
    made = StoppedMachines(
        site, protection, NoFailovers(), stopper=stopper, events=events, users=nobody,
        shown=lambda one: tmp_path / f"{one.name}.img",
    )  # fmt: skip
    return made, told


async def look(machines: StoppedMachines, disks: Sequence[Any]) -> None:
    async with trio.open_nursery() as nursery:
        for one in disks:
            if machines.is_due(one):
                nursery.start_soon(machines.start, one)


async def test_a_machine_of_two_disks_is_started_once_when_both_are_back(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, expect_log: Any
) -> None:
    expect_log("disk web01: its machine waits until it has its other disks: data")
    disks = [disk(tmp_path, name) for name in ("web01", "data", "other")]
    store, commands = MemoryStore(), Commands()
    pair = (MachineDisk("web01"), MachineDisk("data"))
    await write_machine(store, Machine("web01", 1 << 30, pair), etag=None)
    machines, told = stopped(tmp_path, store, disks, commands)
    for one in disks:
        await machines.note(one)
        one.line.handed = True
    disks[0].line.handed = disks[2].line.handed = False
    await look(machines, disks)
    assert commands.started == ["other"]
    disks[1].line.handed = False
    disks[1].image.refuses = True
    for _ in range(3):
        await trio.sleep(FIRST_AGAIN_S)
        asked = store.requests
        await look(machines, disks)
        assert asked < store.requests < asked + 5
        assert not any(machines.is_due(one) for one in disks)  # the vault is not asked all the time
    assert commands.started == ["other"]
    disks[1].image.refuses = False
    # Another run of the daemon knows it, too.
    again, told_again = stopped(tmp_path, store, disks, commands)
    for one in disks:
        await again.learn(one)
    await look(again, disks)
    await look(again, disks)
    assert sorted(commands.started) == ["other", "web01"]
    assert not any(was_stopped(tmp_path / one.name) for one in disks)
    assert (told, told_again) == (["machine.stopped", "machine.started"], ["machine.started"])


async def test_a_machine_that_does_not_start_is_tried_again(
    expect_log: Any, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    expect_log("its machine cannot be started")
    one = disk(tmp_path, "web01")
    commands = Commands(fails=2)
    machines, told = stopped(tmp_path, MemoryStore(), [one], commands)
    await machines.note(one)
    for wait_s in (FIRST_AGAIN_S, 2 * FIRST_AGAIN_S):
        await look(machines, [one])
        assert was_stopped(tmp_path / "web01")
        await trio.sleep(wait_s - 1)
        assert not machines.is_due(one)
        await trio.sleep(1)
    await look(machines, [one])
    assert told == ["machine.stopped", "machine.stopped", "machine.started"]
    assert not was_stopped(tmp_path / "web01")
    assert not machines.is_due(one)
