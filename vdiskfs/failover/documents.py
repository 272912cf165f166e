"""What scripts get of failovers (vdiskfs(1), ``failover list --json``)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from vdiskfs.failover.failovers import Failover
from vdiskfs.failover.record import FailoverRecord, Job
from vdiskfs.failover.states import allowed
from vdiskfs.units import format_time


async def failover_document(failover: Failover, shown_in: Path) -> dict[str, object]:
    """Return one failover with its copies; ``shown_in`` is `failovers/` of the mount."""
    machine = failover.machine
    # Asked first: all else is of one instant, so that a job that is done goes with its state.
    how = "" if machine is None else await machine.state()
    record = failover.record
    directory = shown_in / record.name
    return {
        **record_document(record),
        "path": str(directory),
        "damaged": failover.lost or None,
        "machine": None
        if machine is None
        else {
            "name": machine.machine.name,
            "state": how,
            "directory": str(machine.directory),
        },
        "disks": [
            {
                "disk": member.disk,
                "id": member.disk_id,
                "epoch": member.epoch,
                "point_time": format_time(member.time_ns),
                "path": str(directory / member.file),
                "size": failover.copies[member.disk_id].image.size(),
                "present_bytes": failover.copies[member.disk_id].present_bytes,
                "waits": failover.copies[member.disk_id].waits,
                "hydration": _hydration(failover, member.disk_id),
            }
            for member in record.members
            if member.disk_id in failover.copies
        ],
        "job": _job_document(failover.job, failover.says),
    }


def record_document(record: FailoverRecord) -> dict[str, object]:
    """Return what is known of a failover also when its copies are gone."""
    return {
        "name": record.name,
        "id": record.id,
        "kind": str(record.kind),
        "state": str(record.state),
        "created": format_time(record.created_ns),
        "notes": record.notes or None,
        "health": None if record.health is None else asdict(record.health),
        "possible": [str(step) for step in allowed(record.state)],
        "rolled_back": format_time(record.rollback_ns) if record.rollback_ns else None,
        "members": [
            {
                "disk": one.disk,
                "id": one.disk_id,
                "epoch": one.epoch or None,
                "point_time": format_time(one.time_ns) if one.epoch else None,
            }
            for one in record.members
        ],
    }


def job_document(record: FailoverRecord, job: Job, says: str | None = None) -> dict[str, object]:
    """Return one job of a failover, with all that jobs of disks have."""
    return {
        **(_job_document(job, says) or {}),
        "failover": record.name,
        "disk": record.disk_names,
        "step_times": {},
        "progress": None,
        "outcome": None,
    }


def _job_document(job: Job | None, says: str | None) -> dict[str, object] | None:
    if job is None:
        return None
    state = "done" if job.ended_ns else "failed" if job.error else "running"
    return {
        "id": job.id,
        "kind": str(job.kind),
        "state": state,
        "began": format_time(job.began_ns),
        "ended": format_time(job.ended_ns) if job.ended_ns else None,
        "steps": list(job.done),
        "waits_for": says,
        "error": job.error,
        "hint": job.hint or None,
        "exit_code": job.code,
    }


def _hydration(failover: Failover, disk_id: str) -> dict[str, object] | None:
    """Return how far the background has come with a copy, or None: nothing is brought."""
    task = failover.hydrations.get(disk_id)
    if task is None:
        return None
    found = task.progress()
    return {
        "done": found.done,
        "absent_bytes": found.absent_bytes,
        "fetched_bytes": found.fetched_bytes,
        "waits_for": found.waiting or None,
        "error": None if task.error is None else str(task.error),
    }
