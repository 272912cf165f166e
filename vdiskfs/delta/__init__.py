"""The delta: an immutable object that holds what changed between two epochs.

    layout     the head, flags, metadata of listings
    names      names of objects in the vault
    frames     compressed pages               segments   objects for many frames
    entries    columns of the index           blocks, columns, points   their stored form
    index      rows, pages, root: finding a block         builder, tail  making them
    writer     captured pages to a file of the spool
    local      reading a delta that lies in a file or in memory
    merge      several indexes into one       joined     joined deltas
    digest     what a point's chain proves

Synchronous, no network: what does I/O is given files, or functions that read.
The format: vdiskfs-format(5).
"""

from vdiskfs.delta.digest import genesis_digest
from vdiskfs.delta.frames import DEFAULT_LEVEL, PageBatch
from vdiskfs.delta.layout import NO_ID, DeltaHead, Flags, Kind, delta_metadata
from vdiskfs.delta.leftovers import remove_leftovers
from vdiskfs.delta.local import open_file
from vdiskfs.delta.segments import SpooledSegment
from vdiskfs.delta.writer import DeltaWriter, EpochFacts, Spooled, open_spooled, remove_spooled

__all__ = [
    "DEFAULT_LEVEL",
    "NO_ID",
    "DeltaHead",
    "DeltaWriter",
    "EpochFacts",
    "Flags",
    "Kind",
    "PageBatch",
    "Spooled",
    "SpooledSegment",
    "delta_metadata",
    "genesis_digest",
    "open_file",
    "open_spooled",
    "remove_leftovers",
    "remove_spooled",
]
