"""The machines that failovers run here, when another site asks for their disks.

What `vdiskfs.handovers` asks of failovers: `handovers.OwnMachines`.
"""

from __future__ import annotations

import logging

from vdiskfs.crash import hook
from vdiskfs.failover.failovers import Failover, Failovers
from vdiskfs.failover.states import Kind, State, Step, after

log = logging.getLogger(__name__)


class OwnMachines:
    """Stops them, and notes that their disks have gone. Trio thread only."""

    def __init__(self, failovers: Failovers, shutdown_s: float) -> None:
        """Take the mount's failovers, and how many seconds a guest has to turn itself off."""
        self._failovers = failovers
        self._shutdown_s = shutdown_s

    def _having(self, disk_id: str) -> Failover | None:
        for failover in self._failovers.all():
            if disk_id in failover.taken:
                return failover
        return None

    def _brought(self, disk_id: str) -> Failover | None:
        """Return the newest failback that has brought a disk here, with the machine on it."""
        for failover in reversed(self._failovers.all()):
            ran = failover.record.kind is Kind.FAILBACK and failover.machine is not None
            if ran and disk_id in (one.disk_id for one in failover.record.members):
                return failover
        return None

    def check_may_go(self, disk_id: str) -> None:
        """Raise StateError if a failover that has the disk does not replicate it."""
        failover = self._having(disk_id)
        if failover is not None:
            after(failover.record.name, failover.record.state, Step.HANDOVER)

    async def stop_for(self, disk_id: str) -> bool:
        """Stop the machine of a failover that has the disk; False: no failover has it.

        A guest that does not turn itself off in time is turned off: what it had synced is there.
        """
        failover = self._having(disk_id) or self._brought(disk_id)
        if failover is None:
            return False
        machine = failover.machine
        if machine is not None and not await machine.shut_down(self._shutdown_s):
            log.error("failover %s: machine %s did not turn itself off within %.0f s: it is ended",
                      failover.record.name, machine.machine.name, self._shutdown_s)  # fmt: skip
            await machine.end()
        return True

    async def handed(self, disk_id: str) -> None:
        """The disk was released: with the last one the failover has ended."""
        failover = self._having(disk_id)
        if failover is None:
            return
        disks = [one.disk for one in failover.taken.values()]
        if all(disk is not None and disk.line.handed for disk in disks):
            await self._failovers.write(failover, state=State.HANDED_OVER)
            hook("failover.handed")

    async def kept(self, disk_id: str) -> None:
        """The disk of a failover was not taken after all, or given back: it goes on here."""
        failover = self._having(disk_id)
        if failover is not None:
            await note_kept(self._failovers, failover)


async def note_kept(failovers: Failovers, failover: Failover) -> None:
    """Note that a failover whose disks were released has one that is this site's again.

    Otherwise it would be tidied up as one that has ended, with all that is written to it.
    """
    if failover.record.state is State.HANDED_OVER and any(
        one.is_ours for one in failover.taken.values()
    ):
        await failovers.write(failover, state=State.FAILBACK_READY)
        hook("failover.kept")
        log.info("failover %s: was not taken: it goes on here", failover.record.name)
