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
from vdiskfs.errors import LocalError, VdiskfsError
from vdiskfs.failover.failovers import Failover, Failovers
from vdiskfs.failover.record import Job
from vdiskfs.failover.states import Step

log = logging.getLogger(__name__)

KEPT = 16
"""Jobs of a failover that are remembered."""

Steps = Sequence[tuple[str, Callable[[Failover], Awaitable[None]]]]
"""What a job does, in order, each by its name."""


def begin(failover: Failover, kind: Step) -> tuple[Job, ...]:
    """Return a failover's jobs with a new one; one of its kind that was cut off goes on."""
    jobs, last = failover.record.jobs, failover.job
    if last is not None and last.kind is kind and not last.ended_ns:
        return (*jobs[:-1], replace(last, error=None, hint="", code=0))
    number = 1 + max((int(one.id.rpartition("-")[2]) for one in jobs), default=0)
    job = Job(f"{failover.record.id[:8]}-{number}", kind, time.time_ns())
    return (*jobs, job)[-KEPT:]


class Runner:
    """Runs jobs, one of a failover at a time. Trio thread only."""

    def __init__(self, failovers: Failovers, nursery: trio.Nursery) -> None:
        """Prepare; jobs run in the nursery."""
        self._failovers = failovers
        self._nursery = nursery
        self._running: dict[str, tuple[trio.CancelScope, trio.Event]] = {}

    def is_running(self, failover: Failover) -> bool:
        """Say whether a job of the failover runs now."""
        return failover.record.id in self._running

    async def go_on(self, failover: Failover, kind: Step, steps: Steps) -> None:
        """Begin a job, or go on with one of its kind, unless one runs. Durably under way."""
        if self.is_running(failover):
            return
        if not failover.is_at(kind) or (failover.job is not None and failover.job.error):
            await self._failovers.write(failover, jobs=begin(failover, kind))
        self.start(failover, steps)

    def start(self, failover: Failover, steps: Steps) -> None:
        """Do what is left of a failover's newest job; who asked looks at its record."""
        if failover.record.id not in self._running:
            scope, ended = trio.CancelScope(), trio.Event()
            self._running[failover.record.id] = scope, ended
            self._nursery.start_soon(self._run, failover, steps, scope, ended)

    async def stop(self, failover: Failover) -> None:
        """End a failover's job where it is, if one runs: as a crash would."""
        if failover.record.id in self._running:
            scope, ended = self._running[failover.record.id]
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
            self._running.pop(failover.record.id, None)
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
            disks = ",".join(one.disk for one in failover.record.members)
            self._failovers.events.tell(code, failover.record.name, what, disk=disks)
