"""What the C core says of a live image: it has changed, or something about it is wrong."""

from __future__ import annotations

import errno
import logging
import os

from vdiskfs import native
from vdiskfs.events import Events
from vdiskfs.native import EventKind
from vdiskfs.protection import Protection
from vdiskfs.room import RoomMaker

log = logging.getLogger(__name__)


def tell_disk(
    protection: Protection, events: Events, room: RoomMaker, event: native.Event
) -> None:  # fmt: skip
    """Tell the disk that an event of the core is of, and the log where it is bad news."""
    if event.kind is EventKind.NO_ROOM:
        room.ask()
        return
    disk = protection.by_cookie(event.cookie)
    if disk is None or not disk.started:
        return
    if event.kind is EventKind.DIRTY:
        disk.replicator.touched()
        return
    why = os.strerror(event.error)
    if event.kind is EventKind.ABANDONED:
        if event.error == errno.EFBIG:
            log.info("disk %s: an epoch is given up: %s", disk.name, why)
            return
        level, code, text = logging.WARNING, "epoch.given-up", f"an epoch is given up: {why}"
    elif event.kind is EventKind.INTENT_VOID:
        noted = "noted" if event.offset else "NOT noted: the state directory takes nothing"
        level, code = logging.ERROR, "intent.void"
        text = (
            f"the intent log cannot be kept: {why}; should the host die, all is compared ({noted})"
        )
    elif event.kind is EventKind.SYNC_FAILED:
        level, code, text = logging.ERROR, "image.sync-failed", f"syncing the image failed: {why}"
    else:
        return
    log.log(level, "disk %s: %s", disk.name, text)
    events.tell(code, disk.name, text, disk=disk.name)
