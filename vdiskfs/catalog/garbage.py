"""Deleting what no chain needs any more: the end of thinning. Never decides what that is.

A ledger says which names are doomed, and since when. They are deleted a grace period later,
by the store's clock, and not while somebody has a point open that only they can serve. A
name that was doomed is never used again, so that it does not matter who deletes it, how often,
or how late. vdiskfs-internals(7), "Thinning".
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import trio

from vdiskfs.catalog.documents import DOCUMENT_LIMIT
from vdiskfs.catalog.ledger import Ledger
from vdiskfs.crash import hook
from vdiskfs.errors import ConflictError, NotFoundError, RefusedError, StateError
from vdiskfs.point.fetch import first_error
from vdiskfs.store import Store
from vdiskfs.units import NS, format_time

GRACE_S = 3600
"""From the commit of a ledger to the first deletion: readers and writers have looked again."""

FRESH_S = 60.0
"""How old a disk's record may be when a slot is filled: far below `GRACE_S`."""

SKEW_S = 300
"""Clocks that differ by more than this stop everything that deletes."""

STEP_S = 86400
"""How far the time that points are thinned for may go on from one commit to the next."""

CLOCK = "clock.json"
CLOCK_DOCUMENT = b"{}\n"
"""Says nothing: its time is what counts."""
_DELETES_AT_ONCE = 8
_REFUSED_MOST = 16
"""Deletions that are refused before the others wait for the next collection."""


class ClockError(StateError):
    """Clocks disagree: nothing is thinned and nothing deleted."""


@dataclass(slots=True)
class Collected:
    """What a collection did. ``refused``: what an immutability policy keeps for now."""

    deleted: int = 0
    waiting: int = 0
    refused: int = 0
    gone: set[str] = field(default_factory=set)


async def store_time_ns(store: Store, local_ns: Callable[[], int] = time.time_ns) -> int:
    """Return the time of the store's clock, by writing a small object.

    Raises:
        ClockError: it differs from this host's by more than 5 minutes.
    """
    try:
        _, info = await store.read(CLOCK, limit=DOCUMENT_LIMIT)
        etag: str | None = info.etag
    except NotFoundError:
        etag = None
    before = local_ns()
    # If somebody else has just written it, that is as good.
    with contextlib.suppress(ConflictError, NotFoundError):
        await store.replace(CLOCK, CLOCK_DOCUMENT, etag=etag)
    now = (await store.stat(CLOCK)).modified_ns
    # Whole seconds on some stores; and the answer took its time.
    if not before - SKEW_S * NS <= now <= local_ns() + SKEW_S * NS:
        raise ClockError(
            f"the vault's clock says {format_time(now)}, this host's {format_time(local_ns())}: "
            "nothing is thinned",
            hint="set the clock that is wrong",
        )
    return now


def thinning_time_ns(now_ns: int, before_ns: int) -> int:
    """Return the time to thin for: a clock that jumped ahead is followed a day at a time.

    Args:
        now_ns: what the clocks say.
        before_ns: the time of the last commit; of the newest point, if there was none.

    Raises:
        ClockError: the clock was set back.
    """
    if now_ns < before_ns - SKEW_S * NS:
        raise ClockError(
            f"it is {format_time(now_ns)}, before the last thinning of {format_time(before_ns)}",
            hint="set the clock that is wrong; nothing is thinned until then",
        )
    return max(before_ns, min(now_ns, before_ns + STEP_S * NS))


def boottime_s() -> float:
    """Return the seconds since this host started, those in which it slept included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def collect(
    store: Store, ledger: Ledger, now_ns: int, open_points: Collection[tuple[int, int]] = (),
    skip: Collection[str] = (),
) -> Collected:  # fmt: skip
    """Delete what a ledger, which disk.json names, has doomed long enough ago.

    Args:
        store: the vault's.
        ledger: of one generation.
        now_ns: the store's time.
        open_points: leases. While one is thinned away already, nothing is deleted, nor while the
            line is read as a whole: the epoch 0 is no point's.
        skip: names that are known to be gone.
    """
    found = Collected(gone=set(skip) & set(ledger.doomed))
    known = set(ledger.points.epoch.tolist())
    needed = {
        epoch for generation, epoch in open_points
        if generation == ledger.generation and epoch <= ledger.horizon
    }  # fmt: skip
    due = [
        name for name, since in sorted(ledger.doomed.items(), key=lambda one: one[1])
        if name not in found.gone and since + GRACE_S * NS <= now_ns
    ]  # fmt: skip
    if needed - known:
        due = []
    if len(due) > _REFUSED_MOST:
        # Some may be kept for longer than the others: not always the same ones are asked for.
        first = now_ns // NS % len(due)
        due = due[first:] + due[:first]
    waiting = len(ledger.doomed) - len(found.gone) - len(due)
    done = await collect_names(store, due)
    done.gone |= found.gone
    done.waiting = waiting
    return done


async def collect_names(store: Store, names: Sequence[str]) -> Collected:
    """Delete objects, several at once; those that an immutability policy keeps are counted."""
    found = Collected()
    limiter = trio.CapacityLimiter(_DELETES_AT_ONCE)

    async def one(name: str) -> None:
        async with limiter:
            if found.refused >= _REFUSED_MOST:
                # What is left is kept as well, as it seems; the next time others come first.
                found.refused += 1
                return
            try:
                await store.delete(name)
                found.deleted += 1
                hook("garbage.deleted")
            except NotFoundError:
                pass  # by an earlier run, or by another site
            except (RefusedError, ConflictError):
                # Immutable until its policy says otherwise, or a key that may not delete.
                found.refused += 1
                return
            found.gone.add(name)

    try:
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(one, name)
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    return found
