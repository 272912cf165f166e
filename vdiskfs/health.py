"""How a disk fares: its state, its health with the reason, and waiting to try again.

Errors are recoverable (the vault cannot now: 1, 2, 4, 8, 10 minutes and then every 30,
with jitter, cut short when the vault answers somebody else or the user asks) or not
(credentials, a damaged chain, a vault that is gone): then nothing is tried until the user
asks. Blips of seconds are the store's own matter and never get here.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TypeVar

import trio

from vdiskfs.errors import VaultUnreachableError, VdiskfsError

log = logging.getLogger(__name__)

RETRY_MINUTES = (1, 2, 4, 8, 10, 30)
"""Waits between tries; the last one repeats. Source: Azure Site Recovery's retry table."""

T = TypeVar("T")


class State(StrEnum):
    """Where a disk stands; DESIGN section 8 names all states, these are reached today."""

    UNPROTECTED = "Unprotected"
    ENABLING = "Enabling"
    INITIAL_REPLICATION = "InitialReplication"
    PROTECTED = "Protected"
    RESYNCING = "Resyncing"
    RETIRED = "Retired"
    DISPLACED = "Displaced"


class Level(StrEnum):
    """The health of a protected disk."""

    NORMAL = "Normal"
    WARNING = "Warning"
    CRITICAL = "Critical"


class Health:
    """One disk's state. Only the trio thread uses it."""

    def __init__(self, disk: str) -> None:
        """Begin as Enabling."""
        self.disk = disk
        self.state = State.ENABLING
        self._displaced: str | None = None
        self._vault_error: VdiskfsError | None = None
        self._local_error: str | None = None
        self._retry_at: float | None = None
        self._retry = trio.Event()

    @property
    def level(self) -> Level:
        """Normal, Warning (being tried again) or Critical (waits for the administrator)."""
        if self._displaced is not None:
            return Level.CRITICAL
        if self._vault_error is None and self._local_error is None:
            return Level.NORMAL
        waits = self._retry_at is not None or self._vault_error is None
        return Level.WARNING if waits else Level.CRITICAL

    @property
    def last_error(self) -> str | None:
        """The reason of a health that is not Normal: one line."""
        if self._displaced is not None:
            return self._displaced
        return str(self._vault_error) if self._vault_error is not None else self._local_error

    @property
    def next_retry_s(self) -> float | None:
        """Seconds until the next try, or None: nothing waits for one."""
        if self._retry_at is None:
            return None
        return max(0.0, self._retry_at - trio.current_time())

    @property
    def shown_state(self) -> State:
        """The state for people: displaced, whatever goes on in the branch."""
        return self.state if self._displaced is None else State.DISPLACED

    def displaced(self, reason: str) -> None:
        """Another site has taken the disk over."""
        self._displaced = reason

    def pass_started(self, *, first: bool) -> None:
        """A pass over suspect pages runs: the first replication, or a resynchronization."""
        self.state = State.INITIAL_REPLICATION if first else State.RESYNCING

    def pass_finished(self) -> None:
        """An epoch was captured: the disk has a point, here at least."""
        self.state = State.PROTECTED

    def local_failed(self, reason: str) -> None:
        """The local disk could not keep an epoch. Nothing is lost; it will be tried again."""
        if self._local_error != reason:
            log.error("disk %s: %s", self.disk, reason)
        self._local_error = reason

    def local_works(self) -> None:
        """An epoch was kept again."""
        self._local_error = None

    def retry_now(self) -> None:
        """End the wait, if one is on: the user asks, or the vault has answered somebody."""
        self._retry.set()
        self._retry = trio.Event()

    def vault_answers(self) -> None:
        """The vault answered: an error that time may mend is tried again at once."""
        if self._retry_at is not None:
            self.retry_now()

    async def until_done(self, what: str, action: Callable[[], Awaitable[T]]) -> T:
        """Do it until it is done; only cancelling ends it otherwise."""
        tries = 0
        while True:
            try:
                result = await action()
            except VdiskfsError as error:
                await self._wait_after(what, error, tries)
                tries += 1
            else:
                if self._vault_error is not None:
                    log.info("disk %s: %s works again", self.disk, what)
                self._vault_error = None
                return result

    async def _wait_after(self, what: str, error: VdiskfsError, tries: int) -> None:
        self._vault_error = error
        if not isinstance(error, VaultUnreachableError):
            log.error("disk %s: %s: %s (will not be tried again by itself)", self.disk, what, error)
            await self._retry.wait()
            return
        minutes = RETRY_MINUTES[min(tries, len(RETRY_MINUTES) - 1)]
        wait_s = 60 * minutes * random.uniform(0.9, 1.1)  # noqa: S311 (jitter, not a secret)
        log.warning("disk %s: %s: %s (next try in %.0f s)", self.disk, what, error, wait_s)
        self._retry_at = trio.current_time() + wait_s
        with trio.move_on_after(wait_s):
            await self._retry.wait()
        self._retry_at = None
