"""Waiting until a started machine is of use, and how long that took."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trio

from vdiskfs.config import MachinesConfig
from vdiskfs.errors import VdiskfsError
from vdiskfs.machines.directory import passed_environ
from vdiskfs.machines.hookrun import run_program
from vdiskfs.machines.machine import HealthCheck, Machine
from vdiskfs.machines.permission import hook_command
from vdiskfs.machines.runner import Running

LOOK_S = 0.25
"""Seconds between two attempts: the error of the measured time is below this and one attempt."""


@dataclass(frozen=True, slots=True)
class Health:
    """What came of a health check.

    ``seconds`` is from the machine's start to its first sign of health, or to the end of the
    check: the measured recovery time. ``detail`` is for people.
    """

    healthy: bool
    seconds: float
    detail: str


async def wait_healthy(running: Running, machine: Machine, host: MachinesConfig) -> Health:
    """Wait until a machine passes its health check, ends, or the check's limit is over.

    Without a check a machine that runs is healthy. The limit counts from this call. Can be
    cancelled at any time; the machine is left alone in any case.

    Raises:
        RefusedError, NotFoundError: this host does not run the check's command.
        LocalError: the check cannot be made.
    """
    check = machine.health
    if check is None:
        up = await running.is_up()
        return Health(up, running.age_s(), "it runs; no check is defined" if up else "it ended")
    attempt = _Attempts(running, check, host)
    ended: list[str] = []
    passed = False
    with trio.move_on_after(check.limit_s):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, running, ended, nursery.cancel_scope)
            passed = await attempt.until_passed()
            nursery.cancel_scope.cancel()
    seconds = running.age_s()
    if passed:
        return Health(True, seconds, f"{_named(check)}: passed after {seconds:.1f} s")
    if attempt.error is not None:
        if await running.is_up():
            raise attempt.error
        ended.append(await running.wait_status())
    why = ended[0] if ended else f"not passed within {check.limit_s:g} s"
    return Health(False, seconds, f"{_named(check)}: {why}")


class _Attempts:
    """Tries one check again and again. ``error`` is why that makes no sense."""

    def __init__(self, running: Running, check: HealthCheck, host: MachinesConfig) -> None:
        self._running = running
        self._check = check
        self.error: VdiskfsError | None = None
        self._command: list[str] = []
        if check.kind == "command":
            what = f"machine {running.name}: health"
            self._command = hook_command(host, check.command, what=what)

    async def until_passed(self) -> bool:
        """Return True at the first attempt that passes; False: see ``error``."""
        while True:
            try:
                if await self._try():
                    return True
            except VdiskfsError as error:
                self.error = error
                return False
            await trio.sleep(LOOK_S)

    async def _try(self) -> bool:
        check = self._check
        if check.kind == "agent":
            return await self._running.answers_agent()
        if check.kind == "tcp":
            return await self._running.answers_tcp(check.port)
        if check.kind == "serial":
            return await _printed(self._running, check.text.encode())
        directory: Path = self._running.directory
        environ = {**passed_environ(None), "VDISKFS_MACHINE": self._running.name,
                   "VDISKFS_DIRECTORY": str(directory), "VDISKFS_HOOK": "health"}  # fmt: skip
        done = await run_program(
            self._command, environ=environ, directory=directory, limit_s=check.limit_s
        )
        return done.code == 0


async def _printed(running: Running, text: bytes) -> bool:
    return text in await trio.to_thread.run_sync(running.console)


async def _watch(running: Running, ended: list[str], scope: trio.CancelScope) -> None:
    """End the check when the machine ends."""
    try:
        ended.append(await running.wait_status())
    except VdiskfsError as error:
        ended.append(error.message)
    scope.cancel()


def _named(check: HealthCheck) -> str:
    """Say what is checked."""
    return {
        "agent": "guest agent",
        "tcp": f"TCP port {check.port}",
        "serial": f"text {check.text!r} on the console",
        "command": f"command {check.command[0] if check.command else ''}",
    }[check.kind]
