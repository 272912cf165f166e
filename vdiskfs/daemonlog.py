"""The daemon's log within bounds: ``STATE/daemon.log``, and what was before it in ``.1``.

The keeper and each daemon have the same open file as their standard error, and write at its end.
So it is not replaced but copied and cut: whoever has it open writes on, in the same file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import BinaryIO

LIMIT = 8 << 20
"""Bytes of the log; the copy has as many."""

NAME = "daemon.log"


class BoundedHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the log at standard error; cuts it when it is too long."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        """Take the log's name; standard error is that file."""
        super().__init__(sys.stderr)
        self._path = path
        self._limit = limit

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; one writer at a time, as logging does it."""
        super().emit(record)
        with contextlib.suppress(OSError):  # its disk fails: the line is lost, no more
            if os.fstat(self.stream.fileno()).st_size > self._limit:
                self._cut()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Lose a line that the disk does not take; else say what is wrong with it."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def _cut(self) -> None:
        """Keep what there is as ``.1``, in the place of what was there, and begin anew."""
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(fd, "r+b") as log:
            try:
                self._keep(log)
            finally:
                # Where there is no room for the copy the bound counts all the same.
                log.truncate(0)

    def _keep(self, log: BinaryIO) -> None:
        """Copy the log to ``.1``; where that fails, what is there already stays."""
        new = self._path.with_name(f"{NAME}.1.new")
        try:
            kept = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(kept, "wb") as copy:
                shutil.copyfileobj(log, copy, 1 << 20)
            new.replace(self._path.with_name(f"{NAME}.1"))
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            raise


def log_handler(state: Path) -> logging.StreamHandler:  # type: ignore[type-arg]
    """Return what writes this process's log: bounded, if standard error is the mount's log."""
    path = state / NAME
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(sys.stderr.fileno()), path.lstat()):
            return BoundedHandler(path)
    return logging.StreamHandler(sys.stderr)
