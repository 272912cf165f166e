"""Runs one program of this host for a machine: bounded in time and in output, ended as a group."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from vdiskfs.machines.spawn import spawn

_OUTPUT_LIMIT = 64 << 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended; ``code`` None: it was ended at its limit."""

    code: int | None
    output: str

    @property
    def last_line(self) -> str:
        """The last line that it printed, after a colon."""
        lines = [line.strip() for line in self.output.split("\n") if line.strip()]
        return f": {lines[-1][:300]}" if lines else ""


async def run_program(
    command: Sequence[str], *, environ: Mapping[str, str], directory: Path, limit_s: float
) -> Outcome:
    """Run a program in a session of its own, and wait for its end.

    At the limit, and on cancellation, it and all of its process group are killed. What it
    leaves running when it ends by itself stays: a machine, for instance. Its output is read
    until it ends; what it leaves behind should write elsewhere.

    Raises:
        LocalError: it cannot be run.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    output = bytearray()
    code: int | None = None
    async with trio.lowlevel.FdStream(reading) as reader:
        try:
            child = await spawn(
                command, stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.STDOUT,
                cwd=directory, env=dict(environ),
            )  # fmt: skip
        finally:
            os.close(writing)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_collect, reader, output)
                with trio.move_on_after(limit_s):
                    code = await child.wait()
                nursery.cancel_scope.cancel()
        finally:
            await child.end(lambda: _kill_group(child.pid))
        _drain(reader, output)
    return Outcome(code, output.decode(errors="replace"))


def _kill_group(pid: int) -> None:
    """Kill a child that is not reaped yet, so that the group's number is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


async def _collect(reader: trio.abc.ReceiveStream, output: bytearray) -> None:
    while data := await reader.receive_some(65536):
        _append(output, data)


def _drain(reader: trio.lowlevel.FdStream, output: bytearray) -> None:
    """Take what the pipe still holds, without waiting for those who keep it open."""
    with contextlib.suppress(OSError):
        while len(output) < 2 * _OUTPUT_LIMIT and (data := os.read(reader.fileno(), 65536)):
            _append(output, data)


def _append(output: bytearray, data: bytes | bytearray) -> None:
    """Keep the newest output."""
    output += data
    del output[:-_OUTPUT_LIMIT]
