"""What the control socket offers of jobs: those of disks, and those of failovers, as one list."""

from __future__ import annotations

from vdiskfs.errors import StateError
from vdiskfs.failover import Failovers, job_document
from vdiskfs.jobs import Jobs
from vdiskfs.requests import Document


class JobControl:
    """The jobs of one mount, as scripts see them: `jobapi.Jobs`."""

    def __init__(self, jobs: Jobs, failovers: Failovers) -> None:
        """Take both kinds."""
        self._jobs = jobs
        self._failovers = failovers

    async def all(self) -> Document:
        """Return all jobs, the oldest first."""
        there = {job.id for one in self._failovers.all() for job in one.record.jobs}
        rows = [(job.began_ns, self._jobs.document(job))
                for job in self._jobs.all() if job.id not in there]  # fmt: skip
        rows += [
            (job.began_ns, job_document(one.record, job, one.says if job is one.job else None))
            for one in self._failovers.all()
            for job in one.record.jobs
        ]
        return {"jobs": [document for _, document in sorted(rows, key=lambda row: row[0])]}

    async def one(self, job_id: str) -> Document:
        """Return one job.

        Raises:
            NotFoundError: there is none of this id.
        """
        return self._of_failover(job_id) or self._jobs.document(self._jobs.find(job_id))

    async def cancel(self, job_id: str, *, dry_run: bool) -> Document:
        """End a job that can be ended; on return that is under way.

        Raises:
            NotFoundError: there is none of this id.
            StateError: it is over, or cannot be cancelled.
        """
        found = self._of_failover(job_id)
        if found is not None:
            name = found["failover"]
            raise StateError(
                f"job {job_id}: the jobs of a failover are not cancelled",
                hint=f"vdiskfs failover rollback {name}, or failover cleanup {name}",
            )
        return self._jobs.document(await self._jobs.cancel(job_id, dry_run=dry_run))

    def _of_failover(self, job_id: str) -> Document | None:
        for one in self._failovers.all():
            for job in one.record.jobs:
                if job.id == job_id:
                    return job_document(one.record, job, one.says if job is one.job else None)
        return None
