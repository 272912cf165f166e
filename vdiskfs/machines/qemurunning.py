"""A machine that is a QEMU process: asked, turned off, killed, awaited."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from vdiskfs.crash import hook
from vdiskfs.errors import BusyError, LocalError
from vdiskfs.machines import agent
from vdiskfs.machines.directory import console_text, qemu_lines, reason
from vdiskfs.machines.process import ENDED, Process
from vdiskfs.machines.qemuline import AGENT_SOCKET, QMP_SOCKET
from vdiskfs.machines.qmp import connected
from vdiskfs.machines.reach import connects, first_address, is_established

log = logging.getLogger(__name__)

READY_S = 60.0
"""Seconds until QEMU takes a connection: it opens its disks first."""
POWER_DOWN_S = 5.0
"""Seconds after which the power button is pressed again: a guest that boots misses it."""
AGENT_S = 3.0
TCP_S = 5.0
_LOOK_S = 0.05
_LOCKED = 'Failed to get "write" lock'
"""What QEMU says of a disk that another one has open (block/file-posix.c)."""


class EndedError(LocalError):
    """QEMU ended before its guest ran."""


class QemuRunning:
    """A QEMU process of this boot that was alive when this was made."""

    def __init__(
        self, directory: Path, record: Mapping[str, Any], process: Process, console: Process
    ) -> None:
        self._directory = directory
        self._record = record
        self._process = process
        self._console = console
        self._what = f"machine {self.name}"

    @property
    def name(self) -> str:
        """See `Running`."""
        return str(self._record.get("name"))

    @property
    def directory(self) -> Path:
        """See `Running`."""
        return self._directory

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    def age_s(self) -> float:
        """See `Running`."""
        return self._process.age_s()

    async def is_up(self) -> bool:
        """See `Running`."""
        await trio.lowlevel.checkpoint()
        return self._process.is_alive()

    async def state(self) -> str:
        """See `Running`: QEMU's own word for it."""
        try:
            async with connected(self._socket, what=self._what) as qmp:
                status = await qmp.execute("query-status")
        except LocalError:
            if self._process.is_alive():
                raise
            return "down"
        return str(status.get("status")) if isinstance(status, dict) else "unknown"

    async def resume(self) -> None:
        """See `Running`."""
        async with connected(self._socket, what=self._what) as qmp:
            await qmp.execute("cont")

    async def wait_ready(self, limit_s: float = READY_S) -> None:
        """Wait until QEMU has opened its disks and answers; its guest runs then.

        Raises:
            BusyError: it ended, because another process has one of the disks.
            EndedError: it ended, and why.
            LocalError: it does not answer within the limit.
        """
        with trio.move_on_after(limit_s):
            while self._process.is_alive():
                try:
                    async with connected(self._socket, what=self._what, limit_s=limit_s) as qmp:
                        await qmp.execute("query-status")
                    return
                except LocalError:
                    await trio.sleep(_LOOK_S)
            await self.wait()
            if any(_LOCKED in line for line in qemu_lines(self._directory)):
                raise BusyError(f"{self._what}: a disk is in use{reason(self._directory)}")
            raise EndedError(f"{self._what}: QEMU ended{reason(self._directory)}")
        raise LocalError(f"{self._what}: QEMU does not answer within {limit_s:g} s",
                         hint=f"see {self._directory / 'qemu.log'}")  # fmt: skip

    async def shut_down(self, timeout_s: float) -> bool:
        """See `Running`."""
        with trio.move_on_after(timeout_s):
            while self._process.is_alive():
                await self._press()
                with trio.move_on_after(POWER_DOWN_S):
                    await self._process.wait()
        if self._process.is_alive():
            return False
        await self._wait_console()
        hook("machine.down")
        return True

    async def _press(self) -> None:
        """Press the power button. A QEMU that hangs does not hear it, as many a guest does not."""
        try:
            async with connected(self._socket, what=self._what) as qmp:
                await qmp.execute("system_powerdown")
        except LocalError as error:
            if self._process.is_alive():
                log.warning("%s", error)

    async def kill(self) -> None:
        """See `Running`."""
        await self._process.kill(what=self._what)
        await self._wait_console()
        hook("machine.killed")

    async def wait(self) -> None:
        """See `Running`."""
        await self._process.wait()
        await self._wait_console()

    async def wait_status(self) -> str:
        """See `Running`."""
        await self.wait()
        try:
            status = json.loads((self._directory / ENDED).read_bytes())["status"]
        except (OSError, ValueError, KeyError, TypeError):
            return "it ended, nobody saw how"
        if isinstance(status, int) and status < 0:
            return f"QEMU was ended by signal {-status} ({signal.strsignal(-status)})"
        return "it turned itself off" if status == 0 else f"QEMU failed{reason(self._directory)}"

    def console(self) -> bytes:
        """See `Running`."""
        return console_text(self._directory)

    async def answers_agent(self) -> bool:
        """See `Running`."""
        return await agent.answers(self._directory / AGENT_SOCKET, AGENT_S)

    async def answers_tcp(self, port: int) -> bool:
        """See `Running`.

        Raises:
            LocalError: nothing leads to that port.
        """
        if self._record.get("forwarded") == port:
            return await self._answers_forwarded(port)
        return await connects(first_address(self._record, self._what, port), port, TCP_S)

    async def _answers_forwarded(self, port: int) -> bool:
        """Connect through QEMU, which accepts at once: whether the guest does, QEMU tells."""
        with trio.move_on_after(TCP_S):
            async with connected(self._socket, what=self._what) as qmp:

                async def connections() -> str:
                    command = {"command-line": "info usernet"}
                    return str(await qmp.execute("human-monitor-command", **command))

                return await is_established(connections, port)
        return False

    async def _wait_console(self) -> None:
        """Wait until the logs are whole, and the directory can be used again."""
        with trio.move_on_after(READY_S):
            await self._console.wait()

    @property
    def _socket(self) -> Path:
        return self._directory / QMP_SOCKET
