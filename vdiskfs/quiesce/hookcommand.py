"""Runs one of this host's own programs before or after a freeze; in the holder only."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence

from vdiskfs.quiesce.agentline import QuiesceError


def run_hook(
    command: Sequence[str], *, what: str, environ: Mapping[str, str], limit_s: float
) -> None:
    """Run a command in a session of its own, and wait for its end; killed at the limit.

    Args:
        command: a program's path, and its arguments.
        what: the hook, for messages.
        environ: added to our own.
        limit_s: how long it may take.

    Raises:
        QuiesceError: it cannot be run, failed, or took too long; the last line that it printed.
    """
    with tempfile.TemporaryFile() as output:
        try:
            child = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                cwd="/", env={**os.environ, **environ}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise QuiesceError(f"{what}: {command[0]}: {error.strerror}") from None
        try:
            status = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            # It is not reaped yet: the group's number is its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise QuiesceError(f"{what}: not done within {limit_s:g} s") from None
        if status != 0:
            output.seek(max(0, output.seek(0, os.SEEK_END) - 4096))
            lines = output.read().decode(errors="replace").split("\n")
            said = [line.strip() for line in lines if line.strip()][-1:]
            reason = f": {said[0][:300]}" if said else ""
            raise QuiesceError(f"{what}: exit {status}{reason}")
