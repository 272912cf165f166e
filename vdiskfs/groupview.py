"""The documents of groups and of their points: what scripts get (vdiskfs(1), JSON)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vdiskfs.catalog import Group, Point
from vdiskfs.units import format_time

if TYPE_CHECKING:  # the command line prints points, and needs no disk for that
    from vdiskfs.disk import ProtectedDisk


def group_document(group: Group, here: Sequence[ProtectedDisk]) -> dict[str, object]:
    """Return a group with its disks; ``here``: those of them that are protected in this mount."""
    by_id = {disk.disk_id: disk for disk in here}
    rows = []
    for member in sorted(group.disks, key=lambda one: one.name):
        disk = by_id.get(member.id)
        rows.append({
            "disk": member.name, "id": member.id, "here": disk is not None,
            "state": None if disk is None else str(disk.health.shown_state),
            "ready": disk is not None and disk.replicator.is_ready,
        })  # fmt: skip
    return {"name": group.name, "id": group.id, "created": group.created, "disks": rows}


def group_point_document(
    group: str, names: Sequence[str], points: Sequence[Point]
) -> dict[str, object]:
    """Return an instant of which every disk of a group has a point."""
    first = points[0]
    labels = {point.label for point in points}
    consistent = all(point.consistency == "application" for point in points)
    return {
        "group": group,
        "disk": None,
        "epoch": None,
        "time": format_time(first.time_ns),
        "consistency": "application" if consistent else "crash",
        "proof": first.proof,
        "label": first.label or None if len(labels) == 1 else None,
        "held": False,
        "size": sum(point.size for point in points),
        "changed_bytes": sum(point.changed_bytes for point in points),
        "stored_bytes": sum(point.stored_bytes for point in points),
        "generation": None,
        "disks": [
            {"disk": name, "epoch": point.epoch, "generation": point.generation}
            for name, point in zip(names, points, strict=True)
        ],
    }
