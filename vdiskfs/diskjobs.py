"""The jobs of disks, beside replication and never in it: enabled, finalized, resynchronized.

`DiskJobs.follow` runs with each disk. It looks at what its health says and keeps a record of
what goes on; the only thing that it does itself is to finalize a disk once. A daemon that takes
the disk up later goes on with the jobs that were open. Trio thread only.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Callable
from functools import partial

import trio

from vdiskfs.disk import ProtectedDisk
from vdiskfs.errors import LocalError, VaultUnreachableError, VdiskfsError
from vdiskfs.events import Events
from vdiskfs.finalizing import Finalizer, pass_progress
from vdiskfs.health import State
from vdiskfs.jobs import JobKind, Jobs, JobState, Progress
from vdiskfs.units import PAGE_SIZE, format_size, format_time

log = logging.getLogger(__name__)

AGAIN_S = 5.0
"""Seconds before following a disk is begun again, after a mistake of ours."""

QUIET_TRIES = 3
"""A vault that is away so often, seconds apart, is a failure of finalize."""

_LONGEST_LOOK_S = 1.0


class DiskJobs:
    """Keeps the jobs of the disks of one mount."""

    def __init__(self, jobs: Jobs, events: Events) -> None:
        """Take the mount's jobs, and who is told of what comes of them."""
        self._jobs = jobs
        self._finalizer = Finalizer(events)

    async def follow(self, disk: ProtectedDisk) -> None:
        """Follow a disk until it is stopped. Whatever is wrong here, it replicates on."""
        try:
            while True:
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._first, disk)
                        nursery.start_soon(self._resyncs, disk)
                except Exception:
                    log.exception("disk %s: its jobs are not followed", disk.name)
                await trio.sleep(AGAIN_S)
        finally:
            if disk.health.state is State.RETIRED:
                self._end_open(disk)
            self._jobs.disk_left(disk.disk_id)

    def refused(self, path: str, error: VdiskfsError) -> None:
        """Keep a job of a file that was to become a disk, and why it could not: it has ended."""
        job_id = self._jobs.begin(JobKind.PROTECT, path, "")
        self._jobs.failed(job_id, error)

    def _end_open(self, disk: ProtectedDisk) -> None:
        for kind in JobKind:
            job = self._jobs.open_job(kind, disk.disk_id)
            if job is not None:
                self._jobs.ended_as(
                    job.id, JobState.CANCELLED, "the disk is not protected any more"
                )

    # ---- the first replication -------------------------------------------------------------

    async def _first(self, disk: ProtectedDisk) -> None:
        """Note the first replication of a disk, then finalize it; nothing where that is done."""
        if not disk.health.finalizing:
            return
        replicator = disk.replicator
        if not replicator.stored.epoch or self._jobs.open_job(JobKind.PROTECT, disk.disk_id):
            job_id = self._jobs.begin(
                JobKind.PROTECT, disk.name, disk.disk_id, progress=partial(pass_progress, disk)
            )
            self._jobs.step(job_id, "enrolled")
            while not (replicator.stored.epoch or replicator.end.epoch):
                await disk.health.wait_moved()
            self._jobs.step(job_id, "replicated")
            self._jobs.waits(job_id, "the first point to be in the vault")
            await _until(lambda: replicator.stored.epoch > 0)
            self._jobs.step(job_id, "stored")
            stored = replicator.stored
            self._jobs.done(
                job_id, f"point #{stored.epoch} of {format_time(stored.time_ns)} is in the vault"
            )
        await _until(lambda: replicator.stored.epoch > 0)
        await self._finalize(disk)

    async def _finalize(self, disk: ProtectedDisk) -> None:
        note = disk.site.state.disk(disk.disk_id).unfinished
        health, silences, failures = disk.health, 0, 0
        given_up = trio.CancelScope()

        async def give_up() -> None:
            given_up.cancel()

        with given_up:
            while True:
                if disk.line.displaced is not None:
                    self._leave(disk)
                    return
                progress = Progress()
                job_id = self._jobs.begin(
                    JobKind.FINALIZE, disk.name, disk.disk_id, progress=progress.shown,
                    cancel=give_up,
                )  # fmt: skip
                error = await self._try(disk, job_id, progress)
                if error is None:
                    break
                if isinstance(error, VaultUnreachableError) and silences < QUIET_TRIES:
                    self._jobs.waits(job_id, str(error))
                    await trio.sleep(AGAIN_S * 2**silences)
                    silences += 1
                else:
                    log.error("disk %s: cannot be finalized: %s", disk.name, error)
                    again = (
                        "it is tried again by itself; vdiskfs disk retry "
                        f"{shlex.quote(disk.name)} at once"
                    )
                    health.unfinished = f"{error}; {again}"
                    self._jobs.stands(job_id, error)
                    await health.wait_retry(failures)
                    failures += 1
        if given_up.cancelled_caught:
            self._jobs.ended_as(job_id, JobState.CANCELLED, "asked for; the disk is not looked at")
        health.finalizing, health.unfinished = False, None
        await trio.to_thread.run_sync(partial(note.unlink, missing_ok=True))

    def _leave(self, disk: ProtectedDisk) -> None:
        """Do not finalize a disk that another site has by now; the next start looks again."""
        job = self._jobs.open_job(JobKind.FINALIZE, disk.disk_id)
        if job is not None:
            self._jobs.ended_as(job.id, JobState.CANCELLED, "another site has the disk")
        disk.health.finalizing, disk.health.unfinished = False, None

    async def _try(
        self, disk: ProtectedDisk, job_id: str, progress: Progress
    ) -> VdiskfsError | None:  # fmt: skip
        """Try once to finalize a disk; return why it failed."""
        try:
            outcome = await self._finalizer.run(disk, progress, partial(self._jobs.step, job_id))
        except VdiskfsError as error:
            return error
        except OSError as error:
            return LocalError(str(error))
        except Exception as error:
            # Whatever it is, it is tried again like the rest, and the disk replicates on.
            log.exception("disk %s: finalizing failed", disk.name)
            return VdiskfsError(f"it failed: {error!r}", hint="see the daemon's log")
        self._jobs.done(job_id, outcome)
        return None

    # ---- resynchronizations ----------------------------------------------------------------

    async def _resyncs(self, disk: ProtectedDisk) -> None:
        """Note each resynchronization of a disk, from its beginning to its end."""
        while True:
            # What it waits for, and that its notes are gone, nobody tells.
            with trio.move_on_after(_LONGEST_LOOK_S if self._look(disk) else math.inf):
                await disk.health.wait_moved()

    def _look(self, disk: ProtectedDisk) -> bool:
        """Look once; return whether one is open that does not run."""
        state, suspects = disk.health.state, disk.replicator.suspects
        if state is State.RESYNCING:
            job_id = self._jobs.begin(
                JobKind.RESYNC, disk.name, disk.disk_id, progress=partial(pass_progress, disk),
                cancel=disk.replicator.cancel_resync,
            )  # fmt: skip
            self._jobs.waits(job_id, "")
            return False
        job = self._jobs.open_job(JobKind.RESYNC, disk.disk_id)
        if job is None:
            return False
        if state is State.RESYNC_REQUIRED and suspects.resync.cancelled:
            again = f"held back; vdiskfs disk resync {shlex.quote(disk.name)} --now goes on"
            self._jobs.ended_as(job.id, JobState.CANCELLED, again)
        elif state is State.RESYNC_REQUIRED:
            self._jobs.waits(job.id, suspects.reason)
        elif not suspects.needed:
            pass_ = disk.replicator.pass_
            looked = format_size(pass_.done_pages * PAGE_SIZE)
            differed = format_size(pass_.sent_pages * PAGE_SIZE)
            self._jobs.done(job.id, f"{looked} compared, {differed} differed and were sent")
        return True


async def _until(holds: Callable[[], bool]) -> None:
    """Wait until something holds that nobody tells of; soon is what is expected."""
    wait_s = 0.01
    while not holds():
        await trio.sleep(wait_s)
        wait_s = min(_LONGEST_LOOK_S, 2 * wait_s)
