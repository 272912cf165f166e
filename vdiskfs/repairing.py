"""Healing the vault from what this host has: the image, the spool, copies of indexes.

What is given here is looked at by its sum before it is used, so that nothing waits for the
guest and the guest waits for nothing: a page that is written just now is another one, or it is
the one that was asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

from vdiskfs import native
from vdiskfs.catalog import CheckReport, DiskRecord, RepairReport, repair, repair_document
from vdiskfs.catalog.check import find_records
from vdiskfs.catalog.documentcheck import check_documents
from vdiskfs.catalog.keptdocuments import KeptDocuments
from vdiskfs.catalog.lostrecords import restore_name, restore_record
from vdiskfs.catalog.repair import settle_document
from vdiskfs.catalog.report import Healed, Left, note_stopped
from vdiskfs.catalog.swap import disk_object
from vdiskfs.delta.names import parse_slot, segment_prefix
from vdiskfs.disk import ProtectedDisk
from vdiskfs.errors import VdiskfsError
from vdiskfs.events import Events
from vdiskfs.protection import Protection
from vdiskfs.requests import Document
from vdiskfs.units import PAGE_SIZE

log = logging.getLogger(__name__)

_READ_PAGES = 256
_SPOOLED_MOST = 256 << 20


class Repairs:
    """The repairs of one mount: of its disks, one at a time. Trio thread only."""

    def __init__(self, protection: Protection, events: Events) -> None:
        """Prepare; nothing runs yet."""
        self._protection = protection
        self._events = events
        self._turn = trio.Lock()
        self._progress: dict[str, object] = {}

    def progress(self) -> Document:
        """Return what is checked now: a disk, and how many of its deltas; or nothing."""
        return {"running": dict(self._progress) or None}

    async def run(
        self, names: Sequence[str], *, dry_run: bool, documents: bool = False
    ) -> Document:
        """Heal disks that are protected here, and return what came of it.

        Args:
            names: of the disks.
            dry_run: store nothing.
            documents: heal policies, groups and machines, too, as far as copies are here.

        Raises:
            NotFoundError: a disk is not.
            VdiskfsError: nothing was found out.
        """
        disks = [self._protection.find(name) for name in names]
        report = RepairReport(dry_run)
        failed: list[tuple[ProtectedDisk, VdiskfsError]] = []
        async with self._turn:
            if documents:
                try:
                    _add(report, await self._heal_documents(dry_run=dry_run))
                except VdiskfsError as error:
                    if not disks:
                        raise
                    log.warning("policies, groups and machines were not looked at: %s", error)
            try:
                for disk in disks:
                    try:
                        _add(report, await self._repair(disk, dry_run=dry_run))
                    except VdiskfsError as error:
                        failed.append((disk, error))
            finally:
                self._progress.clear()
        for disk, why in failed:
            note_stopped(report, disk.name, disk_object(disk.disk_id), why)
        return repair_document(report)

    async def _heal_documents(self, *, dry_run: bool) -> RepairReport:
        """Put documents back of which there are copies here; of the others nothing is said."""
        site, report, found = self._protection.site, RepairReport(dry_run), CheckReport()
        kept = KeptDocuments(site.vault.store, site.state.documents)
        records = await find_records(site.vault, None, CheckReport())
        await check_documents(site.vault.store, found, disks=records)
        for problem in found.problems:
            if await kept.copies(problem.object):
                await settle_document(site.vault.store, problem, report, kept)
        for one in report.healed if not dry_run else []:
            log.warning("%s: %s: put back from its copy", one.problem.object, one.problem.message)
        return report

    async def _repair(self, disk: ProtectedDisk, *, dry_run: bool) -> RepairReport:
        report = RepairReport(dry_run)
        for one in await self._records(disk, dry_run=dry_run):
            if isinstance(one, Healed):
                report.healed.append(one)
            else:
                report.left.append(one)
        if not report.left and not (dry_run and report.healed):
            try:
                _add(report, await self._repair_points(disk, dry_run=dry_run))
            except VdiskfsError as error:
                note_stopped(report, disk.name, disk_object(disk.disk_id), error)
        if not dry_run:
            self._tell(disk, report)
            if report.healed:
                disk.health.retry_now()
        return report

    async def _records(self, disk: ProtectedDisk, *, dry_run: bool) -> list[Healed | Left]:
        """Put back what leads to the disk."""
        vault, place = disk.site.vault, (disk.name, disk.disk_id)
        where = disk_object(disk.disk_id)
        copies = await Here(disk).ends(where)
        cache = disk.points.cache if disk.started else None
        age_s = cache.age_s(where) if cache is not None else math.inf
        writer = disk.site.state.writer_id
        found = [
            await restore_record(vault, *place, copies, writer, age_s=age_s, dry_run=dry_run),
            await restore_name(vault, *place, dry_run=dry_run),
        ]
        return [one for one in found if one is not None]

    async def _repair_points(self, disk: ProtectedDisk, *, dry_run: bool) -> RepairReport:
        def step(name: str, done: int, total: int) -> None:
            self._progress.update(disk=name, done=done, total=total)

        def here(record: DiskRecord) -> Here:
            return Here(disk, record)

        return await repair(
            disk.site.vault, [disk.disk_id], sources=here, dry_run=dry_run, progress=step
        )

    def _tell(self, disk: ProtectedDisk, report: RepairReport) -> None:
        """Say what was healed, and what was not."""
        if healed := [one for one in report.healed if not one.in_part]:
            names = ", ".join(one.problem.object for one in healed[:3])
            text = f"{len(healed)} damaged objects of the vault were healed: {names}"
            log.warning("disk %s: %s", disk.name, text)
            self._events.tell("repair.healed", disk.name, text, disk=disk.name)
        if report.left:
            points = {
                (generation, epoch) for one in report.left
                for generation, epochs in one.problem.points.items() for epoch in epochs
            }  # fmt: skip
            one = report.left[0]
            text = (
                f"{len(report.left)} objects of the vault stay damaged, {len(points)} points are"
                f" hurt: {one.problem.object}: {one.why or one.problem.message}"
            )
            log.error("disk %s: %s", disk.name, text)
            self._events.tell("repair.left", disk.name, text, disk=disk.name)


class Here:
    """What this host has of one disk: `vdiskfs.catalog.healer.Sources`."""

    def __init__(self, disk: ProtectedDisk, record: DiskRecord | None = None) -> None:
        """Use a disk while it is protected; without its record the spool means nothing."""
        self._disk = disk
        self._record = record
        self._paths = disk.site.state.disk(disk.disk_id)

    async def ends(self, name: str) -> list[bytes]:
        """Return copies of an object's end: kept indexes, and the spool's file."""
        return await trio.to_thread.run_sync(self._ends, name, self._spooled(name))

    def _ends(self, name: str, spooled: list[Path]) -> list[bytes]:
        cache = self._disk.points.cache if self._disk.started else None
        found = cache.copies(name) if cache is not None else []
        for path in spooled:
            try:
                if path.stat().st_size <= _SPOOLED_MOST:
                    found.append(path.read_bytes())
            except OSError:
                continue  # it has left the spool: the vault has just taken it
        return found

    def _spooled(self, name: str) -> list[Path]:
        """Return files of the spool that the vault has had under this name.

        What is there may be what the vault never took: another site's delta may be in its slot.
        """
        if not self._is_ours():
            return []
        slot = parse_slot(name)
        if slot is not None:
            file = self._paths.spool / f"{slot[1]:016x}.delta"
            return [file] if self._is_published(*slot) else []
        prefix = segment_prefix(self._disk.disk_id)
        if not name.startswith(prefix):
            return []
        segment = f"{name.removeprefix(prefix)}.segment"
        return [self._paths.spool / segment, self._paths.pass_ / segment]

    def _is_ours(self) -> bool:
        owner, disk = self._record.owner if self._record is not None else None, self._disk
        if owner is None or owner.writer != disk.site.state.writer_id or not disk.started:
            return False
        return disk.line.displaced is None and not disk.line.handed

    def _is_published(self, generation: int, start: int) -> bool:
        """Say whether the line, as it is known here, has a slot."""
        line = self._disk.points.line
        return line.generation == generation and any(
            piece.from_epoch <= start < piece.to_epoch for piece in line.cover
        )

    async def pages(self, wanted: Mapping[int, set[int]]) -> dict[tuple[int, int], bytes]:
        """Return the pages that the image holds as they were."""
        return await trio.to_thread.run_sync(self._pages, wanted)

    def _pages(self, wanted: Mapping[int, set[int]]) -> dict[tuple[int, int], bytes]:
        native.background()
        found: dict[tuple[int, int], bytes] = {}
        for first, count in _runs(sorted(wanted)):
            data = self._read(first, count)
            for at, one in enumerate(native.pages_sum(data).tolist()):
                if one in wanted[first + at]:
                    found[first + at, one] = data[at * PAGE_SIZE : (at + 1) * PAGE_SIZE]
        return found

    def _read(self, first: int, count: int) -> bytes:
        """Read pages of the image; what it lacks, and what is behind its end, is zeros."""
        image = self._disk.image
        try:
            data = image.read(first * PAGE_SIZE, count * PAGE_SIZE)
            if data is None:
                parts = [
                    image.read((first + at) * PAGE_SIZE, PAGE_SIZE) or b"" for at in range(count)
                ]
                data = b"".join(part.ljust(PAGE_SIZE, b"\0") for part in parts)
        except (OSError, ValueError) as error:  # of a disk that fails, or that ends
            log.warning("disk %s: its image cannot be read: %s", self._disk.name, error)
            data = b""
        return data.ljust(count * PAGE_SIZE, b"\0")

    async def slots(self) -> list[tuple[int, int, int]]:
        """Return the newest slots that the vault has taken from here."""
        if not self._disk.started or self._disk.line.displaced is not None:
            return []
        line = self._disk.points.line
        return [(line.generation, piece.from_epoch, piece.to_epoch)
                for piece in line.cover if not piece.level]  # fmt: skip

    async def take(self, size: int) -> None:
        """Wait until so many bytes may be uploaded."""
        await self._disk.site.uploads.take(size)


def _runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Return sorted pages as runs: the first one, and how many."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][0] + runs[-1][1] == page and runs[-1][1] < _READ_PAGES:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs


def _add(total: RepairReport, one: RepairReport) -> None:
    total.disks += one.disks
    total.points += one.points
    total.read_bytes += one.read_bytes
    total.healed += one.healed
    total.left += one.left
    total.refused |= one.refused
