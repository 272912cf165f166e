"""Starts child processes with the priority of this process, and waits for them.

Not by trio's own way: that starts them from whichever worker thread is idle, and one that has
captured pages (``native.background``) has stepped back for good. A machine that it started
would run at nice 10 and the lowest I/O priority all its life.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Any

import trio

from vdiskfs.errors import LocalError

END_S = 5.0
"""Seconds that a program may take to end after SIGTERM."""


class Child:
    """A child process. Invariant: its number is its own until ``wait`` has returned."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self._fd = os.pidfd_open(popen.pid)

    @property
    def pid(self) -> int:
        """Its number, which is that of its session too, where it has one of its own."""
        return self._popen.pid

    @property
    def has_ended(self) -> bool:
        """Whether ``wait`` has seen its end."""
        return self._popen.returncode is not None

    async def wait(self) -> int:
        """Wait for its end, and return its status (negative: by that signal)."""
        if not self.has_ended:
            await trio.lowlevel.wait_readable(self._fd)
            os.close(self._fd)
        return self._popen.wait()

    async def end(self, kill: Callable[[], None] | None = None) -> None:
        """End it if it runs, also under cancellation: by SIGTERM, then ``kill`` or SIGKILL."""
        with trio.CancelScope(shield=True):
            if kill is None and not self.has_ended:
                self._popen.terminate()
                with trio.move_on_after(END_S):
                    await self.wait()
            if not self.has_ended:
                (kill or self._popen.kill)()
                await self.wait()


async def spawn(command: Sequence[str], **options: Any) -> Child:
    """Start a program in a session of its own; ``options`` are those of subprocess.Popen.

    Cancellation is looked at before, never between the start and the return.

    Raises:
        LocalError: it cannot be run.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    started: list[subprocess.Popen[bytes]] = []
    failed: list[BaseException] = []
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def start() -> None:
        try:
            started.append(subprocess.Popen(list(command), start_new_session=True, **options))
        except BaseException as error:  # noqa: BLE001 (raised in the other thread)
            failed.append(error)
        token.run_sync_soon(done.set)

    # A thread of its own has the priority of this one. Not this one: the program's file may
    # lie where only this thread's loop can have it read.
    thread = threading.Thread(target=start, name="spawn")
    thread.start()
    with trio.CancelScope(shield=True):
        await done.wait()
    thread.join()
    if failed:
        if isinstance(failed[0], OSError):
            raise LocalError(f"{command[0]}: {failed[0].strerror}") from failed[0]
        raise failed[0]
    return Child(started[0])
