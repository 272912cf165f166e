"""What is told of failovers: kept before a step is answered, and told late rather than never.

A failover's record is durable before anything is told. A daemon that is killed in between, or
before the event is kept, leaves that to its successor, which compares the two.
"""

from __future__ import annotations

import trio

from vdiskfs.events import Events
from vdiskfs.failover.record import FailoverRecord

STATE, REMOVED = "failover.state", "failover.removed"


async def tell_made(events: Events, record: FailoverRecord) -> None:
    """Tell that there is a failover; kept on return, as far as the disk takes it."""
    disks = ", ".join(one.disk for one in record.members)
    await _tell_state(events, record, f"{record.state}: {record.kind} of {disks}")


async def tell_change(events: Events, before: FailoverRecord, record: FailoverRecord) -> None:
    """Tell what has become of a failover; its state is kept on return, as `tell_made`."""
    if record.health is not None and before.health != record.health:
        text = f"{record.point_names}: {record.health.detail}"
        code = "machine.health" if record.health.healthy else "machine.unhealthy"
        events.tell(code, record.name, text, disk=record.disk_names)
    if before.state is not record.state:
        await _tell_state(events, record, f"{before.state} -> {record.state}")


async def tell_removed(events: Events, record: FailoverRecord) -> None:
    """Tell that a failover is gone; kept on return, as `tell_made`."""
    text = f"removed: {record.notes}" if record.notes else "removed"
    events.tell(REMOVED, record.name, text, disk=record.disk_names)
    await events.wait_kept()


async def tell_missed(events: Events, record: FailoverRecord) -> None:
    """Tell the state of a failover that a daemon could not tell that was killed."""
    last = await trio.to_thread.run_sync(events.last_text, STATE, record.name)
    if last is not None and last.rpartition(" -> ")[2].partition(":")[0] != record.state:
        before = last.rpartition(" -> ")[2].partition(":")[0] or "?"
        await _tell_state(events, record, f"{before} -> {record.state}")


async def _tell_state(events: Events, record: FailoverRecord, text: str) -> None:
    events.tell(STATE, record.name, text, disk=record.disk_names)
    await events.wait_kept()
