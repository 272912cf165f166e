"""Points for people: what a list shows, and what the ways to name one mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vdiskfs.delta.layout import Flags
from vdiskfs.delta.points import PointRow, PointTable
from vdiskfs.errors import UsageError
from vdiskfs.units import format_time, parse_time

LATEST = "latest"
LATEST_APPLICATION = "latest-application-consistent"
LATEST_PROVEN = "latest-proven"


@dataclass(frozen=True, slots=True)
class Point:
    """A recovery point: an epoch of a generation whose deltas the vault holds.

    ``proof`` is the level proven: ``stored`` (the vault has acknowledged it), or more, where
    `catalog.proofs.with_proofs` has looked; LEVEL-failed where that was tried and failed.
    ``held``: it stays whatever its disk's policy says. ``recovery_s``: seconds that a machine
    took on it until it answered, the last time that was measured.
    """

    generation: int
    epoch: int
    time_ns: int
    flags: Flags
    size: int
    changed_bytes: int
    stored_bytes: int
    label: str = ""
    proof: str = "stored"
    held: bool = False
    recovery_s: float | None = None

    @property
    def time(self) -> str:
        """Return the time of the seal: ISO 8601, UTC."""
        return format_time(self.time_ns)

    @property
    def consistency(self) -> str:
        """Return ``crash`` or ``application``."""
        return "application" if self.flags & Flags.APPLICATION else "crash"


@dataclass(frozen=True, slots=True)
class Tip:
    """Where a generation ends: what the next delta must start from."""

    generation: int
    epoch: int
    digest: bytes
    time_ns: int
    size: int
    fenced: bool


def point_of(row: PointRow, generation: int, *, held: bool = False) -> Point:
    """Return a row of a table as a point of a generation."""
    return Point(
        generation, row.epoch, row.time_ns, row.flags, row.size, row.changed_bytes,
        row.stored_bytes, row.label, held=held,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a name of a point asks for: an epoch, or the newest point with these properties.

    The newest of all where nothing is set; at or before ``until_ns`` where that is. ``proven``:
    of which more is known than that the vault has acknowledged it.
    """

    epoch: int | None = None
    until_ns: int | None = None
    application: bool = False
    proven: bool = False


def parse_spec(spec: str | int, now_ns: int) -> Wanted:
    """Return what an epoch number, a time, ``-15m`` or ``latest...`` means.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(spec, int):
        return Wanted(epoch=spec)
    text = spec.strip()
    if text == LATEST:
        return Wanted()
    if text == LATEST_PROVEN:
        return Wanted(proven=True)
    if text == LATEST_APPLICATION:
        return Wanted(application=True)
    if text.isascii() and text.isdigit() and len(text) < 19:
        return Wanted(epoch=int(text))
    try:
        return Wanted(until_ns=max(0, parse_time(text, now_ns)))
    except (ValueError, OverflowError):
        raise UsageError(
            f"not a point: {spec[:80]!r}",
            hint="use an epoch, a time such as 2026-11-21T01:40:05Z, -15m, or latest",
        ) from None


def newest_row(table: PointTable, wanted: Wanted, end: int) -> int | None:
    """Return the row of the newest point of a table that is wanted, up to an epoch."""
    fits = table.epoch <= np.uint64(end)
    if wanted.epoch is not None:
        fits &= table.epoch == np.uint64(wanted.epoch)
    if wanted.until_ns is not None:
        fits &= table.time_ns <= np.uint64(max(0, wanted.until_ns))
    if wanted.application:
        fits &= (table.flags & np.uint8(Flags.APPLICATION)) != 0
    rows = np.flatnonzero(fits)
    return int(rows[-1]) if len(rows) else None
