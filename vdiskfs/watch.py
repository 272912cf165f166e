"""Looks at the disks every second, and tells as events what begins to be wrong, and what is over.

A *condition* is a code of `vdiskfs.events` that holds for a disk: what failed there
(`health.Health.conditions`), or a shipped lag above its threshold. It is told when it begins
and when it has been gone for ``hold_s``; what comes back before that is still the same one, so
that nothing flaps. What was told is kept with the events: a daemon that is replaced says nothing
twice. Trio thread only; decides nothing about the disks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from vdiskfs.disk import ProtectedDisk
from vdiskfs.earlydisk import EarlyDisk
from vdiskfs.events import Events
from vdiskfs.health import Level, State, code_of_error
from vdiskfs.watchsettings import RpoThresholds

LOOK_S = 1.0

ABSENT_S = 600.0
"""A disk that is not here for so long is not protected here any more: its conditions end."""

PLAIN = "mount.plain"
"""The condition of a mount that no daemon serves: a daemon that watches it is its end."""

_NOT_LATE = (State.ENABLING, State.INITIAL_REPLICATION)


@dataclass(slots=True)
class _Told:
    """A condition that was told: since when, and since when it is gone."""

    began: float
    reason: str
    gone_at: float | None = None


class Watch:
    """Watches while its `run` runs."""

    def __init__(
        self, events: Events, disks: Callable[[], Sequence[ProtectedDisk]],
        early: Callable[[], Sequence[EarlyDisk]], *,
        thresholds: Callable[[ProtectedDisk], RpoThresholds], hold_s: float,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            events: is told.
            disks: gives those protected here.
            early: gives those that wait to be started: nothing of them is over.
            thresholds: what a disk's shipped lag may be.
            hold_s: how long something must be gone to be over.
        """
        self.thresholds = thresholds
        self._events = events
        self._disks = disks
        self._early = early
        self._hold_s = hold_s
        self._told: dict[tuple[str, str], _Told] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        for event in await trio.to_thread.run_sync(self._events.open_conditions):
            if event.code == PLAIN:
                text = "a daemon serves the mount: its disks are compared, then replicated"
                self._events.end(PLAIN, event.subject, text, disk=event.disk)
                continue
            self._told[event.subject, event.code] = _Told(trio.current_time(), event.text)
        while True:
            self.look()
            await trio.sleep(LOOK_S)

    def look(self) -> None:
        """Look once at each disk."""
        here = {disk.name: disk for disk in self._disks()}
        for disk in here.values():
            self._look_at(disk)
        early = {one.record.name: one for one in self._early()}
        for name, one in early.items():
            if one.error is not None:
                level = Level.CRITICAL if one.is_hopeless else Level.WARNING
                self._tell(name, {code_of_error(one.error): str(one.error)}, level)
        for (name, code), told in list(self._told.items()):
            if (
                name not in here
                and name not in early
                and self._is_gone(told, max(ABSENT_S, self._hold_s))
            ):
                del self._told[name, code]
                self._events.end(code, name, "the disk is not protected here", disk=name)

    def _look_at(self, disk: ProtectedDisk) -> None:
        health = disk.health
        late = self._late(disk)
        health.late = _worst(late)
        found = {**health.conditions(), **late}
        self._tell(disk.name, found, health.level)
        for (name, code), told in list(self._told.items()):
            if name == disk.name and code not in found and self._is_gone(told, self._hold_s):
                self._end(disk, code, told)

    def _tell(self, name: str, found: Mapping[str, str], level: Level) -> None:
        for code, reason in found.items():
            told = self._told.get((name, code))
            if told is not None:
                told.gone_at, told.reason = None, reason
                continue
            self._told[name, code] = _Told(trio.current_time(), reason)
            self._events.tell(code, name, reason, disk=name, health=str(level), fold="")

    def _is_gone(self, told: _Told, hold_s: float) -> bool:
        now = trio.current_time()
        if told.gone_at is None:
            told.gone_at = now
        return now - told.gone_at >= hold_s

    def _end(self, disk: ProtectedDisk, code: str, told: _Told) -> None:
        del self._told[disk.name, code]
        # As far as this daemon saw it: not what a predecessor saw before.
        text = f"over after {_span((told.gone_at or told.began) - told.began)}: {told.reason}"
        health = str(disk.health.level)
        self._events.end(code, disk.name, text, disk=disk.name, health=health)

    def _late(self, disk: ProtectedDisk) -> dict[str, str]:
        """Return which thresholds the disk's shipped lag is above, and what to say of it."""
        health = disk.health
        # Before the first point there is nothing to lag behind; elsewhere others ship.
        if health.state in _NOT_LATE or health.shown_as is not None:
            return {}
        lag_s, limits = disk.replicator.lag_s(), self.thresholds(disk)
        named = (("rpo.warning", limits.warning_s), ("rpo.error", limits.error_s))
        return {
            code: f"the vault lags {_span(lag_s)} behind: above {code.replace('.', '_')} "
            f"({_span(limit_s)})"
            for code, limit_s in named
            if limit_s and lag_s >= limit_s
        }


def _worst(late: dict[str, str]) -> tuple[Level, str] | None:
    if "rpo.error" in late:
        return Level.CRITICAL, late["rpo.error"]
    return (Level.WARNING, late["rpo.warning"]) if late else None


def _span(seconds: float) -> str:
    """Write seconds for people: ``42 s``, ``12 min``, ``3.5 h``."""
    if seconds < 120:
        return (
            f"{seconds:.0f} s" if seconds >= 10 or seconds == int(seconds) else f"{seconds:.1f} s"
        )
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
