"""How long an epoch lasts: the interval that was asked for, longer while changes outrun captures.

What a guest overwrites of an epoch that is being captured is copied first. A guest that
rewrites its disk faster than it can be captured would pay for every byte twice, for points
that are late anyway. So an epoch may have a bounded amount preserved; beyond that it is given
up (nothing is lost, its pages count to the next) and the next epochs last twice as long,
up to half a minute. An epoch of that length is carried through whatever it costs: points come
at least that often. When captures keep up again the interval shrinks as it grew.
"""

from __future__ import annotations

from dataclasses import dataclass

from vdiskfs.window import Window

PRESERVE_PAGES = 128 * 1024 * 1024 // 4096
"""Pages of a frozen epoch that are copied for overwrites before it is given up."""

LONGEST_S = 32.0
"""Seconds of the longest epoch, unless a longer one was asked for."""


@dataclass(frozen=True)
class Pace:
    """How a disk is replicated. Sizes are bytes.

    ``resync_threshold`` is the part of the disk's size that may wait while the vault is
    away; ``resync_window`` when resynchronizations run that nobody asked for (None: always).
    """

    epoch_interval_s: float
    spool_limit: int
    compression_level: int
    resync_threshold: float = 0.5
    resync_window: Window | None = None


class Stride:
    """The pace of one disk's epochs."""

    def __init__(self, interval_s: float) -> None:
        """Begin with the interval that was asked for, in seconds."""
        self._asked_s = interval_s
        self.interval_s = interval_s

    def ask(self, interval_s: float) -> None:
        """Take another interval, in seconds, from the next epoch on."""
        if interval_s != self._asked_s:
            self._asked_s = self.interval_s = interval_s

    @property
    def budget_pages(self) -> int | None:
        """Pages that the next epoch may have preserved; None: as many as it takes."""
        return PRESERVE_PAGES if self.interval_s < LONGEST_S else None

    def outrun(self) -> None:
        """An epoch was given up because changes outran its capture."""
        longest = max(LONGEST_S, self._asked_s)
        self.interval_s = min(2 * max(self.interval_s, 0.5), longest)

    def kept(self) -> None:
        """An epoch was captured."""
        self.interval_s = max(self.interval_s / 2, self._asked_s)
