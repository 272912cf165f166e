"""A disk that guests go on with and that is not started yet: it waits for the vault.

A daemon that takes a mount over tracks the disks of its predecessor at once. Until each is
compared with the vault nothing of it is sealed. What is said of it meanwhile is here.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

import trio

from vdiskfs import native
from vdiskfs.errors import LocalError, StateError, VaultUnreachableError, VdiskfsError
from vdiskfs.state import DiskRecord


@dataclass(eq=False, slots=True)
class EarlyDisk:
    """One disk, from `resume` until it is started. Trio thread only."""

    image: native.Image
    record: DiskRecord
    error: VdiskfsError | None = None
    """Why the last try to start it failed."""
    _retry_at: float | None = None
    _again: trio.Event = field(default_factory=trio.Event)
    started: trio.Event = field(default_factory=trio.Event)
    """It is a disk as all others."""

    async def wait_retry(self, error: VdiskfsError, wait_s: float) -> None:
        """Wait for the next try, or until the user asks for it."""
        self.error = error
        self._retry_at = trio.current_time() + wait_s
        with trio.move_on_after(wait_s):
            await self._again.wait()
        self._retry_at = None

    def give_up(self, error: Exception) -> None:
        """Nobody tries any more; the next daemon does."""
        self.error = StateError(f"{type(error).__name__}: see daemon.log")

    def retry_now(self) -> bool:
        """End the wait; return whether one was on."""
        waits = self.next_retry_s is not None
        self._again.set()
        self._again = trio.Event()
        return waits

    @property
    def next_retry_s(self) -> float | None:
        """Seconds until the next try; None: nothing waits for one."""
        at = self._retry_at
        return None if at is None else max(0.0, at - trio.current_time())

    @property
    def is_hopeless(self) -> bool:
        """Whether the administrator has to do something."""
        known = (VaultUnreachableError, LocalError)
        return self.error is not None and not isinstance(self.error, known)

    @property
    def reason(self) -> str:
        """What is the matter: one line."""
        why = "" if self.error is None else f": {self.error}"
        return f"tracked, not replicated yet{why}"

    def refusal(self) -> StateError:
        """Return the error of who asks something of it that needs a disk that is started."""
        name = self.record.name
        hint = f"vdiskfs disk retry {shlex.quote(name)}"
        return StateError(f"disk {name}: {self.reason}", hint=hint)
