"""A clock for tests that jumps when nothing is left to do: not while a thread works."""

from __future__ import annotations

import trio
from trio.testing import MockClock

IDLE_S = 0.001


def jumping_clock() -> MockClock:
    """Return a clock that jumps to the next deadline once all tasks wait, and no thread works.

    The clock that trio has for this counts a task that waits for a thread as idle: on a busy
    machine hours pass while a file is being written. Threads count that take their token from
    trio's default limiter.
    """
    clock = MockClock(autojump_threshold=IDLE_S)
    jump = clock._autojump

    def jump_if_idle() -> None:
        if trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0:
            jump()

    setattr(clock, "_autojump", jump_if_idle)  # noqa: B010
    return clock
