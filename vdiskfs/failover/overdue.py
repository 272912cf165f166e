"""Failovers that are rolled back by themselves, unless they are committed in time.

Trio thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

import trio

from vdiskfs.errors import VdiskfsError
from vdiskfs.failover.failovers import Failover, Failovers
from vdiskfs.failover.states import State
from vdiskfs.units import NS

log = logging.getLogger(__name__)

UNCOMMITTED = (State.STARTING, State.FAILED_OVER, State.CHANGING_POINT, State.ROLLING_BACK)
"""States in which a failover is rolled back, or that goes on, once its time is over."""

AGAIN_S = 2.0
"""Seconds between the first two tries; twice as many between the next, up to `LOOK_S`."""

LOOK_S = 60.0
"""Seconds after which the clock is looked at again, at most: it may be set."""


class Overdue:
    """Waits for the end of each failover's time."""

    def __init__(
        self,
        failovers: Failovers,
        nursery: trio.Nursery,
        roll_back: Callable[[str], Awaitable[object]],
    ) -> None:
        """Prepare; ``roll_back`` gets the name of a failover, and raises if it cannot."""
        self._failovers = failovers
        self._nursery = nursery
        self._roll_back = roll_back
        self._watched: set[str] = set()

    def watch(self, failover: Failover) -> None:
        """Have it rolled back when its time is over, if it has one."""
        record = failover.record
        if record.rollback_ns and record.state in UNCOMMITTED and record.id not in self._watched:
            self._watched.add(record.id)
            self._nursery.start_soon(self._wait, failover)

    async def _wait(self, failover: Failover) -> None:
        pause = AGAIN_S
        while self._is_open(failover):
            left = (failover.record.rollback_ns - time.time_ns()) / NS
            if left > 0:
                await trio.sleep(min(left, LOOK_S))
                continue
            if failover.running is None or failover.record.state is not State.ROLLING_BACK:
                await self._try(failover)
            await trio.sleep(pause)
            pause = min(2 * pause, LOOK_S)
        self._watched.discard(failover.record.id)

    def _is_open(self, failover: Failover) -> bool:
        record = failover.record
        is_open = bool(record.rollback_ns) and record.state in UNCOMMITTED
        return is_open and self._failovers.has(record.id)

    async def _try(self, failover: Failover) -> None:
        name = failover.record.name
        log.warning("failover %s: was not committed in time", name)
        try:
            await self._roll_back(name)
        except VdiskfsError as error:
            names = failover.record.disk_names
            self._failovers.events.tell("failover.overdue", name, str(error), disk=names)
