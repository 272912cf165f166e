"""A bound on bytes per second, shared by all who take from it. Trio thread only."""

from __future__ import annotations

import trio

BURST_S = 0.5
"""Seconds of rest that may be made up for."""


class RateLimiter:
    """A token bucket: so many bytes a second at most, first come first served.

    ``limit`` may be changed at any time; 0 is no limit.
    """

    def __init__(self, limit: int = 0) -> None:
        """Begin with a full bucket."""
        self.limit = limit
        self._free_at = float("-inf")

    async def take(self, amount: int) -> None:
        """Wait until ``amount`` bytes may flow. More than a burst is paid for afterwards.

        Who is cancelled while it waits has not taken anything that others wait for.
        """
        if self.limit <= 0 or amount <= 0:
            await trio.lowlevel.checkpoint()
            return
        now = trio.current_time()
        begin = max(self._free_at, now - BURST_S)
        cost = amount / self.limit
        self._free_at = begin + cost
        try:
            await trio.sleep(max(0.0, begin - now))
        except trio.Cancelled:
            self._free_at -= cost
            raise
