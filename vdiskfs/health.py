"""How a disk fares: its state, its health with the reason, and waiting to try again.

Errors are recoverable (the vault or this host cannot now: 1, 2, 4, 8, 10 minutes and then
every 30, with jitter, cut short when the vault answers again or the user asks) or not
(credentials, a damaged chain, a vault that is gone or another one): then nothing is tried
until the user asks. Blips of seconds are the store's own matter and never get here.
"""

from __future__ import annotations

import logging
import random
import shlex
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import trio

from vdiskfs.errors import (
    DamagedError,
    ImageReadError,
    LocalError,
    NotFoundError,
    RefusedError,
    VaultUnreachableError,
    VdiskfsError,
    WrongVaultError,
)

log = logging.getLogger(__name__)

RETRY_MINUTES = (1, 2, 4, 8, 10, 30)
"""Waits between tries; the last one repeats. Source: Azure Site Recovery's retry table."""

T = TypeVar("T")

_CODES: tuple[tuple[type[VdiskfsError], str], ...] = (
    (VaultUnreachableError, "vault.away"),
    (ImageReadError, "image.unreadable"),
    (LocalError, "host.trouble"),
    (RefusedError, "vault.refused"),
    (NotFoundError, "vault.gone"),
    (WrongVaultError, "vault.wrong"),
    (DamagedError, "chain.damaged"),
)


class State(StrEnum):
    """Where a disk stands; DESIGN section 8 names all states, these are reached today."""

    UNPROTECTED = "Unprotected"
    ENABLING = "Enabling"
    INITIAL_REPLICATION = "InitialReplication"
    FINALIZING = "Finalizing"
    PROTECTED = "Protected"
    RESYNC_REQUIRED = "ResyncRequired"
    RESYNCING = "Resyncing"
    RETIRED = "Retired"
    DISPLACED = "Displaced"
    HANDED_OVER = "HandedOver"
    FAILED_OVER = "FailedOver"


class Level(StrEnum):
    """The health of a protected disk."""

    NORMAL = "Normal"
    WARNING = "Warning"
    CRITICAL = "Critical"


@dataclass(eq=False, slots=True)
class _Trouble:
    """Something that failed and waits for its next try: at a time, or (None) for the user."""

    error: VdiskfsError
    retry_at: float | None = None


