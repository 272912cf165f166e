"""Jobs of a failover: steps that are done one after another, each once, over crashes.

A step is noted, durably, when it is done. One that was cut off is done again from its
beginning, so each finds its own effect.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import trio

from vdiskfs.crash import hook
from vdiskfs.errors import DamagedError, LocalError, StateError, VdiskfsError
from vdiskfs.failover.failovers import Failover, Failovers
from vdiskfs.failover.record import Job
from vdiskfs.failover.states import TABLE, Kind, Step

log = logging.getLogger(__name__)

KEPT = 16
"""Jobs of a failover that are remembered."""

Steps = Sequence[tuple[str, Callable[[Failover], Awaitable[None]]]]
"""What a job does, in order, each by its name."""


def begin(failover: Failover, kind: Step) -> tuple[Job, ...]:
    """Return a failover's jobs with a new one; one of its kind that was cut off goes on.

    Raises:
        StateError: a job runs, whose steps would be noted as the new one's.
    """
    check_no_job(failover)
    jobs, last = failover.record.jobs, failover.job
    if last is not None and last.kind is kind and not last.ended_ns:
        return (*jobs[:-1], replace(last, error=None, hint="", code=0))
    number = 1 + max((int(one.id.rpartition("-")[2]) for one in jobs), default=0)
    job = Job(f"{failover.record.id[:8]}-{number}", kind, time.time_ns())
    return (*jobs, job)[-KEPT:]


def check_no_job(failover: Failover) -> None:
    """Check that no job of a failover runs.

    Raises:
        StateError: one does.
    """
    record, job = failover.record, failover.job
    if failover.running is not None and job is not None:
        raise StateError(
            f"failover {record.name}: {job.kind} is under way in state {record.state}",
            hint=f"vdiskfs job wait {job.id}, then the same again",
        )


def check_ended(failover: Failover, before: Step, step: Step, again: str) -> None:
    """Check that the newest job is of a kind, and has come to its end.

    Args:
        failover: whose.
        before: the kind.
        step: what is asked for, and has to follow it.
        again: the command that goes on with that job.

    Raises:
        StateError: it has not.
    """
    record, job = failover.record, failover.job
    if job is not None and job.kind is before and job.ended_ns:
        return
    why, hint = f"{before} has not begun", again
    if job is not None and job.error:
        why, hint = f"{job.kind} stands still: {job.error}", f"{again} goes on with it"
    elif job is not None:
        why = f"{job.kind} is under way"
        hint = f"vdiskfs job wait {job.id}, then the same again"
    raise StateError(
        f"failover {record.name}: {step} is not possible in state {record.state}: {why}", hint=hint
    )


def check_whole(failover: Failover) -> None:
    """Check that the copies of a failover could be opened.

    Raises:
        DamagedError: they could not.
    """
    record = failover.record
    if not failover.lost:
        return
    hint = f"put it back, then mount again; or: vdiskfs failover rollback {record.name}"
    if (record.state, Step.ROLLBACK) not in TABLE:
        hint = "put it back, then mount again; or take what the vault has at home, by vdiskfs "
        hint += "failback complete --unplanned, or mount --force"
    raise DamagedError(
        f"failover {record.name}: its copies cannot be opened: {failover.lost}", hint=hint
    )


def check_same(
    failover: Failover, *, name: str | None = None, spec: str | int = "", vm: bool = True,
    full: bool = False,
) -> None:  # fmt: skip
    """Check that a command that goes on with a failover does not ask for another one.

    Args:
        failover: that goes on.
        name: that it is to have; None: any.
        spec: an epoch that it is to be taken at; what else names a point may mean another
            one by now, and is not looked at.
        vm: False: no machine is to be started.
        full: of a failback: all of it is to be brought.

    Raises:
        StateError: it is another one.
    """
    record = failover.record
    if name is not None and name != record.name:
        other = f"not {name}"
    elif (
        isinstance(spec, int) and record.kind is Kind.UNPLANNED and spec != record.members[0].epoch
    ):
        other = f"at epoch {record.members[0].epoch}, not {spec}"
    elif not vm and record.machine is not None:
        other = "with its machine"
    elif full and not all(one.full for one in record.members):
        other = "in mode minimize-downtime"
    else:
        return
    end = Step.CLEANUP if record.kind is Kind.FAILBACK else Step.ROLLBACK
    raise StateError(
        f"failover {record.name}: is under way in state {record.state}, {other}",
        hint=f"go on with it as it was begun; or: vdiskfs failover {end} {record.name}, then the "
        "same again",
    )


class Runner:
    """Runs jobs, one of a failover at a time. Trio thread only."""

    def __init__(self, failovers: Failovers, nursery: trio.Nursery) -> None:
        """Prepare; jobs run in the nursery."""
        self._failovers = failovers
        self._nursery = nursery

    async def go_on(self, failover: Failover, kind: Step, steps: Steps) -> None:
        """Begin a job, or go on with one of its kind, unless that runs. Durably under way.

        Raises:
            StateError: a job of another kind runs.
        """
        if failover.running is not None and failover.is_at(kind):
            return
        if not failover.is_at(kind) or (failover.job is not None and failover.job.error):
            await self._failovers.write(failover, jobs=begin(failover, kind))
        self.start(failover, steps)

    def start(self, failover: Failover, steps: Steps) -> None:
        """Do what is left of a failover's newest job; who asked looks at its record."""
        if failover.running is None:
            scope, ended = trio.CancelScope(), trio.Event()
            failover.running = scope, ended
            self._nursery.start_soon(self._run, failover, steps, scope, ended)

    async def stop(self, failover: Failover) -> None:
        """End a failover's job where it is, if one runs: as a crash would."""
        if failover.running is not None:
            scope, ended = failover.running
            scope.cancel()
            await ended.wait()

    async def _run(
        self, failover: Failover, steps: Steps, scope: trio.CancelScope,
        ended: trio.Event,
    ) -> None:  # fmt: skip
        try:
            with scope:
                await self._run_steps(failover, steps)
        finally:
            failover.says = None
            failover.running = None
            ended.set()

    async def _run_steps(self, failover: Failover, steps: Steps) -> None:
        name, key = failover.record.name, failover.record.id
        try:
            for step, act in steps:
                if not failover.has_done(step):
                    await act(failover)
                    if not self._failovers.has(key) or failover.job is None:
                        return  # it was the last step: nothing is left of it
                    await self._note(failover, done=(*failover.job.done, step))
                    self._tell(failover, f"{step} done")
                    hook(f"job.{step}")
            await self._note(failover, ended_ns=time.time_ns())
            self._tell(failover, "done")
            log.info("failover %s: %s is done", name, failover.job.kind if failover.job else "")
        except VdiskfsError as error:
            await self._failed(failover, error)
        except OSError as error:
            await self._failed(failover, LocalError(str(error)))
        except Exception as error:
            log.exception("failover %s: failed", name)
            failure = VdiskfsError(f"it failed: {error!r}", hint="see the daemon's log")
            await self._failed(failover, failure)

    async def _note(self, failover: Failover, **changes: object) -> None:
        *others, job = failover.record.jobs
        changed = replace(job, **changes)  # type: ignore[arg-type]
        await self._failovers.write(failover, jobs=(*others, changed))

    async def _failed(self, failover: Failover, error: VdiskfsError) -> None:
        kind = failover.job.kind if failover.job is not None else "?"
        log.error("failover %s: %s stands still: %s", failover.record.name, kind, error)
        self._tell(failover, f"stands still: {error}", "job.stands")
        try:
            await self._note(
                failover, error=error.message, hint=error.hint or "", code=error.exit_code
            )
        except (VdiskfsError, OSError) as failure:
            log.error("failover %s: that cannot be noted: %s", failover.record.name, failure)
            *others, job = failover.record.jobs
            job = replace(job, error=error.message, code=error.exit_code)
            failover.record = replace(failover.record, jobs=(*others, job))

    def _tell(self, failover: Failover, text: str, code: str = "job.step") -> None:
        if failover.job is not None:
            what = f"{failover.job.id} {failover.job.kind}: {text}"
            names = failover.record.disk_names
            self._failovers.events.tell(code, failover.record.name, what, disk=names)
