"""Machines that this host's own programs start, stop, kill and look at.

``start`` returns when the machine runs; ``stop`` asks the guest to turn itself off; ``kill``
ends it at once, and succeeds where nothing runs; ``status`` ends with 0 (runs), 3 (does not),
and anything else means that it cannot tell. Each gets what it has to know in ``VDISKFS_...``
variables, which are listed in vdiskfs(1).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from vdiskfs.config import MachinesConfig
from vdiskfs.crash import hook
from vdiskfs.errors import BusyError, DamagedError, LocalError, NotFoundError, UsageError
from vdiskfs.machines import agent
from vdiskfs.machines.directory import console_text, make_directory, passed_environ
from vdiskfs.machines.hookrun import Outcome, run_program
from vdiskfs.machines.machine import Machine
from vdiskfs.machines.permission import attachments, hook_command, reached_addresses
from vdiskfs.machines.process import RECORD, boot_id, read_record
from vdiskfs.machines.qemuline import AGENT_SOCKET, disk_format
from vdiskfs.machines.qemurunning import AGENT_S, TCP_S
from vdiskfs.machines.reach import connects, first_address
from vdiskfs.machines.runner import Attach, Isolated
from vdiskfs.state.files import write_record

START_S = 300.0
KILL_S = 60.0
STATUS_S = 30.0
LOOK_S = 2.0
"""Seconds between two looks at a machine whose end is waited for."""
DOWN = 3
NAMES = ("start", "stop", "kill", "status")


class HooksRunner:
    """Runs hooks from this host's hooks directory. ``environ`` is what they see beyond ours."""

    def __init__(self, host: MachinesConfig, environ: Mapping[str, str] | None = None) -> None:
        self._host = host
        self._environ = passed_environ(environ)

    async def start(
        self, machine: Machine, disks: Mapping[str, Path], directory: Path, network: Attach
    ) -> HooksRunning:
        """See `Runner`."""
        what = f"machine {machine.name}"
        if machine.hooks is None:
            raise UsageError(f"{what}: it has no hooks")
        words = {name: list(getattr(machine.hooks, name)) for name in NAMES}
        for name in NAMES:  # before anything is run
            hook_command(self._host, words[name], what=f"{what}: hook {name}")
        record = {
            "runner": "hooks", "name": machine.name, "boot_id": boot_id(), "hooks": words,
            "started_s": time.clock_gettime(time.CLOCK_BOOTTIME),
            "variables": variables(machine, disks, directory, network),
            "addresses": reached_addresses(machine, attachments(machine, network)),
        }  # fmt: skip
        await trio.to_thread.run_sync(make_directory, directory)
        with _locked(directory, what):
            running = HooksRunning(directory, record, self._host, self._environ)
            if await running.is_up():
                raise BusyError(f"{what}: it runs already")
            # Durable before the machine is started: whoever comes later asks its status.
            await trio.to_thread.run_sync(write_record, directory / RECORD, record)
            hook("machine.prepared")
            await self._run_start(running, what)
        hook("machine.ready")
        return running

    async def find(self, directory: Path) -> HooksRunning | None:
        """See `Runner`.

        Raises:
            LocalError: its status cannot be told.
        """
        record = read_record(directory)
        body = record.get("body") if record is not None else None
        if not isinstance(body, dict) or body.get("runner") != "hooks":
            return None
        running = HooksRunning(directory, body, self._host, self._environ)
        return running if await running.is_up() else None

    async def _run_start(self, running: HooksRunning, what: str) -> None:
        try:
            done = await running.run("start", START_S)
            if done.code != 0:
                raise LocalError(f"{what}: hook start {_ended(done, START_S)}")
            hook("machine.launched")
            if not await running.is_up():
                raise LocalError(f"{what}: hook start succeeded, and hook status says it is down")
        except BaseException:
            with trio.CancelScope(shield=True):
                await running.kill()
            raise