def code_of_error(error: VdiskfsError) -> str:
    """Return the code of the condition that an error makes: see `vdiskfs.events`."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), "replication.stuck")


def _code_of_local(error: Exception) -> str:
    return code_of_error(error) if isinstance(error, LocalError) else "host.trouble"


class Health:
    """One disk's state. Only the trio thread uses it."""

    def __init__(self, disk: str, chance: Callable[[], float] = random.random) -> None:
        """Begin as Enabling; ``chance`` gives numbers from 0 to 1 for the jitter."""
        self.disk = disk
        self.state = State.ENABLING
        self._displaced: str | None = None
        self._chance = chance
        self._troubles: list[_Trouble] = []
        self._wrong_vault: VdiskfsError | None = None
        self._damage: dict[str, VdiskfsError] = {}
        self._local_errors: dict[str, Exception] = {}
        self.shown_as: State | None = None
        """A state that hides what goes on below."""
        self._notice: str | None = None
        self._retry = trio.Event()
        self._cut_short = False
        self.late: tuple[Level, str] | None = None
        """The vault lags behind more than it may, and why that is said: see `vdiskfs.watch`."""
        self.errors: Counter[str] = Counter()
        """What failed since the start, by the code of its condition."""
        self.retries = 0
        """Waits for another try since the start."""
        self.finalizing = False
        """The first replication is followed by a finalize job, which is not done yet."""
        self.unfinished: str | None = None
        """Why that job failed last, and what to do."""
        self._moved = trio.Event()

    @property
    def level(self) -> Level:
        """Normal, Warning (tried again, or late) or Critical (waits for the administrator)."""
        late = None if self.late is None else self.late[0]
        taken = self.shown_as is State.DISPLACED  # one that was handed over is where it is to be
        if taken or self._critical() is not None or late is Level.CRITICAL:
            return Level.CRITICAL
        if any(isinstance(error, ImageReadError) for error in self._local_errors.values()):
            return Level.CRITICAL  # it is tried again, and nobody else will mend it
        trouble = self._troubles or self._local_errors or self.unfinished is not None
        if late is not None or trouble or self._notice is not None:
            return Level.WARNING
        return Level.NORMAL

    @property
    def last_error(self) -> str | None:
        """The reason of a health that is not Normal: one line, with what to do; or where it is."""
        if self._displaced is not None:
            return self._displaced
        critical = self._critical()
        reasons = []
        if critical is not None:
            line = f"{critical.message}; {critical.hint}" if critical.hint else critical.message
            reasons.append(f"{line}; then: vdiskfs disk retry {shlex.quote(self.disk)}")
        elif self._troubles:
            reasons.append(str(self._troubles[0].error))
        # Beside a vault that is away, these are somebody else's to mend.
        reasons += map(str, self._local_errors.values())
        if self.unfinished is not None:
            reasons.append(f"not finalized: {self.unfinished}")
        if self.late is not None:
            reasons.append(self.late[1])
        return "; and: ".join(reasons) if reasons else self._notice

    def conditions(self) -> dict[str, str]:
        """Return what is not as it should be: the code of each condition, and its reason."""
        found: dict[str, str] = {}
        if self._displaced is not None and self.shown_as is State.DISPLACED:
            found["disk.displaced"] = self._displaced
        errors = [one.error for one in self._troubles]
        for error in [*errors, *filter(None, [self._wrong_vault]), *self._damage.values()]:
            found.setdefault(code_of_error(error), str(error))
        for failed in self._local_errors.values():
            found.setdefault(_code_of_local(failed), str(failed))
        if self._notice is not None:
            found["disk.resync"] = self._notice
        if self.unfinished is not None:
            found["finalize.failed"] = self.unfinished
        return found

    @property
    def next_retry_s(self) -> float | None:
        """Seconds until the next try, or None: nothing waits for one."""
        waits = [one.retry_at for one in self._troubles if one.retry_at is not None]
        return max(0.0, min(waits) - trio.current_time()) if waits else None

    @property
    def is_vault_away(self) -> bool:
        """Whether something waits because it failed: nothing reaches the vault now."""
        return bool(self._troubles)

    def _critical(self) -> VdiskfsError | None:
        stuck = [one.error for one in self._troubles if one.retry_at is None]
        return stuck[0] if stuck else self._wrong_vault or next(iter(self._damage.values()), None)

    @property
    def shown_state(self) -> State:
        """The state for people: displaced, whatever goes on in the branch."""
        if self.shown_as is not None:
            return self.shown_as
        is_last = self.finalizing and self.unfinished is None
        return State.FINALIZING if is_last and self.state is State.PROTECTED else self.state

    async def wait_moved(self) -> None:
        """Wait until the state is another one."""
        await self._moved.wait()

    def _move(self, state: State) -> None:
        if state is not self.state:
            self.state = state
            self._moved.set()
            self._moved = trio.Event()

    def displaced(self, reason: str, *, handed: bool = False) -> None:
        """Another site has the disk: it took it over, or it was ``handed`` to it."""
        self._displaced = reason
        self.shown_as = State.HANDED_OVER if handed else State.DISPLACED

    def returned(self) -> None:
        """The disk is this site's again."""
        self._displaced = self.shown_as = None

    def pass_started(self, *, first: bool) -> None:
        """A pass over suspect pages runs: the first replication, or a resynchronization."""
        self._move(State.INITIAL_REPLICATION if first else State.RESYNCING)
        self._notice = None

    def pass_finished(self) -> None:
        """An epoch was captured: the disk has a point, here at least."""
        self._notice = None
        self._move(State.PROTECTED)

    def resync_required(self, reason: str) -> None:
        """A resynchronization waits: for the vault, for its window, or for the user."""
        self._move(State.RESYNC_REQUIRED)
        self._notice = f"to be resynchronized: {reason}"

    def local_failed(self, error: Exception, what: str = "sealing") -> None:
        """The local disk could not keep or give something. It will be tried again."""
        if str(self._local_errors.get(what)) != str(error):
            log.error("disk %s: %s", self.disk, error)
        self._local_errors[what] = error

    def local_works(self, what: str = "sealing") -> None:
        """The local disk keeps it again."""
        self._local_errors.pop(what, None)

    def vault_is_wrong(self, error: VdiskfsError | None) -> None:
        """The heartbeat found another vault in the place of this disk's; None: it is back."""
        if error is not None and str(error) != str(self._wrong_vault):
            log.error("disk %s: %s", self.disk, error)
        self._wrong_vault = error

    def chain_is_damaged(self, error: VdiskfsError | None, what: str = "joining") -> None:
        """Deltas in the vault cannot be joined, or thinned: points are hurt; None: that is over."""
        if error is None:
            self._damage.pop(what, None)
            return
        error.hint = error.hint or f"vdiskfs vault repair --disk {shlex.quote(self.disk)}"
        if str(error) != str(self._damage.get(what)):
            log.error("disk %s: %s", self.disk, error)
        self._damage[what] = error

    def is_chain_damaged(self, what: str) -> bool:
        """Say whether that was found, and nobody has asked since that it be tried again."""
        return what in self._damage

    def retry_now(self) -> bool:
        """End the wait, if one is on: the user asks. Return whether one was on."""
        waits = bool(self._troubles) or self.unfinished is not None
        self._cut_short = False
        self._damage.clear()  # it is met again with the next try, if it is there
        self._wake()
        return waits

    def _wake(self) -> None:
        self._retry.set()
        self._retry = trio.Event()

    async def wait_retry(self, tries: int) -> None:
        """Wait as long as after so many tries that failed, or until the user asks."""
        minutes = RETRY_MINUTES[min(tries, len(RETRY_MINUTES) - 1)]
        with trio.move_on_after(60 * minutes * (0.9 + 0.2 * self._chance())):
            await self._retry.wait()

    def vault_answers(self) -> None:
        """The vault answered somebody: an error that time may mend is tried again at once.

        Once: what then fails all the same (one object that is throttled, say) keeps to its
        table until the vault was seen away in between.
        """
        if not self._cut_short and self.next_retry_s is not None:
            self._cut_short = True
            self._wake()

    def vault_is_silent(self) -> None:
        """The vault did not answer somebody: its next answer cuts the wait short again."""
        self._cut_short = False

    async def until_done(self, what: str, action: Callable[[], Awaitable[T]]) -> T:
        """Do it until it is done; only cancelling ends it otherwise."""
        trouble: _Trouble | None = None
        tries = 0
        try:
            while True:
                try:
                    result = await action()
                except VdiskfsError as error:
                    failure = error
                except OSError as error:
                    failure = LocalError(f"{what}: {error.strerror or error}")
                else:
                    if trouble is not None:
                        log.info("disk %s: %s works again", self.disk, what)
                    return result
                if trouble is None:
                    trouble = _Trouble(failure)
                    self._troubles.append(trouble)
                trouble.error = failure
                self.errors[code_of_error(failure)] += 1
                await self._wait_after(what, trouble, tries)
                tries += 1
        finally:
            if trouble is not None:
                self._troubles.remove(trouble)
            if not self._troubles:
                self._cut_short = False

    async def _wait_after(self, what: str, trouble: _Trouble, tries: int) -> None:
        error = trouble.error
        if not isinstance(error, VaultUnreachableError | LocalError):
            log.error("disk %s: %s: %s (will not be tried again by itself)", self.disk, what, error)
            trouble.retry_at = None
            await self._retry.wait()
            return
        wait_s = self._wait_s(error, tries)
        log.warning("disk %s: %s: %s (next try in %.0f s)", self.disk, what, error, wait_s)
        trouble.retry_at = trio.current_time() + wait_s
        self.retries += 1
        with trio.move_on_after(wait_s):
            await self._retry.wait()
        # Until the try has its answer the disk is no more than Warning.
        trouble.retry_at = trio.current_time()

    def _wait_s(self, error: VdiskfsError, tries: int) -> float:
        minutes = RETRY_MINUTES[min(tries, len(RETRY_MINUTES) - 1)]
        wait_s = 60 * minutes * (0.9 + 0.2 * self._chance())
        asked_s = error.retry_after_s if isinstance(error, VaultUnreachableError) else None
        # Never earlier than the vault asked for.
        return wait_s if asked_s is None else max(wait_s, asked_s)
