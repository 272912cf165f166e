"""The jobs of one mount: what is said of them is noted without waiting, and written by a task.

A full or damaged disk is nobody's trouble but that of `Jobs.run`: what cannot be written is
tried again, and the jobs in memory are the ones that are shown. Trio thread only.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from vdiskfs.errors import NotFoundError, StateError, VdiskfsError
from vdiskfs.jobs.database import JobDatabase
from vdiskfs.jobs.record import RESUMED, Job, JobKind, JobState, job_document

log = logging.getLogger(__name__)

KEPT = 1000
"""Jobs that are kept."""

KEPT_OF_KIND = 16
"""Jobs of one kind and one disk that are kept."""

AGAIN_S = 10.0

_NOT_YET = "the disk to be taken up"


@dataclass(slots=True)
class _Live:
    """What is known of a job only while it runs here."""

    waits_for: str = ""
    progress: Callable[[], tuple[int, int] | None] = lambda: None
    cancel: Callable[[], Awaitable[None]] | None = None


class Jobs:
    """All jobs of a mount but those of failovers that are still there."""

    def __init__(self, state: Path) -> None:
        """Take the state directory."""
        self._database = JobDatabase(state)
        self._jobs: dict[str, Job] = {}
        self._live: dict[str, _Live] = {}
        self._unwritten: set[str] = set()
        self._news = trio.Event()
        self._failed = False
        self._disks: frozenset[str] | None = None
        self._is_read = False
        self._number = 0
        """The newest job's. Of jobs that cannot be read it is not known: then seconds of the clock,
        which no number comes near that was counted."""

    async def load(self) -> None:
        """Take up what an earlier daemon left: it goes on, or it is interrupted."""
        try:
            await self._read()
        except Exception as error:  # noqa: BLE001 (a mount starts whatever is the matter here)
            log.warning("jobs cannot be read: %s: %r", self._database.path, error)
            self._number = max(self._number, int(time.time()))
            self._news.set()

    async def _read(self) -> None:
        found, taken = await trio.to_thread.run_sync(self._database.read)
        self._is_read = True
        self._number = max(self._number, taken)
        self._take_up(found)

    def _take_up(self, found: Sequence[Job]) -> None:
        """Add what an earlier daemon left to the jobs that were begun since."""
        begun = self._jobs
        self._jobs = {job.id: job for job in found} | begun
        for job in found:
            if job.id in begun or not job.is_open:
                continue
            if self.open_job(job.kind, job.disk_id) != job:
                self.interrupt(job.id, "another one goes on in its place")
            elif job.kind in RESUMED:
                self.waits(job.id, _NOT_YET)
            else:
                self.interrupt(job.id, "the daemon ended while it ran")
        if self._disks is not None:
            self.disks_are(self._disks)

    def disks_are(self, disk_ids: Collection[str]) -> None:
        """The disks of this mount were taken up: no job goes on that waits for another one."""
        self._disks = frozenset(disk_ids)
        for job in list(self._jobs.values()):
            if job.is_open and job.kind in RESUMED and job.disk_id not in self._disks:
                live = self._live.get(job.id)
                if live is not None and live.waits_for == _NOT_YET:
                    self.interrupt(job.id, "the disk is not protected here any more")

    def disk_left(self, disk_id: str) -> None:
        """A disk was stopped: its jobs that go on keep nothing of it, and wait for it."""
        for kind in RESUMED:
            job = self.open_job(kind, disk_id)
            if job is not None:
                self._live[job.id] = _Live(_NOT_YET)

    # ---- what there is -----------------------------------------------------------------

    def all(self) -> list[Job]:
        """Return all jobs, the oldest first."""
        return list(self._jobs.values())

    def document(self, job: Job) -> dict[str, object]:
        """Return what scripts get of a job."""
        live = self._live.get(job.id) if job.is_open else None
        if live is None:
            return job_document(job)
        progress = None
        with contextlib.suppress(Exception):  # a disk that ends now: the other jobs are shown
            progress = live.progress()
        return job_document(job, live.waits_for, progress)

    def open_job(self, kind: JobKind, disk_id: str) -> Job | None:
        """Return the newest job of a kind that goes on for a disk."""
        found = [one for one in self._jobs.values()
                 if one.kind is kind and one.disk_id == disk_id and one.is_open]  # fmt: skip
        return found[-1] if found else None

    def find(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            NotFoundError: there is none of this id.
        """
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFoundError(f"there is no job {job_id} here", hint="vdiskfs job list") from None

    # ---- what becomes of one -------------------------------------------------------------

    def begin(
        self, kind: JobKind, disk: str, disk_id: str, *,
        progress: Callable[[], tuple[int, int] | None] = lambda: None,
        cancel: Callable[[], Awaitable[None]] | None = None,
    ) -> str:  # fmt: skip
        """Begin a job, or go on with the one of its kind that is open; return its id.

        Args:
            kind: what it is for.
            disk: the disk's name.
            disk_id: the disk's id; "": it is none yet.
            progress: gives bytes done and bytes in all, where that is known.
            cancel: what `cancel` calls; None: it cannot be cancelled.
        """
        job = self.open_job(kind, disk_id)
        if job is None:
            self._number += 1
            job_id = f"{disk_id[:8] or 'file'}-{self._number}"
            job = Job(job_id, self._number, kind, disk, disk_id, JobState.RUNNING, time.time_ns())
        self._live[job.id] = _Live("", progress, cancel)
        self._put(replace(job, state=JobState.RUNNING, disk=disk, error="", hint="", code=0))
        return job.id

    def waits(self, job_id: str, what: str) -> None:
        """Say what an open job waits for; empty: nothing. Not kept."""
        self._live.setdefault(job_id, _Live()).waits_for = what

    def step(self, job_id: str, step: str) -> None:
        """A step is done, if it was not before."""
        job = self._jobs[job_id]
        if not job.has_done(step):
            self._put(replace(job, steps=(*job.steps, (step, time.time_ns()))))

    def done(self, job_id: str, outcome: str) -> None:
        """It is done: one line says what came of it."""
        self._end(job_id, JobState.DONE, outcome=outcome, error="", hint="", code=0)

    def stands(self, job_id: str, error: VdiskfsError) -> None:
        """It failed, and will be tried again."""
        self._put(replace(
            self._jobs[job_id], state=JobState.FAILED, error=error.message,
            hint=error.hint or "", code=error.exit_code,
        ))  # fmt: skip

    def failed(self, job_id: str, error: VdiskfsError) -> None:
        """It failed for good."""
        self.stands(job_id, error)
        self._end(job_id, JobState.FAILED)

    def interrupt(self, job_id: str, why: str) -> None:
        """It was cut off, and does not go on."""
        self._end(job_id, JobState.INTERRUPTED, error=why, code=1)

    def ended_as(self, job_id: str, state: JobState, outcome: str) -> None:
        """It ended in another way."""
        self._end(job_id, state, outcome=outcome)

    def note(self, kind: JobKind, disk: str, disk_id: str, began_ns: int, outcome: str) -> None:
        """Keep a job that is over already."""
        job_id = self.begin(kind, disk, disk_id)
        self._put(replace(self._jobs[job_id], began_ns=began_ns))
        self.done(job_id, outcome)

    def keep(self, job: Job) -> None:
        """Keep a job that is over, and was a failover's; the same one again is the same one."""
        self._number += 1
        self._put(replace(job, number=self._number))

    async def cancel(self, job_id: str, *, dry_run: bool = False) -> Job:
        """End a job that can be ended; on return that is under way.

        Raises:
            NotFoundError: there is no such job.
            StateError: it is over, or cannot be cancelled.
        """
        job = self.find(job_id)
        if not job.is_open:
            raise StateError(f"job {job_id}: is over: {job.state}", hint="vdiskfs job show")
        live = self._live.get(job_id)
        if live is None or live.cancel is None:
            hint = {
                JobKind.PROTECT: f"vdiskfs disk pause {shlex.quote(job.disk)}, or disk unprotect"
            }
            raise StateError(
                f"job {job_id}: {job.kind} cannot be cancelled", hint=hint.get(job.kind, "")
            )
        if not dry_run:
            await live.cancel()
        return self._jobs[job_id]

    def _end(self, job_id: str, state: JobState, **changes: object) -> None:
        self._live.pop(job_id, None)
        job = self._jobs[job_id]
        if not job.is_open:
            return
        now = time.time_ns()
        self._put(replace(job, state=state, ended_ns=now, **changes))  # type: ignore[arg-type]

    def _put(self, job: Job) -> None:
        if self._jobs.get(job.id) == job:
            return
        is_new = job.id not in self._jobs
        self._jobs[job.id] = job
        self._unwritten.add(job.id)
        if is_new:
            self._forget_oldest()
        self._news.set()

    def _forget_oldest(self) -> None:
        """Let the oldest go that are over, beyond what is kept."""
        counts = Counter((one.kind, one.disk_id) for one in self._jobs.values())
        beyond = len(self._jobs) - KEPT
        for job in list(self._jobs.values()):
            key = job.kind, job.disk_id
            if job.is_open or not (counts[key] > KEPT_OF_KIND or beyond > 0):
                continue
            del self._jobs[job.id]
            self._unwritten.add(job.id)
            counts[key] -= 1
            beyond -= 1

    # ---- the database ------------------------------------------------------------------

    async def run(self) -> None:
        """Write what becomes of jobs until cancelled; what is said last is written then."""
        try:
            while True:
                await self._news.wait()
                self._news = trio.Event()
                await self._write()
                if self._failed:
                    await trio.sleep(AGAIN_S)
                    self._news.set()
        finally:
            with trio.CancelScope(shield=True):
                await self._write()

    async def _write(self) -> None:
        ids: frozenset[str] = frozenset()
        try:
            if not self._is_read:
                await self._read()
            ids = frozenset(self._unwritten)
            self._unwritten -= ids
            jobs = [self._jobs[one] for one in ids if one in self._jobs]
            gone = [one for one in ids if one not in self._jobs]
            if ids:
                await trio.to_thread.run_sync(self._database.write, jobs, gone)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is tried again)
            if not self._failed:
                log.warning("jobs are not kept for now: %s: %r", self._database.path, error)
            self._failed = True
            self._unwritten |= ids
        else:
            self._failed = False
