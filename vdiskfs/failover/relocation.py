"""Failovers for good: a disk moves to this site, and replicates from here.

Each command is a job of steps. A step that was cut off, by a crash or by a vault that went away,
is gone on with when the daemon is back or when the same command is given again. Until a failover
is committed its point can be changed, and it can be rolled back. Trio thread only.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial

import trio

from vdiskfs.catalog import DiskRecord
from vdiskfs.catalog.moves import Fork, give_back, note_move, withdraw
from vdiskfs.config import MachinesConfig
from vdiskfs.crash import hook
from vdiskfs.disk import ProtectedDisk, Site
from vdiskfs.errors import NotFoundError, StateError, VaultUnreachableError, VdiskfsError
from vdiskfs.failover.asking import Asking
from vdiskfs.failover.background import BackgroundHydration
from vdiskfs.failover.choose import (
    choose,
    close,
    logs_of,
    new_record,
    unknown_members,
    with_tokens,
)
from vdiskfs.failover.failovers import Failover, Failovers
from vdiskfs.failover.free import check_free
from vdiskfs.failover.jobs import Runner, Steps, begin, check_no_job, check_same, check_whole
from vdiskfs.failover.known import fork_of
from vdiskfs.failover.overdue import Overdue
from vdiskfs.failover.ownmachines import note_kept
from vdiskfs.failover.record import FailoverRecord, Member
from vdiskfs.failover.states import Kind, State, Step, after, allowed
from vdiskfs.failover.taken import TakenDisk
from vdiskfs.machines import Mapped
from vdiskfs.protection import Protection
from vdiskfs.ratelimit import RateLimiter
from vdiskfs.units import NS

log = logging.getLogger(__name__)

SETTLED = (State.FAILED_OVER, State.COMMITTED, State.REPROTECTING, State.FAILBACK_READY,
           State.HANDED_OVER)  # fmt: skip
"""States in which a failover's disks are this site's, and its copies are written to."""

LOOK_S = 0.2
"""Seconds between two looks whether a disk is started."""

SIDE = (Kind.TEST, Kind.FAILBACK)
"""Kinds that others deal with."""


class Relocations:
    """Starts failovers for good, and takes them further."""

    def __init__(
        self, failovers: Failovers, site: Site, protection: Protection, nursery: trio.Nursery, *,
        host: MachinesConfig, limiter: RateLimiter,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            failovers: the mount's.
            site: the mount's.
            protection: counts in what is taken.
            nursery: where jobs run, and disks are replicated.
            host: what machines may use of this host.
            limiter: bounds what is brought in the background.
        """
        self._failovers = failovers
        self._site = site
        self._protection = protection
        self._nursery = nursery
        self._networks = Mapped(host.networks)
        self._runner = Runner(failovers, nursery)
        self._asking = Asking(failovers, site)
        self._limiter = limiter
        self._overdue = Overdue(failovers, nursery, partial(self.roll_back, dry_run=False))

    # ---- after a restart -----------------------------------------------------------------

    def resume(self) -> None:
        """Track what is written to here, by what is on this host alone; then go on with jobs."""
        for failover in self._failovers.all():
            if failover.record.kind in SIDE:
                continue
            if failover.lost and failover.record.state is not State.REMOVING:
                self._overdue.watch(failover)
                continue
            under_way = failover.record.state not in SETTLED
            if failover.copies and (not under_way or failover.has_done("taken")):
                self._make_disks(failover)
                for disk in failover.taken.values():
                    disk.resume()
                    self._nursery.start_soon(disk.take_up)
                if not under_way and failover.record.state is not State.HANDED_OVER:
                    self._hydrate(failover)
            self._go_on(failover)

    def _go_on(self, failover: Failover) -> None:
        record, job = failover.record, failover.job
        if record.state is State.REMOVING:
            self._failovers.start_apart(failover, self._remove, failover)
        elif job is not None and not job.ended_ns:
            self._runner.start(failover, self._steps(failover, job.kind))
        elif record.state is State.STARTING:
            self._failovers.start_apart(failover, self._restart, failover, Step.START)
        if record.state in SETTLED or failover.has_done("machine"):
            self._failovers.judge_again(failover)
        self._overdue.watch(failover)

    def _make_disks(self, failover: Failover) -> None:
        failover.taken = {
            disk_id: TakenDisk(
                self._site, self._protection, copy,
                f"failovers/{failover.record.name}/{copy.member.file}", self._nursery,
            )
            for disk_id, copy in failover.copies.items()
        }  # fmt: skip
        for disk in failover.taken.values():
            disk.on_ours = partial(self._failovers.start_apart, failover, self._on_ours, failover)

    async def _on_ours(self, failover: Failover) -> None:
        """A disk of it is known to be this site's: again, perhaps."""
        was_handed = failover.record.state is State.HANDED_OVER
        await note_kept(self._failovers, failover)
        if was_handed and not failover.hydrations:
            self._hydrate(failover)  # a run that began while it was released did not

    # ---- start ---------------------------------------------------------------------------

    async def plan_start(
        self, disk: str, kind: Kind, spec: str | int, name: str | None, *, vm: bool
    ) -> FailoverRecord:
        """Return what `start` would do; nothing changes.

        Raises:
            As `start`.
        """
        found = self._begun(disk, kind)
        if found is None:
            return await self._plan(disk, kind, spec, name, vm=vm)
        check_same(found, name=name, spec=spec, vm=vm)
        return found.record

    async def start(
        self, disk: str, kind: Kind, spec: str | int, name: str | None, *, vm: bool,
        rollback_s: float = 0.0,
    ) -> Failover:  # fmt: skip
        """Fail a disk, and with ``vm`` its machine's other disks, over to this site.

        Returns when that is under way, durably: `Failover.job` says how far it is. The same
        call again goes on with one that stands still.

        Args:
            disk: its name.
            kind: PLANNED: the site that has it stops its machine and ships the rest first, so
                that nothing is lost. UNPLANNED: from a point, whatever that site does.
            spec: the point of an unplanned failover.
            name: of the failover; None: one is found.
            vm: start the machine that the vault has for the disk, if it has one.
            rollback_s: seconds after which it is rolled back unless committed; 0: never.

        Raises:
            NotFoundError: no such disk or point.
            StateError: the disk is this site's, or is failed over already.
            VdiskfsError: as the vault and the local disk.
        """
        async with self._failovers.changing:
            failover = self._begun(disk, kind)
            rollback_ns = time.time_ns() + int(rollback_s * NS) if rollback_s else 0
            if failover is None:
                record = await self._plan(disk, kind, spec, name, vm=vm)
                failover = await self._failovers.make(replace(record, rollback_ns=rollback_ns))
            else:
                check_same(failover, name=name, spec=spec, vm=vm)
                check_whole(failover)
                if rollback_ns and not failover.record.rollback_ns:
                    await self._failovers.write(failover, rollback_ns=rollback_ns)
            self._overdue.watch(failover)
            if failover.record.state is State.STARTING or failover.is_at(Step.START):
                await self._restart(failover, Step.START)
        return failover

    def _begun(self, disk: str, kind: Kind) -> Failover | None:
        """Return the failover of a disk that is to go on; None: there is none of it.

        Raises:
            StateError: the disk is failed over here already.
        """
        for failover in self._failovers.all():
            record = failover.record
            if record.kind in SIDE or record.state is State.HANDED_OVER:
                continue
            if disk in (record.group, *(one.disk for one in record.members)):
                begun = record.state is State.STARTING or failover.is_at(Step.START)
                # Of a planned one there is nothing that could be meant otherwise.
                begun = begun or (kind is Kind.PLANNED and record.state is State.FAILED_OVER)
                if record.kind is kind and begun:
                    return failover
                after(record.name, record.state, Step.START)
                raise StateError(
                    f"failover {record.name}: a {record.kind} failover of {disk} is under way "
                    f"in state {record.state}; possible: {', '.join(allowed(record.state))}",
                    hint=f"vdiskfs failover show {record.name}",
                )
        return None

    def _check_not_here(self, disk: str) -> None:
        """Check that no failover has a disk, also where another one, or a group, was named.

        Raises:
            StateError: one has.
        """
        for failover in self._failovers.all():
            record = failover.record
            has = disk in (one.disk for one in record.members)
            if has and record.kind not in SIDE and record.state is not State.HANDED_OVER:
                raise StateError(
                    f"disk {disk}: failover {record.name} has it, in state {record.state}; "
                    f"possible: {', '.join(allowed(record.state)) or 'none'}",
                    hint=f"vdiskfs failover show {record.name}",
                )

    async def _plan(
        self, disk: str, kind: Kind, spec: str | int, name: str | None, *, vm: bool
    ) -> FailoverRecord:
        record, target = await new_record(self._failovers, disk, name, kind, vm=vm)
        for one in target.names:
            self._check_not_here(one)
        found = [
            await check_free(self._site, self._protection, one, planned=kind is Kind.PLANNED)
            for one in target.names
        ]
        if kind is Kind.PLANNED:
            members = unknown_members(found)
        else:
            find_log = logs_of(self._site.vault, found)
            members, readers = await choose(self._site.vault, find_log, target, spec)
            await close(readers)
        return replace(record, members=with_tokens(members, found))

    # ---- what may follow -----------------------------------------------------------------

    async def change_point(self, name: str, spec: str | int, *, dry_run: bool) -> FailoverRecord:
        """Begin anew at another point; what was written here since is thrown away.

        Raises:
            StateError: it is committed, or no failover for good.
            NotFoundError: no such failover or point.
            BusyError: a program has a copy open.
        """
        async with self._failovers.changing:
            failover = self._failovers.find(name)
            if failover.is_at(Step.CHANGE_POINT):
                check_whole(failover)
                if not dry_run:
                    await self._restart(failover, Step.CHANGE_POINT)
                return failover.record
            state = after(name, failover.record.state, Step.CHANGE_POINT)
            check_no_job(failover)
            records = [await self._site.vault.disk(one.disk_id) for one in failover.record.members]
            members, readers = await choose(
                self._site.vault,
                logs_of(self._site.vault, records, _line_at_source),
                failover.target,
                spec,
            )
            await close(readers)
            members = with_tokens(members, records)
            await self._check_idle(failover)
            if dry_run:
                return replace(failover.record, members=members)
            jobs = begin(failover, Step.CHANGE_POINT)
            await self._failovers.write(
                failover, state=state, members=members, jobs=jobs, health=None
            )
            hook("failover.changing")
            await self._restart(failover, Step.CHANGE_POINT)
        return failover.record

    async def commit(self, name: str, *, dry_run: bool) -> FailoverRecord:
        """Make it final: it cannot be rolled back any more, and its point not be changed."""
        async with self._failovers.changing:
            failover = self._failovers.find(name)
            state = after(name, failover.record.state, Step.COMMIT)
            check_no_job(failover)
            check_whole(failover)
            if not dry_run:
                await self._tell(failover, state)
                jobs = begin(failover, Step.COMMIT)
                done = replace(jobs[-1], done=("told",), ended_ns=time.time_ns())
                await self._failovers.write(
                    failover, state=state, jobs=(*jobs[:-1], done), rollback_ns=0
                )
                hook("failover.committed")
                log.info("failover %s: committed", name)
        return failover.record

    async def roll_back(self, name: str, *, dry_run: bool) -> FailoverRecord:
        """Give the disks back to the site that had them; what was written here is thrown away.

        Raises:
            StateError: it is committed, or no failover for good.
            BusyError: a program has a copy open.
        """
        async with self._failovers.changing:
            failover = self._failovers.find(name)
            state = after(name, failover.record.state, Step.ROLLBACK)
            if failover.record.state not in (State.STARTING, State.ROLLING_BACK):
                await self._check_idle(failover)
            if dry_run:
                return failover.record
            if failover.record.state is not State.ROLLING_BACK:
                if failover.record.state is State.STARTING:
                    await self._runner.stop(failover)
                await self._check_idle(failover)
                jobs = begin(failover, Step.ROLLBACK)
                await self._failovers.write(failover, state=state, jobs=jobs)
                hook("failover.rolling")
            await self._restart(failover, Step.ROLLBACK)
        return failover.record

    async def reprotect(self, disk: str, *, dry_run: bool) -> FailoverRecord:
        """Replicate from here: what changed since the failover is shipped, and all that follows.

        Raises:
            StateError: no committed failover of the disk is here.
        """
        async with self._failovers.changing:
            failover = self.of_disk(disk)
            check_whole(failover)
            goes_on, state = failover.is_at(Step.REPROTECT), State.REPROTECTING
            if not goes_on:
                state = after(failover.record.name, failover.record.state, Step.REPROTECT)
            if not dry_run:
                if not goes_on and failover.record.state is not state:
                    jobs = begin(failover, Step.REPROTECT)
                    await self._failovers.write(failover, state=state, jobs=jobs)
                    hook("failover.reprotecting")
                await self._restart(failover, Step.REPROTECT)
        return failover.record

    def of_disk(self, disk: str) -> Failover:
        """Return the failover for good that has a disk, or whose name it is.

        Raises:
            StateError: there is none.
        """
        for failover in self._failovers.all():
            record = failover.record
            names = (record.name, record.group, *(one.disk for one in record.members))
            if record.kind not in SIDE and disk in names:
                return failover
        raise StateError(f"disk {disk}: is not failed over to this site",
                         hint="vdiskfs failover list")  # fmt: skip

    # ---- steps ---------------------------------------------------------------------------

    async def _restart(self, failover: Failover, kind: Step) -> None:
        await self._runner.go_on(failover, kind, self._steps(failover, kind))

    def _steps(self, failover: Failover, kind: Step) -> Steps:
        take: Steps = [("copies", self._failovers.make_copies), ("taken", self._take),
                       ("machine", self._start_machine), ("over", self._over)]  # fmt: skip
        if kind is Step.START:
            ask: Steps = [("asked", self._asking.ask), ("released", self._asking.wait)]
            return [*(ask if failover.record.kind is Kind.PLANNED else []), *take]
        if kind is Step.CHANGE_POINT:
            return [("ended", self._end), *take]
        if kind is Step.ROLLBACK:
            return [("ended", self._end), ("returned", self._give_back),
                    ("removed", self._failovers.remove)]  # fmt: skip
        if kind is Step.REPROTECT:
            return [("resumed", self._replicate), ("shipped", self._wait_shipped)]
        raise StateError(f"failover {failover.record.name}: {kind} has no steps")

    async def _take(self, failover: Failover) -> None:
        if not failover.taken:
            self._make_disks(failover)
        for member in failover.record.members:
            taken = failover.taken[member.disk_id]
            if taken.disk is None:  # else an earlier try of this run has started it
                record = await self._site.vault.disk(member.disk_id)
                await taken.take(self._fork(failover, member, record))

    def _fork(self, failover: Failover, member: Member, record: DiskRecord) -> Fork:
        state = State.FAILED_OVER
        return fork_of(failover.record, member, record, site=self._site.name, state=state)

    async def _start_machine(self, failover: Failover) -> None:
        await self._failovers.ensure_machine(failover, self._networks)

    async def _over(self, failover: Failover) -> None:
        await self._failovers.write(failover, state=State.FAILED_OVER)
        hook("failover.over")
        self._hydrate(failover)

    def _hydrate(self, failover: Failover) -> None:
        """Bring in the background what nobody has asked for yet."""
        for disk_id, copy in failover.copies.items():
            task = BackgroundHydration(copy, self._limiter)
            failover.hydrations[disk_id] = task
            self._failovers.start_apart(failover, self._bring, failover, task, copy.member.disk)

    async def _bring(self, failover: Failover, task: BackgroundHydration, disk: str) -> None:
        try:
            await task.run()
        except VdiskfsError as error:
            text = f"the rest of disk {disk} is not brought: {error}"
            self._failovers.events.tell("hydration.ended", failover.record.name, text, disk=disk)
            raise

    async def _end(self, failover: Failover) -> None:
        if failover.machine is not None:
            await failover.machine.end()
        await self._failovers.check_unused(failover)
        await self._failovers.discard_copies(failover)
        await self._forget(failover)

    async def _forget(self, failover: Failover) -> None:
        """Remove what is known of the disks here, also what an earlier run has left."""
        for member in failover.record.members:
            if self._site.state.disk(member.disk_id).directory.exists():
                await trio.to_thread.run_sync(self._site.state.remove_disk, member.disk_id)

    async def _remove(self, failover: Failover) -> None:
        await self._forget(failover)
        await self._failovers.remove(failover)

    async def _give_back(self, failover: Failover) -> None:
        vault = self._site.vault
        for member in failover.record.members:
            try:
                await withdraw(vault, member.disk_id, failover.record.id)
                record = await give_back(vault, member.disk_id, failover.record.id, vault.log)
            except NotFoundError as error:
                # A folder that is not mounted lacks everything.
                if await self._failovers.is_away():
                    text = f"the vault is not there: {error.message}"
                    hint = "bring it back, then the same command again"
                    raise VaultUnreachableError(text, hint=hint) from error
                continue
            if record.owner is not None:
                await vault.touch_site(record.owner.site, record.owner.writer)

    async def _replicate(self, failover: Failover) -> None:
        for taken in failover.taken.values():
            disk = await self._started(failover, taken)
            await disk.replicator.resume()
            disk.health.shown_as = None
            disk.replicator.touched()

    async def _started(self, failover: Failover, taken: TakenDisk) -> ProtectedDisk:
        """Return a disk once it is started: after a restart the vault has to answer first."""
        while taken.disk is None:
            failover.says = f"disk {taken.member.disk} waits for the vault"
            await trio.sleep(LOOK_S)
        failover.says = None
        return taken.disk

    async def _wait_shipped(self, failover: Failover) -> None:
        for taken in failover.taken.values():
            disk = await self._started(failover, taken)
            await disk.replicator.seal_if_changed()
            await disk.replicator.wait_shipped()
        await self._tell(failover, State.FAILBACK_READY)
        await self._failovers.write(failover, state=State.FAILBACK_READY)
        hook("failover.protected")

    async def _tell(self, failover: Failover, state: State) -> None:
        for member in failover.record.members:
            await note_move(self._site.vault, member.disk_id, failover.record.id, str(state))

    # ---- checks --------------------------------------------------------------------------

    async def _check_idle(self, failover: Failover) -> None:
        """Check that its machine can be ended, and nothing else uses the copies."""
        check_no_job(failover)
        if failover.machine is None or await failover.machine.state() == "down":
            await self._failovers.check_unused(failover)


def _line_at_source(record: DiskRecord) -> int:
    """Return the line that was current where a disk that is failed over came from."""
    if record.moved is None:
        raise StateError(f"disk {record.name}: is not failed over any more")
    return record.moved.generation
