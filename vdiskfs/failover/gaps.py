"""Instants that a disk does not have yet, because it is being resynchronized."""

from __future__ import annotations

from collections.abc import Sequence

from vdiskfs.catalog import DiskLog, Point, Vault
from vdiskfs.catalog.points import parse_spec
from vdiskfs.errors import NotFoundError, StateError
from vdiskfs.failover.targets import FindLog, Target, TargetDisk, find_points
from vdiskfs.health import State
from vdiskfs.units import format_time, parse_time

_COMPARED = {str(State.INITIAL_REPLICATION), str(State.RESYNC_REQUIRED), str(State.RESYNCING)}
"""States in which a disk goes on being written, and gets no points."""


async def find_points_there(
    vault: Vault, find_log: FindLog, target: Target, spec: str | int, now_ns: int
) -> Sequence[TargetDisk]:
    """Return the point of each disk of a target, as `targets.find_points` does.

    A disk that stands still has the same bytes until its next point; one that is being
    resynchronized was written meanwhile, and an instant after its newest point is none of it.

    Raises:
        StateError: that is so, as the heartbeat of the disk's owner says.
        NotFoundError, UsageError: see `targets.find_points`.
    """
    try:
        found = await find_points(vault, find_log, target, spec, now_ns)
    except NotFoundError:
        for name in target.names:
            await _check(vault, await find_log(name), spec, now_ns)
        raise
    for one in found:
        await _check(vault, one.points, spec, now_ns)
    return found


async def _check(vault: Vault, points: DiskLog, spec: str | int, now_ns: int) -> None:
    wanted = parse_spec(spec, now_ns)
    if wanted.until_ns is None and wanted.epoch is None:
        return  # the newest there is was asked for
    if points.generation != points.record.generation:
        return  # a branch has ended: its last point is what it was from then on
    owner = points.record.owner
    heartbeat = None if owner is None else await vault.site(owner.site, owner.writer)
    state = "" if heartbeat is None else heartbeat.states.get(points.record.id, "")
    if heartbeat is None or state not in _COMPARED:
        return
    newest = await _newest(points)
    if newest is not None and newest.time_ns > parse_time(heartbeat.time, now_ns):
        return  # it was over soon after
    if newest is None:
        later, there = True, "no point"
    else:
        later = (wanted.until_ns or 0) > newest.time_ns or (wanted.epoch or 0) > newest.epoch
        there = f"#{newest.epoch} of {format_time(newest.time_ns)}"
    if later:
        raise StateError(
            f"disk {points.record.name}: is in state {state} at site {heartbeat.site}, and has "
            f"no point yet for {spec}; its newest is {there}",
            hint="wait until it is Protected (vdiskfs disk show there), or take what is there: "
            "--point latest",
        )


async def _newest(points: DiskLog) -> Point | None:
    try:
        return await points.find("latest")
    except NotFoundError:
        return None
