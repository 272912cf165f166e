"""The record of a machine that runs as a process, and that process: found, awaited, killed.

Whose number a process has is never trusted alone: the record holds the kernel's boot and when
the process started, and signals go through a descriptor of the process that was checked.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from vdiskfs.errors import DamagedError, LocalError
from vdiskfs.registry import is_alive

RECORD = "record.json"
ENDED = "ended.json"
END_S = 30.0
"""Seconds that a killed process may take: it waits for I/O under way, which is on a local disk."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LIMIT = 1 << 20


def boot_id() -> str:
    """Return the number of this boot of the kernel."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


def read_record(directory: Path) -> dict[str, Any] | None:
    """Return the record in a machine's directory; None: nothing was started there.

    Raises:
        DamagedError: there is one, and it is none that was written here.
    """
    path = directory / RECORD
    try:
        with path.open("rb") as file:
            table = json.loads(file.read(_LIMIT))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise DamagedError(
            f"{path}: not the record of a machine",
            hint="look whether the machine runs, then remove the file",
        )
    return table


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this boot, by its number and its start in clock ticks."""

    pid: int
    start: int

    @classmethod
    def recorded(cls, record: dict[str, Any], key: str) -> Process | None:
        """Return the process that a record names; None: it was of another boot.

        Raises:
            DamagedError: the record names none.
        """
        pid, start = record.get(key), record.get(f"{key}_start")
        if type(pid) is not int or type(start) is not int or min(pid, start) < 1:
            raise DamagedError(f"the record of a machine names no {key}")
        return cls(pid, start) if record.get("boot_id") == boot_id() else None

    def is_alive(self) -> bool:
        """Tell whether it runs; one that ended and was not reaped does not."""
        return is_alive(self.pid, self.start)

    def age_s(self) -> float:
        """Return the seconds since it started."""
        started = self.start / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)

    @contextmanager
    def descriptor(self) -> Iterator[int | None]:
        """Have a descriptor of this very process over the block; None: it has ended."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            yield None
            return
        try:
            # Only now is it certain that the descriptor is of the process meant.
            yield fd if self.is_alive() else None
        finally:
            os.close(fd)

    async def wait(self) -> None:
        """Wait until it has ended."""
        with self.descriptor() as fd:
            if fd is not None:
                await trio.lowlevel.wait_readable(fd)

    async def kill(self, *, what: str) -> None:
        """Kill it, and wait until it has ended.

        Raises:
            LocalError: it has not after ``END_S`` seconds.
        """
        with self.descriptor() as fd:
            if fd is None:
                return
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            with trio.move_on_after(END_S):
                await trio.lowlevel.wait_readable(fd)
                return
        raise LocalError(
            f"{what}: process {self.pid} was killed and does not end",
            hint="it waits for a disk: see what its mount does",
        )
