"""The events of one state directory: told without waiting, written by a task.

`Events.tell` only notes: a full disk, a slow or damaged database is nobody's trouble but that
of `Events.run`. What cannot be written waits, a bounded number; then the oldest is lost, and an
event says how many were.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import trio

from vdiskfs.events.codes import OVER, EventLevel, code_of
from vdiskfs.events.database import LIMIT, Database, Event, Row
from vdiskfs.units import NS

log = logging.getLogger(__name__)

FOLD_S = 600
"""What repeats within so many seconds of its first is one event, and is told once."""

WAITING = 1000
"""Events that wait for a disk that takes none."""

AGAIN_S = 10.0
_FOLDING = 1000
_TEXT = 2000


class Events:
    """Events of one mount. `tell` and `run` from the trio thread; what says so blocks."""

    def __init__(self, state: Path, *, limit: int = LIMIT) -> None:
        """Take the state directory."""
        self.listeners: list[Callable[[Event], None]] = []
        """Each is called with each new event, not with repeats; must not wait or raise."""
        self.counts: dict[EventLevel, int] = dict.fromkeys(EventLevel, 0)
        """Events told since the start, by level, with repeats."""
        self._database = Database(state, limit)
        self._folding: OrderedDict[str, Row] = OrderedDict()
        self._waiting: deque[Row] = deque()
        self._lost = 0
        self._failed = False
        self._news = trio.Event()
        self._memory = threading.Lock()
        self._writing = threading.Lock()

    def tell(
        self, code: str, subject: str, text: str, *, disk: str = "", todo: str = "",
        health: str = "", fold: str | None = None,
    ) -> None:  # fmt: skip
        """Note an event that happens now. Never waits, never fails.

        Args:
            code: of `CODES`, or of the end of a condition.
            subject: what it concerns: a disk, a failover, a site.
            text: one line.
            disk: the disks that it concerns, with commas between.
            todo: what to do, where that is better known than by the code.
            health: the disk's, with it.
            fold: events of one code and subject are the same if this is; by default the text.
        """
        known, now = code_of(code), time.time_ns()
        event = Event(
            code, known.level, _line(subject), _line(disk), _line(text),
            _line(todo or known.todo), health, 1, now, now, is_open=known.is_condition,
        )  # fmt: skip
        key = f"{code}\0{subject}\0{event.text if fold is None else fold}"
        with self._memory:
            self.counts[known.level] += 1
            row = self._fold(key, event) if not code.endswith(OVER) else None
            is_new = row is None
            if row is None:
                row = Row(event)
                self._begin(key, row)
            if row not in self._waiting:
                self._waiting.append(row)
            if len(self._waiting) > WAITING:
                self._waiting.popleft()
                self._lost += 1
        if is_new:
            self._publish(event)
        self._news.set()

    def end(self, code: str, subject: str, text: str, *, disk: str = "", health: str = "") -> None:
        """Note that a condition is over: the next of its kind is a new one."""
        with self._memory:
            for key in [one for one in self._folding if one.startswith(f"{code}\0{subject}\0")]:
                row = self._folding.pop(key)
                row.event = replace(row.event, is_open=False)
        self.tell(code + OVER, subject, text, disk=disk, health=health)

    def _fold(self, key: str, event: Event) -> Row | None:
        """Count a repeat to its first; None: it is none."""
        row = self._folding.get(key)
        if row is None or event.last_ns - row.event.first_ns >= FOLD_S * NS:
            return None
        first = row.event
        row.event = replace(event, count=first.count + 1, first_ns=first.first_ns)
        return row

    def _begin(self, key: str, row: Row) -> None:
        self._folding[key] = row
        self._folding.move_to_end(key)
        if len(self._folding) > _FOLDING:
            self._folding.popitem(last=False)

    def _publish(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)

    # ---- the database ------------------------------------------------------------------

    async def run(self) -> None:
        """Write what is told until cancelled; what is told last is written then."""
        try:
            while True:
                await self._news.wait()
                self._news = trio.Event()
                await trio.to_thread.run_sync(self.flush)
                if self._waiting:
                    with trio.move_on_after(AGAIN_S):
                        await trio.sleep_forever()
                    self._news.set()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.flush)

    async def wait_kept(self) -> None:
        """Wait until all that was told is durable; or the disk has refused it, and it waits."""
        await trio.to_thread.run_sync(self.flush)

    def flush(self) -> None:
        """Write what waits; what the disk does not take goes on waiting. Blocks."""
        with self._writing:
            with self._memory:
                rows, lost = list(self._waiting), self._lost
                self._waiting.clear()
                self._lost = 0
            if not rows:
                return
            if lost:
                rows.append(_lost(lost))
            try:
                self._write(rows)
            except (OSError, sqlite3.Error) as error:
                if not self._failed:
                    log.warning("events are not kept for now: %s: %s", self._database.path, error)
                self._failed = True
                with self._memory:
                    kept = rows[:-1] if lost else rows
                    later = [row for row in self._waiting if row not in kept]
                    self._waiting = deque([*kept, *later])
                    self._lost += lost
            else:
                if self._failed:
                    log.info("events are kept again")
                self._failed = False

    def _write(self, rows: list[Row]) -> None:
        try:
            self._database.write(rows)
        except sqlite3.DatabaseError:
            # A damaged one is set aside by now: the next try begins a new one.
            self._database.write(rows)

    def since(
        self, time_ns: int, limit: int, *, after: int = 0, level: EventLevel = EventLevel.INFO,
        disk: str = "",
    ) -> list[Event]:  # fmt: skip
        """Return the newest events from a time on, at most so many, the newest last. Blocks."""
        self.flush()
        try:
            return self._database.read(
                since_ns=time_ns, after=after, level=level, disk=disk, limit=limit
            )
        except (OSError, sqlite3.Error) as error:
            log.warning("events cannot be read: %s: %s", self._database.path, error)
            return []

    def was_told(self, code: str, subject: str) -> bool:
        """Say whether an event of a code was told of a subject, as long as it is kept. Blocks."""
        self.flush()
        try:
            return self._database.has(code, subject)
        except (OSError, sqlite3.Error) as error:
            log.warning("events cannot be read: %s: %s", self._database.path, error)
            return False

    def last_text(self, code: str, subject: str) -> str | None:
        """Return the text of the last event of a code and subject; "": there is none. Blocks.

        None: it cannot be told.
        """
        self.flush()
        try:
            return self._database.last_text(code, subject)
        except (OSError, sqlite3.Error) as error:
            log.warning("events cannot be read: %s: %s", self._database.path, error)
            return None

    def open_conditions(self) -> list[Event]:
        """Return the conditions that were told, and are not over. Blocks."""
        self.flush()
        try:
            return self._database.open_conditions()
        except (OSError, sqlite3.Error) as error:
            log.warning("events cannot be read: %s: %s", self._database.path, error)
            return []


def _line(text: str) -> str:
    """Return the text as one line of bounded length, without what a terminal would obey."""
    line = " ".join(text.split())
    line = "".join(one if one.isprintable() else "?" for one in line)
    return line if len(line) <= _TEXT else f"{line[: _TEXT - 3]}..."


def _lost(count: int) -> Row:
    now, code = time.time_ns(), code_of("watch.lost")
    return Row(Event(
        code.name, code.level, "events", "", f"{count} events were lost", code.todo, "", 1, now,
        now, is_open=False,
    ))  # fmt: skip
