"""Failback: a disk that was failed over comes home, and only what differs is moved.

While the machine still runs at the other site, the image at home is brought to that site's
newest point, again and again. To complete it the other site is asked to let the disk go, as by
any planned failover; the last delta is moved, and the disk is this site's again. Steps are jobs
as those of `relocation`. Trio thread only.
"""

from __future__ import annotations

import logging
import secrets
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from vdiskfs.catalog import DiskLog, DiskRecord
from vdiskfs.catalog.moves import Fork, is_forked, note_move
from vdiskfs.config import MachinesConfig
from vdiskfs.crash import hook
from vdiskfs.disk import ProtectedDisk, Site
from vdiskfs.errors import (
    NotFoundError,
    StateError,
    VdiskfsError,
)
from vdiskfs.failover.asking import Asking
from vdiskfs.failover.choose import new_record, path_of
from vdiskfs.failover.failovers import Failover, Failovers
from vdiskfs.failover.jobs import Runner, Steps, begin, check_ended
from vdiskfs.failover.known import fork_of, is_taken, prepare_disk
from vdiskfs.failover.record import FailoverRecord, Member
from vdiskfs.failover.states import Kind, State, Step, after
from vdiskfs.homeward import HomeMover, MoveProgress, prepare_home
from vdiskfs.machines import Mapped
from vdiskfs.ownernote import Start
from vdiskfs.protection import Protection
from vdiskfs.ratelimit import RateLimiter
from vdiskfs.state import DiskRecord as LocalRecord
from vdiskfs.state import FileStamp, LastEnd, sync_directory
from vdiskfs.tree import SourceFile

log = logging.getLogger(__name__)

LOOK_S = 0.5
KEEP_UP_S = 10.0
"""Seconds between two looks whether the other site has newer points, until it is completed."""

