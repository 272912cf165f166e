"""What the control socket offers of failovers: `failoverapi.Failovers`, over a running mount."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from vdiskfs.failover import (
    Drills,
    Failover,
    FailoverRecord,
    Failovers,
    Homecomings,
    Kind,
    Relocations,
    failover_document,
    record_document,
)
from vdiskfs.failover.choose import point_spec
from vdiskfs.requests import Document


class FailoverControl:
    """The failovers of one mount, as scripts see them."""

    def __init__(
        self, failovers: Failovers, drills: Drills, relocations: Relocations,
        homecomings: Homecomings, *, shown_in: Path, changed: Callable[[], None],
    ) -> None:  # fmt: skip
        """Put the parts together; ``changed`` is called when the vault says something new."""
        self._failovers = failovers
        self._drills = drills
        self._relocations = relocations
        self._homecomings = homecomings
        self._shown_in = shown_in
        self._changed = changed

    async def all(self) -> Document:
        """Return all failovers of this mount, the oldest first."""
        rows = [await self._document(one) for one in self._failovers.all()]
        return {"failovers": rows}

    async def one(self, name: str) -> Document:
        """Return one failover."""
        return await self._document(self._failovers.find(name))

    async def _document(self, failover: Failover) -> Document:
        document = await failover_document(failover, self._shown_in)
        moving = self._homecomings.progress(failover)
        return {**document, "moving": {name: asdict(one) for name, one in moving.items()}}

    async def test(
        self, disk: str, point: str, name: str | None, *, vm: bool, dry_run: bool
    ) -> Document:
        """Make a writable copy of a point, for tests."""
        spec = point_spec(point)
        if dry_run:
            return _dry(await self._drills.plan_test(disk, spec, name, vm=vm))
        failover = await self._drills.test(disk, spec, name, vm=vm)
        return await self._document(failover)

    async def start(
        self, disk: str, point: str, name: str | None, *, planned: bool, vm: bool,
        rollback_s: float, dry_run: bool,
    ) -> Document:  # fmt: skip
        """Fail over for good; on return that is under way."""
        kind, spec = Kind.PLANNED if planned else Kind.UNPLANNED, point_spec(point)
        if dry_run:
            return _dry(await self._relocations.plan_start(disk, kind, spec, name, vm=vm))
        failover = await self._relocations.start(
            disk, kind, spec, name, vm=vm, rollback_s=rollback_s
        )
        self._changed()
        return await self._document(failover)

    async def change_point(self, name: str, point: str, *, dry_run: bool) -> Document:
        """Begin anew at another point; on return that is under way."""
        record = await self._relocations.change_point(name, point_spec(point), dry_run=dry_run)
        return await self._told(record, dry_run=dry_run)

    async def commit(self, name: str, *, dry_run: bool) -> Document:
        """Make a failover final."""
        return await self._told(await self._relocations.commit(name, dry_run=dry_run),
                                dry_run=dry_run)  # fmt: skip

    async def roll_back(self, name: str, *, dry_run: bool) -> Document:
        """Give the disks back; on return that is under way."""
        return await self._told(await self._relocations.roll_back(name, dry_run=dry_run),
                                dry_run=dry_run)  # fmt: skip

    async def reprotect(self, disk: str, *, dry_run: bool) -> Document:
        """Replicate from here; on return that is under way."""
        return await self._told(await self._relocations.reprotect(disk, dry_run=dry_run),
                                dry_run=dry_run)  # fmt: skip

    async def bring_home(
        self, disk: str, *, full: bool, create: bool, vm: bool, dry_run: bool
    ) -> Document:
        """Begin a failback; on return that is under way."""
        record = await self._homecomings.start(
            disk, full=full, create=create, vm=vm, dry_run=dry_run
        )
        return await self._told(record, dry_run=dry_run)

    async def complete(self, disk: str, *, dry_run: bool, unasked: str) -> Document:
        """Complete a failback; on return that is under way."""
        record = await self._homecomings.complete(disk, dry_run=dry_run, unasked=unasked)
        return await self._told(record, dry_run=dry_run)

    async def commit_failback(self, disk: str, *, dry_run: bool) -> Document:
        """Make a failback final."""
        return await self._told(await self._homecomings.commit(disk, dry_run=dry_run),
                                dry_run=dry_run)  # fmt: skip

    async def cleanup(self, name: str, notes: str, *, dry_run: bool) -> Document:
        """Throw a failover away."""
        if self._failovers.find(name).record.kind is Kind.FAILBACK:
            record = await self._homecomings.cleanup(name, notes, dry_run=dry_run)
            return _dry(record) if dry_run else record_document(record)
        if dry_run:
            return _dry(await self._drills.plan_cleanup(name))
        return record_document(await self._drills.cleanup(name, notes))

    async def _told(self, record: FailoverRecord, *, dry_run: bool) -> Document:
        if dry_run:
            return _dry(record)
        self._changed()
        return await self._document(self._failovers.find(record.name))


def _dry(record: FailoverRecord) -> Document:
    return {**record_document(record), "dry_run": True}
