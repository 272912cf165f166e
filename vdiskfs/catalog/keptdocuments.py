"""Copies of the vault's policies, groups and machines, on this host, for repairs.

A copy that may be lost, and may be old: whoever uses one has to prove that it is what the vault
had. Read again is only what has another etag.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trio

from vdiskfs.catalog.documents import DOCUMENT_LIMIT, decode_document
from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.store import Store

KEPT = ("policies/", "groups/", "machines/")
"""Where documents lie that people wrote: nothing makes them anew."""


@dataclass(frozen=True, slots=True)
class DocumentCopy:
    """A document as it was once read whole, and the etag that it had then ("": not known)."""

    data: bytes
    etag: str = ""


class KeptDocuments:
    """The copies of one mount, in its state directory."""

    def __init__(self, store: Store, directory: Path) -> None:
        """Use a directory, which is made when something is put there."""
        self._store = store
        self._cache = IndexCache(directory)
        self._seen: dict[str, str] = {}

    async def look(self) -> None:
        """Copy what has changed: a listing for each kind where nothing has.

        Raises:
            VaultUnreachableError, RefusedError: as the store.
            OSError: the local disk is full, or damaged.
        """
        for prefix in KEPT:
            for info in [info async for info in self._store.list(prefix)]:
                if self._seen.get(info.name) == info.etag:
                    continue
                try:
                    data, read = await self._store.read(info.name, limit=DOCUMENT_LIMIT)
                    decode_document(data, where=info.name)
                except NotFoundError:
                    continue
                except DamagedError:
                    self._seen[info.name] = info.etag  # the copy stays what it is
                    continue
                copy = {info.name: read.etag.encode() + b"\n" + data}
                await trio.to_thread.run_sync(self._cache.put_aside, copy)
                self._seen[info.name] = read.etag

    async def copies(self, name: str) -> list[DocumentCopy]:
        """Return what was kept of a document."""
        kept = await trio.to_thread.run_sync(self._cache.copies, name)
        found = []
        for one in kept:
            etag, _, data = one.partition(b"\n")
            found.append(DocumentCopy(data, etag.decode(errors="replace")))
        return found
