"""What has happened at a mount, one line of JSON each: ``STATE/events.jsonl``.

For people and scripts, never read back by the daemon to decide anything. An event that cannot be
written is said in the log and costs nothing else. Appended in one write; not synced.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger(__name__)

LIMIT = 4 << 20
"""Bytes after which a new file is begun; one old file is kept."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: ``kind`` is a word of the program's, ``subject`` a failover or a disk."""

    time_ns: int
    kind: str
    subject: str
    text: str


class Events:
    """The events of one state directory."""

    def __init__(self, state: Path) -> None:
        """Take the state directory."""
        self._path = state / "events.jsonl"
        self._old = state / "events.jsonl.1"

    def tell(self, kind: str, subject: str, text: str) -> None:
        """Add an event that happens now."""
        line = json.dumps(asdict(Event(time.time_ns(), kind, subject, text))) + "\n"
        try:
            if self._path.exists() and self._path.stat().st_size >= LIMIT:
                self._path.rename(self._old)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self._path, flags, 0o600)
            try:
                os.write(fd, line.encode())
            finally:
                os.close(fd)
        except OSError as error:
            log.warning("an event is not kept: %s: %s", line.strip(), error)

    def since(self, time_ns: int, limit: int) -> list[Event]:
        """Return the newest events from a time on, at most so many, the newest last."""
        found = [event for event in self._all() if event.time_ns >= time_ns]
        return found[-limit:]

    def _all(self) -> Iterator[Event]:
        for path in (self._old, self._path):
            try:
                text = path.read_text(errors="replace")
            except OSError:
                continue
            for line in text.splitlines():
                try:
                    yield Event(**json.loads(line))
                except (ValueError, TypeError):
                    continue  # the end of a line that a full disk has cut
