"""The spool of one disk: deltas that are durable here and not yet in the vault.

Deltas follow each other; the oldest leaves first, when the vault holds it. What is given
back when the vault is away for too long are the newest: all but the oldest, because a slot
that was offered to the vault may be taken there although its answer was lost. Where an image
needs its room that one goes, too, if it was not offered; else its segments, which are stored.

Methods that touch files wait for the local disk and say so.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vdiskfs.crash import hook
from vdiskfs.delta import Spooled, open_file, open_spooled, remove_spooled
from vdiskfs.delta.entries import Extents, distinct, extents_of_pages
from vdiskfs.errors import FormatError, LocalError, is_disk_error
from vdiskfs.image import ChainEnd
from vdiskfs.state import sync_directory
from vdiskfs.units import NS, PAGE_SIZE, pages_of

log = logging.getLogger(__name__)


class Spool:
    """Deltas in order, oldest first. Only the trio thread uses it."""

    def __init__(self, directory: Path, stored: ChainEnd) -> None:
        """``stored`` is the newest epoch that the vault holds; `load` finds what follows it."""
        self.directory = directory
        self.stored = stored
        self.bytes = 0
        self.added = self.left = self.left_bytes = 0
        """Deltas taken, deltas shipped and their bytes, since the start."""
        self._waiting: deque[Spooled] = deque()
        self._began_ns: int | None = None

    def __len__(self) -> int:
        """Return how many deltas wait."""
        return len(self._waiting)

    @property
    def first(self) -> Spooled:
        """The delta that is shipped next."""
        return self._waiting[0]

    @property
    def end(self) -> ChainEnd:
        """What the next delta starts from."""
        return ChainEnd.of(self._waiting[-1].head) if self._waiting else self.stored

    def room(self, limit: int) -> int:
        """Return how many bytes one epoch may take: ``limit``, or half of what the disk has."""
        status = os.statvfs(self.directory)
        return min(limit, status.f_bavail * status.f_frsize // 2)

    def load(self, generation: int, doubt: Callable[[], None]) -> None:
        """Take up what an earlier run left; waits for the disk.

        Deltas that the vault holds are removed. One that is damaged, or does not follow, is
        dropped with all after it.

        Args:
            generation: of the line that is written.
            doubt: is called before something is dropped that the vault lacks, and notes
                durably that it is not known what changed.
        """
        self.directory.mkdir(mode=0o700, exist_ok=True)
        paths = sorted(self.directory.glob("*.delta"))
        for number, path in enumerate(paths):
            if not self._load_delta(path, generation):
                doubt()
                for later in reversed(paths[number:]):
                    later.unlink(missing_ok=True)
                return

    def _load_delta(self, path: Path, generation: int) -> bool:
        try:
            spooled = open_spooled(path)
            if not self._waiting:
                _read_whole(spooled)  # nothing is shipped before it
        except (FormatError, LocalError) as error:
            if isinstance(error, LocalError) and not is_disk_error(error):
                raise
            log.warning("%s: dropped, all pages are looked at again: %s", path, error)
            return False
        head, end = spooled.head, self.end
        if head.to_epoch <= end.epoch:
            remove_spooled(spooled)
            return True
        # One captured for an older generation is moved into ours before it is published.
        same = head.from_digest == end.digest or head.generation != generation
        if head.from_epoch != end.epoch or not same:
            log.warning("%s: does not follow epoch %d, dropped", path, end.epoch)
            return False
        self.add(spooled)
        return True

    def lag_s(self) -> float:
        """Return how far the vault is behind, in seconds, while something waits.

        It counts from the newest epoch that is stored; but a disk that was idle until something
        began to wait was not behind then.
        """
        since_ns = self.stored.time_ns or self.first.head.time_ns
        age = max(0.0, (time.time_ns() - since_ns) / NS)
        if self._began_ns is None:
            return age
        return min(age, (time.monotonic_ns() - self._began_ns) / NS)

    def add(self, spooled: Spooled, since_ns: int | None = None) -> None:
        """Take a delta that is durable and starts from `end`.

        ``since_ns``: when what it holds began to be written (`time.monotonic_ns`), if known.
        """
        if not self._waiting:
            self._began_ns = since_ns
        self._waiting.append(spooled)
        self.added += 1
        self.bytes += spooled.head.stored_bytes

    def replace_first(self, spooled: Spooled) -> None:
        """The first delta was moved into another line before it was published."""
        self.bytes += spooled.head.stored_bytes - self._waiting[0].head.stored_bytes
        self._waiting[0] = spooled

    def shipped(self) -> None:
        """The vault holds the first delta, and its files are gone."""
        first = self._waiting.popleft()
        self.stored = ChainEnd.of(first.head)
        self.bytes -= first.head.stored_bytes
        self.left += 1
        self.left_bytes += first.head.stored_bytes

    def take_newer(self, keep: int = 1) -> list[Spooled]:
        """Take all deltas but the ``keep`` oldest out, oldest first. Their files stay."""
        taken = list(self._waiting)[keep:]
        while len(self._waiting) > keep:
            self._waiting.pop()
        self.bytes -= sum(one.head.stored_bytes for one in taken)
        return taken

    def drop_stored(self) -> int:
        """Delete the first delta's segments, which the vault has; return their bytes.

        Waits for the disk.
        """
        first = self._waiting[0]
        self._waiting[0] = replace(first, segments=[])
        for segment in first.segments:
            segment.path.unlink(missing_ok=True)
        return sum(segment.size for segment in first.segments)


def _read_whole(spooled: Spooled) -> None:
    """Read a delta's files, as its upload will.

    Raises:
        LocalError: one cannot be read.
    """
    for path in [spooled.path, *(segment.path for segment in spooled.segments)]:
        try:
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass
        except OSError as error:
            raise LocalError(f"{path}: {error.strerror}") from error


def bytes_here(spooled: Spooled) -> int:
    """Return the bytes of a delta's segments that are not in the vault yet. Waits for the disk."""
    return sum(segment.size for segment in spooled.segments if segment.path.exists())


def changed_runs(deltas: Sequence[Spooled]) -> Iterator[Extents]:
    """Yield the pages that deltas change; what a cut takes away counts. Waits for the disk.

    Raises:
        FormatError: one is damaged.
    """
    for spooled in deltas:
        delta = open_file(spooled.path)
        for entries in delta.entries():
            yield extents_of_pages(distinct(entries.pages()[0]))
        yield delta.zeros()
        head = delta.head
        if head.cut < head.from_size:
            first = head.cut // PAGE_SIZE
            yield Extents(
                np.array([first], np.uint64), np.array([pages_of(head.from_size)], np.uint64)
            )


def remove_newest_first(deltas: Sequence[Spooled]) -> None:
    """Delete deltas so that a kill leaves a line without holes. Waits for the disk."""
    for spooled in reversed(deltas):
        remove_spooled(spooled)
        sync_directory(spooled.path.parent)
        hook("spool.given-back")
