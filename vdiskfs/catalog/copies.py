"""Where a page is once more: whichever frames of a disk hold the same bytes.

Each search opens all slots and leaves of the disk, one after the other. So pages are asked for
first, those of all damaged objects together, and then looked for at once; only their places are
kept, and not the pages.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import trio

from vdiskfs.catalog.beside import Beside, is_first
from vdiskfs.catalog.inspection import READS_AT_ONCE, Inspection
from vdiskfs.catalog.walk import is_damage
from vdiskfs.delta.blocks import DATA
from vdiskfs.delta.entries import U64, Entries, select_pages
from vdiskfs.delta.layout import LIMIT
from vdiskfs.errors import VdiskfsError
from vdiskfs.point import Piece, PieceInfo
from vdiskfs.point.fetch import fetch_pages, locate
from vdiskfs.units import PAGE_SIZE

Key = tuple[int, int]
"""A page's number and its sum."""

ASKED_MOST = 1 << 18
"""Pages of one search, but for those of the last object that asks: 1 GiB of them, about 100 MB."""

_DOUBTFUL_MOST = 6


@dataclass(frozen=True, slots=True)
class _Place:
    """A delta whose index says that it has a page, and in which frame."""

    info: PieceInfo
    frame: tuple[str, int]
    sound: bool


class Copies:
    """Pages that are asked for, and where they are."""

    def __init__(self, work: Inspection, beside: Beside, damaged: Collection[str]) -> None:
        """Prepare.

        Args:
            work: the disk's.
            beside: its deltas.
            damaged: names of objects of which some frames cannot be read.
        """
        self._work = work
        self._beside = beside
        self._damaged = damaged
        self._asked: set[Key] = set()
        self._places: dict[Key, list[_Place]] = {}

    @property
    def is_full(self) -> bool:
        """Say whether no more pages should be asked for before they are looked for."""
        return len(self._asked) >= ASKED_MOST

    def unknown(self, wanted: Mapping[int, set[int]]) -> set[Key]:
        """Return those pages that were not looked for yet."""
        return {(page, one) for page, sums in wanted.items() for one in sums} - self._places.keys()

    def ask(self, keys: Collection[Key]) -> None:
        """Let the next search look for pages."""
        self._asked.update(keys)

    async def search(self) -> None:
        """Look for what was asked for; what was found before is forgotten."""
        if not self._asked:
            return
        self._places = {key: [] for key in self._asked}
        self._asked = set()
        missing = set(self._places)
        pages = np.array(sorted({page for page, _ in missing}), np.uint64)
        for info in self._beside.deltas():
            if not missing:
                return
            # The others refer to what slots and leaves have.
            piece = await self._beside.opened(info) if is_first(info) else None
            if piece is None:
                continue
            try:
                await self._look_into(piece, pages, missing)
            except VdiskfsError as error:
                if not is_damage(error):
                    raise

    async def _look_into(self, piece: Piece, pages: U64, missing: set[Key]) -> None:
        def needed(first: int, last: int) -> bool:
            at = int(np.searchsorted(pages, np.uint64(first)))
            return at < len(pages) and int(pages[at]) <= last

        for row in await piece.rows(DATA, 0, LIMIT - 1, needed):
            entries = await piece.entries(row)
            pageno, owner = entries.pages()
            for at in np.flatnonzero(np.isin(pageno, pages)).tolist():
                key = (int(pageno[at]), int(entries.sums[at]))
                if key in missing:
                    await self._note(piece, entries, int(owner[at]), key, missing)

    async def _note(
        self, piece: Piece, entries: Entries, row: int, key: Key, missing: set[Key]
    ) -> None:
        number, name = int(entries.object[row]), piece.name
        if number:
            name = (await piece.object_ref(number)).name(self._work.record.id)
        place = _Place(piece.info, (name, int(entries.offset[row])), name not in self._damaged)
        known = self._places[key]
        if place.sound:
            known.insert(0, place)
            missing.discard(key)
        elif len(known) < _DOUBTFUL_MOST and place.frame not in {one.frame for one in known}:
            known.append(place)

    async def read(self, wanted: Mapping[int, set[int]]) -> dict[Key, bytes]:
        """Read those pages that were found, each verified."""
        found: dict[Key, bytes] = {}
        for turn in range(_DOUBTFUL_MOST + 1):
            by_name: dict[str, list[Key]] = {}
            infos: dict[str, PieceInfo] = {}
            for page, sums in wanted.items():
                for one in sums:
                    places = self._places.get((page, one), [])
                    if (page, one) not in found and turn < len(places):
                        info = infos.setdefault(places[turn].info.name, places[turn].info)
                        by_name.setdefault(info.name, []).append((page, one))
            for name, keys in by_name.items():
                piece = await self._beside.opened(infos[name])
                if piece is not None:
                    await self._read_of(piece, keys, found)
        return found

    async def _read_of(self, piece: Piece, keys: list[Key], found: dict[Key, bytes]) -> None:
        for key in sorted(keys):
            try:
                page = await _page(self._work, piece, key)
            except VdiskfsError as error:
                if not is_damage(error):
                    raise
                continue
            if page is not None:
                found[key] = page


async def _page(work: Inspection, piece: Piece, key: Key) -> bytes | None:
    """Read a page; None: the delta has another one.

    Raises:
        DamagedError, NotFoundError: it cannot be read.
    """
    for row in await piece.rows(DATA, key[0], key[0]):
        entries = await piece.entries(row)
        pageno, owner = entries.pages()
        mine = np.flatnonzero((pageno == key[0]) & (entries.sums == np.uint64(key[1])))
        if len(mine):
            chosen = select_pages(entries, pageno, owner, mine[:1])
            out = bytearray(PAGE_SIZE)
            limiter = trio.CapacityLimiter(READS_AT_ONCE)
            found = await locate(piece, chosen)
            await fetch_pages(work.store, [found], chosen.pages()[0], out, limiter)
            return bytes(out)
    return None
