"""Reading a delta's whole index for ``check``: what it does to pages, what of it is damaged."""

from __future__ import annotations

import numpy as np

from vdiskfs.catalog.damage import Change
from vdiskfs.catalog.inspection import Inspection, bare
from vdiskfs.delta.blocks import DATA, ZEROS
from vdiskfs.delta.digest import ContentHasher
from vdiskfs.delta.entries import (
    NO_EXTENTS,
    U64,
    Extents,
    distinct,
    extents_of_pages,
    unite_extents,
)
from vdiskfs.delta.index import find_rows
from vdiskfs.delta.layout import LIMIT
from vdiskfs.errors import DamagedError, FormatError, NotFoundError, VdiskfsError
from vdiskfs.point import Piece
from vdiskfs.units import pages_of


async def look(work: Inspection, piece: Piece, hurt: Extents) -> Change:
    """Read the whole index of a delta; return what it does to the pages that are hurt.

    Blocks that cannot be read are reported, and their pages are ``bad``.

    Raises:
        FormatError: the index is whole and not what its digest says.
    """
    found = _Look(work, piece, hurt)
    await found.read_zeros()
    await found.read_data()
    work.looked_at(piece, whole=found.check_whole())
    return found.change()


class _Look:
    """One reading of a delta's index."""

    def __init__(self, work: Inspection, piece: Piece, hurt: Extents) -> None:
        self._work = work
        self._piece = piece
        self._hurt = hurt
        self._hasher = ContentHasher()
        self._zeros = NO_EXTENTS
        self._replaced: list[U64] = []
        self._bad: dict[int, list[Extents]] = {}
        self._whole = True
        self._torn_found = piece.head.torn_page is None

    async def read_zeros(self) -> None:
        """Read all runs of zeros."""
        parts = []
        for row in await self._rows(ZEROS):
            try:
                parts.append(await self._piece.zeros(row))
            except (DamagedError, NotFoundError) as error:
                await self._lose(row, error)
        self._zeros = unite_extents(parts)
        torn = self._piece.head.torn_page
        if torn is not None:
            self._torn_found = bool(self._zeros.contains(np.array([torn], np.uint64))[0])

    async def read_data(self) -> None:
        """Read all entries, and what they refer to."""
        piece = self._piece
        for row in await self._rows(DATA):
            try:
                entries = await piece.entries(row)
                if self._zeros.contains(entries.pages()[0]).any():
                    raise FormatError("a page is both zero and data", where=piece.name)
            except (DamagedError, NotFoundError) as error:
                await self._lose(row, error)
                continue
            pageno, _ = entries.pages()
            order = np.argsort(pageno, kind="stable")
            self._hasher.add_pages(pageno[order], entries.sums[order])
            self._torn_found = self._torn_found or piece.head.torn_page in pageno
            self._replaced.append(pageno[self._hurt.contains(pageno)])
            for problem, pages in (await self._work.bad_pages(piece, entries)).items():
                wrong = extents_of_pages(np.sort(pageno[pages]))
                self._bad.setdefault(problem, []).append(wrong)

    def check_whole(self) -> bool:
        """Check the digest, if all could be read; say whether it could.

        Raises:
            FormatError: the content is not what the digest says.
        """
        if not self._whole:
            return False
        head, where = self._piece.head, self._piece.name
        self._hasher.add_zeros(self._zeros)
        if self._hasher.digest() != head.content_digest:
            raise FormatError("its content is not what its digest says", where=where)
        if not self._torn_found:
            message = f"page {head.torn_page}, which the cut tears, is missing"
            raise FormatError(message, where=where)
        return True

    def change(self) -> Change:
        """Return what the delta does to hurt pages."""
        return Change(
            distinct(np.concatenate([np.empty(0, np.uint64), *self._replaced])),
            self._zeros,
            pages_of(self._piece.head.cut),
            {problem: unite_extents(parts) for problem, parts in self._bad.items()},
        )

    async def _rows(self, kind: int) -> list[np.void]:
        """Return the rows of blocks; pages of rows that cannot be read are reported."""
        found: list[np.void] = []
        for row in find_rows(self._piece.root, kind, 0, LIMIT - 1):
            try:
                found += list(await self._piece.rows(kind, int(row["first"]), int(row["last"])))
            except (DamagedError, NotFoundError) as error:
                await self._lose(row, error)
        for number in {int(row["object"]) for row in found} - {0}:
            self._work.use(await self._name(number), self._piece)
        return found

    async def _name(self, number: int) -> str:
        """Return the name of the object that holds a block."""
        if number:
            try:
                return (await self._piece.object_ref(number)).name(self._piece.head.disk_id)
            except (DamagedError, NotFoundError):
                pass  # the table that names it is itself damaged: this delta is to blame
        return self._piece.name

    async def _lose(self, row: np.void, error: VdiskfsError) -> None:
        self._whole = False
        name = await self._name(int(row["object"]))
        problem = self._work.problem(name, bare(error, name))
        run = np.array([int(row["first"]), int(row["last"]) + 1], np.uint64)
        self._bad.setdefault(problem, []).append(Extents(run[:1], run[1:]))
