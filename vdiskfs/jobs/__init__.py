"""Jobs: the long work of a mount, each a record with steps, times, progress and outcome.

record    what is known of a job
database  the same in SQLite: ``STATE/jobs.db``
jobs      the jobs of one mount: begun, gone on with after a restart, ended; a bounded number

What a job does is its owner's matter, and so is whether it goes on after a restart; the jobs of
failovers are kept with them (`vdiskfs.failover`), and here once those are removed.
"""

from vdiskfs.jobs.jobs import Jobs
from vdiskfs.jobs.record import OF_FAILOVER, Job, JobKind, JobState, Progress, job_document

__all__ = ["OF_FAILOVER", "Job", "JobKind", "JobState", "Jobs", "Progress", "job_document"]
