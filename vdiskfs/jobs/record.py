"""What is known of a job. Plain values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vdiskfs.units import format_time


class JobKind(StrEnum):
    """What a job is for."""

    PROTECT = "enable-protection"
    FINALIZE = "finalize"
    RESYNC = "resynchronize"
    PROVE = "prove"
    THIN = "thin"
    HANDOVER = "handover"
    TEST = "test"
    START = "start"
    CHANGE_POINT = "change-point"
    COMMIT = "commit"
    ROLLBACK = "rollback"
    REPROTECT = "reprotect"
    FAILBACK = "failback"
    COMPLETE = "complete"
    CLEANUP = "cleanup"


class JobState(StrEnum):
    """How a job stands."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class Progress:
    """How far a job has come: bytes done, and in all; 0: not begun."""

    done: int = 0
    total: int = 0

    def tell(self, done: int, total: int) -> None:
        """It has come so far."""
        self.done, self.total = done, total

    def shown(self) -> tuple[int, int] | None:
        """Return it as a job shows it."""
        return (self.done, self.total) if self.total else None


OF_FAILOVER = "failover:"

RESUMED = (JobKind.PROTECT, JobKind.FINALIZE, JobKind.RESYNC)
"""What goes on after a restart as the same job; the others are cut off by it."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a disk.

    ``number`` grows with each job. ``ended_ns`` is 0 while it runs, and while a failed one is
    tried again; ``steps`` are those that are done, and when. ``error`` says why it failed,
    ``hint`` what to do, and ``code`` is the exit status that this means. A job of a failover that
    was removed has OF_FAILOVER and its name in the place of ``disk_id``; when its steps were done
    is not known, 0.
    """

    id: str
    number: int
    kind: JobKind
    disk: str
    disk_id: str
    state: JobState
    began_ns: int
    ended_ns: int = 0
    steps: tuple[tuple[str, int], ...] = ()
    outcome: str = ""
    error: str = ""
    hint: str = ""
    code: int = 0

    @property
    def failover(self) -> str | None:
        """The name of the failover that it was of; None: it is a disk's."""
        found = self.disk_id.startswith(OF_FAILOVER)
        return self.disk_id.removeprefix(OF_FAILOVER) if found else None

    @property
    def is_open(self) -> bool:
        """Whether it goes on."""
        return not self.ended_ns

    def has_done(self, step: str) -> bool:
        """Say whether a step is done."""
        return any(name == step for name, _ in self.steps)


def job_document(
    job: Job, waits_for: str | None = None, progress: tuple[int, int] | None = None
) -> dict[str, object]:
    """Return what scripts get of a job (vdiskfs(1), ``job list --json``)."""
    return {
        "id": job.id,
        "kind": str(job.kind),
        "disk": job.disk,
        "failover": job.failover,
        "state": str(job.state),
        "began": format_time(job.began_ns),
        "ended": format_time(job.ended_ns) if job.ended_ns else None,
        "steps": [name for name, _ in job.steps],
        "step_times": {name: format_time(at) for name, at in job.steps if at},
        "progress": None
        if progress is None
        else {"done_bytes": progress[0], "total_bytes": progress[1]},
        "waits_for": waits_for or None,
        "outcome": job.outcome or None,
        "error": job.error or None,
        "hint": job.hint or None,
        "exit_code": job.code,
    }
