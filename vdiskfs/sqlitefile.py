"""A small SQLite file of the state directory: sound, or set aside and begun anew.

Blocks; one connection for each call, none is kept.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from vdiskfs.crash import hook

log = logging.getLogger(__name__)

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
_BUSY_S = 5.0


class SqliteFile:
    """One file, for any thread."""

    def __init__(
        self, path: Path, *, what: str, version: int, schema: str, pages: int,
        fill: Callable[[sqlite3.Connection], None] = lambda _: None,
        filled: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Nothing is opened yet.

        Args:
            path: ends in ``.db``; what is damaged, or of another version, gets ``.damaged`` behind.
            what: is in it, for messages: "events".
            version: of the schema.
            schema: statements, each with a semicolon at its end.
            pages: the most that the file may take, in pages of 4 KiB.
            fill: adds to a new one, in the transaction that makes it.
            filled: is called when that is durable.
        """
        self.path = path
        self._what = what
        self._version = version
        self._schema = schema
        self._pages = pages
        self._fill = fill
        self._filled = filled
        # Nobody reads what another thread sets aside.
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def opened(self) -> Iterator[sqlite3.Connection]:
        """Give a connection within a transaction, to a file that is there and sound.

        Raises:
            OSError, sqlite3.Error: nothing was written; one that is damaged is set aside, and
                the next try begins a new one.
        """
        with self._lock:
            try:
                database = self._connect()
            except sqlite3.DatabaseError as error:
                if not _is_damaged(error):
                    raise
                self._set_aside(error)
                database = self._connect()
            try:
                with database:
                    yield database
            except sqlite3.DatabaseError as error:
                database.close()
                if _is_damaged(error):
                    self._set_aside(error)
                raise
            finally:
                database.close()

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=_BUSY_S)
        try:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version not in (0, self._version):
                raise sqlite3.DatabaseError(f"version {version} is not known here")
            database.execute("PRAGMA journal_mode = TRUNCATE")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(f"PRAGMA max_page_count = {self._pages}")
            if version == 0:
                self._begin(database)
        except BaseException:
            database.close()
            raise
        return database

    def _begin(self, database: sqlite3.Connection) -> None:
        with database:
            database.execute("BEGIN IMMEDIATE")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version:
                return  # another process was faster
            for statement in self._schema.split(";")[:-1]:
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {self._version}")
            self._fill(database)
        hook(f"{self._what}.begun")
        self._filled()

    def _set_aside(self, error: sqlite3.Error) -> None:
        aside = self.path.with_suffix(".db.damaged")
        log.error("%s: cannot be read and is set aside as %s; %s begin anew: %s",
                  self.path, aside.name, self._what, error)  # fmt: skip
        self.path.replace(aside)
        self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)
        hook(f"{self._what}.set-aside")


def _is_damaged(error: sqlite3.Error) -> bool:
    """Tell a file that is no such database from a disk that is full or fails."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is None or code & 0xFF in _DAMAGED
