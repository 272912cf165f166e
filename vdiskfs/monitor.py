"""The documents of ``status`` and ``disk show``: what the numbers are, not how they look.

RPO is three numbers: how far the vault lags behind the disk, how old the newest usable
point is, and how old the newest proven one. Reads only what is in memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from vdiskfs.config import MountSettings
from vdiskfs.disk import ProtectedDisk
from vdiskfs.earlydisk import EarlyDisk
from vdiskfs.health import Level, State
from vdiskfs.running import VERSION
from vdiskfs.state import DiskRecord
from vdiskfs.units import NS, PAGE_SIZE, format_time


def status_document(
    settings: MountSettings, disks: Sequence[ProtectedDisk], early: Sequence[EarlyDisk],
    vault_error: str | None,
) -> dict[str, object]:  # fmt: skip
    """Return the document of ``vdiskfs status --json``; ``early`` disks wait to be started."""
    shown = [disk_document(disk) for disk in disks] + [early_document(one) for one in early]
    return {
        "site": settings.site,
        "mountpoint": settings.mountpoint,
        "vault": settings.vault,
        "vault_state": "away" if vault_error else "ok",
        "vault_error": vault_error,
        "points_waiting": sum(disk.replicator.waiting for disk in disks),
        "pid": os.getpid(),
        "version": VERSION,
        "plain": None,
        "disks": shown,
    }


def plain_document(
    settings: MountSettings, records: Sequence[DiskRecord], reason: str, again_s: float
) -> dict[str, object]:
    """Return the document of ``vdiskfs status --json`` while a mount is served plainly."""
    again = round(again_s, 1)
    return {
        "site": settings.site,
        "mountpoint": settings.mountpoint,
        "vault": settings.vault,
        "vault_state": "not asked",
        "vault_error": None,
        "points_waiting": None,
        "pid": os.getpid(),
        "version": VERSION,
        "plain": {"reason": reason, "again_s": again},
        "disks": [
            _record_row(record) | {
                "size": record.size,
                "state": str(State.RESYNC_REQUIRED),
                "health": str(Level.CRITICAL),
                "last_error": "neither tracked nor replicated",
                "next_retry_s": again,
            }
            for record in records
        ],
    }  # fmt: skip


def early_document(early: EarlyDisk) -> dict[str, object]:
    """Return the row of a disk that is tracked and waits to be started: what is known here."""
    retry = early.next_retry_s
    return _record_row(early.record) | {
        "size": early.image.size(),
        "state": str(State.ENABLING),
        "health": str(Level.CRITICAL if early.is_hopeless else Level.WARNING),
        "last_error": early.reason,
        "next_retry_s": None if retry is None else round(retry, 1),
    }


def _record_row(record: DiskRecord) -> dict[str, object]:
    """Return what the state directory knows of a disk's row; None: nobody knows."""
    unknown = ("group", "shipped_lag_s", "proven_point_age_s", "dirty_bytes", "spooled_bytes",
               "points_waiting", "progress")  # fmt: skip
    return {
        **dict.fromkeys(unknown),
        "name": record.name,
        "id": record.disk_id,
        "generation": record.generation,
        "epoch": record.epoch,
        "usable_point_age_s":
            round((time.time_ns() - record.time_ns) / NS, 3) if record.epoch else None,
        "paused": False,
    }  # fmt: skip


def disk_document(disk: ProtectedDisk) -> dict[str, object]:
    """Return one disk's row."""
    replicator, health = disk.replicator, disk.health
    stored = replicator.stored
    age = (time.time_ns() - stored.time_ns) / NS if stored.epoch else None
    retry = health.next_retry_s
    return {
        "name": disk.name,
        "id": disk.disk_id,
        "size": disk.image.size(),
        "state": str(health.shown_state),
        "health": str(health.level),
        "group": replicator.group,
        "generation": replicator.end.generation,
        "epoch": stored.epoch,
        "shipped_lag_s": round(replicator.lag_s(), 3),
        "usable_point_age_s": None if age is None else round(age, 3),
        "proven_point_age_s": _age(disk.proven_ns),
        "dirty_bytes": replicator.dirty_bytes(),
        "spooled_bytes": replicator.spooled_bytes,
        "points_waiting": replicator.waiting,
        "paused": replicator.paused,
        "progress": _progress(disk),
        "last_error": health.last_error,
        "next_retry_s": None if retry is None else round(retry, 1),
    }


def disk_details(disk: ProtectedDisk, interval_s: float) -> dict[str, object]:
    """Return the document of ``vdiskfs disk show --json``."""
    replicator = disk.replicator
    counts = replicator.live.counts()
    return {
        **disk_document(disk),
        "file": disk.record.file,
        "policy": {"epoch_interval_s": interval_s},
        "captured_epoch": replicator.end.epoch,
        "captured_time": format_time(replicator.end.time_ns) if replicator.end.epoch else None,
        "suspect_bytes": counts.suspect_pages * PAGE_SIZE,
        "resync": _resync(disk),
        "counts": {
            "dirty_pages": counts.dirty_pages,
            "frozen_pages": counts.frozen_pages,
            "suspect_pages": counts.suspect_pages,
            "preserved_pages": counts.preserved_pages,
            "overflow": counts.overflow,
        },
    }


def _age(moment_ns: int | None) -> float | None:
    return None if moment_ns is None else round(max(0, time.time_ns() - moment_ns) / NS, 3)


def _progress(disk: ProtectedDisk) -> dict[str, object] | None:
    """Return how far the pass is that runs, or None."""
    if disk.health.state not in (State.INITIAL_REPLICATION, State.RESYNCING):
        return None
    pass_ = disk.replicator.pass_
    done = pass_.done_pages * PAGE_SIZE
    left = disk.replicator.live.counts().suspect_pages * PAGE_SIZE
    return {
        "phase": str(disk.health.state),
        "done_bytes": done,
        "total_bytes": done + left,
        "sent_bytes": pass_.sent_pages * PAGE_SIZE,
    }


def _resync(disk: ProtectedDisk) -> dict[str, object] | None:
    """Return the resynchronization that runs or waits, or None."""
    suspects = disk.replicator.suspects
    if suspects.is_first or not suspects.needed:
        return None
    wait_s = suspects.resync.wait_s()
    return {
        "reason": suspects.reason,
        "cancelled": suspects.resync.cancelled,
        "in_window": wait_s is None and not suspects.resync.cancelled,
    }
