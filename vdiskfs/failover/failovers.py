"""All failovers of a mount: what they are made of, shown as, and taken up again from.

A failover is a directory of writable copies, and perhaps a machine on them. What is done with
it, step by step, is others' (`drills`, `relocation`). Trio thread only.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import trio

from vdiskfs import native
from vdiskfs.catalog import Vault
from vdiskfs.config import MachinesConfig
from vdiskfs.crash import hook
from vdiskfs.errors import (
    BusyError,
    LocalError,
    NotFoundError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.events import Events
from vdiskfs.failover.background import BackgroundHydration
from vdiskfs.failover.bootblocks import read_boot, write_boot
from vdiskfs.failover.copy import WritableCopy, make_files
from vdiskfs.failover.known import note_recovery
from vdiskfs.failover.machine import FailoverMachine
from vdiskfs.failover.record import FailoverRecord, Job, Member, kept_job
from vdiskfs.failover.states import Kind, State, Step
from vdiskfs.failover.taken import TakenDisk
from vdiskfs.failover.targets import FindLog, Target
from vdiskfs.failover.told import tell_change, tell_made, tell_missed, tell_removed
from vdiskfs.jobs import Jobs
from vdiskfs.machines import Attach, parse_machine
from vdiskfs.point import PointReader
from vdiskfs.state import StateDirectory, read_record, sync_directory, users_of, write_record
from vdiskfs.tree import CopyRef, FailoverRef

log = logging.getLogger(__name__)

RECORD = "record.json"

PROOF = "proof-"
"""How the names begin of copies that are made to prove a point: a proof is a job of its own."""


@dataclass(eq=False)
class Failover:
    """One failover: its record, the open copies and the disks taken, by disk id."""

    record: FailoverRecord
    directory: Path
    copies: dict[str, WritableCopy]
    machine: FailoverMachine | None = None
    taken: dict[str, TakenDisk] = field(default_factory=dict)
    hydrations: dict[str, BackgroundHydration] = field(default_factory=dict)
    writing: trio.Lock = field(default_factory=trio.Lock)
    lost: str = ""
    """Why its copies cannot be opened, if so; it can be given up, or begun anew."""
    says: str | None = None
    """What its job waits for now, for people."""
    running: tuple[trio.CancelScope, trio.Event] | None = None
    """What ends its job where it is, while that runs, and what says that it has ended."""

    @property
    def is_used(self) -> bool:
        """Whether a program has one of the copies open."""
        return any(copy.users for copy in self.copies.values())

    @property
    def target(self) -> Target:
        """What it is of; several disks of which each has a point at the time that is meant."""
        return Target(tuple(one.disk for one in self.record.members), None, self.record.group)

    @property
    def job(self) -> Job | None:
        """The newest of its jobs."""
        return self.record.jobs[-1] if self.record.jobs else None

    def is_at(self, kind: Step) -> bool:
        """Say whether the newest job is of a kind, and has not ended: it is to go on."""
        return self.job is not None and self.job.kind is kind and not self.job.ended_ns

    def has_done(self, step: str) -> bool:
        """Say whether the newest job has come past a step."""
        return self.job is not None and step in self.job.done


class Failovers:
    """The failovers of one mount."""

    def __init__(
        self, core: native.Core, state: StateDirectory, vault: Vault, find_log: FindLog,
        next_cookie: Callable[[], int], *, shown_in: Path, host: MachinesConfig,
        nursery: trio.Nursery, events: Events, jobs: Jobs,
    ) -> None:  # fmt: skip
        """Know of none yet.

        Args:
            core: the data plane.
            state: where the copies lie.
            vault: where points are read from.
            find_log: gives the points of a disk by its name.
            next_cookie: gives a number for each image.
            shown_in: the directory of the mount that shows them.
            host: what machines may use of this host.
            nursery: where machines are judged.
            events: is told what becomes of them.
            jobs: keeps the jobs of those that are removed.
        """
        self.vault = vault
        self.find_log = find_log
        self.changing = trio.Lock()
        """Held while one is made, or changed."""
        self.events = events
        self._jobs = jobs
        self._host = host
        self._nursery = nursery
        self._shown_in = shown_in
        self._core = core
        self._root = state.failovers
        self._boot_id = state.boot_id
        self._next_cookie = next_cookie
        self._by_id: dict[str, Failover] = {}
        self._by_cookie: dict[int, WritableCopy] = {}

    async def load(self) -> None:
        """Take up what an earlier run left. Asks the vault nothing.

        One whose copies cannot be opened is taken up without them. One whose record cannot be
        read is left where it is. Both are told.
        """
        for directory in sorted(self._root.iterdir()):
            try:
                where = str(directory / RECORD)
                record = FailoverRecord.from_body(read_record(directory / RECORD), where)
                failover = await trio.to_thread.run_sync(self._open_anyway, record, directory)
            except (VdiskfsError, OSError) as error:
                log.error("%s: a failover that cannot be taken up: %s", directory, error)
                self.events.tell("failover.damaged", directory.name, str(error))
                continue
            self.enter(failover)
            await tell_missed(self.events, record)
            if failover.lost:
                names = record.disk_names
                self.events.tell("failover.damaged", record.name, failover.lost, disk=names)

    async def aclose(self) -> None:
        """Close all copies; nobody uses them any more."""
        for failover in self._by_id.values():
            for disk in failover.taken.values():
                try:
                    await disk.stop(clean=True)
                except (VdiskfsError, OSError) as error:
                    log.error("%s: not ended in order: %s", disk.copy.name, error)
            for copy in failover.copies.values():
                try:
                    await copy.aclose()
                except OSError as error:
                    log.error("%s: what is present is not recorded: %s", copy.name, error)
        self._by_id.clear()
        self._by_cookie.clear()

    # ---- what there is -----------------------------------------------------------------

    def all(self) -> Sequence[Failover]:
        """Return all of them, the oldest first."""
        return sorted(self._by_id.values(), key=lambda one: one.record.created_ns)

    def failovers(self) -> Sequence[FailoverRef]:
        """Return what the mount shows of them."""
        return [
            FailoverRef(
                one.record.id, one.record.name, one.record.created_ns,
                tuple(CopyRef(member.file, member.disk_id) for member in one.record.members
                      if member.disk_id in one.copies),
            )
            for one in self.all()
            if one.record.kind is not Kind.FAILBACK
        ]  # fmt: skip

    def copy(self, failover_id: str, disk_id: str) -> WritableCopy | None:
        """Return a copy; None: it is gone."""
        failover = self._by_id.get(failover_id)
        return failover.copies.get(disk_id) if failover is not None else None

    def has(self, failover_id: str) -> bool:
        """Say whether a failover is still there."""
        return failover_id in self._by_id

    def in_use(self) -> list[tuple[str, int, int]]:
        """Return the points (disk id, generation, epoch) that copies are filled from."""
        return [
            (member.disk_id, member.generation, member.epoch)
            for failover in self.all() for member in failover.record.members if member.epoch
        ]  # fmt: skip

    def find(self, name: str) -> Failover:
        """Return the failover of a name.

        Raises:
            NotFoundError: there is none.
        """
        for failover in self._by_id.values():
            if failover.record.name == name:
                return failover
        raise NotFoundError(f"there is no failover {name} here", hint="vdiskfs failover list")

    def by_cookie(self, cookie: int) -> WritableCopy | None:
        """Return the copy whose image has the cookie."""
        return self._by_cookie.get(cookie)

    def shown(self, failover: Failover) -> Path:
        """Return the directory of the mount that shows a failover."""
        return self._shown_in / failover.record.name

    # ---- how they are made -------------------------------------------------------------

    async def make(self, record: FailoverRecord) -> Failover:
        """Make a failover's directory with its copies, whole or not at all. Durable on return.

        Raises:
            LocalError: the disk refused.
        """
        failover = await trio.to_thread.run_sync(self._make, record)
        self.enter(failover)
        await tell_made(self.events, record)
        return failover

    def _make(self, record: FailoverRecord) -> Failover:
        directory, partly = self._root / record.id, self._root / f".{record.id}.new"
        try:
            partly.mkdir(mode=0o700)
            if record.kind is Kind.TEST:
                for member in record.members:
                    make_files(partly / member.disk_id, member)
                    sync_directory(partly / member.disk_id)
            write_record(partly / RECORD, record.to_body())
            sync_directory(partly)
            hook("failover.made")
            partly.rename(directory)
            sync_directory(self._root)
            hook("failover.named")
            return self._open(record, directory)
        except OSError as error:
            for left in (partly, directory):
                shutil.rmtree(left, ignore_errors=True)
            raise LocalError(f"{directory}: {error.strerror}") from error

    async def make_copies(self, failover: Failover) -> None:
        """Make the copies of all members anew; nobody uses those that may be there."""
        await trio.to_thread.run_sync(self._make_copies, failover)
        failover.copies = await trio.to_thread.run_sync(
            self._copies, failover.record.members, failover.directory
        )
        failover.lost = ""
        self.enter(failover)

    def _make_copies(self, failover: Failover) -> None:
        for member in failover.record.members:
            directory = failover.directory / member.disk_id
            partly = failover.directory / f".{member.disk_id}.new"
            try:
                for left in (partly, directory):
                    if left.exists():
                        shutil.rmtree(left)
                make_files(partly, member)
                sync_directory(partly)
                partly.rename(directory)
                sync_directory(failover.directory)
            except OSError as error:
                raise LocalError(f"{directory}: {error.strerror}") from error
            hook("failover.copied")

    def _open_anyway(self, record: FailoverRecord, directory: Path) -> Failover:
        """Open it, perhaps without the copies; in a thread."""
        try:
            return self._open(record, directory)
        except (VdiskfsError, OSError) as error:
            return Failover(
                record, directory, {}, self._machine(record, directory), lost=str(error)
            )

    def _machine(self, record: FailoverRecord, directory: Path) -> FailoverMachine | None:
        if record.machine is None:
            return None
        return FailoverMachine(parse_machine(record.machine), directory, self._host)

    def _open(self, record: FailoverRecord, directory: Path) -> Failover:
        """Open the copies; in a thread."""
        failover = Failover(record, directory, {}, self._machine(record, directory))
        between = record.state in (State.STARTING, State.CHANGING_POINT, State.ROLLING_BACK)
        if record.kind is not Kind.FAILBACK and (not between or failover.has_done("copies")):
            failover.copies = self._copies(record.members, directory)
        return failover

    def _copies(self, members: Iterable[Member], directory: Path) -> dict[str, WritableCopy]:
        copies: dict[str, WritableCopy] = {}
        try:
            for member in members:
                copies[member.disk_id] = WritableCopy(
                    self._core, directory / member.disk_id, member, self._next_cookie(),
                    partial(self._read, member), is_away=self.is_away, boot_id=self._boot_id,
                )  # fmt: skip
        except BaseException:
            for copy in copies.values():
                copy.close()
            raise
        return copies

    def enter(self, failover: Failover) -> None:
        """Show it, and answer for its copies."""
        self._by_id[failover.record.id] = failover
        for copy in failover.copies.values():
            self._by_cookie[copy.image.cookie] = copy
            if failover.record.kind is not Kind.TEST:
                # Invariant: nobody writes to a copy that is to replicate before it is tracked.
                copy.image.refuse_writes(True)

    async def _read(self, member: Member) -> PointReader:
        """Open the point that a copy began with."""
        record = await self.vault.disk(member.disk_id)
        points = self.vault.log(record, member.generation)
        await points.refresh()
        return await points.open(await points.find(member.epoch))

    async def is_away(self) -> bool:
        """Say whether the vault as a whole is not there, or another one is."""
        try:
            found = await Vault.open(self.vault.store)
        except (NotFoundError, VaultUnreachableError):
            return True
        return found.vault_id != self.vault.vault_id

    async def write(self, failover: Failover, **changes: object) -> None:
        """Change a failover's record. Durable on return."""
        async with failover.writing:  # two tasks change two parts of it
            record = replace(failover.record, **changes)  # type: ignore[arg-type]
            path, body = failover.directory / RECORD, record.to_body()
            await trio.to_thread.run_sync(write_record, path, body)
            before, failover.record = failover.record, record
        await tell_change(self.events, before, record)

    # ---- machines ----------------------------------------------------------------------

    async def start_machine(self, failover: Failover, network: Attach) -> None:
        """Start the machine on the copies; it runs on return, and is judged afterwards.

        Raises:
            VdiskfsError: it cannot be started; nothing runs.
        """
        machine = failover.machine
        if machine is None:
            return
        shown = self.shown(failover)
        if failover.record.kind is Kind.FAILBACK:
            shown = self._shown_in.parent / "disks"
        disks = {one.disk: shown / one.file for one in failover.record.members}
        await machine.start(disks, network)
        hook("failover.started")
        for copy in failover.copies.values():
            self.start_apart(failover, self._fetch_first, failover, copy)
        self.start_apart(failover, self.judge, failover)

    async def ensure_machine(self, failover: Failover, network: Attach) -> None:
        """Start the machine, unless it runs already: then an earlier run was cut off.

        Raises:
            VdiskfsError: as `start_machine`.
        """
        if failover.machine is not None and await failover.machine.state() != "down":
            self.start_apart(failover, self.judge, failover)
        else:
            await self.start_machine(failover, network)

    def judge_again(self, failover: Failover) -> None:
        """Wait for the health of a machine that an earlier run has started."""
        if failover.machine is not None and failover.record.health is None:
            self.start_apart(failover, self.judge, failover)

    def start_apart(
        self, failover: Failover, act: Callable[..., Awaitable[None]], *arguments: object
    ) -> None:
        """Do something for a failover beside all else."""
        self._nursery.start_soon(apart, failover.record.name, act, *arguments)

    async def judge(self, failover: Failover) -> None:
        """Wait for the machine's health, and note it."""
        machine, jobs = failover.machine, len(failover.record.jobs)
        if machine is None:
            return
        health = await machine.health()
        ended = failover.record.state in (State.REMOVING, State.ROLLING_BACK, State.CHANGING_POINT)
        if ended or (len(failover.record.jobs) != jobs and failover.record.health is not None):
            return
        # Without a check it has answered nobody; started again it is warm.
        cold = machine.machine.health is not None and failover.record.health is None
        if health.healthy and cold:
            await self._remember_boot(failover)
        said = "is healthy" if health.healthy else "is NOT healthy"
        log.info("failover %s: machine %s %s: %s", failover.record.name, machine.machine.name,
                 said, health.detail)  # fmt: skip
        await self.write(failover, health=health)
        if health.healthy and cold:
            await note_recovery(self.vault, failover.record, machine.machine.name, health)

    async def _fetch_first(self, failover: Failover, copy: WritableCopy) -> None:
        runs = await read_boot(self.vault.store, copy.member.disk_id)
        if runs and failover.record.health is None:
            await copy.until_closed(lambda: copy.fetch_first(runs))

    async def _remember_boot(self, failover: Failover) -> None:
        for copy in failover.copies.values():
            try:
                await write_boot(self.vault.store, copy.member.disk_id, copy.waited)
            except VdiskfsError as error:
                log.info("%s: what it read is not kept: %s", copy.name, error)

    # ---- the end -----------------------------------------------------------------------

    async def check_unused(self, failover: Failover) -> None:
        """Check that no program has a copy open.

        Raises:
            BusyError: one has.
        """
        # Handles that a predecessor gave are known to the kernel alone.
        users = await trio.to_thread.run_sync(users_of, str(self.shown(failover)))
        if users or failover.is_used:
            who = ", ".join(str(one) for one in users[:3]) or "a program has a copy open"
            raise BusyError(
                f"failover {failover.record.name} is in use: {who}",
                hint="stop what runs on it, then the same again",
            )

    async def discard_copies(self, failover: Failover) -> None:
        """Close the copies without a word, and stop tracking their disks."""
        for disk in failover.taken.values():
            await disk.forget()
        failover.taken.clear()
        failover.hydrations.clear()
        for copy in failover.copies.values():
            self._by_cookie.pop(copy.image.cookie, None)
            await copy.discard()
        failover.copies = {}

    async def remove(self, failover: Failover) -> None:
        """End the machine, and throw all of the failover away.

        Raises:
            VdiskfsError: its machine cannot be ended, or the disk refused.
        """
        if failover.machine is not None:
            await failover.machine.end()
        await self.discard_copies(failover)
        for job in failover.record.jobs:
            if not failover.record.name.startswith(PROOF):
                self._jobs.keep(kept_job(failover.record, job))
        self._by_id.pop(failover.record.id, None)
        await trio.to_thread.run_sync(self._remove_files, failover)
        await tell_removed(self.events, failover.record)

    def _remove_files(self, failover: Failover) -> None:
        gone = self._root / f".{failover.record.id}.old"
        try:
            failover.directory.rename(gone)
            sync_directory(self._root)
            hook("failover.removed")
            shutil.rmtree(gone)
        except OSError as error:
            raise LocalError(f"{failover.directory}: {error.strerror}") from error


async def apart(name: str, act: Callable[..., Awaitable[None]], *arguments: object) -> None:
    """Do something for a failover beside all else: where it fails, nothing else does."""
    try:
        await act(*arguments)
    except (VdiskfsError, OSError) as error:
        log.error("failover %s: %s", name, error)
