"""What a failover is of: DISK or GROUP, its machine, and one point of each of its disks.

A group's disks begin at one instant: the newest that all of them share. So do the disks of a
machine that are all in one group; of others the newest point at or before that instant.
"""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from vdiskfs.catalog import DiskLog, Point, Vault, group_members, group_points
from vdiskfs.catalog.groups import list_groups
from vdiskfs.errors import NotFoundError, StateError, UsageError
from vdiskfs.machines import Machine, list_machines, machine_of
from vdiskfs.units import format_time

FindLog = Callable[[str], Awaitable[DiskLog]]


@dataclass(frozen=True, slots=True)
class TargetDisk:
    """One disk of a failover: its name, its points, and the one that is meant."""

    disk: str
    points: DiskLog
    point: Point


@dataclass(frozen=True, slots=True)
class Target:
    """What a failover is of: its disks, the one that was named first, and their machine.

    ``group`` is the group that was named, None: a disk was.
    """

    names: tuple[str, ...]
    machine: Machine | None
    group: str | None


async def find_target(vault: Vault, find_log: FindLog, name: str, *, vm: bool) -> Target:
    """Return the disks that DISK or GROUP means. A disk's name wins.

    Args:
        vault: where groups and machines are kept.
        find_log: gives the points of a disk by its name.
        name: of a disk, a branch, or a group.
        vm: with the machine that the vault has for it, and all of its disks.

    Raises:
        NotFoundError: no such disk or group.
        StateError: a group has disks of several machines, or of one with other disks, too.
    """
    names = await _disks_of_group(vault, find_log, name)
    if names is None:
        machine = await machine_of(vault.store, name) if vm else None
        others = [] if machine is None else [one.disk for one in machine.disks if one.disk != name]
        return Target((name, *sorted(others)), machine, None)
    machine = await _machine_of_group(vault, name, names) if vm else None
    return Target(tuple(names), machine, name)


async def find_points(
    vault: Vault, find_log: FindLog, target: Target, spec: str | int, now_ns: int
) -> tuple[TargetDisk, ...]:
    """Return the point of each disk of a target.

    Args:
        vault: where groups are kept.
        find_log: gives the points of a disk by its name.
        target: as `find_target` gave it.
        spec: the point: an epoch (of a disk alone), a time, ``latest`` and the like.
        now_ns: what ``-15m`` is counted from.

    Raises:
        NotFoundError: no such point.
        UsageError: an epoch means nothing of a group.
    """
    if target.group is None:
        return await _of_disk(vault, find_log, target.names, spec, now_ns)
    if isinstance(spec, int):
        raise UsageError(
            f"{spec} is an epoch of one disk, and means nothing of group {target.group}",
            hint="use a time such as 2026-11-21T01:40:05Z, -15m, or latest",
        )
    return await _shared(find_log, target.names, spec, now_ns)


async def _disks_of_group(vault: Vault, find_log: FindLog, name: str) -> list[str] | None:
    """Return the names of a group's disks; None: the name is a disk's."""
    try:
        await find_log(name)
    except NotFoundError as no_disk:
        try:
            return await group_members(vault, name)
        except NotFoundError as no_group:
            # A group that lost a disk says so; a name that nobody has is no disk's.
            names = [one.name for one in await list_groups(vault.store)]
            raise (no_group if name in names else no_disk) from None
    return None


async def _of_disk(
    vault: Vault, find_log: FindLog, names: Sequence[str], spec: str | int, now_ns: int
) -> tuple[TargetDisk, ...]:
    """Return one disk's point, and those of the other disks of its machine."""
    if len(names) > 1 and isinstance(spec, str) and await _are_in_one_group(vault, names):
        return await _shared(find_log, names, spec, now_ns)
    found: list[TargetDisk] = []
    for name in names:
        points = await find_log(name)
        # A time, or the latest, says the same of each disk; an epoch is the first one's.
        if not found or isinstance(spec, str):
            point = await points.find(spec, now_ns)
        else:
            point = await _at(points, found[0].point.time_ns)
        found.append(TargetDisk(name, points, point))
    return tuple(found)


async def _shared(
    find_log: FindLog, names: Sequence[str], spec: str, now_ns: int
) -> tuple[TargetDisk, ...]:
    points = await group_points(find_log, names, spec, now_ns)
    return tuple([
        TargetDisk(name, await find_log(name), point)
        for name, point in zip(names, points, strict=True)
    ])  # fmt: skip


async def _are_in_one_group(vault: Vault, names: Sequence[str]) -> bool:
    for listed in await list_groups(vault.store):
        if listed.group is not None and set(names) <= {disk.name for disk in listed.group.disks}:
            return True
    return False


async def _machine_of_group(vault: Vault, group: str, names: Sequence[str]) -> Machine | None:
    """Return the machine that a group's disks belong to; None: none has one of them.

    Raises:
        StateError: there are several, or it has other disks, too.
    """
    found = [
        one.machine
        for one in await list_machines(vault.store)
        if one.machine is not None and {disk.disk for disk in one.machine.disks} & set(names)
    ]
    if not found:
        return None
    if len(found) > 1:
        raise StateError(
            f"group {group} has disks of the machines {found[0].name} and {found[1].name}",
            hint="use --vm none, or fail each over by one of its disks",
        )
    others = {disk.disk for disk in found[0].disks} - set(names)
    if others:
        raise StateError(
            f"machine {found[0].name} has disk {min(others)}, which is not in group {group}",
            hint=f"vdiskfs group add {shlex.quote(group)} {shlex.quote(min(others))}, or --vm none",
        )
    return found[0]


async def _at(points: DiskLog, time_ns: int) -> Point:
    """Return the newest point at or before an instant."""
    found = await points.points(None, time_ns, 1)
    if not found:
        raise NotFoundError(
            f"disk {points.record.name} has no point at or before {format_time(time_ns)}",
            hint="choose a later point, or --vm none",
        )
    return found[-1]
