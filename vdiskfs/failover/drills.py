"""Test failovers: a point is tried out on a side branch, and thrown away.

Replication knows nothing of it; any number may be there at once. Trio thread only.
"""

from __future__ import annotations

import logging
import shlex
import time
from dataclasses import replace

import trio

from vdiskfs.crash import hook
from vdiskfs.errors import StateError, VdiskfsError
from vdiskfs.failover.choose import choose, close, new_record
from vdiskfs.failover.failovers import Failover, Failovers
from vdiskfs.failover.jobs import begin, check_no_job
from vdiskfs.failover.record import FailoverRecord, Job
from vdiskfs.failover.states import Kind, State, Step, after
from vdiskfs.machines import Isolated
from vdiskfs.point import PointReader
from vdiskfs.units import format_time

log = logging.getLogger(__name__)


class Drills:
    """Makes test failovers, and cleans failovers up."""

    def __init__(self, failovers: Failovers) -> None:
        """Take the mount's failovers."""
        self._failovers = failovers

    def resume(self) -> None:
        """Go on with what an earlier run was cut off in."""
        for failover in self._failovers.all():
            if failover.record.kind is not Kind.TEST:
                continue
            if failover.is_at(Step.TEST):
                error = VdiskfsError("the daemon ended while it began")
                failover.record = replace(failover.record, jobs=_failed(failover, error))
            if failover.record.state is State.REMOVING:
                self._failovers.start_apart(failover, self._failovers.remove, failover)
            elif failover.machine is not None and failover.record.health is None:
                self._failovers.start_apart(failover, self._failovers.judge, failover)

    async def plan_test(
        self, disk: str, spec: str | int, name: str | None, *, vm: bool
    ) -> FailoverRecord:
        """Return what `test` would make; nothing changes.

        Raises:
            As `test`.
        """
        record, readers = await self._plan(disk, spec, name, vm=vm)
        await close(readers)
        return record

    async def test(self, disk: str, spec: str | int, name: str | None, *, vm: bool) -> Failover:
        """Make writable copies of a point, for tests, and start the machine; replication goes on.

        Durable on return, and nothing of its data is here yet. A machine that was started is
        judged afterwards: see ``record.health``.

        Args:
            disk: its name, or a group's: see `targets.find_points`. With ``vm`` the other disks
                of its machine are copied, too.
            spec: the point: an epoch, a time, ``latest`` and the like.
            name: of the failover; None: one is found.
            vm: start the machine that the vault has for the disk, if it has one.

        Raises:
            NotFoundError: no such disk or point.
            UsageError, AlreadyExistsError: the name is none, or taken.
            VaultUnreachableError: what is to be copied is not known.
            LocalError: the disk refused, or the machine cannot be started.
            RefusedError: this host does not allow what the machine's definition asks for.
        """
        async with self._failovers.changing:
            record, readers = await self._plan(disk, spec, name, vm=vm)
            try:
                failover = await self._failovers.make(record)
            except BaseException:
                await close(readers)
                raise
            for disk_id, copy in failover.copies.items():
                copy.use(readers[disk_id])  # open already: the first read asks for less
            log.info("failover %s: a copy of disk %s at %s", record.name, disk,
                     format_time(record.members[0].time_ns))  # fmt: skip
            try:
                await self._failovers.start_machine(failover, Isolated())
            except BaseException as error:
                if isinstance(error, VdiskfsError):
                    failover.record = replace(failover.record, jobs=_failed(failover, error))
                with trio.CancelScope(shield=True):
                    await self._failovers.remove(failover)
                raise
            done = replace(begin(failover, Step.TEST)[-1], ended_ns=time.time_ns())
            await self._failovers.write(failover, jobs=(done,))
        return failover

    async def _plan(
        self, disk: str, spec: str | int, name: str | None, *, vm: bool
    ) -> tuple[FailoverRecord, dict[str, PointReader]]:
        """Return the record, and the members' points, open, by disk id."""
        record, target = await new_record(self._failovers, disk, name, Kind.TEST, vm=vm)
        owned = self._failovers
        members, readers = await choose(owned.vault, owned.find_log, target, spec)
        job = Job(f"{record.id[:8]}-1", Step.TEST, time.time_ns())
        return replace(record, members=members, jobs=(job,)), readers

    # ---- the end -----------------------------------------------------------------------

    async def plan_cleanup(self, name: str) -> FailoverRecord:
        """Return what `cleanup` would throw away; nothing changes.

        Raises:
            As `cleanup`.
        """
        failover = self._failovers.find(name)
        may_be_removed(failover)
        if failover.machine is None or await failover.machine.state() == "down":
            await self._failovers.check_unused(failover)
        return failover.record

    async def cleanup(self, name: str, notes: str) -> FailoverRecord:
        """End a failover's machine, and throw its copies away with all that was written to them.

        Raises:
            NotFoundError: no such failover.
            StateError: it is no test, and the disk has not gone home.
            BusyError: a program has a copy open.
            LocalError: the disk refused.
        """
        async with self._failovers.changing:
            failover = self._failovers.find(name)
            state = may_be_removed(failover)
            if failover.machine is not None:
                await failover.machine.end()
            await self._failovers.check_unused(failover)
            jobs = begin(failover, Step.CLEANUP)
            await self._failovers.write(failover, state=state, notes=notes, jobs=jobs)
            hook("failover.ending")
            await self._failovers.remove(failover)
        log.info("failover %s: cleaned up%s", name, f": {notes}" if notes else "")
        return failover.record


def _failed(failover: Failover, error: VdiskfsError) -> tuple[Job, ...]:
    """Return the jobs of a test that could not be begun."""
    *others, job = failover.record.jobs
    job = replace(job, error=error.message, hint=error.hint or "", code=error.exit_code)
    return (*others, job)


def may_be_removed(failover: Failover) -> State:
    """Return the state in which a failover is removed.

    One whose disks were all taken by force leads nowhere else: what was written to it is a branch.

    Raises:
        StateError: it is not to be removed now, or a disk has something that is not shipped yet.
    """
    check_no_job(failover)
    disks = [one.disk for one in failover.taken.values()]
    if disks and all(disk is not None and disk.line.displaced is not None for disk in disks):
        for disk in disks:
            if disk is not None and (disk.replicator.waiting or disk.replicator.dirty_bytes()):
                raise StateError(
                    f"failover {failover.record.name}: what was written to disk {disk.name} last "
                    "is not in its branch yet",
                    hint=f"vdiskfs disk resume {shlex.quote(disk.name)}, and wait",
                )
        return State.REMOVING
    state = after(failover.record.name, failover.record.state, Step.CLEANUP)
    check_gone(failover)
    return state


def check_gone(failover: Failover) -> None:
    """Check that no disk is thrown away that is this site's: it may not have been taken."""
    for taken in failover.taken.values():
        if taken.is_ours:
            raise StateError(
                f"failover {failover.record.name}: disk {taken.member.disk} is this site's",
                hint="it was not taken, or was given back: vdiskfs disk list",
            )
