"""Machines as plain QEMU processes, which outlive whoever started them."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import trio

from vdiskfs.config import MachinesConfig
from vdiskfs.crash import hook
from vdiskfs.errors import BusyError, LocalError, NotFoundError
from vdiskfs.machines import launch
from vdiskfs.machines.directory import LOG_LIMIT, LOGS, make_directory, passed_environ
from vdiskfs.machines.machine import Machine
from vdiskfs.machines.permission import attachments
from vdiskfs.machines.process import Process, boot_id, read_record
from vdiskfs.machines.qemuline import AGENT_SOCKET, QMP_SOCKET, Line, accelerators, command_line
from vdiskfs.machines.qemurunning import EndedError, QemuRunning
from vdiskfs.machines.runner import Attach
from vdiskfs.machines.spawn import spawn

_log = logging.getLogger(__name__)


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
        """See `Runner`. Where KVM is there and does not work, ``auto`` goes on without it."""
        directory = directory.absolute()  # noqa: ASYNC240 (no disk is asked)
        attached = attachments(machine, network)
        program = find_qemu(self._host.qemu)
        kinds = accelerators(machine)
        for accel in kinds:
            line = command_line(
                machine, disks, attached, program=program, accel=accel, host=self._host
            )
            try:
                return await self._start(machine, line, directory)
            except EndedError as error:
                if accel == kinds[-1]:
                    raise
                _log.warning("%s; trying without KVM, which is slow", error)
        raise AssertionError  # there is at least one

    async def _start(self, machine: Machine, line: Line, directory: Path) -> QemuRunning:
        await trio.to_thread.run_sync(_prepare, directory, line)
        hook("machine.prepared")
        token = secrets.token_hex(16)
        try:
            await self._launch(machine, line, directory, token)
            hook("machine.launched")
            running = _recorded(directory, token)
            if running is None:
                raise LocalError(f"machine {machine.name}: its record in {directory} is gone")
            await running.wait_ready()
        except BaseException:
            # What was let go has its record (see launch). Another's, which runs there, lives on.
            with trio.CancelScope(shield=True):
                left = _recorded(directory, token)
                if left is not None:
                    await left.kill()
            raise
        hook("machine.ready")
        return running

    async def find(self, directory: Path) -> QemuRunning | None:
        """See `Runner`."""
        await trio.lowlevel.checkpoint()
        found = _recorded(directory)
        return found if found is not None and await found.is_up() else None

    async def _launch(self, machine: Machine, line: Line, directory: Path, token: str) -> None:
        record = {
            "runner": "qemu", "token": token, "name": machine.name, "boot_id": boot_id(),
            "forwarded": line.forwarded,
            "addresses": line.addresses,
        }  # fmt: skip
        settings = {
            "directory": os.fspath(directory), "command": line.command, "disks": line.disks,
            "log_limit": LOG_LIMIT, "record": record,
            "stale": [QMP_SOCKET, AGENT_SOCKET, *(f"{name}.1" for name in LOGS)],
        }  # fmt: skip
        # -I -S: nothing of this project or its libraries is imported; it is there in 20 ms.
        command = [sys.executable, "-I", "-S", str(Path(launch.__file__))]
        with _memory_file(json.dumps(settings)) as told, _memory_file("") as heard:
            launcher = await spawn(
                command, stdin=told, stdout=subprocess.DEVNULL, stderr=heard, env=self._environ
            )
            try:
                status = await launcher.wait()
            finally:
                await launcher.end()
            text = os.pread(heard, 4096, 0).decode(errors="replace").strip().split("\n")[-1]
        what = f"machine {machine.name}"
        if status == launch.BUSY:
            raise BusyError(f"{what}: one runs in {directory} already")
        if status != 0:
            raise LocalError(f"{what}: not started: {text[:500] or 'its launcher failed'}")


@contextmanager
def _memory_file(text: str) -> Iterator[int]:
    """Have a file in memory with this text, to be read from its beginning."""
    fd = os.memfd_create("vdiskfs-machine", os.MFD_CLOEXEC)
    try:
        os.write(fd, text.encode())
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _recorded(directory: Path, token: str | None = None) -> QemuRunning | None:
    """Return the machine of the record in a directory, which may have ended.

    Args:
        directory: the machine's.
        token: of the start that is meant; None: whichever.
    """
    record = read_record(directory)
    if record is None or record.get("runner") != "qemu":
        return None
    process = Process.recorded(record, "pid")
    console = Process.recorded(record, "console")
    if process is None or console is None or token not in (None, record.get("token")):
        return None
    return QemuRunning(directory, record, process, console)


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
