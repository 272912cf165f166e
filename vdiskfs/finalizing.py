"""What is done once the first replication of a disk has ended: is it all there, for a failover?

The machine's definition is looked for in the vault and read back; the newest point, whose chain
holds the first one, is opened as a failover would open it, and the beginning of its data is read
back and verified. What comes of it names the command that tries it: a test failover.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable
from functools import partial

from vdiskfs.catalog import Point
from vdiskfs.catalog.leases import leased
from vdiskfs.catalog.proofs import FAIL, HASHED, PASS, STORED
from vdiskfs.disk import ProtectedDisk
from vdiskfs.errors import DamagedError, FormatError
from vdiskfs.events import Events
from vdiskfs.jobs import Progress
from vdiskfs.machines import machine_of
from vdiskfs.proving import keep_proof, read_back
from vdiskfs.units import PAGE_SIZE, format_size

log = logging.getLogger(__name__)

READ_LIMIT = 64 << 20
"""Bytes of data that are read back."""


class Finalizer:
    """Finalizes disks, each by itself. Trio thread only."""

    def __init__(self, events: Events) -> None:
        """Take who is told."""
        self._events = events

    async def run(
        self, disk: ProtectedDisk, progress: Progress, done: Callable[[str], None]
    ) -> str:
        """Do all steps for a disk; return what came of it, in one line.

        Args:
            disk: its first point is in the vault.
            progress: is kept up to date.
            done: is told of each step.

        Raises:
            DamagedError: the point, or the machine's definition, is not what was stored.
            VdiskfsError: the vault does not answer, or refuses.
        """
        machine = await self._machine(disk)
        done("machine")
        point, read, whole = await self._read_back(disk, progress)
        done("read-back")
        size = format_size(read)
        how = f"all {size} of data" if whole else f"the first {size} of its data"
        command = f"vdiskfs failover test {shlex.quote(disk.name)}"
        outcome = (
            f"point #{point.epoch} of {point.time}: {how} read back and verified; {machine}; "
            f"try it: {command}"
        )
        self._events.tell(
            "disk.finalized", disk.name, outcome, disk=disk.name, todo=command,
            health=str(disk.health.level),
        )  # fmt: skip
        log.info("disk %s: finalized: %s", disk.name, outcome)
        return outcome

    async def _machine(self, disk: ProtectedDisk) -> str:
        """Read the machine's definition back; say what it has."""
        try:
            machine = await machine_of(disk.site.vault.store, disk.name)
        except FormatError as error:
            raise FormatError(
                error.message, hint="vdiskfs machine set NAME --file FILE, then: "
                f"vdiskfs disk retry {shlex.quote(disk.name)}"
            ) from None  # fmt: skip
        if machine is None:
            return (
                "no machine in the vault has it: vdiskfs machine set NAME --file FILE, so that a "
                "failover starts one"
            )
        networks = ", ".join(one.name for one in machine.networks) or "none"
        text = f"machine {machine.name} is in the vault (networks: {networks})"
        others = [one.disk for one in machine.disks if one.disk != disk.name]
        known: set[str] = set()
        if others:
            found, unreadable = await disk.site.vault.read_disks()
            known = {one.name for one in found} | {one.name for one in unreadable}
        missing = [one for one in others if one not in known]
        return f"{text}, but not its disk {missing[0]}" if missing else text

    async def _read_back(
        self, disk: ProtectedDisk, progress: Progress
    ) -> tuple[Point, int, bool]:  # fmt: skip
        """Read the newest point back, up to `READ_LIMIT`, and note the proof."""
        began = time.monotonic()
        point = await disk.points.find("latest")
        keep = partial(keep_proof, disk.points, point, site=disk.site.name, began=began)
        record = disk.points.record
        try:
            async with (
                leased(disk.site.vault, [(record, point)], "finalize"),
                await disk.points.open(point) as reader,
            ):
                read = await read_back(reader, progress.tell, limit=READ_LIMIT)
        except DamagedError as error:
            await keep(HASHED, (FAIL, str(error)), read=0)
            word = shlex.quote(disk.name)
            raise DamagedError(
                f"point {disk.name}@#{point.epoch} cannot be read back: {error.message}",
                hint=f"vdiskfs vault check; vdiskfs disk resync {word} --now; then: "
                f"vdiskfs disk retry {word}",
            ) from error
        await keep(STORED, (PASS, ""), read=read)
        return point, read, progress.done == progress.total


def pass_progress(disk: ProtectedDisk) -> tuple[int, int] | None:
    """Return the bytes that a pass has looked at, and all that it has to."""
    if not disk.started:
        return None
    replicator = disk.replicator
    done = replicator.pass_.done_pages * PAGE_SIZE
    return done, done + replicator.live.counts().suspect_pages * PAGE_SIZE
