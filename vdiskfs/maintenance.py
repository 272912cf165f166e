"""Policies at work: a mount follows those of its disks, and keeps its lines in order.

One task for all disks of a mount. It looks which policy each disk has, makes the settings
take effect that can, and thins and collects the lines of the disks that this site owns, one
after the other, so that guests and replication have the machine. A disk without a policy is
left alone. A line that fails is tried again by the retry table of `vdiskfs.health`, and keeps
neither other lines nor other disks from their turn; clocks that disagree stop it with an
event. What may be sent only slowly is thinned aside: policies are followed meanwhile. Trio
thread only.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

import trio

from vdiskfs.catalog.garbage import ClockError
from vdiskfs.catalog.keptdocuments import KeptDocuments
from vdiskfs.catalog.policy import Policy, read_policy
from vdiskfs.catalog.records import DiskRecord, encode_disk
from vdiskfs.catalog.retention import Ladder
from vdiskfs.catalog.swap import disk_object
from vdiskfs.catalog.upkeep import SWEEP_S, Tended, Upkeep
from vdiskfs.catalog.walk import is_damage
from vdiskfs.disk import ProtectedDisk, Site
from vdiskfs.errors import DamagedError, VaultUnreachableError, VdiskfsError
from vdiskfs.events import Events
from vdiskfs.health import RETRY_MINUTES
from vdiskfs.jobs import JobKind, Jobs
from vdiskfs.units import format_size
from vdiskfs.window import Window

log = logging.getLogger(__name__)

LOOK_S = 60.0
"""How often policies are read."""

TEND_S = 900.0
"""How often a line that is written is thinned: a point of it stays that cheap to open."""

ASIDE_AT_ONCE = 4
"""Disks that are thinned aside at a time."""

OTHERS_S = 6 * 3600.0
"""How often the other generations and branches of a disk are."""


COPY_S = 300.0
"""How often documents that are no disk's are copied, where they have changed."""

_WHAT = "thinning"
_LOOSE = 0
"""Stands for a generation where segments are meant that no delta of any names."""

_Key = tuple[str, int]  # a disk's id and a generation of it


