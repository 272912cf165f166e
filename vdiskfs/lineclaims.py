"""What a site claims of a disk's line, and remembers of it: the base of `ownership.DiskLine`.

A number is known here, in ``owner.json``, before the vault can know it, so that a crash in
between finds its own effect there.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from vdiskfs.catalog import DiskLog, DiskRecord, IndexCache, Vault
from vdiskfs.catalog.owners import Claim, claim
from vdiskfs.catalog.records import REFUSED, Handover
from vdiskfs.crash import hook
from vdiskfs.image import ChainEnd
from vdiskfs.ownernote import Displaced, Note, place_of, write_note


class LineClaims:
    """A disk's note and its claims. Trio thread only."""

    def __init__(
        self, *, vault: Vault, name: str, disk_id: str, directory: Path, site: str, writer: str
    ) -> None:
        """Prepare; ``directory`` is the disk's."""
        self.name = name
        self.displaced: Displaced | None = None
        self.asked: Handover | None = None
        """Who asks for the disk, as it was seen last."""
        self._vault = vault
        self._disk_id = disk_id
        self._directory = directory
        self._site = site
        self._writer = writer
        self._note = Note()
        self._points: DiskLog | None = None
        self._stored: ChainEnd | None = None

    @property
    def points(self) -> DiskLog:
        """The line that is written, with its ancestors; once started."""
        if self._points is None:
            raise RuntimeError(f"disk {self.name} is not started")
        return self._points

    @property
    def _end(self) -> ChainEnd:
        """The newest epoch that the line holds."""
        if self._stored is None:
            raise RuntimeError(f"disk {self.name} is not started")
        return self._stored

    @property
    def handed(self) -> bool:
        """Whether the disk was released, and not given back."""
        return self._note.handed != ""

    @property
    def is_elsewhere(self) -> bool:
        """Whether another site has the disk, or may take it: it is sealed with no others."""
        return self.displaced is not None or self.handed

    def _log(self, record: DiskRecord, generation: int | None = None) -> DiskLog:
        cache = IndexCache(self._directory / "indexes")
        return self._vault.log(record, generation, cache=cache)

    def _claim(self, record: DiskRecord, start: str = "") -> Claim:
        known = {self._note.start, self._note.pending} - {""}
        return Claim(self._site, self._writer, start, known)

    async def _new_claim(self, record: DiskRecord) -> Claim:
        """Return a claim whose number is known here before the vault can know it."""
        before = self._claim(record)
        start = secrets.token_hex(16)
        own = record.owner.start if record.owner is not None else ""
        kept = own if own in before.known else self._note.start
        await self._write(start=kept, pending=start)
        hook("owner.noted")
        return replace(before, start=start)

    async def _claimed(self, record: DiskRecord) -> DiskRecord:
        wanted = await self._new_claim(record)
        record = await claim(self._vault, record, wanted)
        await self._own(wanted)
        return record

    async def _own(self, wanted: Claim) -> None:
        await self._write(
            start=wanted.start, pending="", token="", line=0, by="", since="", handed=""
        )
        hook("owner.kept")

    async def _write(self, **changes: Any) -> None:
        note = replace(self._note, place=place_of(self._directory), **changes)
        await trio.to_thread.run_sync(write_note, self._directory, note)
        self._note = note

    def _is_mine(self, record: DiskRecord) -> bool:
        owner = record.owner
        if owner is None or owner.writer != self._writer:
            return owner is None
        return owner.start in (self._note.start, self._note.pending)

    def _is_away(self, record: DiskRecord) -> bool:
        """Say whether a disk that was released is still another site's, or promised to it."""
        if record.owner is not None and record.owner.writer != self._writer:
            return True
        asked = record.handover
        return asked is not None and asked.id == self._note.handed and asked.step != REFUSED

    def _is_promised(self, record: DiskRecord) -> bool:
        """Say whether the disk was released here to a site that asks for it still."""
        return self._note.handed != "" and self._is_away(record)

    def _is_returned(self, record: DiskRecord) -> bool:
        """Say whether the branch that is written here is the main line now."""
        return record.generation == self._note.line and self._claim(record).is_of(record.owner)

    async def _is_unfinished(self, record: DiskRecord) -> bool:
        """Say whether only a fence stands in our way."""
        if not self._is_mine(record) or record.generation != self.points.generation:
            return False
        tip = await self._log(record).tip()
        return tip.fenced and tip.digest == self._end.digest
