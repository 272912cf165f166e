"""What a failover is made of: which disks, at which point of each, and the machine on them."""

from __future__ import annotations

import itertools
import os
import secrets
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import trio

from vdiskfs.catalog import DiskLog, DiskRecord, Point, Vault
from vdiskfs.errors import AlreadyExistsError
from vdiskfs.failover.failovers import Failovers
from vdiskfs.failover.gaps import find_points_there
from vdiskfs.failover.record import FailoverRecord, Member, check_name
from vdiskfs.failover.states import Kind, State
from vdiskfs.failover.targets import FindLog, Target, find_target
from vdiskfs.machines import Machine
from vdiskfs.point import PointReader
from vdiskfs.tree import plain_name

_FIRST_STATE = {Kind.TEST: State.TEST_FAILOVER, Kind.FAILBACK: State.FAILING_BACK}
_SUFFIX = {Kind.TEST: "test", Kind.FAILBACK: "failback"}


async def new_record(
    failovers: Failovers, target: str, name: str | None, kind: Kind, *, vm: bool
) -> tuple[FailoverRecord, Target]:
    """Return the record of a failover without members yet, and what it is of.

    Args:
        failovers: those there are.
        target: a disk's name, or a group's. With ``vm`` the other disks of its machine belong to
            it, too.
        name: of the failover; None: one is found.
        kind: why it is made.
        vm: start the machine that the vault has for it, if it has one.

    Raises:
        NotFoundError: no such disk or group.
        UsageError, AlreadyExistsError: the name is none, or taken.
    """
    found = await find_target(failovers.vault, failovers.find_log, target, vm=vm)
    record = _record(failovers, target, name, found.machine, kind)
    return replace(record, group=found.group), found


async def choose(
    vault: Vault, find_log: FindLog, target: Target, spec: str | int
) -> tuple[tuple[Member, ...], dict[str, PointReader]]:
    """Return the members of a failover, and their points, open, by disk id.

    Args:
        vault: where groups are kept.
        find_log: gives the points of a disk.
        target: its disks: see `targets.find_points`.
        spec: the point.

    Raises:
        NotFoundError: no such disk, or no such point.
        StateError: a disk is being resynchronized, and has no point of that time yet.
    """
    readers: dict[str, PointReader] = {}
    members: list[Member] = []
    try:
        for one in await find_points_there(vault, find_log, target, spec, time.time_ns()):
            taken = [member.file for member in members]
            member = member_of(one.disk, one.points, one.point, taken)
            reader = await one.points.open(one.point)
            readers[member.disk_id] = reader
            members.append(replace(member, digest=reader.digest.hex()))
    except BaseException:
        await close(readers)
        raise
    return tuple(members), readers


def logs_of(
    vault: Vault, records: Sequence[DiskRecord],
    line: Callable[[DiskRecord], int] = lambda record: record.generation,
) -> FindLog:  # fmt: skip
    """Return what gives the points of disks, by name, each in the line that is meant."""
    by_name = {one.name: one for one in records}

    async def find(name: str) -> DiskLog:
        points = vault.log(by_name[name], line(by_name[name]))
        await points.refresh()
        return points

    return find


def point_spec(point: str) -> str | int:
    """Return what names a point: an epoch, or a time and the like."""
    return int(point) if point.isdigit() else point


async def close(readers: Mapping[str, PointReader]) -> None:
    """Give points up that nobody wants any more."""
    with trio.CancelScope(shield=True):
        for reader in readers.values():
            await reader.aclose()


def member_of(disk: str, points: DiskLog, point: Point, taken: Collection[str] = ()) -> Member:
    """Return the member of a failover that a disk at a point is; ``taken`` are others' files."""
    return Member(
        disk, points.record.id, file_of(points.record, taken), point.generation, point.epoch,
        point.time_ns, point.size, current=points.record.generation,
    )  # fmt: skip


def unknown_members(records: Sequence[DiskRecord]) -> tuple[Member, ...]:
    """Return members whose points are not known yet: the last ones of the site that has them."""
    members: list[Member] = []
    for record in records:
        file = file_of(record, [one.file for one in members])
        members.append(Member(record.name, record.id, file, record.generation, 0, 0, 0))
    return tuple(members)


def file_of(record: DiskRecord, taken: Collection[str] = ()) -> str:
    """Return the name of a disk's image in a directory of its own, or beside others of it.

    What the vault says of it may lead out of the directory, and is not taken then.
    """
    plain = plain_name(record.file.rpartition("/")[2]) or plain_name(f"{record.name}.img")
    file = "disk.img" if plain is None else os.fsdecode(plain)
    # Of several directories of the source: the ids differ.
    return f"{record.id}-{file}"[-255:] if file in taken else file


def path_of(record: DiskRecord) -> str:
    """Return where an image is made anew below the source; the vault may say what it likes."""
    parts = record.file.split("/")
    return record.file if all(plain_name(part) for part in parts) else file_of(record)


def _record(
    failovers: Failovers, disk: str, name: str | None, machine: Machine | None, kind: Kind
) -> FailoverRecord:
    taken = {one.record.name for one in failovers.all()}
    if name is None:
        name = _free_name(f"{disk}-{_SUFFIX.get(kind, 'failover')}", taken)
    check_name(name)
    if name in taken:
        raise AlreadyExistsError(
            f"there is a failover {name} already",
            hint=f"another --name, or: vdiskfs failover cleanup {name}",
        )
    return FailoverRecord(
        uuid.uuid4().hex, name, kind, _FIRST_STATE.get(kind, State.STARTING), time.time_ns(), (),
        machine=None if machine is None else machine.to_toml(),
    )  # fmt: skip


def _free_name(stem: str, taken: set[str]) -> str:
    stem = "".join(char if char.isascii() and char.isalnum() else "-" for char in stem)[:56]
    stem = stem.lstrip("-") or "failover"
    return next(name for n in itertools.count(1) if (name := f"{stem}-{n}") not in taken)


def with_tokens(members: Sequence[Member], records: Sequence[DiskRecord]) -> tuple[Member, ...]:
    """Return the members with a number of their own each, for the step that takes the disk."""
    current = {record.id: record.generation for record in records}
    return tuple(
        replace(one, token=secrets.token_hex(16), current=current[one.disk_id]) for one in members
    )
