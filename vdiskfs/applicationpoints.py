"""Application-consistent points of a mount: on demand, on schedule, and what a freeze left.

What uses a disk (a guest, a file system of this host) is brought to rest as the disk's
``[quiesce.DISK]`` table says, by a process of its own (`vdiskfs.quiesce`), for as long as a
seal takes. A point carries the label only if everything stayed frozen from before the seal
until it was thawed in time; else it is the crash-consistent point that it would have been
anyway, and an event says why. Trio thread only.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import trio

from vdiskfs.config import Config
from vdiskfs.crash import hook
from vdiskfs.delta import Spooled
from vdiskfs.disk import ProtectedDisk
from vdiskfs.errors import LocalError, StateError, VdiskfsError
from vdiskfs.events import Events
from vdiskfs.groups import Groups
from vdiskfs.quiesce.session import Resting, Session
from vdiskfs.quiesce.undoing import undo, undo_all
from vdiskfs.quiesceconfig import QuiesceConfig
from vdiskfs.together import check_known, seal_together

log = logging.getLogger(__name__)

LOOK_S = 30.0
"""How often it is looked whether a point is due: disks and groups come and go, clocks jump."""
_STILL = "what was frozen for an earlier point has not said that it is thawed"
LATE_S = 60.0
"""A point that is due longer than that was missed; the next one is at its own time."""


@dataclass(frozen=True)
class Unit:
    """What gets points of its own: a disk, or a group."""

    id: str
    name: str
    disks: tuple[ProtectedDisk, ...]


class Schedule:
    """When a point is due: each unit at its own time within the interval, by the wall clock.

    The time follows from its id, so that it is spread over units and the same after a restart.
    """

    def __init__(self, interval_s: float) -> None:
        """Take the interval."""
        self._interval_s = interval_s
        self._next: dict[str, float] = {}

    def due(self, ids: Sequence[str], now_s: float) -> list[str]:
        """Return whose time has come; those that were missed by much are left to the next time."""
        self._next = {one: at for one, at in self._next.items() if one in ids}
        found = []
        for one in ids:
            at = self._next.get(one)
            # Another time than was set: the clock was put back.
            if at is not None and at - now_s > self._interval_s:
                at = None
            if at is None or at <= now_s:
                if at is not None and now_s - at <= LATE_S:
                    found.append(one)
                self._next[one] = self._after(one, now_s)
        return found

    def wait_s(self, now_s: float) -> float:
        """Return the seconds until the next one is due, at most `LOOK_S`."""
        return max(0.0, min([LOOK_S, *(at - now_s for at in self._next.values())]))

    def _after(self, one: str, now_s: float) -> float:
        digest = blake2b(one.encode(), digest_size=8).digest()
        phase_s = int.from_bytes(digest, "big") / 2**64 * self._interval_s
        at = ((now_s - phase_s) // self._interval_s + 1) * self._interval_s + phase_s
        # Rounding may have given the very moment that it is.
        return at if at - now_s > self._interval_s / 1000 else at + self._interval_s


class ApplicationPoints:
    """The application-consistent points of one mount."""

    def __init__(
        self, options: Config, mountpoint: Path, state: Path, *, events: Events, groups: Groups,
        disks: Callable[[], Sequence[ProtectedDisk]], nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        """Prepare; what an earlier run left frozen is not thawed before `run`."""
        self._options = options
        self._mountpoint = mountpoint
        self._notes = state / "quiesce"
        self._events = events
        self._groups = groups
        self._disks = disks
        self._nursery = nursery
        self._newest: dict[str, tuple[int, ...]] = {}
        self._told: set[str] = set()
        self._busy: set[str] = set()
        self._moved = trio.Event()

    # ---- on demand -------------------------------------------------------------------------

    async def create(
        self, disks: Sequence[ProtectedDisk], label: str = ""
    ) -> tuple[list[Spooled], str]:
        """Make a point of disks at one instant; return their deltas, and why it has no label.

        The points are in the spool on return; an empty reason: they are application-consistent.

        Raises:
            StateError: nothing says how one of the disks is brought to rest, or it has no
                point to give now.
            EpochGivenUpError: one of the disks could not keep its epoch.
        """
        resting = [self._resting(disk) for disk in disks]
        replicators = [disk.replicator for disk in disks]
        for one in replicators:
            check_known(one)  # before anybody is disturbed
        why = await self._take_turn(resting)
        if why:
            spooled = await seal_together(replicators, label)
            self._tell_plain(disks, why)
            return spooled, why
        session = Session(self._notes, self._options.freeze_limit_s, self._teller(disks))
        try:
            try:
                await session.prepare(resting, label)
            except LocalError as error:
                session.why = str(error)
            spooled = await seal_together(replicators, label, session)
        finally:
            self._start(self._see_off, session, [one.name for one in disks])
        if session.why:
            self._tell_plain(disks, session.why)
        hook("quiesce.captured")
        return spooled, session.why

    async def _take_turn(self, resting: Sequence[Resting]) -> str:
        """Wait until an earlier point of these disks is over, hooks and all; say why it is not."""
        names = {one.name for one in resting}
        hooks_s = sum(2 * one.how.hook_limit_s for one in resting if one.how.before)
        with trio.move_on_after(self._options.freeze_limit_s + hooks_s):
            while names & self._busy:
                await self._moved.wait()
        if names & self._busy:
            return _STILL
        self._busy |= names
        why = await trio.to_thread.run_sync(self._left, names)
        if why:
            self._give_turn(names)
        return why

    def _give_turn(self, names: Collection[str]) -> None:
        self._busy -= set(names)
        self._moved.set()
        self._moved = trio.Event()

    def _resting(self, disk: ProtectedDisk) -> Resting:
        how = self._how(disk)
        if how is None:
            raise StateError(
                f"disk {disk.name}: nothing says how it is brought to rest",
                hint=f"add [quiesce.{disk.name}] to vdiskfs.conf(5), and mount again",
            )
        path = disk.file.path
        images = [str(self._mountpoint / "disks" / path), str(self._mountpoint / path)]
        return Resting(disk.name, images, how)

    def _how(self, disk: ProtectedDisk) -> QuiesceConfig | None:
        return self._options.quiesce.get(disk.name)

    def _left(self, names: Collection[str]) -> str:
        """Say whether something of these disks may still be frozen; in a thread."""
        for path in sorted(self._notes.glob("*.json")):
            try:
                body = json.loads(path.read_text(encoding="utf-8"))
                frozen = {one["name"] for one in body["disks"]}
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                return f"{path}: cannot be read: {error}"
            if frozen & set(names):
                return _STILL
        return ""

    # ---- what is said ----------------------------------------------------------------------

    def _teller(self, disks: Sequence[ProtectedDisk]) -> Callable[[str], None]:
        names = ",".join(disk.name for disk in disks)

        def tell(text: str) -> None:
            log.warning("%s", text)
            self._events.tell("quiesce.trouble", names, text, disk=names)

        return tell

    def _tell_undone(self, names: str, text: str) -> None:
        self._events.tell("quiesce.thawed", names, text, disk=names)

    def _tell_plain(self, disks: Sequence[ProtectedDisk], why: str) -> None:
        for disk in disks:
            log.warning("disk %s: the point is crash-consistent: %s", disk.name, why)
            self._events.tell(
                "point.crash-consistent", disk.name, f"crash-consistent: {why}", disk=disk.name
            )

    # ---- what is left frozen ---------------------------------------------------------------

    async def run(self) -> None:
        """Thaw what an earlier run left frozen; then make points on schedule, where there is one.

        A disk's policy says how often, else the mount's settings; in a group the shortest counts.
        """
        await trio.to_thread.run_sync(self._make_directory)
        self._start(undo_all, self._notes, self._tell_undone)
        await self._keep_schedule()

    def _start(self, task: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run a task beside the others: what it raises ends none of them."""

        async def run() -> None:
            try:
                await task(*arguments)
            except Exception:
                log.exception("what belongs to an application-consistent point failed")

        self._nursery.start_soon(run)

    def _make_directory(self) -> None:
        self._notes.mkdir(mode=0o700, exist_ok=True)
        for path in self._notes.glob(".*.new"):
            path.unlink()

    async def _see_off(self, session: Session, names: Sequence[str]) -> None:
        """Wait until a holder has put all back; if it dies, have another one do it."""
        session.let_go()
        try:
            why = await session.wait_over()
        finally:
            with trio.CancelScope(shield=True):
                await session.aclose()
            self._give_turn(names)
        if not why:
            return
        subject = ",".join(names)
        log.error("disk %s: may still be frozen: %s", subject, why)
        self._events.tell("quiesce.frozen", subject, f"may still be frozen: {why}", disk=subject)
        await undo(session.note, self._tell_undone)

    # ---- on schedule -----------------------------------------------------------------------

    async def _keep_schedule(self) -> None:
        schedules: dict[float, Schedule] = {}
        while True:
            units: dict[float, dict[str, Unit]] = {}
            for unit in self._units():
                units.setdefault(self._interval_s(unit), {})[unit.id] = unit
            units.pop(0.0, None)
            schedules = {one: schedules.get(one) or Schedule(one) for one in units}
            for interval_s, schedule in schedules.items():
                mine = units[interval_s]
                for one in schedule.due(list(mine), time.time()):
                    self._start(self._make, mine[one])
            await trio.sleep(
                min([LOOK_S, *(one.wait_s(time.time()) for one in schedules.values())])
            )

    def _interval_s(self, unit: Unit) -> float:
        """Return how often a unit gets points, seconds; 0: not on schedule."""
        found = []
        for disk in unit.disks:
            own = disk.policy.application_interval_s if disk.policy is not None else None
            found.append(self._options.application_interval_s if own is None else own)
        return min((one for one in found if one), default=0.0)

    def _units(self) -> list[Unit]:
        """Return the groups and disks of which all is known that it takes."""
        here = {disk.disk_id: disk for disk in self._disks() if disk.started}
        away = {one for one, disk in here.items() if disk.line.is_elsewhere}
        here = {one: disk for one, disk in here.items() if one not in away}
        found = []
        for group in self._groups.all():
            disks = [here.pop(one, None) for one in sorted(group.ids - away)]
            known = tuple(one for one in disks if one is not None)
            configured = [one for one in known if self._how(one) is not None]
            if len(configured) == len(disks):
                found.append(Unit(group.id, f"group {group.name}", known))
            elif (
                configured
                and group.id not in self._told
                and self._interval_s(Unit(group.id, group.name, known))
            ):
                self._told.add(group.id)
                text = "no application-consistent points: not all of its disks say how they rest"
                self._events.tell("quiesce.incomplete", group.name, text)
        alone = [one for one in here.values() if self._how(one) is not None]
        return found + [Unit(one.disk_id, f"disk {one.name}", (one,)) for one in alone]

    async def _make(self, unit: Unit) -> None:
        """Make a point, unless nothing has changed since the last one."""
        newest = tuple(one.replicator.end.epoch for one in unit.disks)
        changed = any(one.replicator.live.counts().changed for one in unit.disks)
        if not changed and newest == self._newest.get(unit.id):
            return
        try:
            spooled, why = await self.create(unit.disks)
        except (VdiskfsError, OSError) as error:
            log.warning("%s: no application-consistent point: %s", unit.name, error)
            disks = ",".join(one.name for one in unit.disks)
            name = unit.name.split()[-1]
            self._events.tell("point.not-made", name, f"not made: {error}", disk=disks)
            return
        if not why:
            by_id: Mapping[str, int] = {one.head.disk_id: one.head.to_epoch for one in spooled}
            self._newest[unit.id] = tuple(by_id[one.disk_id] for one in unit.disks)
