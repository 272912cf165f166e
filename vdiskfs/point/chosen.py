"""Pages of a point that lie apart: what it holds there, and where that is stored.

The cost is that of the index blocks that name these pages, wherever on the disk they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vdiskfs.delta.blocks import DATA, ZEROS
from vdiskfs.delta.entries import I64, U8, U64, Bools, select_pages
from vdiskfs.errors import DamagedError, FormatError, NotFoundError, VdiskfsError
from vdiskfs.point.fetch import Found, locate, stored_bytes
from vdiskfs.point.kinds import FULL, ZERO
from vdiskfs.point.piece import Piece
from vdiskfs.units import pages_of


@dataclass(slots=True)
class Chosen:
    """What a point holds in ``pages``, in order; see ``kinds``. ``sums`` are of those with data."""

    pages: U64
    kind: U8
    sums: U64
    found: list[Found] = field(default_factory=list)

    @property
    def full(self) -> Bools:
        """Return for each page whether it has data."""
        mask: Bools = self.kind == FULL
        return mask

    @property
    def stored_bytes(self) -> int:
        """Return how many bytes of the vault gathering them takes, if they were located."""
        return stored_bytes(self.found)

    def differs(self, other: Chosen) -> Bools:
        """Return which of the same pages read otherwise at another point."""
        mask: Bools = (self.full != other.full) | (self.full & (self.sums != other.sums))
        return mask


class PieceError(Exception):
    """A piece of a chain could not be read."""

    def __init__(self, piece: Piece, error: VdiskfsError) -> None:
        super().__init__(str(error))
        self.piece = piece
        self.error = error


async def resolve_chosen(
    pieces: Sequence[Piece], pages: U64, size_pages: int, *, places: bool
) -> Chosen:
    """Resolve sorted pages through a chain, oldest first, of a disk of so many pages.

    Raises:
        PieceError: a delta of the chain cannot be read.
    """
    result = Chosen(pages, np.zeros(len(pages), np.uint8), np.zeros(len(pages), np.uint64))
    waiting = pages < np.uint64(size_pages)
    for piece in reversed(pieces):
        rest = np.flatnonzero(waiting)
        if not len(rest):
            break
        try:
            await _apply(piece, result, waiting, rest, places=places)
            torn = piece.head.torn_page
            if torn is not None and (waiting & (pages == np.uint64(torn))).any():
                raise FormatError(f"page {torn}, which the cut tears, is missing", where=piece.name)
        except (DamagedError, NotFoundError) as error:
            raise PieceError(piece, error) from error
        # Invariant: what is older than a cut has nothing to say beyond it.
        waiting &= pages < np.uint64(pages_of(piece.head.cut))
    return result


async def _apply(piece: Piece, result: Chosen, waiting: Bools, rest: I64, *, places: bool) -> None:
    """Let a piece decide what of the pages that still wait, ``rest``, it names."""
    wanted = result.pages[rest]
    first, last = int(wanted[0]), int(wanted[-1])

    def needed(low: int, high: int) -> bool:
        at = int(np.searchsorted(wanted, np.uint64(low)))
        return at < len(wanted) and int(wanted[at]) <= high

    zero = np.zeros(len(wanted), np.bool_)
    for row in await piece.rows(ZEROS, first, last, needed):
        zero |= (await piece.zeros(row)).contains(wanted)
    for row in await piece.rows(DATA, first, last, needed):
        entries = await piece.entries(row)
        pageno, owner = entries.pages()
        at = np.minimum(np.searchsorted(wanted, pageno), len(wanted) - 1)
        rows = np.flatnonzero(wanted[at] == pageno)
        if not len(rows):
            continue
        at = at[rows]
        if zero[at].any():
            raise FormatError("a page is both zero and data", where=piece.name)
        result.kind[rest[at]] = FULL
        result.sums[rest[at]] = entries.sums[rows]
        waiting[rest[at]] = False
        if places:
            chosen = select_pages(entries, pageno, owner, rows)
            result.found.append(await locate(piece, chosen))
    result.kind[rest[zero]] = ZERO
    waiting[rest[zero]] = False
