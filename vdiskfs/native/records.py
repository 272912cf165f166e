"""What the C core answers with: plain records, no cffi."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

U64Array: TypeAlias = npt.NDArray[np.uint64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells one file from another; ``birth_ns`` is 0 where the file system keeps none."""

    device: int
    inode: int
    birth_ns: int
    change_ns: int
    modify_ns: int
    size: int


@dataclass(frozen=True, slots=True)
class CoreCounts:
    """Requests answered in C, requests passed on, requests parked now, bytes moved."""

    reads: int
    writes: int
    syncs: int
    discards: int
    seeks: int
    names: int
    parked: int
    read_bytes: int
    write_bytes: int


@dataclass(frozen=True, slots=True)
class TrackCounts:
    """What a track holds, in pages; see ``vdf_track_counts``."""

    epoch: int
    dirty_pages: int
    frozen_pages: int
    suspect_pages: int
    preserved_pages: int
    frozen: bool
    changed: bool
    overflow: bool
    abandoned: bool
    lost: bool
    detached: bool


@dataclass(frozen=True, slots=True)
class IntentCounts:
    """What an intent log has done; see ``vdf_intent_counts``."""

    slots: int
    active: int
    misses: int
    commits: int
    waits: int
    rounds: int
    left: int
    voids: int
    is_void: bool
    void_durable: bool


@dataclass(frozen=True, slots=True)
class PresenceCounts:
    """What is known of a writable copy's pages; see ``vdf_presence_counts``. Sizes in bytes."""

    base_size: int
    low: int
    present_pages: int
    uncommitted_pages: int
    absent_pages: int
    log_bytes: int
    complete: bool
    rebuilt: bool
    lost: bool


@dataclass(frozen=True, slots=True)
class Recovery:
    """Where a disk may differ from its bitmaps after the death of the host, in bytes.

    ``regions`` are the starts of regions of 4 MiB that are suspect now; in each of ``spans``,
    (start, end), what is allocated or has data in the vault is still to be made so.
    """

    regions: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Seal:
    """The end of one epoch: its number, the wall clock (ns), size, cut and low in bytes."""

    epoch: int
    time_ns: int
    size: int
    cut: int
    low: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Pages in ascending order; ``data`` holds those that are not zero, back to back.

    The arrays are views of the reader's buffers: valid until its next call.
    """

    pageno: U64Array
    sum: U64Array
    zero: BoolArray
    data: memoryview
