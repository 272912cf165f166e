"""Jobs in SQLite: ``STATE/jobs.db``. Blocks."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from vdiskfs.jobs.record import Job, JobKind, JobState
from vdiskfs.sqlitefile import SqliteFile

log = logging.getLogger(__name__)

VERSION = 1

PAGES = 2048
"""The most that the file may take, in pages of 4 KiB: 8 MiB."""

_COLUMNS = tuple(item.name for item in fields(Job))
_NAMES = ", ".join(_COLUMNS)
_MARKS = ", ".join("?" * len(_COLUMNS))
_TYPES = ", ".join(
    f"{name} NOT NULL" if name != "id" else "id TEXT PRIMARY KEY NOT NULL" for name in _COLUMNS
)
_NUMBERS = ("number", "began_ns", "ended_ns", "code")
_TEXTS = ("id", "disk", "disk_id", "outcome", "error", "hint")
_SCHEMA = f"CREATE TABLE jobs ({_TYPES});\n"


class JobDatabase:
    """The jobs of one state directory, for any thread."""

    def __init__(self, state: Path) -> None:
        """Take the state directory; nothing is opened."""
        self.path = state / "jobs.db"
        self._file = SqliteFile(
            self.path, what="jobs", version=VERSION, schema=_SCHEMA, pages=PAGES
        )

    def read(self) -> tuple[list[Job], int]:
        """Return all jobs, the oldest first, and the highest number that is taken.

        Raises:
            OSError, sqlite3.Error: they cannot be read.
        """
        query = f"SELECT {_NAMES} FROM jobs ORDER BY number"  # noqa: S608 (no input)
        with self._file.opened() as database:
            rows = database.execute(query).fetchall()
        found = [_job(row) for row in rows]
        if None in found:
            log.warning("%s: jobs that are damaged, or of a later version, are left out: %d",
                        self.path, found.count(None))  # fmt: skip
        numbers = (row[_COLUMNS.index("number")] for row in rows)
        taken = max((one for one in numbers if _is_number(one)), default=0)
        return [job for job in found if job is not None], taken

    def write(self, jobs: Sequence[Job], gone: Collection[str]) -> None:
        """Add or update jobs, and remove those of some ids; durable on return.

        Raises:
            OSError, sqlite3.Error: nothing was written.
        """
        put = f"INSERT OR REPLACE INTO jobs ({_NAMES}) VALUES ({_MARKS})"  # noqa: S608 (no input)
        with self._file.opened() as database:
            for job in jobs:
                values = list(astuple(job))
                values[_COLUMNS.index("steps")] = json.dumps(job.steps)
                database.execute(put, values)
            database.executemany("DELETE FROM jobs WHERE id = ?", [(one,) for one in gone])


def _job(row: tuple[object, ...]) -> Job | None:
    """Return the job of a row; None: a later version has written it, or it is damaged."""
    values = dict(zip(_COLUMNS, row, strict=True))
    try:
        values["kind"] = JobKind(str(values["kind"]))
        values["state"] = JobState(str(values["state"]))
        steps = json.loads(str(values["steps"]))
        values["steps"] = tuple((str(name), at) for name, at in steps)
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = [*(values[name] for name in _NUMBERS), *(at for _, at in steps)]
    if not all(_is_number(one) for one in numbers):
        return None
    if not all(isinstance(values[name], str) for name in _TEXTS):
        return None
    return Job(**values)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    """Tell what is a count, or a time in nanoseconds."""
    return type(value) is int and 0 <= value < 1 << 62
