"""What a spool holds that does not follow the line that is written: it becomes a branch.

A delta is stored under another generation and digest than it was captured with, so that
what was stored is known by its slot, and what comes after it by the epoch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import trio

from vdiskfs.catalog import DiskLog, DiskRecord
from vdiskfs.catalog.publish import is_stored
from vdiskfs.crash import hook
from vdiskfs.delta import Spooled, open_spooled
from vdiskfs.delta.rehead import rehead
from vdiskfs.errors import FormatError, SegmentsGoneError
from vdiskfs.image import ChainEnd
from vdiskfs.ownernote import Remembered
from vdiskfs.state import sync_directory
from vdiskfs.store import Store

log = logging.getLogger(__name__)

# log(record, generation): the points of a generation.
LogOf = Callable[[DiskRecord, int], DiskLog]


def spooled_deltas(spool: Path) -> list[Spooled]:
    """Return the deltas of a spool in order, up to the first that is damaged; in a thread."""
    found = []
    for path in sorted(spool.glob("*.delta")):
        try:
            found.append(open_spooled(path))
        except FormatError:
            break
    return found


def spool_end(spool: Path, end: ChainEnd | None) -> ChainEnd | None:
    """Return the newest epoch that the spool holds, ``end`` if that is newer; in a thread."""
    found = spooled_deltas(spool)
    newest = ChainEnd.of(found[-1].head) if found else None
    return end if newest is None or (end is not None and end.epoch >= newest.epoch) else newest


def after(spooled: Spooled) -> Remembered:
    """Return what a site remembers once a delta is stored."""
    head = spooled.head
    return Remembered(head.generation, head.to_epoch, head.to_digest.hex())


async def begun(
    log_of: LogOf, record: DiskRecord, token: str, first: Spooled, last: Remembered
) -> int | None:
    """Return the branch of a token, if it has what comes before this delta; else None."""
    for number, branch in record.branches.items():
        if branch.token == token:
            tip = await log_of(record, number).tip()
            if tip.epoch == first.head.from_epoch and (
                tip.digest == first.head.from_digest or tip.digest.hex() == last.digest
            ):
                return number
    return None


async def parent_of(
    log_of: LogOf, record: DiskRecord, first: Spooled, last: Remembered
) -> tuple[int, int] | None:
    """Return the generation and epoch of the vault that a delta follows; None: there is none."""
    head = first.head
    for generation, digest in (
        (last.generation, last.digest if last.epoch == head.from_epoch else ""),
        (head.generation, head.from_digest.hex()),
    ):
        if generation not in record.parents:
            continue
        found = await log_of(record, generation).place(head.from_epoch)
        if found is not None and (found[1].hex() == digest or not head.from_epoch):
            return found[0], head.from_epoch
    return None


async def ship(name: str, waiting: list[Spooled], points: DiskLog) -> list[Spooled]:
    """Store deltas in a branch, up to the first that does not follow; return those stored.

    What cannot be stored any more is taken off ``waiting``, with all that follows it.
    """
    tip = await points.tip()
    epoch, digest = tip.epoch, tip.digest
    stored: list[Spooled] = []
    for spooled in waiting:
        if spooled.head.from_epoch != epoch:
            break
        moved = await trio.to_thread.run_sync(rehead, spooled, points.generation, digest)
        try:
            await points.publish(moved)
        except SegmentsGoneError as error:
            log.warning("disk %s: cannot be kept as a branch: %s", name, error)
            del waiting[len(stored) :]
            break
        hook("branch.shipped")
        stored.append(moved)
        epoch, digest = moved.head.to_epoch, moved.head.to_digest
    if stored:
        branch = points.record.branches[points.generation].name
        log.warning("disk %s: what was not shipped is kept as branch %s", name, branch)
    return stored


async def advance(store: Store, spool: Path, last: Remembered) -> Remembered:
    """Pass deltas of the spool that were stored, though the answer never came."""
    for spooled in await trio.to_thread.run_sync(spooled_deltas, spool):
        if spooled.head.from_epoch == last.epoch and await is_stored(store, spooled.head):
            last = after(spooled)
    return last


def set_aside(name: str, directory: Path) -> None:
    """Keep what follows nothing that the vault has where nobody takes it for the spool.

    Durable on return. In a thread.
    """
    spool = directory / "spool"
    left = sorted(spool.iterdir()) if spool.exists() else []
    left = [path for path in left if path.suffix in (".delta", ".segment")]
    if left:
        aside = directory / "set-aside" / f"{time.time_ns():020d}"
        aside.mkdir(mode=0o700, parents=True)
        for path in left:
            path.rename(aside / path.name)
        sync_directory(aside)
        sync_directory(spool)
        log.error("disk %s: deltas that follow nothing in the vault are in %s", name, aside)
