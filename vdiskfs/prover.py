"""Points proven in the background: the newest of each disk, every so often, at idle priority.

It also learns what somebody else has proven: how old a disk's newest proven point is stands in
its status.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import trio

from vdiskfs.catalog import DiskLog, Point
from vdiskfs.catalog.proofs import CHECKED, FAIL, HASHED, INCONCLUSIVE, PASS, Proof
from vdiskfs.config import Config
from vdiskfs.disk import ProtectedDisk, Site
from vdiskfs.errors import DamagedError, LocalError, NotFoundError, VdiskfsError
from vdiskfs.events import Events
from vdiskfs.jobs import JobKind, Jobs, JobState, Progress
from vdiskfs.proving import Outcome, check_image, let_go, prove_point, verdict
from vdiskfs.units import NS

log = logging.getLogger(__name__)

LOOK_S = 300.0
"""Seconds between two looks at what is proven, and at what is due."""

REST = 4.0
"""Seconds of rest for each second of work."""

COPY = "proof-auto-"


class Copies(Protocol):
    """Makes writable copies of points, as a test failover without a machine does."""

    async def make(self, disk: str, epoch: int, name: str) -> Path:
        """Make one; return its image in the mount."""

    async def remove(self, name: str) -> None:
        """Throw it away; nothing where it is gone."""

    def left(self) -> Mapping[str, Sequence[Path]]:
        """Return the names of all that there are, with the paths of their images."""


class Prover:
    """Looks and proves while its `run` runs. Trio thread only."""

    def __init__(
        self, site: Site, disks: Callable[[], Sequence[ProtectedDisk]], copies: Copies, *,
        options: Config, events: Events, jobs: Jobs,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            site: who proves.
            disks: gives those protected here.
            copies: of points, for file systems to be checked.
            options: how often, and how far.
            events: are told of what fails.
            jobs: keep what was done.
        """
        self._disks = disks
        self._copies = copies
        self._site = site.name
        self._interval_s = options.prove_interval_s
        self._level = options.prove_level
        self._events = events
        self._jobs = jobs
        self._failed: dict[str, float] = {}
        self._at_work: trio.CancelScope | None = None
        self._reads: tuple[str, int, int] | None = None
        self._idle = trio.Condition()
        self._rests = False

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self._tidy_up()
            for disk in self._disks():
                try:
                    await self._look(disk)
                except VdiskfsError as error:
                    log.info("disk %s: nothing can be proven now: %s", disk.name, error)
            await trio.sleep(min(LOOK_S, self._interval_s or LOOK_S))

    async def rest(self) -> None:
        """Give up the proof that is under way, and begin none until `go_on`."""
        self._rests = True
        async with self._idle:
            while self._at_work is not None:
                self._at_work.cancel()
                await self._idle.wait()

    def in_use(self) -> list[tuple[str, int, int]]:
        """Return the point that is read now (disk, generation, epoch): it is not to go."""
        return [] if self._reads is None else [self._reads]

    def go_on(self) -> None:
        """Prove again: the mount goes on."""
        self._rests = False

    async def _tidy_up(self) -> None:
        """Throw away what a run that was killed has left; its tools may be at work still."""
        for name, images in self._copies.left().items():
            if name.startswith(COPY):
                try:
                    for image in images:
                        await let_go(image)
                    await self._copies.remove(name)
                except VdiskfsError as error:
                    log.warning("%s", error)

    async def _look(self, disk: ProtectedDisk) -> None:
        points = disk.line.points
        disk.proven_ns = settled_ns = await _proven_ns(points)
        if self._rests or disk.line.displaced is not None or not self._interval_s:
            return
        if self._level != HASHED:  # what was only read back, by hand say, does not count
            settled_ns = await _proven_ns(points, self._level)
        if not self._is_due(disk, settled_ns):
            return
        try:
            newest = await points.find("latest")
        except NotFoundError:
            return
        if settled_ns is None or newest.time_ns > settled_ns:
            await self._prove(disk, newest)

    def _is_due(self, disk: ProtectedDisk, settled_ns: int | None) -> bool:
        ages = [(time.time_ns() - settled_ns) / NS] if settled_ns is not None else []
        if disk.disk_id in self._failed:
            ages.append(trio.current_time() - self._failed[disk.disk_id])
        return not ages or min(ages) >= self._interval_s

    async def _prove(self, disk: ProtectedDisk, point: Point) -> None:
        """Prove a point, as a job."""
        if self._rests:
            return
        progress = Progress()
        given_up = trio.CancelScope()

        async def give_up() -> None:
            given_up.cancel()

        job_id = self._jobs.begin(
            JobKind.PROVE, disk.name, disk.disk_id, progress=progress.shown, cancel=give_up,
        )  # fmt: skip
        proof: Proof | None = None
        self._at_work = given_up
        self._reads = (disk.disk_id, point.generation, point.epoch)
        try:
            with given_up:
                proof = await self._prove_as(disk, point, job_id, progress)
        except VdiskfsError as error:
            self._failed[disk.disk_id] = trio.current_time()
            self._jobs.failed(job_id, error)
            raise
        finally:
            self._reads = None
            with trio.CancelScope(shield=True):
                async with self._idle:
                    self._at_work = None
                    self._idle.notify_all()
        if proof is None:
            self._failed[disk.disk_id] = trio.current_time()
            self._jobs.ended_as(
                job_id, JobState.CANCELLED, "given up, or the mount ended; the next is due as ever"
            )
            return
        why = f": {proof.reason}" if proof.reason else ""
        text = f"point #{point.epoch} of {point.time}: {proof.outcome}{why}"
        if proof.outcome == FAIL:
            self._jobs.failed(job_id, DamagedError(text, hint="vdiskfs vault check"))
        else:
            self._jobs.done(job_id, text)

    async def _prove_as(
        self, disk: ProtectedDisk, point: Point, job_id: str, progress: Progress
    ) -> Proof:
        def noted(proof: Proof) -> None:
            self._note(disk, point, proof)
            self._jobs.step(job_id, proof.level)

        async def check() -> Outcome:
            try:
                return await self._check(disk, point)
            except LocalError as error:
                return INCONCLUSIVE, str(error)

        proof = await prove_point(
            disk.line.points, point, site=self._site, progress=progress.tell, rest=REST,
            check=check if self._level == CHECKED else None, noted=noted,
        )  # fmt: skip
        if proof.outcome == PASS:
            disk.proven_ns = point.time_ns
        return proof

    async def _check(self, disk: ProtectedDisk, point: Point) -> Outcome:
        name = f"{COPY}{secrets.token_hex(4)}"
        try:
            return verdict(await check_image(await self._copies.make(disk.name, point.epoch, name)))
        finally:
            with trio.CancelScope(shield=True):
                await self._copies.remove(name)

    def _note(self, disk: ProtectedDisk, point: Point, proof: Proof) -> None:
        """Say what came of a level."""
        text = f"point {disk.name}@#{point.epoch} of {point.time}: {proof.level}: {proof.outcome}"
        if proof.outcome == PASS:
            log.info("%s (%.0f s)", text, proof.seconds)
            return
        self._failed[disk.disk_id] = trio.current_time()
        log.error("%s: %s", text, proof.reason)
        code = "proof.failed" if proof.outcome == FAIL else "proof.inconclusive"
        told = f"{proof.level}: {proof.outcome}: #{point.epoch}: {proof.reason}"
        self._events.tell(code, disk.name, told, disk=disk.name)


async def _proven_ns(points: DiskLog, level: str = HASHED) -> int | None:
    """Return the time of the newest point that is proven, and settled at a level."""
    try:
        return (await points.find_proven(level)).time_ns
    except NotFoundError:
        return None
