"""The record of a disk, changed by compare-and-swap."""

from __future__ import annotations

from collections.abc import Callable

from vdiskfs.catalog.documents import DOCUMENT_LIMIT
from vdiskfs.catalog.records import DiskRecord, decode_disk, encode_disk
from vdiskfs.delta.layout import is_id
from vdiskfs.errors import ConflictError, NotFoundError
from vdiskfs.store import Store

_TRIES = 20


def disk_object(disk_id: str) -> str:
    """Return the name of a disk's record."""
    if not is_id(disk_id):
        raise NotFoundError(f"not the id of a disk: {disk_id[:40]!r}")
    return f"disks/{disk_id}/disk.json"


async def swap_disk(
    store: Store, disk_id: str, change: Callable[[DiskRecord], DiskRecord]
) -> DiskRecord:
    """Change a disk's record by compare-and-swap; ``change`` may be called again.

    What ``change`` raises ends it: it sees the truth and can refuse. Returns the record as it is
    now, durably.
    """
    name = disk_object(disk_id)
    for _ in range(_TRIES):
        data, info = await store.read(name, limit=DOCUMENT_LIMIT)
        record = decode_disk(data, disk_id, where=name)
        changed = change(record)
        if changed == record:
            return record
        try:
            await store.replace(name, encode_disk(changed), etag=info.etag)
        except ConflictError:
            continue
        return changed
    raise ConflictError(f"disk {disk_id}: changed by others all the time")
