"""What keeps a vault in order: lines thinned by their policies, garbage collected; holds.

Any site may do it, at any time, several at once: what counts is decided by compare-and-swap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from vdiskfs.catalog.abandoned import sweep
from vdiskfs.catalog.garbage import (
    SKEW_S,
    ClockError,
    Collected,
    collect,
    store_time_ns,
    thinning_time_ns,
)
from vdiskfs.catalog.leases import open_points
from vdiskfs.catalog.leaves import Take
from vdiskfs.catalog.log import DiskLog
from vdiskfs.catalog.points import Point
from vdiskfs.catalog.proofs import LEVELS, list_proven
from vdiskfs.catalog.records import WHOLE_LINE, DiskRecord, Hold
from vdiskfs.catalog.retention import Ladder
from vdiskfs.catalog.thinning import Thinned, Thinner
from vdiskfs.catalog.vault import Vault, now_text
from vdiskfs.crash import hook
from vdiskfs.errors import ConflictError, NotFoundError
from vdiskfs.units import NS, format_time

_TRIES = 5


@dataclass(frozen=True, slots=True)
class Tended:
    """What was done with one line, or would be."""

    thinned: Thinned
    collected: Collected


SWEEP_S = 86400
"""How often the segments of a line are listed, for those that nothing names."""

DOOMED_MOST = 300_000
"""While more objects than this cannot be deleted nothing more of their line is thinned."""


@dataclass(slots=True)
class Upkeep:
    """Tends lines of a vault.

    ``gone``: doomed names of each that were deleted already. ``swept``: when its segments were
    listed last, store's time.
    """

    vault: Vault
    writer_id: str
    compression_level: int = 1
    clock: Callable[[], int] = time.time_ns
    gone: dict[tuple[str, int], frozenset[str]] = field(default_factory=dict)
    swept: dict[tuple[str, int], int] = field(default_factory=dict)

    async def tend(
        self, log: DiskLog, ladder: Ladder, scratch: Path, *, compression_level: int = 0,
        take: Take | None = None, dry_run: bool = False,
    ) -> Tended:  # fmt: skip
        """Collect what is doomed on a line, then thin it.

        Args:
            log: of the generation; it knows the outcome on return.
            ladder: of the disk's policy.
            scratch: a directory for this line alone.
            compression_level: of what is written, if not that of all lines.
            take: waits until so many bytes may be uploaded.
            dry_run: only say what would be done.

        Raises:
            ClockError: clocks disagree: nothing was done.
            ConflictError: others change the disk all the time.
            DamagedError: what is to be rewritten is damaged: nothing was decided.
        """
        now = await store_time_ns(self.vault.store, self.clock)
        thinner = Thinner(
            self.vault, log, writer_id=self.writer_id, scratch=scratch,
            compression_level=compression_level or self.compression_level, take=take,
        )  # fmt: skip
        place = (log.record.id, log.generation)
        due = not dry_run and abs(now - self.swept.get(place, 0)) >= SWEEP_S * NS
        for _ in range(_TRIES):
            log.adopt(await self.vault.disk(log.record.id))
            table = await log.line_points()
            if log.record.moved is not None or log.record.handover is not None:
                # On its way: what a failback needs stays until it is committed.
                return Tended(Thinned(log.generation, 0, 0, None, len(table)), Collected())
            ledger = log.line.ledger
            leased = await open_points(self.vault, log.record, now, tidy=not dry_run)
            leased |= await self._proven(log)
            done = Collected()
            if ledger is not None and not dry_run:
                known = self.gone.get(place, frozenset())
                done = await collect(self.vault.store, ledger, now, leased, known)
                self.gone[place] = frozenset(done.gone)
                if len(ledger.doomed) - len(done.gone) > DOOMED_MOST:
                    # The vault keeps what is to go: points that stay cost less than a ledger of it.
                    return Tended(Thinned(log.generation, 0, 0, None, len(table)), done)
            leased = {place for place in leased if place[1] != WHOLE_LINE}
            newest = int(table.time_ns[-1]) if len(table) else now
            if newest > now + SKEW_S * NS:
                raise ClockError(
                    f"disk {log.record.name}: its newest point is of {format_time(newest)}, after "
                    f"{format_time(now)}: nothing is thinned until then",
                    hint="a clock was ahead when it was sealed",
                )
            thin_ns = thinning_time_ns(now, ledger.now_ns if ledger is not None else newest)
            if dry_run:
                return Tended(await thinner.plan(ladder, thin_ns, leased), done)
            if due:
                self.swept[place] = now
            try:
                found = await thinner.run(
                    ladder, now, thin_ns=thin_ns, leased=leased, gone=done.gone, sweep=due
                )
            except ConflictError:
                continue
            return Tended(found, done)
        raise ConflictError(f"disk {log.record.name}: is changed by others all the time")

    async def sweep(self, disk_id: str, *, dry_run: bool = False) -> Collected:
        """Collect segments of a disk that nothing names, and nothing will: see `abandoned`.

        Raises:
            ClockError: clocks disagree: nothing was done.
            ConflictError: its writer claims segments all the time.
            DamagedError: what deltas name cannot be read: nothing was decided.
        """
        now = await store_time_ns(self.vault.store, self.clock)
        for _ in range(_TRIES):
            try:
                return await sweep(self.vault, disk_id, now, dry_run=dry_run)
            except ConflictError:
                continue
        raise ConflictError(f"disk {disk_id}: is changed by others all the time")

    async def _proven(self, log: DiskLog) -> set[tuple[int, int]]:
        """Return the newest proven point of a line, if there is one: proving it was work."""
        proven = await list_proven(self.vault.store, log.record.id)
        epochs = [epoch for (at, epoch), one in proven.items()
                  if at == log.generation and one.passed in LEVELS[1:]]  # fmt: skip
        return {(log.generation, max(epochs))} if epochs else set()


async def hold_point(vault: Vault, log: DiskLog, point: Point, note: str) -> DiskRecord:
    """Keep a point until it is released, whatever the policy says; durable on return.

    Raises:
        NotFoundError: it was thinned away just now.
    """
    for _ in range(_TRIES):
        log.adopt(await vault.disk(log.record.id))
        checked = log.record.ledgers.get(point.generation)
        found = await log.find(point.epoch)
        if (found.generation, found.epoch) != (point.generation, point.epoch):
            raise NotFoundError(f"{log.record.name}@{point.epoch}: the point was thinned away")

        def change(found: DiskRecord) -> DiskRecord:
            if found.ledgers.get(point.generation) != checked:  # noqa: B023  called at once
                raise ConflictError(f"disk {found.name}: is being thinned")
            others = _others(found.holds, point)
            return replace(found, holds=(*others, Hold(
                point.generation, point.epoch, note, now_text()
            )))  # fmt: skip

        try:
            record = await vault.update_disk(log.record.id, change)
        except ConflictError:
            continue
        hook("hold.written")
        log.adopt(record)
        return record
    raise ConflictError(f"disk {log.record.name}: is thinned all the time")


async def release_point(vault: Vault, log: DiskLog, point: Point) -> DiskRecord:
    """Let the policy decide about a point again.

    Raises:
        NotFoundError: it is not held.
    """

    def change(found: DiskRecord) -> DiskRecord:
        check_held(found, point)
        return replace(found, holds=tuple(_others(found.holds, point)))

    record = await vault.update_disk(log.record.id, change)
    hook("hold.released")
    log.adopt(record)
    return record


def check_held(record: DiskRecord, point: Point) -> None:
    """Check that a point is held; NotFoundError."""
    if len(_others(record.holds, point)) == len(record.holds):
        raise NotFoundError(f"{record.name}@{point.epoch}: is not held")


async def choose_policy(vault: Vault, disk_id: str, policy: str) -> DiskRecord:
    """Let a disk follow a policy; "" keeps every point. Nothing is thinned by this."""
    record = await vault.update_disk(disk_id, lambda found: replace(found, policy=policy))
    hook("policy.chosen")
    return record


def _others(holds: Iterable[Hold], point: Point) -> list[Hold]:
    place = (point.generation, point.epoch)
    return [hold for hold in holds if (hold.generation, hold.epoch) != place]
