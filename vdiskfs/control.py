"""What the control socket offers, over a running mount: `api.Control`.

Looks disks and points up by name, asks the module that knows, and puts documents together.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict

import trio

from vdiskfs.applicationpoints import ApplicationPoints
from vdiskfs.browse import Browser, point_document
from vdiskfs.catalog import Group, shared_points
from vdiskfs.config import MountSettings
from vdiskfs.delta import Flags
from vdiskfs.disk import ProtectedDisk
from vdiskfs.errors import NotFoundError, StateError, UsageError, VdiskfsError
from vdiskfs.failover.choose import point_spec
from vdiskfs.failovercontrol import FailoverControl
from vdiskfs.groups import Groups
from vdiskfs.groupview import group_document, group_point_document
from vdiskfs.jobapi import Jobs
from vdiskfs.monitor import disk_details, disk_document, early_document, status_document
from vdiskfs.native import CoreCounts
from vdiskfs.protection import Protection
from vdiskfs.repairing import Repairs
from vdiskfs.together import seal_together
from vdiskfs.units import format_time, parse_time
from vdiskfs.watchapi import Watching

Document = Mapping[str, object]

LIST_S = 10.0
"""How long the vault may take to list its disks."""

_SHOWN_POINTS = 5
"""The newest points of a group that are shown with it."""


class MountControl:
    """The control of one mount."""

    def __init__(
        self, settings: MountSettings, protection: Protection, browser: Browser,
        failovers: FailoverControl, unmount: Callable[..., Awaitable[Document]], *, groups: Groups,
        vault_error: Callable[[], str | None], hand_over: Callable[[], Awaitable[Document]],
        counts: Callable[[], CoreCounts], application: ApplicationPoints, watching: Watching,
        jobs: Jobs, repairs: Repairs,
    ) -> None:  # fmt: skip
        """Put the parts together; nothing runs yet."""
        self.watching = watching
        self.jobs = jobs
        self.repairs = repairs
        self._settings = settings
        self._protection = protection
        self._browser = browser
        self.failovers = failovers
        self._groups = groups
        self._unmount = unmount
        self._vault_error = vault_error
        self._hand_over = hand_over
        self._counts = counts
        self._application = application

    async def status(self) -> Document:
        """Return the document of ``vdiskfs status --json``."""
        disks, early = self._protection.disks(), self._protection.early()
        document = status_document(self._settings, disks, early, self._vault_error())
        counts = asdict(self._counts())
        return {**document, "requests": counts, "vault_requests": self._browser.requests}

    async def disks(self) -> Document:
        """Return the disks protected here, and the others of the vault.

        Those are as they were last seen where the vault does not answer.
        """
        here = [{**disk_document(disk), "site": self._settings.site, "here": True,
                 "file": disk.file.path}
                for disk in self._protection.disks()]  # fmt: skip
        here += [{**early_document(one), "site": self._settings.site, "here": True,
                  "file": one.record.file}
                 for one in self._protection.early()]  # fmt: skip
        names = {row["name"] for row in here}
        error = None
        try:
            with trio.fail_after(LIST_S):
                known = await self._browser.records()
        except (VdiskfsError, trio.TooSlowError) as caught:
            known = self._browser.known
            error = str(caught) or f"the vault does not answer within {LIST_S:.0f} s"
        others = [
            {"name": one.name, "id": one.id, "size": one.size, "here": False,
             "state": "Retired" if one.retired else "Elsewhere", "site": one.site,
             "generation": one.generation}
            for one in known.values()
            if one.name not in names
        ]  # fmt: skip
        return {"disks": here + others, "vault_error": error}

    async def disk(self, name: str) -> Document:
        """Return one disk, in detail."""
        disk = self._protection.find(name)
        return disk_details(disk, self._settings.options.epoch_interval_s)

    async def protect(self, name: str) -> Document:
        """Protect a file of the source."""
        disk = await self._protection.protect(name)
        self._browser.forget_records()
        return disk_document(disk)

    async def unprotect(self, name: str) -> Document:
        """End protection; the history stays."""
        disk = await self._protection.unprotect(name)
        self._browser.forget_records()
        return {"name": disk.name, "id": disk.disk_id, "state": str(disk.health.state)}

    async def retry(self, name: str) -> Document:
        """End the wait for the next try of what failed."""
        early = self._protection.find_early(name)
        if early is not None:
            error, waited = early.error, early.retry_now()
            return {
                "name": early.record.name, "retried": waited,
                "last_error": None if error is None else str(error),
            }  # fmt: skip
        disk = self._protection.find(name)
        waited = disk.health.retry_now()
        return {"name": disk.name, "retried": waited, "last_error": disk.health.last_error}

    async def pause(self, name: str) -> Document:
        """Let a disk's replication stand still; it is tracked on."""
        disk = self._protection.find(name)
        await disk.replicator.pause()
        return disk_document(disk)

    async def resume(self, name: str) -> Document:
        """Let a disk's replication go on."""
        disk = self._protection.find(name)
        await disk.replicator.resume()
        return disk_document(disk)

    async def resync(self, name: str, *, now: bool, cancel: bool) -> Document:
        """Compare a disk with the vault, or stop that."""
        disk = self._protection.find(name)
        if cancel:
            await disk.replicator.cancel_resync()
        else:
            await disk.replicator.start_resync(now=now)
        return disk_details(disk, self._settings.options.epoch_interval_s)

    async def points(self, name: str, since: str, until: str, limit: int | None) -> Document:
        """Return a disk's points, or a group's, newest last."""
        now = time.time_ns()
        since_ns, until_ns = _time("since", since, now), _time("until", until, now)
        try:
            points = await self._browser.list_points(name, since_ns, until_ns, limit)
        except NotFoundError:
            group = self._groups.known(name)
            if group is None:
                raise
            return {"points": await self._group_points(group, since_ns, until_ns, limit)}
        return {"points": [point_document(name, point) for point in points]}

    async def point(self, name: str, point: str) -> Document:
        """Return one point, with what opening it costs."""
        log = await self._browser.log(name)
        found = await log.find(point_spec(point), time.time_ns())
        [proven] = await self._browser.proven(log, [found], new=True)
        before = log.store.requests
        async with await log.open(found) as reader:
            requests = log.store.requests - before
            return {
                **point_document(name, proven), "objects": reader.objects, "requests": requests
            }  # fmt: skip

    async def create_points(
        self, names: list[str], label: str, *, application: bool, wait: bool
    ) -> Document:
        """Seal disks, or all of a group, at one instant."""
        found = {one.disk_id: one for name in names for one in self._meant(name)}
        disks = list(found.values())
        why = ""
        if application:
            sealed, why = await self._application.create(disks, label)
        else:
            sealed = await seal_together([disk.replicator for disk in disks], label)
        if wait:
            async with trio.open_nursery() as nursery:
                for disk in disks:
                    nursery.start_soon(disk.replicator.wait_shipped)
        by_id = {spooled.head.disk_id: spooled.head for spooled in sealed}
        rows = []
        for disk in disks:
            head = by_id[disk.disk_id]
            rows.append({
                "disk": disk.name, "epoch": head.to_epoch, "time": format_time(head.time_ns),
                "consistency": "application" if head.flags & Flags.APPLICATION else "crash",
                "label": label or None, "generation": head.generation,
                "stored": disk.replicator.stored.epoch >= head.to_epoch,
            })  # fmt: skip
        return {"points": rows, "fell_back": why or None}

    def _meant(self, name: str) -> list[ProtectedDisk]:
        """Return the disk of a name, or all disks of the group."""
        group = self._groups.known(name)
        try:
            return [self._protection.find(name)]
        except NotFoundError:
            if group is None:
                raise
        here = self._groups.members(group)
        absent = group.ids - {disk.disk_id for disk in here}
        for member in group.disks:
            if member.id in absent:
                raise StateError(
                    f"group {name}: disk {member.name} is not protected here",
                    hint=f"vdiskfs group show {shlex.quote(name)}",
                )
        return [disk for disk in here if not disk.line.is_elsewhere] or here

    # ---- groups ------------------------------------------------------------------------

    async def groups(self) -> Document:
        """Return all groups of the vault; as they were known last while it is away."""
        error = await self._groups.try_learn()
        rows = [group_document(one, self._groups.members(one)) for one in self._groups.all()]
        return {"groups": rows, "vault_error": None if error is None else str(error)}

    async def group(self, name: str) -> Document:
        """Return one group, with its newest points where the vault answers."""
        error = await self._groups.try_learn()
        group = self._groups.find(name)
        points = None
        if error is None:
            try:
                points = await self._group_points(group, None, None, _SHOWN_POINTS)
            except VdiskfsError as failure:
                error = failure
        return {
            **group_document(group, self._groups.members(group)),
            "points": points,
            "vault_error": None if error is None else str(error),
        }

    async def change_group(
        self, name: str, change: str, disks: list[str], *, dry_run: bool
    ) -> Document:
        """Create, extend, shrink or delete a group."""
        if change == "delete":
            gone = await self._groups.delete(name, dry_run=dry_run)
            document: Document = {"name": name, "id": None if gone is None else gone.id}
        else:
            acts = {"create": self._groups.create, "add": self._groups.add,
                    "remove": self._groups.remove}  # fmt: skip
            group = await acts[change](name, disks, dry_run=dry_run)
            document = group_document(group, self._groups.members(group))
        return {**document, "dry_run": True} if dry_run else document

    async def _group_points(
        self, group: Group, since_ns: int | None, until_ns: int | None, limit: int | None
    ) -> list[dict[str, object]]:
        names = sorted(disk.name for disk in group.disks)
        found = await shared_points(
            self._browser.log, names, since_ns=since_ns, until_ns=until_ns, limit=limit
        )
        return [group_point_document(group.name, names, points) for points in found]

    # ---- the mount ---------------------------------------------------------------------

    async def unmount(self, *, drain: bool, lazy: bool) -> Document:
        """Unmount; the daemon ends."""
        return await self._unmount(drain=drain, lazy=lazy)

    async def upgrade(self) -> Document:
        """Let a successor take the mount over; the daemon ends."""
        return await self._hand_over()


def _time(what: str, text: str, now_ns: int) -> int | None:
    if not text:
        return None
    try:
        return parse_time(text, now_ns)
    except ValueError as error:
        raise UsageError(f"{what}: {error}") from None
