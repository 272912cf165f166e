"""Whether a disk may be failed over to this site."""

from __future__ import annotations

import shlex

from vdiskfs.catalog import DiskRecord
from vdiskfs.disk import Site
from vdiskfs.errors import StateError
from vdiskfs.failover.states import State
from vdiskfs.protection import Protection

_REPLICATED = (State.FAILBACK_READY, State.FAILBACK_UNCOMMITTED)
"""States in which whoever has a disk that was moved replicates it."""


async def check_free(site: Site, protection: Protection, disk: str, *, planned: bool) -> DiskRecord:
    """Return the disk's record, if it may be failed over to this site.

    Args:
        site: the mount's.
        protection: what is protected here.
        disk: its name.
        planned: not so: the site that has it is not asked, and may be gone.

    Raises:
        StateError: it may not.
    """
    record = await site.vault.find_disk(disk)
    word = shlex.quote(disk)
    here = [one for one in protection.disks() if one.disk_id == record.id]
    if here and here[0].line.handed and here[0] in protection.adopted:
        raise StateError(
            f"disk {disk}: an old copy of it is here: {here[0].file.path}",
            hint="vdiskfs failover cleanup it",
        )
    if here and here[0].line.displaced is None:
        raise StateError(
            f"disk {disk}: is in use at this very site",
            hint="a failover is started at the other site; to look at a point here: "
            "vdiskfs failover test",
        )
    if here:
        raise StateError(
            f"disk {disk}: has its home at this site, and was failed over from it",
            hint=f"vdiskfs failback start {word}",
        )
    if protection.parked(record.id) is not None:
        raise StateError(
            f"disk {disk}: its image at this site is on its way home",
            hint=f"vdiskfs failback start {word}, then: vdiskfs failback complete {word}, with "
            "--unplanned if the other site is gone",
        )
    moved = record.moved
    ready = _REPLICATED[:1] if planned else _REPLICATED
    if moved is not None and moved.state not in ready:
        there = "commit and reprotect it there, or roll it back there; if that site is gone, where "
        there += "an image of it is: vdiskfs mount --force"
        if moved.state == State.FAILBACK_UNCOMMITTED:
            there = f"there: vdiskfs failback commit {word}; if that site is gone: --unplanned"
        raise StateError(
            f"disk {disk}: is failed over to site {moved.site} since {moved.since}, state "
            f"{moved.state}",
            hint=there,
        )
    if record.retired:
        raise StateError(
            f"disk {disk}: was retired {record.retired}",
            hint=f"vdiskfs point restore {word}@latest FILE; or, at its home: vdiskfs disk protect",
        )
    return record
