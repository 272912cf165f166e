"""The owner's side of a handover: another site asks for a disk, and this one lets it go.

In this order: the machine is stopped, nobody has the image open, it takes no more writes, all
that was ever written is sealed and stored, the line is ended by a fence, and only then is the
disk said to be released: nothing is lost. Each step can be done again; what cannot be done is
said in the request, and the disk goes on as before. vdiskfs-format(5), "Moves".
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from vdiskfs.catalog.moves import ASKED, REFUSED, RELEASED, STOPPING, answer
from vdiskfs.catalog.records import Handover
from vdiskfs.crash import hook
from vdiskfs.disk import ProtectedDisk, Site
from vdiskfs.errors import (
    ConflictError,
    LocalError,
    StateError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.events import Events
from vdiskfs.jobs import JobKind, Jobs
from vdiskfs.protection import Protection
from vdiskfs.restarting import Startable, StoppedMachines
from vdiskfs.state import users_of
from vdiskfs.stopping import MachineStopper

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_S = 0.5
"""Seconds between two looks at who uses a disk that is to be let go."""

AGAIN_S = 2.0
"""Seconds between tries while the vault is away."""


class OwnMachines(Startable, Protocol):
    """The machines that failovers run here."""

    async def stop_for(self, disk_id: str) -> None:
        """Stop the machine of the failover that has the disk."""

    async def handed(self, disk_id: str) -> None:
        """The disk of a failover was released: it goes home."""

    async def kept(self, disk_id: str) -> None:
        """The disk of a failover is not let go after all."""

    def check_may_go(self, disk_id: str) -> None:
        """Raise StateError if a failover that has the disk is not replicated."""


class Handovers:
    """Answers requests while its `run` runs. Trio thread only."""

    def __init__(
        self, site: Site, protection: Protection, machines: OwnMachines, *,
        stopper: MachineStopper,
        mountpoint: Path, events: Events, jobs: Jobs,
    ) -> None:  # fmt: skip
        """Prepare."""
        self._site = site
        self._protection = protection
        self._machines = machines
        self._stopper = stopper
        self._mountpoint = mountpoint
        self._events = events
        self._jobs = jobs
        self._under_way: set[str] = set()
        self._stopped = StoppedMachines(
            site, protection, machines, stopper=stopper, shown=self._shown, users=self._users,
            events=events,
        )  # fmt: skip

    async def run(self) -> None:
        """Look for requests, and carry them out, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                for disk in self._protection.disks():
                    await self._stopped.learn(disk)
                    asked = disk.line.asked
                    if asked is not None and self._is_for_us(disk, asked):
                        self._under_way.add(disk.disk_id)
                        nursery.start_soon(self._hand_over, disk, asked)
                    elif disk.disk_id not in self._under_way and self._stopped.is_due(disk):
                        nursery.start_soon(self._stopped.start, disk)
                await trio.sleep(LOOK_S)

    def _is_for_us(self, disk: ProtectedDisk, asked: Handover) -> bool:
        mine = disk.line.displaced is None or disk.line.handed
        return (
            mine and asked.step in (ASKED, STOPPING) and disk.disk_id not in self._under_way
            and asked.writer != self._site.state.writer_id and not self._stopped.is_starting(disk)
        )  # fmt: skip

    async def _hand_over(self, disk: ProtectedDisk, asked: Handover) -> None:
        job = self._jobs.begin(JobKind.HANDOVER, disk.name, disk.disk_id)
        try:
            log.warning("disk %s: site %s asks for it", disk.name, asked.site)
            self._tell_event("disk.asked", disk, f"site {asked.site} asks for it")
            await self._let_go(disk, asked, job)
            self._jobs.done(job, f"handed over to site {asked.site}")
        except ConflictError as error:
            self._jobs.failed(job, error)
            log.warning("disk %s: is kept: %s", disk.name, error)
            await self._keep(disk)
        except (VdiskfsError, OSError) as error:
            log.error("disk %s: cannot be handed over: %s", disk.name, error)
            failure = error if isinstance(error, VdiskfsError) else LocalError(str(error))
            self._jobs.failed(job, failure)
            self._tell_event("disk.kept", disk, f"cannot be handed over: {error}")
            await self._keep(disk)
            await self._tell(disk, asked, REFUSED, str(error))
        finally:
            self._jobs.interrupt(job, "the daemon ended while it ran")  # if it is still open
            # Looked at anew by the next heartbeat that has a reason to.
            disk.line.asked = None
            self._under_way.discard(disk.disk_id)

    def _tell_event(self, code: str, disk: ProtectedDisk, text: str) -> None:
        self._events.tell(code, disk.name, text, disk=disk.name)

    async def _let_go(self, disk: ProtectedDisk, asked: Handover, job: str) -> None:
        self._machines.check_may_go(disk.disk_id)
        if not disk.line.handed:
            # Before anything is stopped for it.
            disk.replicator.check_not_paused()
            _check_whole(disk)
            await self._tell(disk, asked, STOPPING, "stops what runs on it")
            await self.stop_machine(disk, "handover")
            await self._wait_unused(disk, asked, job)
            self._jobs.step(job, "unused")
            hook("handover.unused")
            await self._ship(disk, asked)
            self._jobs.step(job, "shipped")
        await self._patiently(lambda: self._release(disk, asked))
        self._jobs.step(job, "released")
        hook("handover.fenced")
        await self._machines.handed(disk.disk_id)
        await self._tell(disk, asked, RELEASED, "")
        disk.health.displaced(f"handed over to site {asked.site} since {asked.asked}", handed=True)
        log.warning("disk %s: handed over to site %s", disk.name, asked.site)
        self._tell_event("disk.handed", disk, f"handed over to site {asked.site}")
        await self._events.wait_kept()

    async def stop_machine(self, disk: ProtectedDisk, reason: str) -> None:
        """Stop the machine on a disk: a failover's, or the host's own as it has set.

        Args:
            disk: one of this mount.
            reason: ``handover`` or ``displaced``.

        Raises:
            VdiskfsError: it cannot be stopped.
        """
        runs = await self._machines.runs_on(disk.disk_id)
        if runs is False and await self._users(disk):
            runs = None  # it is not the machine that we know of: the host's own
        if runs if runs is not None else await self._users(disk):
            await self._stopped.note(disk)
        if runs is not None:
            await self._machines.stop_for(disk.disk_id)
        else:
            await self._stopper.stop(disk.name, str(self._shown(disk)), reason)

    def _shown(self, disk: ProtectedDisk) -> Path:
        """Return the path of the disk's image in the mount."""
        path = disk.file.path
        inside = path.startswith("failovers/") and disk in self._protection.adopted
        return self._mountpoint / path if inside else self._mountpoint / "disks" / path

    async def _wait_unused(self, disk: ProtectedDisk, asked: Handover, job: str) -> None:
        """Wait until no program has the image open, and let none open it to write."""
        said = ""
        while True:
            who = await self._users(disk)
            if not who:
                disk.refuse_writes(True)
                if not (who := await self._users(disk)):
                    self._jobs.waits(job, "")
                    return
                disk.refuse_writes(False)
            if who != said:
                said = who
                self._jobs.waits(job, who)
                await self._tell(disk, asked, STOPPING, f"waits for {who}")
            await trio.sleep(LOOK_S)
            record = await self._patiently(lambda: self._site.vault.disk(disk.disk_id))
            if record.handover is None or record.handover.id != asked.id:
                raise ConflictError(f"disk {disk.name}: the request was withdrawn")

    async def _users(self, disk: ProtectedDisk) -> str:
        """Say who has the image open; empty: nobody."""
        users = await trio.to_thread.run_sync(users_of, str(self._shown(disk)))
        if users:
            return ", ".join(str(one) for one in users[:3])
        return "a program that has it open" if disk.file.is_open else ""

    async def _ship(self, disk: ProtectedDisk, asked: Handover) -> None:
        """Have all stored that was ever written."""
        replicator = disk.replicator
        for _ in range(10):
            _check_whole(disk)
            waits = f"ships the last {replicator.dirty_bytes() + replicator.spooled_bytes} bytes"
            await self._tell(disk, asked, STOPPING, waits)
            await replicator.seal_if_changed()
            await replicator.wait_shipped()
            if not replicator.live.counts().changed:
                _check_whole(disk)  # what waited may have been given back
                return
        raise StateError(f"disk {disk.name}: is still being written to")

    async def _release(self, disk: ProtectedDisk, asked: Handover) -> None:
        """End the line. Its group may have sealed it since all was stored: that is stored, too."""
        while True:
            if not disk.line.handed:
                # Not while it is held: what cannot be stored any more is given back then.
                await disk.replicator.wait_shipped()
            async with disk.replicator.hold():
                if not disk.line.handed:
                    if disk.replicator.spooled_bytes:
                        continue
                    _check_whole(disk)
                await disk.line.release(asked.id)
                return

    async def _keep(self, disk: ProtectedDisk) -> None:
        """Go on as before."""
        try:
            await disk.line.keep()
            await self._machines.kept(disk.disk_id)
        except (VdiskfsError, OSError) as error:
            log.error("disk %s: %s", disk.name, error)
            return
        if disk.line.displaced is None and not disk.line.handed:
            disk.refuse_writes(False)

    async def _tell(self, disk: ProtectedDisk, asked: Handover, step: str, said: str) -> None:
        await self._patiently(lambda: answer(self._site.vault, disk.disk_id, asked.id, step, said))

    async def _patiently(self, act: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await act()
            except VaultUnreachableError as error:
                log.info("a handover waits for the vault: %s", error)
                await trio.sleep(max(AGAIN_S, error.retry_after_s or 0.0))


def _check_whole(disk: ProtectedDisk) -> None:
    """Check that the vault can have all of the disk soon."""
    suspects = disk.replicator.suspects
    if suspects.needed:
        raise StateError(
            f"disk {disk.name}: is in state {disk.health.shown_state}: {suspects.reason}",
            hint=f"let that finish: vdiskfs disk resync {shlex.quote(disk.name)} --now",
        )
