"""The intent log of a tracked image, and what to do with it after a host has died.

Part of ``vdiskfs.native``; native/src/intent.c says how it works. Everything here may wait
for the local disk: call it from a thread.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vdiskfs._native import ffi, lib
from vdiskfs.native.host import check
from vdiskfs.native.records import IntentCounts, Recovery

if TYPE_CHECKING:
    from vdiskfs.native import Image, Track

INTENT_REGION: int = lib.VDF_INTENT_REGION
_CAPACITY = 8000


def intent_slots() -> int:
    """Return how many regions a new log has room for; 0: as many as ever.

    VDISKFS_INTENT_SLOTS in the environment is for tests: regions leave small images, too.
    """
    return int(os.environ.get("VDISKFS_INTENT_SLOTS", "0"))


def begin_intent(image: Image) -> None:
    """All that has to be suspect is marked: sync the bitmaps, let the log be kept.

    What is marked changed or suspect is durable on return. A log that is void is begun
    later; until then a death of the host makes everything suspect.
    """
    check(lib.vdf_image_begin_intent(image.handle), "intent log")


def intent_counts(image: Image) -> IntentCounts:
    """Return what the intent log of the image has done so far; all 0 without a track."""
    out = ffi.new("vdf_intent_counts *")
    lib.vdf_intent_counts_get(image.handle, out)
    return IntentCounts(
        out.slots, out.active, out.misses, out.commits, out.waits, out.rounds, out.left,
        out.voids, bool(out.is_void), bool(out.void_durable),
    )  # fmt: skip


def sync_track(track: Track) -> None:
    """Make durable what is marked changed or suspect by now."""
    check(lib.vdf_track_sync(track.handle), "bitmaps")


def settle_track(image: Image) -> None:
    """All that may lack a mark is suspect: let the bitmaps be believed again.

    Raises:
        OSError: their disk does not take them.
    """
    check(lib.vdf_track_settle(image.handle), "bitmaps")


def recover_track(
    directory: Path, *, size: int, change_ns: int, epoch: int, base_size: int
) -> Recovery:
    """Make a track right that a dead host left behind; it is not open. Durable on return.

    Args:
        directory: the track's.
        size: bytes of the image, which is durable as it is.
        change_ns: when the image was changed last, by its status.
        epoch: the next epoch's number.
        base_size: bytes of the disk at its start, as vault and spool know it.

    Raises:
        OSError: ENOENT or EBADMSG, the intent log says nothing; ESTALE, somebody else changed
            the image since. Nothing is known then.
    """
    out = ffi.new("vdf_recovery *")
    regions = ffi.new("uint64_t[]", _CAPACITY)
    out.region = regions
    out.capacity = _CAPACITY
    result = lib.vdf_track_recover(os.fsencode(directory), size, change_ns, epoch, base_size, out)
    check(result, str(directory))
    spans = [(int(out.start[i]), int(out.end[i])) for i in range(lib.VDF_INTENT_SPANS)]
    return Recovery(
        tuple(int(regions[i]) * INTENT_REGION for i in range(out.regions)),
        tuple((start, end) for start, end in spans if end > start),
    )
