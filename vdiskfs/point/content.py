"""Where a point has data, page by page, in order: from its indexes alone.

The cost is that of the index blocks, however large the disk is and wherever its data lie.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import numpy as np

from vdiskfs.delta.blocks import DATA
from vdiskfs.delta.entries import U64, distinct
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.point.chosen import PieceError
from vdiskfs.point.reader import PointReader

BATCH = 16384
"""Pages that are looked at once."""


async def data_pages(reader: PointReader, first_page: int = 0) -> AsyncGenerator[U64, None]:
    """Yield the pages that have data, from one on, in order, up to `BATCH` at once.

    Raises:
        DamagedError: an index cannot be read.
        VaultUnreachableError, RefusedError: as the store.
    """
    position: int | None = first_page
    while position is not None and position < reader.pages:
        try:
            position, pages = await _named(reader, position)
        except PieceError as broken:
            found = broken
        else:
            for at in range(0, len(pages), BATCH):
                part = await reader.choose(pages[at : at + BATCH])
                if part.full.any():
                    yield part.pages[part.full]
            continue
        await reader.go_round(found.piece, found.error)


async def _named(reader: PointReader, position: int) -> tuple[int | None, U64]:
    """Return pages that deltas name, and where what follows them begins; None: nothing does.

    Up to where the first block of any of them ends, so that one block of each is held.
    """
    rows = []
    for piece in reader.pieces:
        try:
            row = await piece.next_row(DATA, position)
        except (DamagedError, NotFoundError) as error:
            raise PieceError(piece, error) from error
        if row is not None:
            rows.append((piece, row))
    if not rows:
        return None, np.empty(0, np.uint64)
    stop = min(int(row["last"]) + 1 for _, row in rows)
    parts = [np.empty(0, np.uint64)]
    for piece, row in rows:
        if int(row["first"]) < stop:
            try:
                entries = await piece.entries(row)
            except (DamagedError, NotFoundError) as error:
                raise PieceError(piece, error) from error
            pages = entries.within(position, stop).pages()[0]
            parts.append(pages[(pages >= np.uint64(position)) & (pages < np.uint64(stop))])
    return stop, distinct(np.concatenate(parts))
