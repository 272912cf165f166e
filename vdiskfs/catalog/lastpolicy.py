"""The policy that a disk followed when the vault was last heard of, by the copies on this host."""

from __future__ import annotations

from pathlib import Path

from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.catalog.policy import PRESETS, Policy, decode_policy, policy_object
from vdiskfs.catalog.records import decode_disk
from vdiskfs.catalog.swap import disk_object
from vdiskfs.errors import DamagedError


def last_policy(indexes: Path, documents: Path, disk_id: str) -> Policy | None:
    """Return it; None: there was none, or nothing is known of it here. Blocks.

    Args:
        indexes: where the disk's copies are kept.
        documents: where those of policies are.
        disk_id: the disk's.
    """
    where, name = disk_object(disk_id), ""
    for copy in IndexCache(indexes).copies(where):
        try:
            name = decode_disk(copy, disk_id, where=where).policy
        except DamagedError:
            continue
        break
    if not name:
        return None
    where = policy_object(name)
    for copy in IndexCache(documents).copies(where):
        try:
            return decode_policy(copy.partition(b"\n")[2], where)
        except DamagedError:
            continue
    return PRESETS.get(name)
