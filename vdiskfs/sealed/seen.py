"""What a site has seen of a vault's changing objects, so that an older state is noticed.

Each version of an object that is changed by compare-and-swap has a revision, which is
authenticated with it and always grows. The largest one seen of each is remembered, in the state
directory where there is one. What another site's clock says does not matter: who changes an
object has seen it before.

Heartbeats and leases are remembered in memory alone: they change all the time. What this
site has deleted must not come back: its last version is older than what was seen. A lease that
it has deleted is forgotten: its name never comes again, and an old one ends by itself.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from vdiskfs.errors import DamagedError, LocalError, NotFoundError, WrongVaultError
from vdiskfs.sealed.names import VAULT, is_bulk
from vdiskfs.state.files import read_record, remove_file, write_record

log = logging.getLogger(__name__)

SAVE_S = 5.0
"""Seconds between two writes to the state directory at least: what a kill may forget."""

# Of each, so that no number of proofs displaces a document; 65,536 take 6 MB on disk.
_MOST = 32768
_MANY = re.compile(r"disks/[0-9a-f]{32}/proofs/.*|leases/.*")
_LEASES = "leases/"
_IN_MEMORY = ("sites/", _LEASES, "boot/")


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
        # What was used last is last.
        self._documents: dict[str, int] = {}
        self._many: dict[str, int] = {}
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
            for name, number in body["revisions"].items():
                # Earlier versions took note of ledgers.
                if type(number) is int and not is_bulk(name):
                    self._keep(name, number)

    def forget(self) -> None:
        """Accept whatever the vault holds now. Blocks; durable on return."""
        self._documents.clear()
        self._many.clear()
        if self._path is not None and self._path.exists():
            remove_file(self._path)

    @property
    def anything(self) -> bool:
        """Return whether any object was seen."""
        return bool(self._documents or self._many)

    def get(self, stored: str) -> int:
        """Return the largest revision seen; ask before the object is asked for."""
        return self._held(stored).get(stored, 0)

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
        known = self.get(stored)
        if max(known, revision):
            self._keep(stored, max(known, revision))
        self._changed |= revision > known and not stored.startswith(_IN_MEMORY)

    def gone(self, stored: str) -> None:
        """Take note that this site has deleted an object: what it was must not come back.

        Whoever makes it anew gives it a larger revision, as of one that was changed.
        """
        known = self.get(stored)
        if stored.startswith(_LEASES):
            self._many.pop(stored, None)
        elif known:
            self.note(stored, known + 1)

    def _held(self, stored: str) -> dict[str, int]:
        return self._many if _MANY.fullmatch(stored) else self._documents

    def _keep(self, stored: str, revision: int) -> None:
        held = self._held(stored)
        held.pop(stored, None)
        held[stored] = revision
        if len(held) > _MOST:
            del held[next(name for name in held if name != VAULT)]

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
            for name, number in [*self._documents.items(), *self._many.items()]
            if not name.startswith(_IN_MEMORY)
        }
        try:
            write_record(self._path, {"vault_id": self._vault_id, "revisions": kept})
        except (LocalError, OSError) as error:
            log.info("%s: not written: %s", self._path, error)
            self._changed = True
