"""Failback: a disk that was failed over comes home, and only what differs is moved.

While the machine still runs at the other site, the image at home is brought to that site's
newest point, again and again. To complete it the other site is asked to let the disk go, as by
any planned failover; the last delta is moved, and the disk is this site's again. Steps are jobs
as those of `relocation`. Trio thread only.
"""

from __future__ import annotations

import logging
import secrets
import shlex
import time
from dataclasses import replace
from pathlib import Path

import trio

from vdiskfs.catalog import DiskRecord
from vdiskfs.catalog.moves import Fork, is_forked, note_move, withdraw
from vdiskfs.config import MachinesConfig
from vdiskfs.crash import hook
from vdiskfs.disk import ProtectedDisk, Site
from vdiskfs.errors import BusyError, StateError
from vdiskfs.failover.asking import Asking
from vdiskfs.failover.bringing import Bringing
from vdiskfs.failover.choose import choose, close, logs_of, new_record, path_of, point_spec
from vdiskfs.failover.failovers import Failover, Failovers
from vdiskfs.failover.homeimage import HomeImages
from vdiskfs.failover.jobs import Runner, Steps, begin, check_ended, check_same
from vdiskfs.failover.known import fork_of, is_taken, prepare_disk
from vdiskfs.failover.record import FailoverRecord, Member
from vdiskfs.failover.states import Kind, State, Step, after
from vdiskfs.failover.targets import Target
from vdiskfs.homeward import MoveProgress
from vdiskfs.machines import Mapped
from vdiskfs.ownernote import Start
from vdiskfs.protection import Protection
from vdiskfs.ratelimit import RateLimiter
from vdiskfs.state import DiskRecord as LocalRecord
from vdiskfs.state import FileStamp, LastEnd
from vdiskfs.storing import is_stored
from vdiskfs.tree import SourceFile

log = logging.getLogger(__name__)

LOOK_S = 0.5


