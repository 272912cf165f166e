"""What the tree shows of recovery points: the catalog's lists and the points' images.

Disks protected here are listed from memory and cost the vault nothing. What other sites
write is looked up again after a few seconds. Trio thread only.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import PurePath

import trio

from vdiskfs.catalog import DiskLog, DiskRecord, Point, Vault
from vdiskfs.catalog.proofs import Place, Proven, list_proven, mark_proven
from vdiskfs.catalog.records import UnreadableDisk
from vdiskfs.errors import DamagedError, NotFoundError, VaultUnreachableError
from vdiskfs.hydration import OpenedPoint, PointImages
from vdiskfs.tree import Access, DiskName, OpenPoint, PointFacts, PointKind, PointRef
from vdiskfs.units import NS, format_time

log = logging.getLogger(__name__)

STALE_S = 3.0
"""How old a list of other sites' disks and points may be, in seconds."""

_PROOFS_STALE_S = 30.0
_PROOFS_LIMIT_S = 2.0

_SPECS = {
    "any": "latest",
    "application-consistent": "latest-application-consistent",
    "proven": "latest-proven",
}


class Browser:
    """The recovery points of every disk in the vault."""

    def __init__(
        self, vault: Vault, images: PointImages, own: Callable[[], Mapping[str, DiskLog]],
        access: Callable[[str], Access | None],
    ) -> None:  # fmt: skip
        """``own`` gives the logs of the disks protected here, by name of the disk."""
        self._vault = vault
        self._images = images
        self._own = own
        self._access = access
        self._records: dict[str, DiskRecord] = {}
        self._unreadable: list[UnreadableDisk] = []
        self._records_until = 0.0
        self._logs: dict[tuple[str, int], tuple[DiskLog, float]] = {}
        self._proofs: dict[str, tuple[Mapping[Place, Proven], float]] = {}
        self._lock = trio.Lock()

    @property
    def requests(self) -> int:
        """Requests made to the vault so far, for whatever."""
        return self._vault.store.requests

    async def records(self) -> Mapping[str, DiskRecord]:
        """Return the vault's disks by name. One whose record was damaged since is as it was.

        A disk that was protected here since the vault was asked is among them.
        """
        async with self._lock:
            if trio.current_time() >= self._records_until:
                found, unreadable = await self._vault.read_disks()
                for one in unreadable:
                    if one not in self._unreadable:
                        log.warning("disk %s: %s: %s", one.name, one.object, one.why)
                    if one.name in self._records:
                        found.append(self._records[one.name])
                self._unreadable = unreadable
                self._records = {one.name: one for one in found}
                self._records_until = trio.current_time() + STALE_S
        return self.known

    @property
    def known(self) -> Mapping[str, DiskRecord]:
        """The vault's disks as they were last seen, by name; nobody is asked."""
        own = {name: one.record for name, one in self._own().items()}
        return {**own, **self._records}

    def forget_records(self) -> None:
        """Look the vault's disks up anew the next time: this site has changed one."""
        self._records_until = 0.0

    async def log(self, disk: str) -> DiskLog:
        """Return the disk's points: the live list of our own, a fresh one of others'.

        Raises:
            NotFoundError: no such disk.
        """
        own = self._own().get(disk)
        if own is not None:
            return own
        record, generation = await self._meant(disk)
        if record is None:
            if self._unreadable:
                await self._vault.find_disk(disk.partition("@")[0])  # it may be one of these
            raise NotFoundError(f"there is no disk {disk} in the vault", hint="vdiskfs disk list")
        key = (record.id, generation)
        found, until = self._logs.get(key, (None, 0.0))
        if found is None:
            found = self._vault.log(record, generation)
        elif found.record != record:
            found.adopt(record)  # thinned, or held, since
        if trio.current_time() >= until:
            try:
                await found.refresh()
            except DamagedError as error:
                # What is whole is listed; what is hurt says so when it is opened.
                log.warning("disk %s: %s", disk, error)
            self._logs[key] = (found, trio.current_time() + STALE_S)
        return found

    async def newest_log(self, disk: str) -> DiskLog:
        """Return the disk's points, with all that the vault has of them now.

        Raises:
            NotFoundError: no such disk.
        """
        if disk not in self._own():
            self.forget_records()
            self._logs = {key: (found, 0.0) for key, (found, _) in self._logs.items()}
        return await self.log(disk)

    async def _meant(self, name: str) -> tuple[DiskRecord | None, int]:
        """Return the disk and the generation that DISK or DISK@BRANCH means."""
        records = await self.records()
        record = records.get(name)
        if record is not None:
            return record, record.generation
        disk, _, branch = name.rpartition("@")
        record = records.get(disk)
        generation = record.branch(branch) if record is not None else None
        return (record, generation) if generation is not None else (None, 0)

    # ---- PointSource ---------------------------------------------------------------------

    async def disks(self) -> Sequence[DiskName]:
        """Return all disks of the vault, and their branches as DISK@BRANCH."""
        return [
            DiskName(name, PurePath(record.file).name or f"{record.name}.img")
            for record in (await self.records()).values()
            for name in (record.name, *(f"{record.name}@{one.name}" for one in
                                        record.branches.values()))
        ]  # fmt: skip

    async def days(self, disk: str) -> Sequence[str]:
        """Return the days that have points."""
        points = await (await self.log(disk)).points()
        days = {point.time_ns // (86400 * NS) for point in points}
        return [f"{datetime.fromtimestamp(day * 86400, UTC):%Y-%m-%d}" for day in sorted(days)]

    async def points(self, disk: str, since_ns: int, until_ns: int) -> Sequence[PointRef]:
        """Return the points with since <= time < until, in order."""
        points = await (await self.log(disk)).points(since_ns, until_ns - 1)
        return [_ref(point) for point in points]

    async def list_points(
        self, disk: str, since_ns: int | None, until_ns: int | None, limit: int | None
    ) -> list[Point]:
        """Return a disk's points, newest last, with what is proven of them.

        Raises:
            NotFoundError: no such disk.
        """
        points = await self.log(disk)
        return await self.proven(points, await points.points(since_ns, until_ns, limit), new=True)

    async def proven(
        self, points: DiskLog, found: Sequence[Point], *, new: bool = False
    ) -> list[Point]:
        """Return points with what is proven of them, as of now (``new``) or a while ago."""
        disk_id = points.record.id
        proofs, until = self._proofs.get(disk_id, ({}, 0.0))
        if new or trio.current_time() >= until:
            # A list that was known is not lost, nor late, for what it says beside.
            with trio.move_on_after(_PROOFS_LIMIT_S):
                try:
                    proofs = await list_proven(points.store, disk_id)
                except VaultUnreachableError as error:
                    log.info("what is proven is not known: %s", error)
            self._proofs[disk_id] = (proofs, trio.current_time() + _PROOFS_STALE_S)
        return [mark_proven(one, proofs.get((one.generation, one.epoch))) for one in found]

    async def latest(self, disk: str, kind: PointKind) -> PointRef | None:
        """Return the newest point of that kind."""
        return await self.find(disk, _SPECS[kind])

    async def find(self, disk: str, text: str) -> PointRef | None:
        """Return the newest point at or before a time."""
        try:
            return _ref(await (await self.log(disk)).find(text, time.time_ns()))
        except NotFoundError:
            return None

    async def describe(self, disk: str, point: PointRef) -> PointFacts:
        """Return the size and point.json."""
        [found] = await self.proven(await self.log(disk), [await self._point(disk, point)])
        text = json.dumps(point_document(disk, found), indent=2) + "\n"
        return PointFacts(found.size, text.encode())

    async def open_point(self, disk: str, point: PointRef) -> OpenedPoint:
        """Return the point's image."""
        log = await self.log(disk)
        found = await self._point(disk, point)
        key = (log.record.id, found.generation, found.epoch)
        return await self._images.open(key, lambda: log.open(found))

    async def close_point(self, opened: OpenPoint) -> None:
        """Give the image back."""
        if isinstance(opened, OpenedPoint):
            await self._images.close(opened)

    def access(self, disk: str) -> Access | None:
        """Return who may read the live image."""
        return self._access(disk)

    async def _point(self, disk: str, ref: PointRef) -> Point:
        return await (await self.log(disk)).find(ref.epoch)


def _ref(point: Point) -> PointRef:
    return PointRef(point.time_ns, point.epoch, point.generation)


def point_document(disk: str, point: Point) -> dict[str, object]:
    """Return what scripts get of a point (vdiskfs(1), ``point list --json``)."""
    return {
        "disk": disk,
        "epoch": point.epoch,
        "time": format_time(point.time_ns),
        "consistency": point.consistency,
        "proof": point.proof,
        "recovery_s": point.recovery_s,
        "label": point.label or None,
        "held": point.held,
        "size": point.size,
        "changed_bytes": point.changed_bytes,
        "stored_bytes": point.stored_bytes,
        "generation": point.generation,
    }
