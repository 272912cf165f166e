"""The start of a mount's daemon: ``python -m vdiskfs.daemon``.

Its keeper (``vdiskfs.keeper``) is started, and starts it.
The settings go through a descriptor, so that no argument list shows them. The daemon
answers with one line on another descriptor when it is ready, or says why it cannot be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NoReturn

from vdiskfs.config import MountSettings
from vdiskfs.crypto.given import PASSPHRASE
from vdiskfs.daemonlog import NAME
from vdiskfs.errors import LocalError
from vdiskfs_tools.answers import error_from

END_S = 10.0

# Compressing takes and frees some MiB a batch: glibc would give them back to the kernel, which
# clears them, each time (mallopt(3)).
_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(16 << 20), "MALLOC_MMAP_THRESHOLD_": str(16 << 20)}


def run_in_place(settings: MountSettings) -> NoReturn:
    """Become the daemon; or its keeper, where nobody keeps descriptors for this process.

    systemd does (``$NOTIFY_SOCKET``): there this process must be the daemon itself.
    """
    descriptor = _settings_descriptor(settings)
    _make_state(settings.state)
    # -m would let a module of the current directory take the place of the daemon's.
    os.chdir("/")
    sys.stdout.flush()
    sys.stderr.flush()
    os.set_inheritable(descriptor, True)
    kept = bool(os.environ.get("NOTIFY_SOCKET"))
    command = [*(_daemon if kept else _command)(descriptor), "--foreground"]
    os.execve(command[0], command, _environ())  # noqa: S606 (no shell is wanted)


def start(settings: MountSettings) -> int:
    """Start the daemon in the background, wait until it is ready, return its process id.

    Cancelled by Ctrl-C: the daemon is ended before this raises.

    Raises:
        VdiskfsError: what the daemon said, or that it ended without a word.
    """
    _make_state(settings.state)
    log_path = Path(settings.state) / NAME
    private = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(private, "ab") as log:
        log_end = log.seek(0, os.SEEK_END)
        process, ready = _spawn(settings, log)
        with ready:
            try:
                pid = _read_answer(ready.readline(1 << 20), process, log_path, log_end)
            except BaseException:
                _end(process)
                raise
    # It outlives this process, which therefore never waits for it.
    process.returncode = 0
    return pid


def _spawn(
    settings: MountSettings, log: BinaryIO
) -> tuple[subprocess.Popen[bytes], BufferedReader]:
    """Start the process; return it and the end of a pipe that it answers on."""
    descriptor = _settings_descriptor(settings)
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [*_command(descriptor), "--ready-fd", str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=_environ(),
            pass_fds=(descriptor, writing),
            start_new_session=True,
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(descriptor)
        os.close(writing)
    return process, os.fdopen(reading, "rb")


def _read_answer(
    line: bytes, process: subprocess.Popen[bytes], log_path: Path, log_end: int
) -> int:
    """Return the process id in the daemon's line, or raise the error in it."""
    if not line.endswith(b"\n"):
        code = process.wait(END_S)
        said = _last_line(log_path, log_end)
        raise LocalError(
            f"the daemon ended with status {code} while it started{said}", hint=f"see {log_path}"
        )
    try:
        answer = json.loads(line)
        if answer.get("ok") is True:
            return int(answer.get("pid", process.pid))
    except (ValueError, AttributeError, TypeError):
        answer = None
    raise error_from(answer, "the daemon does not start")


def _command(descriptor: int) -> list[str]:
    return [sys.executable, "-m", "vdiskfs.keeper", "--settings-fd", str(descriptor)]


def _environ() -> dict[str, str]:
    """Return the daemon's environment: the passphrase is in the settings, in memory alone."""
    return {name: value for name, value in (_MEMORY | os.environ).items() if name != PASSPHRASE}


def _daemon(descriptor: int) -> list[str]:
    return [sys.executable, "-m", "vdiskfs.daemon", "--settings-fd", str(descriptor)]


def _settings_descriptor(settings: MountSettings) -> int:
    """Return a descriptor from which the settings can be read, in memory only."""
    descriptor = os.memfd_create("vdiskfs-settings")
    text = settings.to_json().encode()
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        file.write(text)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _make_state(state: str) -> None:
    """Make the state directory, for this user alone."""
    try:
        Path(state).mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise LocalError(f"{state}: the state directory is not a directory") from None


def _last_line(path: Path, start: int) -> str:
    """Return the last line that was written to the log since then, after a colon."""
    with path.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 65536))
        lines = file.read().decode(errors="replace").split("\n")
    last = [line.strip() for line in lines if line.strip()][-1:]
    return f": {last[0]}" if last else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a daemon that did not become ready."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
