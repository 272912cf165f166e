"""Machines as plain QEMU processes, which outlive whoever started them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from vdiskfs.config import MachinesConfig
from vdiskfs.crash import hook
from vdiskfs.errors import BusyError, LocalError, NotFoundError, RefusedError
from vdiskfs.machines import agent, launch
from vdiskfs.machines.machine import Machine
from vdiskfs.machines.permission import attachments
from vdiskfs.machines.process import ENDED, Process, boot_id, read_record
from vdiskfs.machines.qemuline import AGENT_SOCKET, QMP_SOCKET, Line, command_line
from vdiskfs.machines.qmp import connected
from vdiskfs.machines.reach import connects, is_established
from vdiskfs.machines.runner import Attach

CONSOLE_LIMIT = 1 << 20
"""Bytes of a log before it is begun anew; the one before it is kept."""
READY_S = 60.0
"""Seconds until QEMU takes a connection: it opens its disks first."""
POWER_DOWN_S = 5.0
"""Seconds after which the power button is pressed again: a guest that boots misses it."""
AGENT_S = 3.0
TCP_S = 5.0
_LOOK_S = 0.05
_LOGS = ("serial.log", "qemu.log")
_PASSED = ("PATH", "HOME", "LANG", "TMPDIR", "TZ", "USER", "LOGNAME", "XDG_RUNTIME_DIR")


class QemuRunner:
    """Starts machines with this host's QEMU. ``environ`` is what QEMU sees of the environment.

    Nothing of the vault's credentials is in that: only names that say where things lie.
    """

    def __init__(self, host: MachinesConfig, environ: Mapping[str, str] | None = None) -> None:
        self._host = host
        self._environ = passed_environ(environ)

    async def start(
        self, machine: Machine, disks: Mapping[str, Path], directory: Path, network: Attach
    ) -> QemuRunning:
        """See `Runner`."""
        what = f"machine {machine.name}"
        line = command_line(
            machine, disks, attachments(machine, network),
            program=find_qemu(self._host.qemu), host=self._host,
        )  # fmt: skip
        await trio.to_thread.run_sync(_prepare, directory, line)
        hook("machine.prepared")
        try:
            await self._launch(machine, line, directory)
            hook("machine.launched")
            running = await self.find(directory)
            if running is None:
                raise LocalError(f"{what}: QEMU ended at once{_reason(directory)}")
            await running.wait_ready()
        except BusyError:
            raise
        except BaseException:
            # What was let go has its record: see launch.
            with trio.CancelScope(shield=True):
                left = await self.find(directory)
                if left is not None:
                    await left.kill()
            raise
        hook("machine.ready")
        return running

    async def find(self, directory: Path) -> QemuRunning | None:
        """See `Runner`."""
        await trio.lowlevel.checkpoint()
        record = read_record(directory)
        if record is None or record.get("runner") != "qemu":
            return None
        process = Process.recorded(record, "pid")
        console = Process.recorded(record, "console")
        if process is None or console is None or not process.is_alive():
            return None
        return QemuRunning(directory, record, process, console)

    async def _launch(self, machine: Machine, line: Line, directory: Path) -> None:
        record = {
            "runner": "qemu", "name": machine.name, "boot_id": boot_id(),
            "forwarded": line.forwarded,
            "addresses": [card.address for card in machine.networks if card.address],
        }  # fmt: skip
        settings = {
            "directory": os.fspath(directory), "command": line.command, "disks": line.disks,
            "log_limit": CONSOLE_LIMIT, "record": record,
            "stale": [QMP_SOCKET, AGENT_SOCKET, *(f"{name}.1" for name in _LOGS)],
        }  # fmt: skip
        # -I -S: nothing of this project or its libraries is imported; it is there in 20 ms.
        command = [sys.executable, "-I", "-S", str(Path(launch.__file__))]
        done = await trio.run_process(
            command, stdin=json.dumps(settings).encode(), capture_stderr=True, check=False,
            env=self._environ, start_new_session=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        what = f"machine {machine.name}"
        if done.returncode == launch.BUSY:
            raise BusyError(f"{what}: one runs in {directory} already")
        if done.returncode != 0:
            text = done.stderr.decode(errors="replace").strip().split("\n")[-1]
            raise LocalError(f"{what}: not started: {text[:500] or 'its launcher failed'}")


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

    async def wait_ready(self, limit_s: float = READY_S) -> None:
        """Wait until QEMU has opened its disks and answers; its guest runs then.

        Raises:
            LocalError: it ended, and why; or it does not answer within the limit.
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
            raise LocalError(f"{self._what}: QEMU ended{_reason(self._directory)}")
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
        """Press the power button."""
        try:
            async with connected(self._socket, what=self._what) as qmp:
                await qmp.execute("system_powerdown")
        except LocalError:
            if self._process.is_alive():
                raise

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
            return f"QEMU was ended by {signal.Signals(-status).name}"
        return "it turned itself off" if status == 0 else f"QEMU failed{_reason(self._directory)}"

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
        addresses = self._record.get("addresses")
        if not isinstance(addresses, list) or not addresses:
            raise LocalError(f"{self._what}: no address is known for port {port}",
                             hint="give a network of the definition its address")  # fmt: skip
        return await connects(str(addresses[0]).partition("/")[0], port, TCP_S)

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


def passed_environ(environ: Mapping[str, str] | None) -> dict[str, str]:
    """Return what a machine's programs see of the environment: what was given, else our own.

    Of our own no credentials: only names that say where things lie.
    """
    if environ is not None:
        return dict(environ)
    return {key: os.environ[key] for key in _PASSED if key in os.environ}


def find_qemu(program: str) -> str:
    """Return the path of QEMU.

    Raises:
        NotFoundError: this host has none.
    """
    found = shutil.which(program)
    if found is None:
        raise NotFoundError(
            f"{program}: this host has no such program",
            hint="apt-get install qemu-system-x86, or set qemu, [machines] in vdiskfs.conf(5)",
        )
    return found


def console_text(directory: Path) -> bytes:
    """Return what the console's two files hold, the older one first."""
    text = b""
    for name in ("serial.log.1", "serial.log"):
        try:
            with (directory / name).open("rb") as file:
                text += file.read(2 * CONSOLE_LIMIT)
        except OSError:
            continue
    return text


def make_directory(directory: Path) -> None:
    """Make a machine's directory, for this user alone.

    Raises:
        LocalError: it cannot be made.
        RefusedError: it is somebody else's, or others may enter it.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.stat()
    except OSError as error:
        raise LocalError(f"{directory}: {error.strerror}") from error
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise RefusedError(f"{directory}: not a directory of yours alone", hint="chmod 700 it")


def _prepare(directory: Path, line: Line) -> None:
    """Make the machine's directory and what QEMU writes to in it."""
    make_directory(directory)
    try:
        for source, name in line.copies:
            target = directory / name
            if not target.exists():
                shutil.copyfile(source, target.with_suffix(".new"))
                target.with_suffix(".new").chmod(0o600)
                target.with_suffix(".new").rename(target)
    except OSError as error:
        raise LocalError(f"{directory}: {error.strerror}") from error


def _reason(directory: Path) -> str:
    """Return the last line that QEMU wrote about itself, after a colon."""
    try:
        lines = (directory / "qemu.log").read_text(errors="replace").split("\n")
    except OSError:
        return ""
    last = [re.sub(r"^qemu-system-\w+: ", "", one) for one in lines if one.strip()][-1:]
    return f": {last[0][:500]}" if last else ""