class Homecomings:
    """Brings disks home."""

    def __init__(
        self, failovers: Failovers, site: Site, protection: Protection, nursery: trio.Nursery, *,
        host: MachinesConfig, limiter: RateLimiter,
    ) -> None:  # fmt: skip
        """Prepare; the arguments are those of `Relocations`, and what bounds the moving."""
        self._failovers = failovers
        self._site = site
        self._protection = protection
        self._nursery = nursery
        self._networks = Mapped(host.networks)
        self._runner = Runner(failovers, nursery)
        self._asking = Asking(failovers, site)
        self._images = HomeImages(site, protection)
        self._bringing = Bringing(
            failovers, site, self._images, nursery, limiter=limiter, notes=self._notes
        )

    def resume(self) -> None:
        """Go on with what an earlier run was cut off in; the source is known by now."""
        for failover in self._failovers.all():
            job = failover.job
            if failover.record.kind is not Kind.FAILBACK:
                continue
            if failover.record.state is State.REMOVING:
                self._failovers.start_apart(failover, self._remove, failover)
            elif job is not None and not job.ended_ns:
                self._runner.start(failover, self._steps(failover, job.kind))
            elif job is None:
                self._failovers.start_apart(failover, self._go, failover, Step.FAILBACK)
            elif failover.record.state is State.FAILING_BACK:
                self._bringing.follow(failover)
            if failover.has_done("machine"):
                self._failovers.judge_again(failover)

    def progress(self, failover: Failover) -> dict[str, MoveProgress]:
        """Return how far the moving of each disk is, by the disk's name."""
        return self._bringing.progress(failover)

    # ---- what the user asks ----------------------------------------------------------------

    async def start(
        self, disk: str, *, full: bool, create: bool, vm: bool, dry_run: bool
    ) -> FailoverRecord:
        """Begin to bring a disk, and its machine's other disks, home; or go on with it.

        Args:
            disk: its name.
            full: bring all of it, whatever the image here holds.
            create: make the image anew: it is not here (any more).
            vm: start the machine that the vault has for the disk, once it is home.
            dry_run: change nothing.

        Raises:
            StateError: it was not failed over, or is not replicated from the other site.
        """
        async with self._failovers.changing:
            failover = self._of_disk(disk)
            if failover is not None:
                if not failover.is_at(Step.FAILBACK):
                    after(failover.record.name, failover.record.state, Step.FAILBACK)
                check_same(failover, full=full, vm=vm)
                if not dry_run:
                    await self._go(failover, Step.FAILBACK)
                return failover.record
            record, target = await new_record(self._failovers, disk, None, Kind.FAILBACK, vm=vm)
            members = [await self._member(one, full=full, create=create) for one in target.names]
            record = replace(record, members=tuple(members))
            if dry_run:
                return record
            failover = await self._failovers.make(record)
            await self._go(failover, Step.FAILBACK)
        return failover.record

    async def complete(self, disk: str, *, dry_run: bool, unasked: str = "") -> FailoverRecord:
        """Stop the machine at the other site, move the last delta, and start it here.

        Args:
            disk: its name, a group's, or the failback's.
            dry_run: change nothing.
            unasked: a point. The disks are taken at it whatever the other site does, which is
                not asked: it is gone, perhaps. Also where it was asked before, in vain.

        Raises:
            StateError: no failback of the disk has been begun here, or not all of its disks were
                moved: the machine would be down until they are.
        """
        async with self._failovers.changing:
            failover = self.of_disk(disk, Step.COMPLETE)
            goes_on, state = failover.is_at(Step.COMPLETE), State.COMPLETING
            if not goes_on:
                state = after(failover.record.name, failover.record.state, Step.COMPLETE)
            if failover.record.state is State.FAILING_BACK:
                again = f"vdiskfs failback start {shlex.quote(disk)}"
                check_ended(failover, Step.FAILBACK, Step.COMPLETE, again)
            if dry_run:
                return failover.record
            if not goes_on and failover.record.state is not state:
                jobs = begin(failover, Step.COMPLETE)
                await self._failovers.write(failover, state=state, jobs=jobs, unasked=unasked)
                hook("failback.completing")
            elif unasked and not failover.record.unasked:
                await self._runner.stop(failover)
                *others, job = failover.record.jobs
                jobs = (*others, replace(job, done=()))
                await self._failovers.write(failover, jobs=jobs, unasked=unasked)
            elif failover.running is None and await self._is_overtaken(failover):
                *others, job = failover.record.jobs
                await self._failovers.write(failover, jobs=(*others, replace(job, done=())))
            await self._bringing.stop(failover)
            await self._go(failover, Step.COMPLETE)
        return failover.record

    async def _is_overtaken(self, failover: Failover) -> bool:
        """Say whether a disk went on elsewhere since it was released: it is asked for anew."""
        for member in failover.record.members:
            record = await self._site.vault.disk(member.disk_id)
            if record.generation != member.current and not is_taken(record, member):
                return True
        return False

    async def commit(self, disk: str, *, dry_run: bool) -> FailoverRecord:
        """Make it final: the copy at the other site is not needed any more.

        Raises:
            StateError: it is not completed.
        """
        async with self._failovers.changing:
            failover = self.of_disk(disk, Step.COMMIT)
            state = after(failover.record.name, failover.record.state, Step.COMMIT)
            again = f"vdiskfs failback complete {shlex.quote(disk)}"
            check_ended(failover, Step.COMPLETE, Step.COMMIT, again)
            if dry_run:
                return failover.record
            for member in failover.record.members:
                found = await self._site.vault.disk(member.disk_id)
                # One that another site has taken since is told of by that one.
                if found.moved is not None and found.moved.id == failover.record.id:
                    await note_move(self._site.vault, member.disk_id, failover.record.id, None)
            jobs = begin(failover, Step.COMMIT)
            done = replace(jobs[-1], done=("told",), ended_ns=time.time_ns())
            await self._failovers.write(failover, state=state, jobs=(*jobs[:-1], done))
            hook("failback.committed")
            log.info("failback %s: committed", failover.record.name)
        return failover.record

    async def cleanup(self, name: str, notes: str, *, dry_run: bool) -> FailoverRecord:
        """Remove what is left of a failback that is committed, or call off one under way.

        Called off: the other site keeps the disk. An image that was known here stays closed to
        programs, and what was brought to it is there for the next failback.

        Raises:
            StateError: a disk of it is home already, and it is not committed.
            BusyError: its machine runs.
            VaultUnreachableError: the other site cannot be told any more that it keeps the disk.
        """
        async with self._failovers.changing:
            failover = self._failovers.find(name)
            record = failover.record
            state = after(name, record.state, Step.CLEANUP)
            if record.state is State.FAILED_BACK:
                await _check_down(failover)
            if dry_run:
                return record
            if record.state not in (State.REMOVING, State.FAILED_BACK):
                await self._let_be(failover)
            jobs = begin(failover, Step.CLEANUP)
            await self._failovers.write(failover, state=state, notes=notes, jobs=jobs)
            hook("failover.ending")
            await self._remove(failover)
        log.info("failback %s: cleaned up%s", name, f": {notes}" if notes else "")
        return failover.record

    async def _let_be(self, failover: Failover) -> None:
        """End the work on the images, and ask for no disk any more."""
        await self._runner.stop(failover)
        await self._bringing.stop(failover)
        if failover.record.state is not State.COMPLETING:
            return
        try:
            # Invariant: what a request that is cut off may still do to a disk, it does against
            # the record as it was before this.
            for member in failover.record.members:
                await withdraw(self._site.vault, member.disk_id, failover.record.id)
            for member in failover.record.members:
                if self._images.is_named(member) or await self._is_home(member):
                    raise StateError(
                        f"failover {failover.record.name}: disk {member.disk} is home already",
                        hint=f"vdiskfs failback complete {shlex.quote(member.disk)}",
                    )
        except BaseException:
            if failover.job is not None and not failover.job.error:
                self._runner.start(failover, self._steps(failover, Step.COMPLETE))
            raise

    async def _remove(self, failover: Failover) -> None:
        for member in failover.record.members:
            self._bringing.forget(failover, member)
            if not any("over" in job.done for job in failover.record.jobs):
                notes = self._notes(failover, member)
                await trio.to_thread.run_sync(self._images.leave, notes, member)
                self._images.let_write(member.disk_id)
        await self._failovers.remove(failover)

    def of_disk(self, disk: str, step: Step) -> Failover:
        """Return the failback of a disk, or of this name, that may take a step.

        Raises:
            StateError: there is none, or it is committed.
        """
        found = self._of_disk(disk)
        if found is None:
            for one in reversed(self._failovers.all()):
                if one.record.kind is Kind.FAILBACK and disk in _names(one.record):
                    after(one.record.name, one.record.state, step)
            raise StateError(
                f"disk {disk}: no failback of it was begun here",
                hint=f"vdiskfs failback start {shlex.quote(disk)}",
            )
        return found

    def _of_disk(self, disk: str) -> Failover | None:
        for failover in self._failovers.all():
            record = failover.record
            open_ = record.kind is Kind.FAILBACK and record.state is not State.FAILED_BACK
            if open_ and disk in _names(record):
                return failover
        return None

    async def _member(self, disk: str, *, full: bool, create: bool) -> Member:
        """Check that a disk may come home, and return it; its file is below the source."""
        record = await self._site.vault.find_disk(disk)
        moved = record.moved
        if moved is None or record.owner is None:
            raise StateError(f"disk {disk}: is not failed over", hint="vdiskfs disk list")
        if record.owner.writer == self._site.state.writer_id:
            raise StateError(f"disk {disk}: is this site's", hint="vdiskfs disk list")
        if moved.state != State.FAILBACK_READY:
            raise StateError(
                f"disk {disk}: is not replicated from site {moved.site}, state {moved.state}",
                hint=f"there: vdiskfs reprotect {shlex.quote(disk)}",
            )
        path = self._images.known(record.id)
        if path is None and not create:
            raise StateError(
                f"disk {disk}: no image of it is known here",
                hint=f"to make one anew: vdiskfs failback start {shlex.quote(disk)} --create-vm",
            )
        full = full or path is None
        if path is None:
            path = path_of(record)
            self._images.check_free(path)
        return Member(disk, record.id, path, 0, 0, 0, 0, current=record.generation, full=full)

    # ---- steps -----------------------------------------------------------------------------

    async def _go(self, failover: Failover, kind: Step) -> None:
        await self._runner.go_on(failover, kind, self._steps(failover, kind))

    def _steps(self, failover: Failover, kind: Step) -> Steps:
        if kind is Step.FAILBACK:
            return [("shipped", self._ship_own), ("parked", self._park),
                    ("moved", self._bringing.move),
                    ("following", self._begin_following)]  # fmt: skip
        if failover.record.unasked:
            return [("chosen", self._choose), ("home", self._take),
                    ("machine", self._start_machine), ("over", self._over)]  # fmt: skip
        return [("asked", self._asking.ask), ("released", self._released),
                ("moved", self._bringing.move), ("home", self._take),
                ("machine", self._start_machine), ("over", self._over)]  # fmt: skip

    async def _ship_own(self, failover: Failover) -> None:
        """Have all that was written here in the vault, and note the point that the image is."""
        members = []
        for member in failover.record.members:
            disk = self._images.protected(member.disk_id)
            if disk is None:
                members.append(member)
                continue
            failover.says = f"disk {member.disk}: ships what was written here"
            await self._wait_known(disk, failover)
            stored = disk.replicator.stored
            members.append(replace(
                member, generation=stored.generation, epoch=stored.epoch, size=stored.size,
                time_ns=stored.time_ns, digest=stored.digest.hex(),
            ))  # fmt: skip
        await self._failovers.write(failover, members=tuple(members))

    async def _wait_known(self, disk: ProtectedDisk, failover: Failover) -> None:
        """Wait until the newest point of the disk's line here is the image, byte for byte."""
        replicator = disk.replicator
        disk.refuse_writes(True)
        while True:
            if replicator.paused:
                raise StateError(f"disk {disk.name}: its replication is paused",
                                 hint=f"vdiskfs disk resume {shlex.quote(disk.name)}")  # fmt: skip
            if replicator.suspects.needed:
                failover.says = f"disk {disk.name}: finds out what was written here last"
                await replicator.suspects.ask(now=True)
                replicator.touched()
                await trio.sleep(LOOK_S)
                continue
            await replicator.seal_if_changed()
            await replicator.wait_shipped()
            if is_stored(replicator):
                return

    async def _park(self, failover: Failover) -> None:
        # Again: since it was done the host may have died, with what no image had durably.
        await self._ship_own(failover)
        for member in failover.record.members:
            await self._images.park(self._notes(failover, member), member)

    def _notes(self, failover: Failover, member: Member) -> Path:
        return failover.directory / member.disk_id

    async def _begin_following(self, failover: Failover) -> None:
        self._bringing.follow(failover)
        await trio.lowlevel.checkpoint()

    async def _released(self, failover: Failover) -> None:
        """Wait until the other site has let go; `_move` finds its last point."""
        await self._asking.wait(failover)
        members = [
            one if await self._is_home(one) else replace(one, token=secrets.token_hex(16))
            for one in failover.record.members
        ]
        await self._failovers.write(failover, members=tuple(members))

    async def _choose(self, failover: Failover) -> None:
        """Note the point that is taken without asking: one instant of all disks of it."""
        vault, chosen = self._site.vault, dict[str, Member]()
        records = {one.disk: await vault.disk(one.disk_id) for one in failover.record.members}
        find = logs_of(vault, list(records.values()))
        left = [one.disk for one in failover.record.members
                if not is_taken(records[one.disk], one)]  # fmt: skip
        whole, spec = len(left) == len(records), point_spec(failover.record.unasked)
        targets = [Target((name,), None, None) for name in left]
        for target in [failover.target] if whole else targets:
            found, readers = await choose(vault, find, target, spec)
            await close(readers)
            chosen.update({one.disk_id: one for one in found})
        members = [
            replace(one, file=before.file, full=before.full, token=secrets.token_hex(16))
            if (one := chosen.get(before.disk_id)) is not None
            else before
            for before in failover.record.members
        ]
        await self._failovers.write(failover, members=tuple(members))

    async def _is_home(self, member: Member) -> bool:
        return is_taken(await self._site.vault.disk(member.disk_id), member)

    async def _take(self, failover: Failover) -> None:
        """The images are the last points: the disks are this site's from here on."""
        for member in failover.record.members:
            record = await self._site.vault.disk(member.disk_id)
            if self._images.protected(member.disk_id) is None:
                await self._take_one(failover, member, record)

    async def _take_one(self, failover: Failover, member: Member, record: DiskRecord) -> None:
        mover, last = self._bringing.mover(failover, member), (member.generation, member.epoch)
        fork = self._fork(failover, member, record)
        if mover.at != last and not is_forked(record, fork):
            # Noted as moved, by an older version perhaps: nobody has written to it.
            failover.says = f"disk {member.disk}: is brought to epoch {member.epoch}"
            await mover.move(last)
        if mover.at != last:
            raise StateError(f"disk {member.disk}: its image is not the last point yet")
        file = await self._images.hold(member)
        if is_forked(record, fork):
            # An earlier run was cut off when programs could write already.
            local, how = await trio.to_thread.run_sync(self._taken, member, file)
        else:
            local = await trio.to_thread.run_sync(self._prepare, member, file)
            how = Start(LastEnd.CLEAN, sure=True)
        await self._protection.unpark(file, local, replace(how, fork=fork))
        self._site.state.disk(member.disk_id).parked.unlink(missing_ok=True)
        self._bringing.forget(failover, member)

    def _fork(self, failover: Failover, member: Member, record: DiskRecord) -> Fork:
        state = State.FAILBACK_UNCOMMITTED
        return fork_of(failover.record, member, record, site=self._site.name, state=state)

    def _taken(self, member: Member, file: SourceFile) -> tuple[LocalRecord, Start]:
        """Return what is known of a disk that was taken, and how it ended; in a thread."""
        state = self._site.state
        record = state.record(member.disk_id)
        if record.end == FileStamp.of(file.identity()):
            return record, Start(LastEnd.CLEAN, sure=True)
        return record, Start(state.end_of_disk(record))

    def _prepare(self, member: Member, file: SourceFile) -> LocalRecord:
        # It is parked from its first moment on.
        record = prepare_disk(
            self._site, member, file, lambda paths: paths.parked.touch(mode=0o600)
        )
        hook("failback.prepared")
        return record

    async def _start_machine(self, failover: Failover) -> None:
        await self._failovers.ensure_machine(failover, self._networks)

    async def _over(self, failover: Failover) -> None:
        await self._failovers.write(failover, state=State.FAILBACK_UNCOMMITTED)
        hook("failback.over")


def _names(record: FailoverRecord) -> tuple[str | None, ...]:
    return (record.name, record.group, *(one.disk for one in record.members))


async def _check_down(failover: Failover) -> None:
    """Check that what runs in production is not ended by tidying up."""
    machine = failover.machine
    if machine is not None and await machine.state() != "down":
        raise BusyError(
            f"failover {failover.record.name}: its machine {machine.machine.name} runs",
            hint="stop it first, or leave the record where it is",
        )
