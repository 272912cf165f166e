"""What is known of a failover on this host, and where its files lie.

    failovers/<id>/record.json
    failovers/<id>/<disk id>/image, boot, presence/
    failovers/<id>/machine/   what the machine's runner keeps

The directory of a failover appears and goes by one rename: it is there whole or not at all.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from typing import Any

from vdiskfs import jobs
from vdiskfs.errors import DamagedError, UsageError
from vdiskfs.failover.states import Kind, State, Step

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Member:
    """One disk of a failover: the point that its copy begins with.

    ``generation`` is that of the line on which ``epoch`` is looked up; ``size`` is bytes at
    the point, ``time_ns`` its instant. ``file`` is the name of the image. Of a failover for good
    ``current`` is the disk's generation when the point was chosen, ``token`` a random number of
    the step that takes the disk; an ``epoch`` of 0 is not known yet;
    of a failback ``full`` means that all of it is brought, whatever the image held.
    """

    disk: str
    disk_id: str
    file: str
    generation: int
    epoch: int
    time_ns: int
    size: int
    digest: str = ""
    current: int = 0
    token: str = ""
    full: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """Something that was asked of a failover: how far it is, step by step.

    ``ended_ns`` is 0 while it runs; ``error`` says why it stands still, ``hint`` what to do, and
    ``code`` is the exit status that this means.
    """

    id: str
    kind: Step
    began_ns: int
    done: tuple[str, ...] = ()
    ended_ns: int = 0
    error: str | None = None
    hint: str = ""
    code: int = 0


@dataclass(frozen=True, slots=True)
class Health:
    """What came of a machine's health check; ``seconds`` from its start: the recovery time."""

    healthy: bool
    seconds: float
    detail: str


@dataclass(frozen=True, slots=True)
class FailoverRecord:
    """One failover.

    ``created_ns`` is when it was asked for. ``machine`` is the definition (TOML) of the machine
    on it, None: none was started. ``health`` is None while that is being judged. ``jobs`` are
    the newest that were asked for, the last one is the newest. ``rollback_ns``: when it is rolled
    back by itself unless it is committed; 0: never. ``group`` is the consistency group that was
    named; None: a disk was. ``unasked`` is the point at which a failback takes its disks without
    asking the site that has them; empty: it asks.
    """

    id: str
    name: str
    kind: Kind
    state: State
    created_ns: int
    members: tuple[Member, ...]
    notes: str = ""
    machine: str | None = None
    health: Health | None = None
    jobs: tuple[Job, ...] = ()
    rollback_ns: int = 0
    group: str | None = None
    unasked: str = ""

    @property
    def disk_names(self) -> str:
        """The names of its disks, with commas between."""
        return ",".join(one.disk for one in self.members)

    @property
    def point_names(self) -> str:
        """The points that the copies began with, as DISK@#EPOCH."""
        return ", ".join(
            f"{one.disk}@#{one.epoch}" if one.epoch else one.disk for one in self.members
        )

    def to_body(self) -> dict[str, Any]:
        """Return what `from_body` reads."""
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_body(body: dict[str, Any], where: str) -> FailoverRecord:
        """Read a record.

        Raises:
            DamagedError: it is none; ``where`` is named.
        """
        try:
            if body["format"] != FORMAT:
                raise DamagedError(
                    f"{where}: format {body['format']} is not known to this version",
                    hint="use the version of vdiskfs that wrote it",
                )
            health = body["health"]
            begun = [
                Job(**{**one, "kind": Step(one["kind"]), "done": tuple(one["done"])})
                for one in body.get("jobs", ())
            ]
            return FailoverRecord(
                str(body["id"]), str(body["name"]), Kind(body["kind"]), State(body["state"]),
                int(body["created_ns"]), tuple(Member(**one) for one in body["members"]),
                str(body["notes"]), body["machine"],
                None if health is None else Health(**health), tuple(begun),
                int(body.get("rollback_ns", 0)), body.get("group"),
                str(body.get("unasked", "")),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{where}: not the record of a failover: {error!r}") from None


def kept_job(record: FailoverRecord, job: Job) -> jobs.Job:
    """Return a job of a failover that is removed now: by its last one, if that leads there."""
    removes = job is record.jobs[-1] and job.kind in (Step.ROLLBACK, Step.CLEANUP)
    if job.ended_ns or removes:
        state = jobs.JobState.DONE
    else:
        state = jobs.JobState.FAILED if job.error else jobs.JobState.INTERRUPTED
    steps = (*job.done, "removed") if removes else job.done
    error, code = ("", 0) if removes else (job.error or "", job.code)
    return jobs.Job(
        job.id, 0, jobs.JobKind(str(job.kind)), record.disk_names,
        jobs.OF_FAILOVER + record.name, state, job.began_ns, job.ended_ns or time.time_ns(),
        tuple((step, 0) for step in steps), error=error, hint="" if removes else job.hint,
        code=code,
    )  # fmt: skip


def check_name(name: str) -> None:
    """Check that a failover may have this name: a directory of the mount gets it.

    Raises:
        UsageError: it may not.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a failover",
            hint="up to 64 letters, digits, dots, dashes and underscores, a letter or digit first",
        )
