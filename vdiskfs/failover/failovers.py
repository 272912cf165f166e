"""All failovers of a mount: begun, shown, used, cleaned up; taken up again at a start.

A test failover is a side branch: a directory of writable copies, which replication knows
nothing of. Any number may be there at once. Trio thread only.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from vdiskfs import native
from vdiskfs.catalog import Vault
from vdiskfs.config import MachinesConfig
from vdiskfs.crash import hook
from vdiskfs.errors import (
    AlreadyExistsError,
    BusyError,
    LocalError,
    NotFoundError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.failover.bootblocks import read_boot, write_boot
from vdiskfs.failover.copy import WritableCopy, make_files
from vdiskfs.failover.machine import FailoverMachine
from vdiskfs.failover.record import FailoverRecord, Member, check_name
from vdiskfs.failover.states import Kind, State, Step, after
from vdiskfs.failover.targets import FindLog, TargetDisk, find_target
from vdiskfs.machines import Machine, parse_machine
from vdiskfs.point import PointReader
from vdiskfs.state import StateDirectory, read_record, sync_directory, users_of, write_record
from vdiskfs.tree import CopyRef, FailoverRef, plain_name
from vdiskfs.units import format_time

log = logging.getLogger(__name__)

RECORD = "record.json"


@dataclass(eq=False)
class Failover:
    """One failover: its record, and the open copies by disk id."""

    record: FailoverRecord
    directory: Path
    copies: dict[str, WritableCopy]
    machine: FailoverMachine | None = None

    @property
    def is_used(self) -> bool:
        """Whether a program has one of the copies open."""
        return any(copy.users for copy in self.copies.values())


class Failovers:
    """The failovers of one mount."""

    def __init__(
        self, core: native.Core, state: StateDirectory, vault: Vault, find_log: FindLog,
        next_cookie: Callable[[], int], *, shown_in: Path, host: MachinesConfig,
        nursery: trio.Nursery,
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
        """
        self._host = host
        self._nursery = nursery
        self._shown_in = shown_in
        self._core = core
        self._root = state.failovers
        self._boot_id = state.boot_id
        self._vault = vault
        self._find_log = find_log
        self._next_cookie = next_cookie
        self._by_id: dict[str, Failover] = {}
        self._by_cookie: dict[int, WritableCopy] = {}
        self._changing = trio.Lock()

    async def load(self) -> None:
        """Take up what an earlier run left. Asks the vault nothing.

        What cannot be taken up is left where it is and said in the log; the others are.
        """
        for directory in sorted(self._root.iterdir()):
            try:
                where = str(directory / RECORD)
                record = FailoverRecord.from_body(read_record(directory / RECORD), where)
                failover = await trio.to_thread.run_sync(self._open, record, directory)
            except (VdiskfsError, OSError) as error:
                log.error("%s: a failover that cannot be taken up: %s", directory, error)
                continue
            self._enter(failover)
            if record.state is State.REMOVING:
                self._start_apart(failover, self._remove, failover)
            elif failover.machine is not None and record.health is None:
                self._start_apart(failover, self._judge, failover, failover.machine)

    async def aclose(self) -> None:
        """Close all copies; nobody uses them any more."""
        for failover in self._by_id.values():
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
                tuple(CopyRef(member.file, member.disk_id) for member in one.record.members),
            )
            for one in self.all()
        ]  # fmt: skip

    def copy(self, failover_id: str, disk_id: str) -> WritableCopy | None:
        """Return a copy; None: it is gone."""
        failover = self._by_id.get(failover_id)
        return failover.copies.get(disk_id) if failover is not None else None

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

    # ---- a test ------------------------------------------------------------------------

    async def plan_test(
        self, disk: str, spec: str | int, name: str | None, *, vm: bool
    ) -> FailoverRecord:
        """Return what `test` would make; nothing changes.

        Raises:
            As `test`.
        """
        record, readers = await self._plan(disk, spec, name, vm=vm)
        await _close(readers)
        return record

    async def test(self, disk: str, spec: str | int, name: str | None, *, vm: bool) -> Failover:
        """Make writable copies of a point, for tests, and start the machine; replication goes on.

        Durable on return, and nothing of its data is here yet. A machine that was started is
        judged afterwards: see ``record.health``.

        Args:
            disk: its name, or a group's: see `find_target`. With ``vm`` the other disks of
                its machine are copied, too.
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
        async with self._changing:
            record, readers = await self._plan(disk, spec, name, vm=vm)
            try:
                failover = await trio.to_thread.run_sync(self._make, record)
            except BaseException:
                await _close(readers)
                raise
            for disk_id, copy in failover.copies.items():
                copy.use(readers[disk_id])  # open already: the first read asks for less
            self._enter(failover)
            log.info("failover %s: a copy of disk %s at %s", record.name, disk,
                     format_time(record.members[0].time_ns))  # fmt: skip
            if failover.machine is not None:
                await self._start(failover, failover.machine)
        return failover

    async def _start(self, failover: Failover, machine: FailoverMachine) -> None:
        shown = self._shown_in / failover.record.name
        try:
            await machine.start({one.disk: shown / one.file for one in failover.record.members})
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._remove(failover)
            raise
        hook("failover.started")
        for copy in failover.copies.values():
            self._start_apart(failover, self._fetch_first, failover, copy)
        self._start_apart(failover, self._judge, failover, machine)

    def _start_apart(
        self, failover: Failover, act: Callable[..., Awaitable[None]], *arguments: object
    ) -> None:
        self._nursery.start_soon(apart, failover.record.name, act, *arguments)

    async def _judge(self, failover: Failover, machine: FailoverMachine) -> None:
        """Wait for the machine's health, and note it."""
        health = await machine.health()
        if failover.record.state is not State.TEST_FAILOVER:
            return
        if health.healthy:
            await self._remember_boot(failover)
        said = "is healthy" if health.healthy else "is NOT healthy"
        log.info("failover %s: machine %s %s: %s", failover.record.name, machine.machine.name,
                 said, health.detail)  # fmt: skip
        await self._write(failover, replace(failover.record, health=health))

    async def _fetch_first(self, failover: Failover, copy: WritableCopy) -> None:
        runs = await read_boot(self._vault.store, copy.member.disk_id)
        if runs and failover.record.health is None:
            await copy.until_closed(lambda: copy.fetch_first(runs))

    async def _remember_boot(self, failover: Failover) -> None:
        for copy in failover.copies.values():
            try:
                await write_boot(self._vault.store, copy.member.disk_id, copy.waited)
            except VdiskfsError as error:
                log.info("%s: what it read is not kept: %s", copy.name, error)

    async def _write(self, failover: Failover, record: FailoverRecord) -> None:
        failover.record = record
        path, body = failover.directory / RECORD, record.to_body()
        await trio.to_thread.run_sync(write_record, path, body)

    async def _plan(
        self, disk: str, spec: str | int, name: str | None, *, vm: bool
    ) -> tuple[FailoverRecord, dict[str, PointReader]]:
        """Return the record, and the members' points, open, by disk id."""
        target = await find_target(self._vault, self._find_log, disk, spec, time.time_ns(), vm=vm)
        record = self._record(disk, name, target.machine)
        readers: dict[str, PointReader] = {}
        members: list[Member] = []
        try:
            for one in target.disks:
                members.append(_member(one, {member.file for member in members}))
                readers[one.points.record.id] = await one.points.open(one.point)
        except BaseException:
            await _close(readers)
            raise
        return replace(record, members=tuple(members)), readers

    def _record(self, disk: str, name: str | None, machine: Machine | None) -> FailoverRecord:
        taken = {one.record.name for one in self._by_id.values()}
        if name is None:
            name = _free_name(f"{disk}-test", taken)
        check_name(name)
        if name in taken:
            raise AlreadyExistsError(
                f"there is a failover {name} already",
                hint=f"another --name, or: vdiskfs failover cleanup {name}",
            )
        return FailoverRecord(
            uuid.uuid4().hex, name, Kind.TEST, State.TEST_FAILOVER, time.time_ns(), (),
            machine=None if machine is None else machine.to_toml(),
        )  # fmt: skip

    def _make(self, record: FailoverRecord) -> Failover:
        """Make the files, whole or not at all; in a thread."""
        directory, partly = self._root / record.id, self._root / f".{record.id}.new"
        try:
            partly.mkdir(mode=0o700)
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

    def _open(self, record: FailoverRecord, directory: Path) -> Failover:
        """Open the copies; in a thread."""
        copies: dict[str, WritableCopy] = {}
        for member in record.members:
            copies[member.disk_id] = WritableCopy(
                self._core, directory / member.disk_id, member, self._next_cookie(),
                partial(self._read, member), is_away=self._is_away, boot_id=self._boot_id,
            )  # fmt: skip
        machine = None
        if record.machine is not None:
            definition = parse_machine(record.machine)
            machine = FailoverMachine(definition, directory, self._host)
        return Failover(record, directory, copies, machine)

    def _enter(self, failover: Failover) -> None:
        self._by_id[failover.record.id] = failover
        for copy in failover.copies.values():
            self._by_cookie[copy.image.cookie] = copy

    async def _read(self, member: Member) -> PointReader:
        """Open the point that a copy began with."""
        record = await self._vault.disk(member.disk_id)
        points = self._vault.log(record, member.generation)
        await points.refresh()
        return await points.open(await points.find(member.epoch))

    async def _is_away(self) -> bool:
        try:
            found = await Vault.open(self._vault.store)
        except (NotFoundError, VaultUnreachableError):
            return True
        return found.vault_id != self._vault.vault_id

    # ---- the end -----------------------------------------------------------------------

    async def plan_cleanup(self, name: str) -> FailoverRecord:
        """Return what `cleanup` would throw away; nothing changes.

        Raises:
            As `cleanup`.
        """
        failover = self.find(name)
        after(name, failover.record.state, Step.CLEANUP)
        if failover.machine is None or await failover.machine.state() == "down":
            await self._check_unused(failover)
        return failover.record

    async def cleanup(self, name: str, notes: str) -> FailoverRecord:
        """End a test's machine, and throw its copies away with all that was written to them.

        Raises:
            NotFoundError: no such failover.
            BusyError: a program has a copy open.
            LocalError: the disk refused.
        """
        async with self._changing:
            failover = self.find(name)
            state = after(name, failover.record.state, Step.CLEANUP)
            if failover.machine is not None:
                await failover.machine.end()
            await self._check_unused(failover)
            await self._write(failover, replace(failover.record, state=state, notes=notes))
            hook("failover.ending")
            await self._remove(failover)
        log.info("failover %s: cleaned up%s", name, f": {notes}" if notes else "")
        return failover.record

    async def _check_unused(self, failover: Failover) -> None:
        # Handles that a predecessor gave are known to the kernel alone.
        shown = str(self._shown_in / failover.record.name)
        users = await trio.to_thread.run_sync(users_of, shown)
        if users or failover.is_used:
            who = ", ".join(str(one) for one in users[:3]) or "a program has a copy open"
            raise BusyError(
                f"failover {failover.record.name} is in use: {who}",
                hint="stop what runs on it, then clean up again",
            )

    async def _remove(self, failover: Failover) -> None:
        if failover.machine is not None:
            await failover.machine.end()
        for copy in failover.copies.values():
            self._by_cookie.pop(copy.image.cookie, None)
            await copy.discard()
        self._by_id.pop(failover.record.id, None)
        await trio.to_thread.run_sync(self._remove_files, failover)

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


async def _close(readers: Mapping[str, PointReader]) -> None:
    with trio.CancelScope(shield=True):
        for reader in readers.values():
            await reader.aclose()


def _free_name(stem: str, taken: set[str]) -> str:
    stem = "".join(char if char.isascii() and char.isalnum() else "-" for char in stem)[:56]
    stem = stem.lstrip("-") or "failover"
    return next(name for n in itertools.count(1) if (name := f"{stem}-{n}") not in taken)


def _member(one: TargetDisk, taken: set[str]) -> Member:
    points, point = one.points, one.point
    name = points.record.name
    # Those of a hostile vault may lead out of the directory.
    plain = plain_name(points.record.file.rpartition("/")[2]) or plain_name(f"{name}.img")
    file = "disk.img" if plain is None else os.fsdecode(plain)
    if file in taken:
        # Of several directories of the source: the ids differ.
        file = f"{points.record.id}-{file}"[-255:]
    return Member(
        one.disk, points.record.id, file, points.generation, point.epoch, point.time_ns, point.size
    )
