"""What waits for one sink: bounded, tried again, in its own task."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

import trio

from vdiskfs.events import Event, EventLevel, code_of

log = logging.getLogger(__name__)

LIMIT = 500
"""Events that wait for one sink; beyond that the oldest is dropped, and counted."""

FIRST_S = 1.0
LONGEST_S = 300.0
"""The waits between tries double from the first to the longest."""


class SinkError(Exception):
    """A sink did not take something; one line, without secrets. ``final``: it never will."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class Sink(Protocol):
    """Who is told."""

    name: str
    gather_s: float
    """Seconds that it waits for more after the first event."""

    batch: int
    """Events that it takes at once."""

    async def deliver(self, events: list[Event], dropped: int) -> str:
        """Tell it, and return what it answered.

        Args:
            events: at least one, at most ``batch``, oldest first.
            dropped: events before these that were lost.

        Raises:
            SinkError: it was not told.
        """


class SinkQueue:
    """One sink's queue. Trio thread only."""

    def __init__(
        self, sink: Sink, level: EventLevel, *, failed: Callable[[str, str], None],
        limit: int = LIMIT,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            sink: who is told.
            level: of what is at least so bad.
            failed: is told the sink's name and why, once for each trouble.
            limit: events that wait at most.
        """
        self.sink = sink
        self.delivered = 0
        self.failures = 0
        self.dropped = 0
        self._level = level
        self._failed = failed
        self._limit = limit
        self._waiting: deque[Event] = deque()
        self._dropped_now = 0
        self._news = trio.Event()
        self._again_s = 0.0

    def __len__(self) -> int:
        """Return how many events wait."""
        return len(self._waiting)

    def offer(self, event: Event) -> None:
        """Take an event, if this sink is told of such. Never waits."""
        code = code_of(event.code)
        if code.told_as.rank < self._level.rank and event.level.rank < self._level.rank:
            return
        if code.name == "watch.sink" and event.subject == self.sink.name:
            return
        self._waiting.append(event)
        if len(self._waiting) > self._limit:
            self._waiting.popleft()
            self._drop(1)
        self._news.set()

    async def run(self) -> None:
        """Deliver until cancelled."""
        while True:
            while not self._waiting:
                self._news = trio.Event()
                await self._news.wait()
            await trio.sleep(self.sink.gather_s)
            await self._deliver_some()

    async def _deliver_some(self) -> None:
        some = [self._waiting[index] for index in range(min(len(self._waiting), self.sink.batch))]
        dropped = self._dropped_now
        try:
            await self.sink.deliver(some, dropped)
        except (SinkError, OSError) as failure:
            # This host may have no descriptor left, for one: that is over some time.
            error = failure if isinstance(failure, SinkError) else SinkError(str(failure))
            self._note_failure(error)
            if error.final:
                self._forget(some)
                self._drop(len(some))
            else:
                await trio.sleep(self._again_s)
            return
        if self._again_s:
            log.info("%s takes events again", self.sink.name)
        self._again_s = 0.0
        self.delivered += len(some)
        self._dropped_now -= dropped
        self._forget(some)

    def _note_failure(self, error: SinkError) -> None:
        self.failures += 1
        if not self._again_s:
            log.warning("%s does not take events: %s", self.sink.name, error)
            self._failed(self.sink.name, str(error))
        self._again_s = min(LONGEST_S, 2 * self._again_s or FIRST_S)

    def _forget(self, events: list[Event]) -> None:
        """Take out what was delivered; the oldest may have been dropped meanwhile."""
        gone = {id(event) for event in events}
        while self._waiting and id(self._waiting[0]) in gone:
            self._waiting.popleft()

    def _drop(self, count: int) -> None:
        self.dropped += count
        self._dropped_now += count
