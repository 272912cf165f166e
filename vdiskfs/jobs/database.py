"""Jobs in SQLite: ``STATE/jobs.db``. Blocks."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from vdiskfs.jobs.record import Job, JobKind, JobState
from vdiskfs.sqlitefile import SqliteFile

VERSION = 1

PAGES = 2048
"""The most that the file may take, in pages of 4 KiB: 8 MiB."""

_COLUMNS = tuple(item.name for item in fields(Job))
_NAMES = ", ".join(_COLUMNS)
_MARKS = ", ".join("?" * len(_COLUMNS))
_TYPES = ", ".join(
    f"{name} NOT NULL" if name != "id" else "id TEXT PRIMARY KEY NOT NULL" for name in _COLUMNS
)
_SCHEMA = f"CREATE TABLE jobs ({_TYPES});\n"


class JobDatabase:
    """The jobs of one state directory, for any thread."""

    def __init__(self, state: Path) -> None:
        """Take the state directory; nothing is opened."""
        self.path = state / "jobs.db"
        self._file = SqliteFile(
            self.path, what="jobs", version=VERSION, schema=_SCHEMA, pages=PAGES
        )

    def read(self) -> list[Job]:
        """Return all jobs, the oldest first.

        Raises:
            OSError, sqlite3.Error: they cannot be read.
        """
        query = f"SELECT {_NAMES} FROM jobs ORDER BY number"  # noqa: S608 (no input)
        with self._file.opened() as database:
            found = [_job(row) for row in database.execute(query)]
        return [job for job in found if job is not None]

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
        values["steps"] = tuple((str(name), int(at)) for name, at in steps)
    except (ValueError, TypeError):
        return None
    return Job(**values)  # type: ignore[arg-type]
