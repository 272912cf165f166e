"""Machines that were stopped for a handover are started again where their disks come back.

That a machine was stopped is noted in the directory of each disk, so that it holds over a
restart. A machine is started once, and only when all its disks that are in this mount can be
written to: one that starts before meets errors. What fails is tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

import trio

from vdiskfs.disk import ProtectedDisk, Site
from vdiskfs.errors import DamagedError, VaultUnreachableError, VdiskfsError
from vdiskfs.events import Events
from vdiskfs.machines.vaulted import machine_of
from vdiskfs.protection import Protection
from vdiskfs.stopping import MachineStopper, forget_stopped, note_stopped, was_stopped

log = logging.getLogger(__name__)

FIRST_AGAIN_S = 30.0
LAST_AGAIN_S = 1800.0
"""Seconds until a machine that could not be started is tried again: the first time, at most."""

WAIT_AGAIN_S = FIRST_AGAIN_S
"""Seconds between two looks whether the other disks of a machine have come back."""


class Startable(Protocol):
    """The machines that failovers run here."""

    async def runs_on(self, disk_id: str) -> bool | None:
        """Say whether the machine of a failover runs on the disk; None: no failover has it."""

    async def start_for(self, disk_id: str) -> bool:
        """Start it again; False: not all of its disks are this site's yet."""


class StoppedMachines:
    """Knows which were stopped, and starts them. Trio thread only."""

    def __init__(
        self, site: Site, protection: Protection, machines: Startable, *,
        stopper: MachineStopper, shown: Callable[[ProtectedDisk], Path],
        users: Callable[[ProtectedDisk], Awaitable[str]], events: Events,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            site: where they run.
            protection: has its disks.
            machines: those of failovers.
            stopper: starts the host's own.
            shown: gives the path of a disk's image in the mount.
            users: says who has it open; empty: nobody.
            events: are told what was started, and what could not be.
        """
        self._site = site
        self._protection = protection
        self._machines = machines
        self._stopper = stopper
        self._shown = shown
        self._users = users
        self._events = events
        self._known: set[str] = set()
        self._stopped: set[str] = set()  # as a file of each disk says
        self._starting: set[str] = set()
        self._put_off: dict[str, tuple[float, float]] = {}  # until, seconds waited

    async def note(self, disk: ProtectedDisk) -> None:
        """Note that the machine on a disk is about to be stopped. Durable on return."""
        await trio.to_thread.run_sync(note_stopped, self._directory(disk))
        self._stopped.add(disk.disk_id)

    async def learn(self, disk: ProtectedDisk) -> None:
        """Look once whether an earlier run has stopped the machine on a disk."""
        if disk.disk_id not in self._known:
            self._known.add(disk.disk_id)
            if await trio.to_thread.run_sync(was_stopped, self._directory(disk)):
                self._stopped.add(disk.disk_id)

    def is_due(self, disk: ProtectedDisk) -> bool:
        """Say whether `start` has something to do for a disk."""
        until, _ = self._put_off.get(disk.disk_id, (0.0, 0.0))
        return (
            self._is_back(disk) and disk.disk_id not in self._starting
            and trio.current_time() >= until
        )  # fmt: skip

    def is_starting(self, disk: ProtectedDisk) -> bool:
        """Say whether the machine on a disk is being started now."""
        return disk.disk_id in self._starting

    async def start(self, disk: ProtectedDisk) -> None:
        """Start the machine on a disk, if all its disks are back."""
        self._starting.add(disk.disk_id)
        mine = {disk.disk_id}
        try:
            together = await self._together(disk)
            others = {one.disk_id for one in together} - mine
            if others & self._starting:
                return
            if missing := [one.name for one in together if not _is_whole(one)]:
                told = f"its machine waits until it has its other disks: {', '.join(missing)}"
                self._later(disk, told)
                return
            self._starting |= others
            mine |= others
            if not await self._start(disk, together):
                self._later(disk, "its machine waits until all its disks are this site's")
                return
            for one in together:
                if self._is_back(one):  # else it was stopped once more meanwhile
                    await self._forget(one)
        except VaultUnreachableError as error:
            self._later(disk, f"its machine waits for the vault: {error}")
        except (VdiskfsError, OSError) as error:
            self._later(disk, f"its machine cannot be started again: {error}", LAST_AGAIN_S)
        finally:
            self._starting -= mine

    def _later(self, disk: ProtectedDisk, why: str, most_s: float = WAIT_AGAIN_S) -> None:
        """Try again later; said the first time, and whenever the wait has grown."""
        _, waited = self._put_off.get(disk.disk_id, (0.0, FIRST_AGAIN_S / 2))
        wait_s = min(2 * waited, most_s)
        self._put_off[disk.disk_id] = (trio.current_time() + wait_s, wait_s)
        if wait_s != waited:
            log.warning("disk %s: %s", disk.name, why)
            self._tell("machine.stopped", disk, f"{why}; next try in {wait_s:.0f} s")

    async def _start(self, disk: ProtectedDisk, together: Sequence[ProtectedDisk]) -> bool:
        """Start a machine; return False where that is for later."""
        if not await trio.to_thread.run_sync(was_stopped, self._directory(disk)):
            return True  # it came home: whoever brought it has seen to its machine
        if await self._machines.runs_on(disk.disk_id) is not None:
            return await self._machines.start_for(disk.disk_id)
        if any([await self._users(one) for one in together]):
            log.info("disk %s: its machine runs already", disk.name)
        elif not self._stopper.can_start:
            told = "is this site's again; its machine was stopped: start it (no start_command)"
            self._tell("machine.stopped", disk, told)
        else:
            await self._stopper.start(together[0].name, str(self._shown(together[0])))
            self._tell("machine.started", disk, "its machine was started again")
        return True

    async def _together(self, disk: ProtectedDisk) -> list[ProtectedDisk]:
        """Return the disks here of the machine that a disk belongs to, as it has them."""
        try:
            machine = await machine_of(self._site.vault.store, disk.name)
        except DamagedError as error:
            log.warning("disk %s: whether its machine has more disks is not known: %s",
                        disk.name, error)  # fmt: skip
            machine = None
        if machine is None:
            return [disk]
        here = {one.name: one for one in self._protection.disks()}
        return [here[one.disk] for one in machine.disks if one.disk in here]

    async def _forget(self, disk: ProtectedDisk) -> None:
        self._stopped.discard(disk.disk_id)
        self._put_off.pop(disk.disk_id, None)
        await trio.to_thread.run_sync(forget_stopped, self._directory(disk))

    def _is_back(self, disk: ProtectedDisk) -> bool:
        """Say whether the machine on a disk was stopped, and may run here again."""
        return disk.disk_id in self._stopped and _is_whole(disk)

    def _directory(self, disk: ProtectedDisk) -> Path:
        return self._site.state.disk(disk.disk_id).directory

    def _tell(self, code: str, disk: ProtectedDisk, text: str) -> None:
        self._events.tell(code, disk.name, text, disk=disk.name)


def _is_whole(disk: ProtectedDisk) -> bool:
    """Say whether a disk is this site's, asked for by nobody, and takes writes."""
    line = disk.line
    ours = line.displaced is None and not line.handed and line.asked is None
    return ours and not disk.image.refuses
