"""The machines that failovers run here, when another site asks for their disks.

What `vdiskfs.handovers` asks of failovers: `handovers.OwnMachines`.
"""

from __future__ import annotations

import logging

from vdiskfs.config import MachinesConfig
from vdiskfs.crash import hook
from vdiskfs.failover.failovers import Failover, Failovers
from vdiskfs.failover.states import Kind, State, Step, after
from vdiskfs.machines import Mapped

log = logging.getLogger(__name__)


class OwnMachines:
    """Stops them, and notes that their disks have gone. Trio thread only."""

    def __init__(self, failovers: Failovers, host: MachinesConfig) -> None:
        """Take the mount's failovers, and what this host allows machines."""
        self._failovers = failovers
        self._shutdown_s = host.shutdown_s
        self._networks = Mapped(host.networks)

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

    async def runs_on(self, disk_id: str) -> bool | None:
        """Say whether the machine of a failover runs on the disk; None: no failover has it."""
        failover = self._having(disk_id) or self._brought(disk_id)
        if failover is None:
            return None
        return failover.machine is not None and await failover.machine.state() != "down"

    async def start_for(self, disk_id: str) -> bool:
        """Start it again; False: not all of its disks are this site's yet.

        Raises:
            VdiskfsError: as `Failovers.start_machine`.
        """
        failover = self._having(disk_id) or self._brought(disk_id)
        if failover is None or any(not one.is_ours for one in failover.taken.values()):
            return False
        if failover.machine is not None:
            await self._failovers.ensure_machine(failover, self._networks)
        return True

    async def stop_for(self, disk_id: str) -> None:
        """Stop the machine of the failover that has the disk.

        A guest that does not turn itself off in time is turned off: what it had synced is there.
        """
        failover = self._having(disk_id) or self._brought(disk_id)
        machine = None if failover is None else failover.machine
        if (
            failover is not None
            and machine is not None
            and not await machine.shut_down(self._shutdown_s)
        ):
            log.error("failover %s: machine %s did not turn itself off within %.0f s: it is ended",
                      failover.record.name, machine.machine.name, self._shutdown_s)  # fmt: skip
            await machine.end()

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