class HooksRunning:
    """A machine that hooks started."""

    def __init__(
        self, directory: Path, record: Mapping[str, Any], host: MachinesConfig,
        environ: Mapping[str, str],
    ) -> None:  # fmt: skip
        self._directory = directory
        self._record = record
        self._host = host
        self._environ = environ
        self._what = f"machine {self.name}"

    @property
    def name(self) -> str:
        """See `Running`."""
        return str(self._record.get("name"))

    @property
    def directory(self) -> Path:
        """See `Running`."""
        return self._directory

    def age_s(self) -> float:
        """See `Running`. After a reboot it is not known, and counts from the boot."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        started = self._record.get("started_s")
        here = self._record.get("boot_id") == boot_id() and isinstance(started, int | float)
        return max(0.0, now - float(started)) if here and started is not None else now

    async def run(self, name: str, limit_s: float) -> Outcome:
        """Run one of its hooks.

        Raises:
            RefusedError, NotFoundError: this host does not, or no longer, allow or have it.
            DamagedError: the record has no such hook.
        """
        hooks = self._record.get("hooks")
        words = hooks.get(name) if isinstance(hooks, dict) else None
        variables = self._record.get("variables")
        if not isinstance(words, list) or not words or not isinstance(variables, dict):
            raise DamagedError(f"{self._directory / RECORD}: it has no hook {name}")
        command = hook_command(self._host, words, what=f"{self._what}: hook {name}")
        environ = {**self._environ, **variables, "VDISKFS_HOOK": name}
        return await run_program(
            command, environ=environ, directory=self._directory, limit_s=limit_s
        )

    async def is_up(self) -> bool:
        """See `Running`.

        Raises:
            LocalError: hook status cannot tell. That is never taken for down.
        """
        done = await self.run("status", STATUS_S)
        if done.code not in (0, DOWN):
            raise LocalError(f"{self._what}: hook status {_ended(done, STATUS_S)}")
        return done.code == 0

    async def state(self) -> str:
        """See `Running`."""
        return "running" if await self.is_up() else "down"

    async def resume(self) -> None:
        """See `Running`."""
        raise LocalError(f"{self._what}: there is no hook to resume it")

    async def shut_down(self, timeout_s: float) -> bool:
        """See `Running`."""
        with trio.move_on_after(timeout_s):
            done = await self.run("stop", timeout_s)
            if done.code not in (0, None) and await self.is_up():
                raise LocalError(f"{self._what}: hook stop {_ended(done, timeout_s)}")
            await self.wait()
        gone = not await self.is_up()
        if gone:
            hook("machine.down")
        return gone

    async def kill(self) -> None:
        """See `Running`."""
        done = await self.run("kill", KILL_S)
        if await self.is_up():
            raise LocalError(f"{self._what}: hook kill {_ended(done, KILL_S)}, and it runs on")
        hook("machine.killed")

    async def wait(self) -> None:
        """See `Running`."""
        while await self.is_up():  # noqa: ASYNC110 (nobody tells: it has to be asked)
            await trio.sleep(LOOK_S)

    async def wait_status(self) -> str:
        """See `Running`."""
        await self.wait()
        return "hook status says that it is down"

    def console(self) -> bytes:
        """See `Running`: what the hooks put into serial.log in its directory."""
        return console_text(self._directory)

    async def answers_agent(self) -> bool:
        """See `Running`: on the socket agent.sock in its directory."""
        return await agent.answers(self._directory / AGENT_SOCKET, AGENT_S)

    async def answers_tcp(self, port: int) -> bool:
        """See `Running`.

        Raises:
            LocalError: the machine has no address on a network of this host.
        """
        return await connects(first_address(self._record, self._what, port), port, TCP_S)


def variables(
    machine: Machine, disks: Mapping[str, Path], directory: Path, network: Attach
) -> dict[str, str]:
    """Return what hooks are told of a machine; lists have a count and numbers from 0.

    Raises:
        NotFoundError: a disk has no file.
        RefusedError: a network is not allowed on this host.
    """
    missing = [disk.disk for disk in machine.disks if disk.disk not in disks]
    if missing:
        raise NotFoundError(f"machine {machine.name}: no file is given for its disk {missing[0]}")
    found = {
        "MACHINE": machine.name, "ID": machine.id, "DIRECTORY": os.fspath(directory),
        "MEMORY": str(machine.memory), "PROCESSORS": str(machine.processors),
        "FIRMWARE": machine.firmware, "ISOLATED": str(int(isinstance(network, Isolated))),
        "DISKS": str(len(machine.disks)), "NETWORKS": str(len(machine.networks)),
    }  # fmt: skip
    for number, disk in enumerate(machine.disks):
        path = disks[disk.disk]
        found |= {
            f"DISK_{number}_NAME": disk.disk, f"DISK_{number}_PATH": os.fspath(path),
            f"DISK_{number}_FORMAT": disk_format(disk, path), f"DISK_{number}_BUS": disk.bus,
            f"DISK_{number}_BOOT": str(disk.boot or ""),
        }  # fmt: skip
    for number, target in enumerate(attachments(machine, network)):
        card = machine.networks[number]
        found |= {
            f"NETWORK_{number}_NAME": card.name, f"NETWORK_{number}_TARGET": target,
            f"NETWORK_{number}_MAC": machine.mac(number), f"NETWORK_{number}_MODEL": card.model,
            f"NETWORK_{number}_ADDRESS": card.address or "",
        }  # fmt: skip
    return {f"VDISKFS_{key}": value for key, value in found.items()}


@contextmanager
def _locked(directory: Path, what: str) -> Iterator[None]:
    """Keep other starts in the same directory out."""
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{what}: it is being started already, in {directory}") from None
        yield
    finally:
        os.close(fd)


def _ended(done: Outcome, limit_s: float) -> str:
    if done.code is None:
        return f"took longer than {limit_s:g} s{done.last_line}"
    how = f"was ended by signal {-done.code}" if done.code < 0 else f"ended with {done.code}"
    return how + done.last_line
