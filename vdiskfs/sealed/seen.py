"""What a site has seen of a vault's changing objects, so that an older state is noticed.

Each version of an object that is changed by compare-and-swap has a revision, which is
authenticated with it and always grows. The largest one seen of each is remembered, in the state
directory where there is one. What another site's clock says does not matter: who changes an
object has seen it before.

Heartbeats and leases are remembered in memory alone: they change all the time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from vdiskfs.errors import DamagedError, LocalError, NotFoundError, WrongVaultError
from vdiskfs.state.files import read_record, remove_file, write_record

log = logging.getLogger(__name__)

SAVE_S = 5.0
"""Seconds between two writes to the state directory at least: what a kill may forget."""

_MOST = 65536
_PASSING = ("sites/", "leases/", "boot/")


class Seen:
    """The largest revision of each object, by its name in the store."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        vault_id: str = "",
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """Remember in a file, or only as long as this lives. Nothing is read yet."""
        self._path = path
        self._vault_id = vault_id
        self._clock = clock
        self._revisions: dict[str, int] = {}
        self._saved_at = -SAVE_S
        self._changed = False

    def load(self) -> None:
        """Read what earlier runs have seen. What is damaged is begun anew. Blocks."""
        if self._path is None:
            return
        try:
            body = read_record(self._path)
        except NotFoundError:
            return
        except DamagedError as error:
            log.warning("%s: what was seen of the vault is not known any more: %s",
                        self._path, error)  # fmt: skip
            return
        if body.get("vault_id") == self._vault_id and isinstance(body.get("revisions"), dict):
            self._revisions = {
                name: number for name, number in body["revisions"].items() if type(number) is int
            }

    def forget(self) -> None:
        """Accept whatever the vault holds now. Blocks; durable on return."""
        self._revisions.clear()
        if self._path is not None and self._path.exists():
            remove_file(self._path)

    @property
    def anything(self) -> bool:
        """Return whether any object was seen."""
        return bool(self._revisions)

    def get(self, stored: str) -> int:
        """Return the largest revision seen; ask before the object is asked for."""
        return self._revisions.get(stored, 0)

    def next(self, stored: str) -> int:
        """Return the revision of a new version."""
        return max(self._clock(), self.get(stored) + 1)

    def check(self, stored: str, revision: int, since: int, *, where: str, name: str) -> None:
        """Take note of a revision. ``since`` is what was known before the store was asked.

        Raises:
            WrongVaultError: it is older.
        """
        if revision < since:
            raise WrongVaultError(
                f"{where}: the vault has gone back in time: {name} is older than this site has "
                "seen it",
                hint="nothing is sent there; bring the vault back, or mount with"
                " --accept-rollback to go on from what it holds",
            )
        self.note(stored, revision)

    def note(self, stored: str, revision: int) -> None:
        """Take note of a version that was written or read."""
        if revision <= self.get(stored):
            return
        self._revisions.pop(stored, None)
        self._revisions[stored] = revision
        if len(self._revisions) > _MOST:
            del self._revisions[next(iter(self._revisions))]
        self._changed |= not stored.startswith(_PASSING)

    @property
    def due(self) -> bool:
        """Return whether it is time to `save`."""
        late = time.monotonic() - self._saved_at >= SAVE_S
        return self._path is not None and self._changed and late

    def save(self) -> None:
        """Write down what was seen, if anything is new. Blocks; durable on return.

        A disk that refuses is tried again later: what is known in memory holds.
        """
        if self._path is None or not self._changed:
            return
        self._changed = False
        self._saved_at = time.monotonic()
        kept = {
            name: number
            for name, number in list(self._revisions.items())
            if not name.startswith(_PASSING)
        }
        try:
            write_record(self._path, {"vault_id": self._vault_id, "revisions": kept})
        except (LocalError, OSError) as error:
            log.info("%s: not written: %s", self._path, error)
            self._changed = True
