"""The machine on a failover's copies: started, judged, found again, ended.

It runs in its own directory of the failover and outlives the daemon. What was started is
in the failover's record, so that nothing of the vault is needed to find it again. Trio thread
only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from vdiskfs.config import MachinesConfig
from vdiskfs.errors import VdiskfsError
from vdiskfs.failover.record import Health
from vdiskfs.machines import Attach, Isolated, Machine, find_running, runner_for, wait_healthy

log = logging.getLogger(__name__)

DIRECTORY = "machine"


class FailoverMachine:
    """The machine of one failover."""

    def __init__(self, machine: Machine, failover: Path, host: MachinesConfig) -> None:
        """Prepare; ``failover`` is the failover's directory."""
        self.machine = machine
        self.directory = failover / DIRECTORY
        self._host = host

    async def start(self, disks: Mapping[str, Path], network: Attach) -> None:
        """Start it on these images; it runs on return.

        Raises:
            VdiskfsError: it cannot be started; nothing runs.
        """
        runner = runner_for(self.machine.runner, self._host)
        await runner.start(self.machine, disks, self.directory, network)
        how = "isolated" if isinstance(network, Isolated) else "on this host's networks"
        log.info("machine %s: started, %s", self.machine.name, how)

    async def health(self) -> Health:
        """Wait until it passes its check, or fails."""
        try:
            running = await find_running(self.directory, self._host)
            if running is None:
                return Health(False, 0.0, "it does not run any more")
            found = await wait_healthy(running, self.machine, self._host)
        except VdiskfsError as error:
            return Health(False, 0.0, str(error))
        return Health(found.healthy, round(found.seconds, 3), found.detail)

    async def state(self) -> str:
        """Say how it does now: ``running``, ``down``, or why it stands still."""
        try:
            running = await find_running(self.directory, self._host)
            return "down" if running is None else await running.state()
        except VdiskfsError as error:
            return str(error)

    async def shut_down(self, timeout_s: float) -> bool:
        """Ask its guest to turn itself off; tell whether nothing of it runs any more."""
        running = await find_running(self.directory, self._host)
        return running is None or await running.shut_down(timeout_s)

    async def end(self) -> None:
        """End it as a power cut does: nothing of it runs on return.

        Raises:
            VdiskfsError: that cannot be done, or not be known.
        """
        running = await find_running(self.directory, self._host)
        if running is not None:
            await running.kill()
            log.info("machine %s: ended", self.machine.name)
