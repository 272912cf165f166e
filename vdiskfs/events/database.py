"""Events in SQLite: ``STATE/events.db``. Blocks; one connection for each call, none is kept.

The oldest go beyond `LIMIT`, but for conditions that are not over. A database that is damaged,
or of a later version, is set aside as ``events.db.damaged``, with one line in the log. What an
earlier version kept in ``events.jsonl`` is taken over.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from vdiskfs.crash import hook
from vdiskfs.events.codes import OVER, EventLevel, code_of
from vdiskfs.sqlitefile import SqliteFile

LIMIT = 20_000
"""Rows that are kept."""

PAGES = 16_384
"""The most that the file may take, in pages of 4 KiB: 64 MiB."""

VERSION = 1


@dataclass(frozen=True, slots=True)
class Event:
    """One event, and its repeats.

    ``subject`` is what it concerns: a disk, a failover, the mount; ``disk`` are the disks, with
    commas between. ``health`` is a disk's health with it. ``is_open``: a condition that goes on.
    ``number`` grows with each event and each repeat; 0: not kept yet.
    """

    code: str
    level: EventLevel
    subject: str
    disk: str
    text: str
    todo: str
    health: str
    count: int
    first_ns: int
    last_ns: int
    is_open: bool
    number: int = 0


@dataclass(eq=False, slots=True)
class Row:
    """An event that is to be written, or was; 0: it has no row yet."""

    event: Event
    row_id: int = 0


_COLUMNS = tuple(item.name for item in fields(Event))
_SCHEMA = f"""
CREATE TABLE events (id INTEGER PRIMARY KEY, {", ".join(f"{name} NOT NULL" for name in _COLUMNS)});
CREATE INDEX by_number ON events (number);
CREATE INDEX by_open ON events (is_open) WHERE is_open;
"""
_NAMES = ", ".join(_COLUMNS)


class Database:
    """The events of one state directory, for any thread."""

    def __init__(self, state: Path, limit: int = LIMIT) -> None:
        """Take the state directory; nothing is opened."""
        self.path = state / "events.db"
        self._old = (state / "events.jsonl.1", state / "events.jsonl")
        self._limit = limit
        self._file = SqliteFile(
            self.path, what="events", version=VERSION, schema=_SCHEMA, pages=PAGES,
            fill=self._fill, filled=self._forget_old,
        )  # fmt: skip

    def write(self, rows: Sequence[Row]) -> None:
        """Add or update rows, and give them their ids and numbers; durable on return.

        Raises:
            OSError, sqlite3.Error: nothing was written.
        """
        written = []
        with self._file.opened() as database:
            (number,) = database.execute("SELECT coalesce(max(number), 0) FROM events").fetchone()
            for row in rows:
                number += 1
                event = replace(row.event, number=number)
                written.append((row, event, _put(database, row.row_id, event)))
            database.execute(
                "DELETE FROM events WHERE NOT is_open AND id <= "
                "(SELECT id FROM events ORDER BY id DESC LIMIT 1 OFFSET ?)", (self._limit,),
            )  # fmt: skip
        for row, event, row_id in written:
            row.event, row.row_id = event, row_id
        hook("events.kept")

    def read(
        self, *, since_ns: int = 0, after: int = 0, level: EventLevel = EventLevel.INFO,
        disk: str = "", limit: int,
    ) -> list[Event]:  # fmt: skip
        """Return the newest events, at most so many, the newest last.

        Args:
            since_ns: that happened, or were repeated, from then on.
            after: with a higher number.
            level: at least so bad.
            disk: that concern it; empty: all.
            limit: how many at most.

        Raises:
            OSError, sqlite3.Error: they cannot be read.
        """
        levels = [one for one in EventLevel if one.rank >= level.rank]
        marks = ", ".join("?" * len(levels))
        query = (
            f"SELECT {_NAMES} FROM events WHERE last_ns >= ? AND number > ? "  # noqa: S608 (no input)
            f"AND level IN ({marks}) AND (? = '' OR subject = ? OR "
            "instr(',' || disk || ',', ',' || ? || ',')) ORDER BY number DESC LIMIT ?"
        )
        values = (since_ns, after, *levels, disk, disk, disk, limit)
        with self._file.opened() as database:
            found = [_event(row) for row in database.execute(query, values)]
        return found[::-1]

    def has(self, code: str, subject: str) -> bool:
        """Say whether there is an event of a code that concerns a subject.

        Raises:
            OSError, sqlite3.Error: it cannot be read.
        """
        query = "SELECT 1 FROM events WHERE code = ? AND subject = ? LIMIT 1"
        with self._file.opened() as database:
            return database.execute(query, (code, subject)).fetchone() is not None

    def last_text(self, code: str, subject: str) -> str:
        """Return the text of the last event of a code that concerns a subject; "": there is none.

        Raises:
            OSError, sqlite3.Error: it cannot be read.
        """
        query = "SELECT text FROM events WHERE code = ? AND subject = ? ORDER BY number DESC"
        with self._file.opened() as database:
            found = database.execute(f"{query} LIMIT 1", (code, subject)).fetchone()
        return "" if found is None else str(found[0])

    def open_conditions(self) -> list[Event]:
        """Return the conditions that were told, and are not over.

        Raises:
            OSError, sqlite3.Error: they cannot be read.
        """
        query = f"SELECT {_NAMES} FROM events WHERE is_open ORDER BY number"  # noqa: S608 (no input)
        with self._file.opened() as database:
            return [_event(row) for row in database.execute(query)]

    def _fill(self, database: sqlite3.Connection) -> None:
        for number, event in enumerate(self._old_events(), 1):
            _put(database, 0, replace(event, number=number))

    def _forget_old(self) -> None:
        for path in self._old:
            path.unlink(missing_ok=True)

    def _old_events(self) -> Iterator[Event]:
        for path in self._old:
            try:
                lines = path.read_text(errors="replace").splitlines()
            except OSError:
                continue
            for line in lines[-self._limit :]:
                try:
                    yield _old_event(json.loads(line))
                except (ValueError, TypeError, KeyError):
                    continue  # the end of a line that a full disk has cut


def _put(database: sqlite3.Connection, row_id: int, event: Event) -> int:
    """Write a row, and end the condition that it ends; return its id."""
    if event.code.endswith(OVER):
        database.execute(
            "UPDATE events SET is_open = 0 WHERE is_open AND code = ? AND subject = ?",
            (event.code.removesuffix(OVER), event.subject),
        )
    if row_id:
        changes = ", ".join(f"{name} = ?" for name in _COLUMNS)
        done = database.execute(
            f"UPDATE events SET {changes} WHERE id = ?", (*astuple(event), row_id)  # noqa: S608 (no input)
        )  # fmt: skip
        if done.rowcount:
            return row_id
    marks = ", ".join("?" * len(_COLUMNS))
    done = database.execute(
        f"INSERT INTO events ({_NAMES}) VALUES ({marks})", astuple(event)  # noqa: S608 (no input)
    )  # fmt: skip
    return done.lastrowid or 0


def _event(row: tuple[object, ...]) -> Event:
    values = dict(zip(_COLUMNS, row, strict=True))
    values["level"] = EventLevel(str(values["level"]))
    values["is_open"] = bool(values["is_open"])
    return Event(**values)  # type: ignore[arg-type]


_OLD_CODES = {"failover": "failover.state", "machine": "machine.health", "job": "job.step"}


def _old_event(old: dict[str, object]) -> Event:
    code = code_of(_OLD_CODES.get(str(old["kind"]), "event.other"))
    time_ns, subject = int(str(old["time_ns"])), str(old["subject"])
    disk = subject if old["kind"] == "disk" else ""
    return Event(
        code.name, EventLevel.INFO, subject, disk, str(old["text"]), "", "", 1, time_ns, time_ns,
        is_open=False,
    )  # fmt: skip