PARTIAL = ".vdiskfs-partial"
"""Ends the name of an image that is being made anew: no pattern of disks has it."""


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
        self._limiter = limiter
        self._coming: dict[str, HomeMover] = {}
        self._following: dict[str, tuple[trio.CancelScope, trio.Event]] = {}
        self._moving: dict[str, trio.Lock] = defaultdict(trio.Lock)

    def resume(self) -> None:
        """Go on with what an earlier run was cut off in; the source is known by now."""
        for failover in self._failovers.all():
            job = failover.job
            if failover.record.kind is not Kind.FAILBACK:
                continue
            if job is not None and not job.ended_ns:
                self._runner.start(failover, self._steps(job.kind))
            elif job is None:
                self._failovers.start_apart(failover, self._go, failover, Step.FAILBACK)
            elif failover.record.state is State.FAILING_BACK:
                self._follow(failover)
            if failover.has_done("machine"):
                self._failovers.judge_again(failover)

    def progress(self, failover: Failover) -> dict[str, MoveProgress]:
        """Return how far the moving of each disk is, by the disk's name."""
        return {
            member.disk: self._coming[key].progress
            for member in failover.record.members
            if (key := f"{failover.record.id}/{member.disk_id}") in self._coming
        }

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

    async def complete(self, disk: str, *, dry_run: bool) -> FailoverRecord:
        """Stop the machine at the other site, move the last delta, and start it here.

        Raises:
            StateError: no failback of the disk has been begun here, or not all of its disks were
                moved: the machine would be down until they are.
        """
        async with self._failovers.changing:
            failover = self.of_disk(disk)
            goes_on, state = failover.is_at(Step.COMPLETE), State.COMPLETING
            if not goes_on:
                state = after(failover.record.name, failover.record.state, Step.COMPLETE)
            if failover.record.state is State.FAILING_BACK:
                again = f"vdiskfs failback start {disk}"
                check_ended(failover, Step.FAILBACK, Step.COMPLETE, again)
            if dry_run:
                return failover.record
            if not goes_on and failover.record.state is not state:
                jobs = begin(failover, Step.COMPLETE)
                await self._failovers.write(failover, state=state, jobs=jobs)
                hook("failback.completing")
            elif failover.running is None and await self._is_overtaken(failover):
                *others, job = failover.record.jobs
                await self._failovers.write(failover, jobs=(*others, replace(job, done=())))
            await self._stop_following(failover)
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
            failover = self.of_disk(disk)
            state = after(failover.record.name, failover.record.state, Step.COMMIT)
            again = f"vdiskfs failback complete {disk}"
            check_ended(failover, Step.COMPLETE, Step.COMMIT, again)
            if dry_run:
                return failover.record
            for member in failover.record.members:
                await note_move(self._site.vault, member.disk_id, failover.record.id, None)
            await self._failovers.write(failover, state=state)
            hook("failback.committed")
            log.info("failback %s: committed", failover.record.name)
        return failover.record

    def of_disk(self, disk: str) -> Failover:
        """Return the failback of a disk, or of this name.

        Raises:
            StateError: there is none.
        """
        found = self._of_disk(disk)
        if found is None:
            raise StateError(
                f"disk {disk}: no failback of it was begun here",
                hint=f"vdiskfs failback start {disk}",
            )
        return found

    def _of_disk(self, disk: str) -> Failover | None:
        for failover in self._failovers.all():
            record = failover.record
            names = (record.name, record.group, *(one.disk for one in record.members))
            open_ = record.kind is Kind.FAILBACK and record.state is not State.FAILED_BACK
            if open_ and disk in names:
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
                hint=f"there: vdiskfs reprotect {disk}",
            )
        here = self._here(record.id)
        if here is None and not create:
            raise StateError(
                f"disk {disk}: no image of it is known here",
                hint="to make one anew: vdiskfs failback start --create-vm",
            )
        path = here.file.path if here is not None else path_of(record)
        if here is None:
            self._check_free(path)
        whole = full or here is None
        return Member(disk, record.id, path, 0, 0, 0, 0, current=record.generation, full=whole)

    def _here(self, disk_id: str) -> ProtectedDisk | None:
        own = [one for one in self._protection.disks() if one not in self._protection.adopted]
        return next((one for one in own if one.disk_id == disk_id), None)

    def _check_free(self, path: str) -> None:
        try:
            self._protection.files.find(path).drop()
        except NotFoundError:
            return
        raise StateError(f"{path}: is in the way in the source", hint="move it aside first")

    # ---- steps -----------------------------------------------------------------------------

    async def _go(self, failover: Failover, kind: Step) -> None:
        await self._runner.go_on(failover, kind, self._steps(kind))

    def _steps(self, kind: Step) -> Steps:
        if kind is Step.FAILBACK:
            return [("shipped", self._ship_own), ("parked", self._park),
                    ("moved", self._move), ("following", self._begin_following)]  # fmt: skip
        return [("asked", self._asking.ask), ("released", self._released),
                ("moved", self._move), ("home", self._take),
                ("machine", self._start_machine), ("over", self._over)]  # fmt: skip

    async def _ship_own(self, failover: Failover) -> None:
        """Have all that was written here in the vault, and note the point that the image is."""
        members = []
        for member in failover.record.members:
            disk = self._here(member.disk_id)
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
                                 hint=f"vdiskfs disk resume {disk.name}")  # fmt: skip
            if replicator.suspects.needed:
                failover.says = f"disk {disk.name}: finds out what was written here last"
                await replicator.suspects.ask(now=True)
                replicator.touched()
                await trio.sleep(LOOK_S)
                continue
            await replicator.seal_if_changed()
            await replicator.wait_shipped()
            if not replicator.live.counts().changed and not replicator.suspects.needed:
                return

    async def _park(self, failover: Failover) -> None:
        # Again: since it was done the host may have died, with what no image had durably.
        await self._ship_own(failover)
        for member in failover.record.members:
            notes = self._notes(failover, member)
            known = not member.full and member.epoch > 0
            place = (member.generation, member.epoch) if known else None
            disk = self._here(member.disk_id)
            if disk is not None or not (notes / "home.json").exists():
                await trio.to_thread.run_sync(prepare_home, notes, member.disk_id, place)
            if disk is not None:
                # Nobody writes to it any more; what is parked is believed.
                await trio.to_thread.run_sync(disk.image.sync_internal)
                paths = self._site.state.disk(member.disk_id)
                paths.parked.touch(mode=0o600)
                await trio.to_thread.run_sync(sync_directory, paths.directory)
                hook("failback.parked")
                await self._protection.park(disk)
            elif self._protection.parked(member.disk_id) is None and member.epoch:
                raise StateError(f"disk {member.disk}: is not known here yet")
            elif self._protection.parked(member.disk_id) is None:
                await trio.to_thread.run_sync(self._make_partial, member)

    def _make_partial(self, member: Member) -> None:
        path = self._partial(member)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            path.chmod(0o600)
        sync_directory(path.parent)

    def _partial(self, member: Member) -> Path:
        root = Path(f"/proc/self/fd/{self._protection.files.descriptor}")
        return root / f"{member.file}{PARTIAL}"

    def _notes(self, failover: Failover, member: Member) -> Path:
        return failover.directory / member.disk_id

    def _mover(self, failover: Failover, member: Member) -> HomeMover:
        key = f"{failover.record.id}/{member.disk_id}"
        if key not in self._coming:
            file = self._protection.parked(member.disk_id)
            path = Path(file.proc_path) if file is not None else self._partial(member)
            mover = HomeMover(
                path, self._notes(failover, member), partial(self._log, member.disk_id),
                limiter=self._limiter, is_away=self._failovers.is_away, verify=True,
            )  # fmt: skip
            self._coming[key] = mover
        return self._coming[key]

    async def _log(self, disk_id: str, generation: int) -> DiskLog:
        record = await self._site.vault.disk(disk_id)
        return self._site.vault.log(record, generation)

    async def _move(self, failover: Failover) -> None:
        """Bring each image to the newest point of the other site."""
        # What follows it does not lead an image back that has come further meanwhile.
        async with self._moving[failover.record.id]:
            for member in failover.record.members:
                await self._move_one(failover, member)

    async def _move_one(self, failover: Failover, member: Member) -> None:
        record = await self._site.vault.disk(member.disk_id)
        if is_taken(record, member):
            return
        points = self._site.vault.log(record)
        tip = await points.tip()
        point = await points.find(tip.epoch)
        failover.says = f"disk {member.disk}: is brought to epoch {tip.epoch}"
        mover = self._mover(failover, member)
        await mover.move((point.generation, tip.epoch))
        log.info("disk %s: is at epoch %d of the other site; %d bytes fetched", member.disk,
                 tip.epoch, mover.progress.fetched_bytes)  # fmt: skip

    async def _begin_following(self, failover: Failover) -> None:
        self._follow(failover)
        await trio.lowlevel.checkpoint()

    def _follow(self, failover: Failover) -> None:
        if failover.record.id not in self._following:
            scope, ended = trio.CancelScope(), trio.Event()
            self._following[failover.record.id] = scope, ended
            self._nursery.start_soon(self._keep_up, failover, scope, ended)

    async def _keep_up(
        self, failover: Failover, scope: trio.CancelScope, ended: trio.Event
    ) -> None:
        """Move what is new at the other site, until the failback is completed."""
        try:
            with scope:
                while failover.record.state is State.FAILING_BACK:
                    await trio.sleep(KEEP_UP_S)
                    await self._follow_once(failover)
        finally:
            ended.set()

    async def _follow_once(self, failover: Failover) -> None:
        try:
            await self._move(failover)
        except (VdiskfsError, OSError) as error:
            log.warning("failback %s: %s", failover.record.name, error)
        finally:
            failover.says = None

    async def _stop_following(self, failover: Failover) -> None:
        """End that, and wait until none of its threads writes any more."""
        if failover.record.id in self._following:
            scope, ended = self._following[failover.record.id]
            scope.cancel()
            await ended.wait()
            del self._following[failover.record.id]

    async def _released(self, failover: Failover) -> None:
        """Wait until the other site has let go; `_move` finds its last point."""
        await self._asking.wait(failover)
        members = [
            one if await self._is_home(one) else replace(one, token=secrets.token_hex(16))
            for one in failover.record.members
        ]
        await self._failovers.write(failover, members=tuple(members))

    async def _is_home(self, member: Member) -> bool:
        return is_taken(await self._site.vault.disk(member.disk_id), member)

    async def _take(self, failover: Failover) -> None:
        """The images are the last points: the disks are this site's from here on."""
        for member in failover.record.members:
            record = await self._site.vault.disk(member.disk_id)
            if self._here(member.disk_id) is None:
                await self._take_one(failover, member, record)

    async def _take_one(self, failover: Failover, member: Member, record: DiskRecord) -> None:
        mover, last = self._mover(failover, member), (member.generation, member.epoch)
        fork = self._fork(failover, member, record)
        if mover.at != last and not is_forked(record, fork):
            # Noted as moved, by an older version perhaps: nobody has written to it.
            failover.says = f"disk {member.disk}: is brought to epoch {member.epoch}"
            await mover.move(last)
        if mover.at != last:
            raise StateError(f"disk {member.disk}: its image is not the last point yet")
        file = self._protection.parked(member.disk_id)
        if file is None:
            file = await trio.to_thread.run_sync(self._named, member)
        if is_forked(record, fork):
            # An earlier run was cut off when programs could write already.
            local, how = await trio.to_thread.run_sync(self._taken, member, file)
        else:
            local = await trio.to_thread.run_sync(self._prepare, member, file)
            how = Start(LastEnd.CLEAN, sure=True)
        await self._protection.unpark(file, local, replace(how, fork=fork))
        self._site.state.disk(member.disk_id).parked.unlink(missing_ok=True)
        self._coming.pop(f"{failover.record.id}/{member.disk_id}", None)

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

    def _named(self, member: Member) -> SourceFile:
        """Give an image that was made anew its name, and return its file, held."""
        part = self._partial(member)
        if part.exists():
            self._check_free(member.file)
            part.rename(part.with_name(part.name.removesuffix(PARTIAL)))
            sync_directory(part.parent)
            hook("failback.named")
        return self._protection.files.find(member.file)

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
