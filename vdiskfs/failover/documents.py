"""What scripts get of failovers (vdiskfs(1), ``failover list --json``)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from vdiskfs.failover.failovers import Failover
from vdiskfs.failover.record import FailoverRecord
from vdiskfs.units import format_time


async def failover_document(failover: Failover, shown_in: Path) -> dict[str, object]:
    """Return one failover with its copies; ``shown_in`` is `failovers/` of the mount."""
    machine = failover.machine
    record = failover.record
    directory = shown_in / record.name
    return {
        **record_document(record),
        "path": str(directory),
        "machine": None
        if machine is None
        else {
            "name": machine.machine.name,
            "state": await machine.state(),
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
            }
            for member in record.members
        ],
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
    }