class Maintenance:
    """Follows the policies of a mount's disks while its `run` runs."""

    def __init__(
        self, site: Site, disks: Callable[[], Sequence[ProtectedDisk]], events: Events, jobs: Jobs
    ) -> None:
        """Prepare; ``disks`` gives those protected here, ``jobs`` keep what was done."""
        self._jobs = jobs
        self._site = site
        self._disks = disks
        self._events = events
        self._due: dict[_Key, float] = {}
        self._tries: dict[_Key, int] = {}
        self._hurt: dict[_Key, DamagedError] = {}
        self._upkeep = Upkeep(site.vault, site.state.writer_id, site.pace.compression_level)
        self._told: dict[str, str] = {}
        self._kept_told = False
        self._copied: dict[str, DiskRecord] = {}
        self._ladders: dict[str, Ladder] = {}
        self._woken = trio.Event()
        self._documents = KeptDocuments(site.vault.store, site.state.documents)
        self._copy_at = -math.inf
        self._aside: set[str] = set()
        self._places = trio.CapacityLimiter(ASIDE_AT_ONCE)

    async def run(self) -> None:
        """Look and tend until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await self.turn(nursery)
                with trio.move_on_after(LOOK_S):
                    await self._woken.wait()
                self._woken = trio.Event()

    def wake(self) -> None:
        """Somebody has changed something: look now."""
        self._woken.set()

    async def turn(self, nursery: trio.Nursery) -> None:
        """Look at each disk once; in the nursery those are thinned that may send only slowly."""
        for disk in self._disks():
            if disk.started:
                async with self._telling(disk):
                    await self._look(disk, nursery)
        await self._copy()

    @contextlib.asynccontextmanager
    async def _telling(self, disk: ProtectedDisk) -> AsyncIterator[None]:
        """Tell of what fails with a disk: the others are to have their turn, whatever it is."""
        try:
            yield
            if not _of(self._tries, disk):
                self._told.pop(disk.name, None)
        except (VdiskfsError, OSError) as error:
            self._tell(disk, error)
        except Exception as error:
            log.exception("disk %s: is not thinned", disk.name)
            self._tell(disk, error)

    async def _copy(self) -> None:
        """Copy the documents of the vault that people wrote, should it lose them."""
        if trio.current_time() < self._copy_at:
            return
        self._copy_at = trio.current_time() + COPY_S
        try:
            await self._documents.look()
        except (VdiskfsError, OSError) as error:
            log.info("no copies of policies, groups and machines are made now: %s", error)

    async def _look(self, disk: ProtectedDisk, nursery: trio.Nursery) -> None:
        record = await self._site.vault.disk(disk.disk_id)
        is_aside = disk.disk_id in self._aside
        if is_aside:  # who thins it has read a newer one, perhaps
            disk.points.claims.learned(record)
        else:
            disk.points.learned(record)
        await disk.replicator.suspects.renew()
        await self._keep(disk, record)
        policy = None
        if record.policy:
            policy = await read_policy(self._site.vault.store, record.policy)
        follow(disk, policy, datetime.now().astimezone())
        if is_aside:
            return
        owner = record.owner
        if (
            policy is None
            or disk.line.displaced is not None
            or owner is None
            or owner.writer != self._site.state.writer_id
            or disk.points.generation not in record.parents
        ):
            self._forget(disk)
            return
        if self._ladders.get(disk.disk_id) != policy.ladder:
            self._ladders[disk.disk_id] = policy.ladder
            self._forget(disk)
        elif not disk.health.is_chain_damaged(_WHAT):
            # Damage that is noted no more: somebody has healed it, or asks for another try.
            for key in _of(self._hurt, disk):
                self._due.pop(key, None)
        if disk.replicator.shipper.is_bounded:
            self._aside.add(disk.disk_id)
            nursery.start_soon(self._tend_aside, disk, record, policy)
        else:
            await self._tend_lines(disk, record, policy)

    async def _tend_aside(self, disk: ProtectedDisk, record: DiskRecord, policy: Policy) -> None:
        try:
            async with self._places, self._telling(disk):
                await self._tend_lines(disk, record, policy)
        finally:
            self._aside.discard(disk.disk_id)

    async def _tend_lines(self, disk: ProtectedDisk, record: DiskRecord, policy: Policy) -> None:
        """Tend the lines of a disk that are due; raise what failed first, but for damage."""
        failed: list[Exception] = []
        for number in (*record.parents, _LOOSE):
            key = (disk.disk_id, number)
            if trio.current_time() < self._due.get(key, -math.inf):
                continue
            try:
                if number == _LOOSE:
                    await self._sweep(disk)
                else:
                    await self._tend(disk, record, policy, number)
            except Exception as error:  # noqa: BLE001 (raised below, when all had their turn)
                self._put_off(key)
                if isinstance(error, VdiskfsError) and is_damage(error):
                    self._hurt[key] = DamagedError(f"not thinned: {error.message}", hint=error.hint)
                else:
                    failed.append(error)
            else:
                self._tries.pop(key, None)
                self._hurt.pop(key, None)
        hurt = _of(self._hurt, disk)
        disk.health.chain_is_damaged(self._hurt[hurt[0]] if hurt else None, _WHAT)
        if failed:
            raise failed[0]

    async def _tend(
        self, disk: ProtectedDisk, record: DiskRecord, policy: Policy, number: int
    ) -> None:
        own, now = number == disk.points.generation, trio.current_time()
        began_ns = time.time_ns()
        points = disk.points if own else self._site.vault.log(record, number)
        scratch = self._site.state.disk(disk.disk_id).directory / "thin" / str(number)
        tended = await self._upkeep.tend(
            points, policy.ladder, scratch, compression_level=policy.compression_level,
            take=disk.replicator.shipper.take_aside,
        )  # fmt: skip
        self._due[disk.disk_id, number] = now + (
            0 if tended.thinned.more else TEND_S if own else OTHERS_S
        )
        self._say(disk, tended, began_ns)
        if tended.collected.refused:
            await self._tell_kept(disk, tended.collected.refused)

    async def _sweep(self, disk: ProtectedDisk) -> None:
        """Collect segments of a disk that nothing names, and nothing will."""
        now, began_ns = trio.current_time(), time.time_ns()
        found = await self._upkeep.sweep(disk.disk_id)
        self._due[disk.disk_id, _LOOSE] = now + SWEEP_S
        if found.deleted:
            self._note(disk, f"{found.deleted} segments deleted that no point ever named", began_ns)

    def _put_off(self, key: _Key) -> None:
        """A line has failed: it is tried again later, and later."""
        tries = self._tries.get(key, 0)
        self._tries[key] = tries + 1
        minutes = RETRY_MINUTES[min(tries, len(RETRY_MINUTES) - 1)]
        self._due[key] = trio.current_time() + 60 * minutes

    def _forget(self, disk: ProtectedDisk) -> None:
        """Forget when the lines of a disk are due, and what was wrong with them."""
        for key in _of(self._due, disk):
            del self._due[key]
            self._tries.pop(key, None)
            self._hurt.pop(key, None)
        disk.health.chain_is_damaged(None, _WHAT)

    def _say(self, disk: ProtectedDisk, tended: Tended, began_ns: int) -> None:
        thinned, collected = tended.thinned, tended.collected
        if thinned.points or collected.deleted:
            what = (
                f"{thinned.points} points ({format_size(thinned.bytes)}) thinned away, "
                f"{thinned.left} are left; {collected.deleted} objects deleted, "
                f"{collected.waiting + collected.refused} wait"
            )
            self._note(disk, what, began_ns)

    def _note(self, disk: ProtectedDisk, what: str, began_ns: int) -> None:
        log.info("disk %s: %s", disk.name, what)
        self._jobs.note(JobKind.THIN, disk.name, disk.disk_id, began_ns, what)

    async def _tell_kept(self, disk: ProtectedDisk, refused: int) -> None:
        """Say once for the vault that it keeps what is to be deleted."""
        vault = self._site.vault.vault_id
        if self._kept_told or await trio.to_thread.run_sync(
            self._events.was_told, "thinning.kept", vault
        ):
            self._kept_told = True
            return
        self._kept_told = True
        text = f"disk {disk.name}: {refused} objects that no point needs cannot be deleted yet"
        self._events.tell("thinning.kept", vault, text, disk=disk.name)

    async def _keep(self, disk: ProtectedDisk, record: DiskRecord) -> None:
        """Keep a copy of the record of a disk that is ours, should the vault lose it."""
        cache, owner = disk.points.cache, record.owner
        if cache is None or owner is None or owner.writer != self._site.state.writer_id:
            return
        name = disk_object(disk.disk_id)
        try:
            if self._copied.get(disk.disk_id) == record:
                await trio.to_thread.run_sync(cache.confirm, name)
            else:
                await trio.to_thread.run_sync(cache.put_aside, {name: encode_disk(record)})
                self._copied[disk.disk_id] = record
        except OSError as error:
            # A disk that is full must not end thinning, which makes room.
            log.info("disk %s: no copy of its record is kept: %s", disk.name, error)

    def _tell(self, disk: ProtectedDisk, error: Exception) -> None:
        """Say what failed, once."""
        text = str(error)
        if not isinstance(error, VdiskfsError | OSError):
            text = f"{type(error).__name__}: {error}"
        if self._told.get(disk.name) == text:
            return
        self._told[disk.name] = text
        code = "thinning.clocks" if isinstance(error, ClockError) else "thinning.failed"
        if not isinstance(error, VaultUnreachableError):  # which is told as such
            self._events.tell(code, disk.name, text, disk=disk.name)
        log.warning("disk %s: is not thinned: %s", disk.name, text)


def _of(known: Mapping[_Key, object], disk: ProtectedDisk) -> list[_Key]:
    """Return the keys of a disk."""
    return [key for key in known if key[0] == disk.disk_id]


def follow(disk: ProtectedDisk, policy: Policy | None, now: datetime) -> None:
    """Let what a policy says take effect on a disk; None: what the mount's settings say.

    The intervals and thresholds that others ask for are there as ``disk.policy``.
    """
    disk.policy = policy
    pace = disk.site.pace
    limit = 0
    if policy is not None:
        pace = replace(
            pace, epoch_interval_s=policy.epoch_interval_s or pace.epoch_interval_s,
            compression_level=policy.compression_level or pace.compression_level,
            resync_window=Window.parse(policy.resync_window) or pace.resync_window,
        )  # fmt: skip
        hours = Window.parse(policy.bandwidth_hours)
        if hours is None or hours.opens_in_s(now) <= 0:
            limit = policy.bandwidth_bytes or 0
    replicator = disk.replicator
    replicator.pace = pace
    replicator.stride.ask(pace.epoch_interval_s)
    replicator.resync.window = pace.resync_window
    replicator.shipper.limiter.limit = limit
