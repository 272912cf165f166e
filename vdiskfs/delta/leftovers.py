"""What a killed writer leaves in a spool: files that belong to no delta."""

from __future__ import annotations

import itertools
from pathlib import Path

from vdiskfs.delta.writer import open_spooled
from vdiskfs.errors import FormatError


def remove_leftovers(directory: Path) -> None:
    """Delete half-written files, and segments to which no delta beside them refers.

    Call it while nothing writes there. Where a delta is damaged its segments stay.
    """
    for path in directory.glob("*.tmp"):
        path.unlink()
    segments = set(directory.glob("*.segment"))
    if not segments:
        return
    for path in itertools.chain(directory.glob("*.delta"), directory.glob("*.part")):
        try:
            segments -= {segment.path for segment in open_spooled(path).segments}
        except FormatError:
            return
    for path in segments:
        path.unlink()
