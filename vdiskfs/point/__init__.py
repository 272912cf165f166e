"""A recovery point as a read-only disk: reading, restoring, comparing.

    reader    PointReader: which page is where, verified pages, sums
    piece     one delta of the chain, read block by block
    chosen    pages that lie apart
    content   where a point has data
    kinds     what a page may be
    fetch     ranged reads of frames
    cache     decoded blocks
    restore   a point as a file
    diff      where points of two disks differ (of one disk: catalog.differences)

Points are opened by ``catalog``, which knows what the vault holds.
"""

from vdiskfs.point.cache import BlockCache
from vdiskfs.point.chosen import Chosen
from vdiskfs.point.content import data_pages
from vdiskfs.point.diff import diff
from vdiskfs.point.kinds import ABSENT, FULL, ZERO
from vdiskfs.point.piece import Piece, PieceInfo, open_piece
from vdiskfs.point.reader import PointReader
from vdiskfs.point.restore import restore

__all__ = [
    "ABSENT",
    "FULL",
    "ZERO",
    "BlockCache",
    "Chosen",
    "Piece",
    "PieceInfo",
    "PointReader",
    "data_pages",
    "diff",
    "open_piece",
    "restore",
]
