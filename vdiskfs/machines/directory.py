"""A machine's directory: this user's alone, with its logs; and what a machine's programs see."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from vdiskfs.errors import LocalError, RefusedError

LOG_LIMIT = 1 << 20
"""Bytes of a log before it is begun anew; the one before it is kept."""
LOGS = ("serial.log", "qemu.log")
_PASSED = ("PATH", "HOME", "LANG", "TMPDIR", "TZ", "USER", "LOGNAME", "XDG_RUNTIME_DIR")


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


def console_text(directory: Path) -> bytes:
    """Return what the console's two files hold, the older one first."""
    text = b""
    for name in ("serial.log.1", "serial.log"):
        try:
            with (directory / name).open("rb") as file:
                text += file.read(2 * LOG_LIMIT)
        except OSError:
            continue
    return text


def qemu_lines(directory: Path) -> list[str]:
    """Return what QEMU wrote about itself, without its name."""
    try:
        text = (directory / "qemu.log").read_text(errors="replace")
    except OSError:
        return []
    return [re.sub(r"^qemu-system-\w+: ", "", line) for line in text.split("\n") if line.strip()]


def reason(directory: Path) -> str:
    """Return the last line that QEMU wrote about itself, after a colon."""
    last = qemu_lines(directory)[-1:]
    return f": {last[0][:500]}" if last else ""


def passed_environ(environ: Mapping[str, str] | None) -> dict[str, str]:
    """Return what a machine's programs see of the environment: what was given, else our own.

    Of our own no credentials: only names that say where things lie.
    """
    if environ is not None:
        return dict(environ)
    return {key: os.environ[key] for key in _PASSED if key in os.environ}
