"""What is done while crash hooks end the process: each scenario has a past and an act.

The past runs once, unharmed, and its directory is the template of all runs. The act runs in
a child process that is killed at a hook. What was acknowledged, what was sealed and what was
shipped is noted in a ledger outside the disk, as a guest would know it.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from unittest import mock

from tests.model.changes import MAX_SIZE, random_changes
from tests.model.onedisk import OneDisk, hooked
from vdiskfs import native
from vdiskfs.catalog.garbage import GRACE_S, collect
from vdiskfs.catalog.ledger import ledger_name
from vdiskfs.catalog.retention import kept, parse_ladder
from vdiskfs.catalog.thinning import Thinner
from vdiskfs.catalog.upkeep import hold_point
from vdiskfs.delta import DeltaWriter
from vdiskfs.delta.names import parse_joined, parse_slot
from vdiskfs.errors import LocalError
from vdiskfs.units import NS

INTENT_STAMP_S = 5.0
"""Seconds after a commit of the intent log in which no region leaves it."""

CHANGES = random_changes(20261121, 400)
START = bytes(range(256)) * 600
LADDER = parse_ladder("1h for 1d")
"""Of points that are made within seconds the newest stays, and what is held."""
Step = Callable[["Actor"], Awaitable[None]]


class Ledger:
    """Lines that survive the process, one system call each."""

    def __init__(self, root: Path) -> None:
        self.path = root / "ledger"

    def note(self, *words: object) -> None:
        """Add a line; it is there when this returns."""
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.write(fd, (" ".join(map(str, words)) + "\n").encode())
        os.close(fd)

    def lines(self, kind: str) -> list[list[str]]:
        """Return the words after ``kind`` of each line of that kind."""
        if not self.path.exists():
            return []
        rows = [line.split() for line in self.path.read_text().splitlines()]
        return [row[1:] for row in rows if row[0] == kind]

    def count(self, kind: str) -> int:
        """Return how many changes have begun, or were acknowledged."""
        return len(self.lines(kind))


class Actor:
    """One process that works on the disk of a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ledger = Ledger(root)
        self.one = OneDisk(root)
        self.one.sealed = self._note_seal

    async def open(self) -> None:
        """Start as the next daemon, on the kernel that the directory says is running."""
        boot = self.root / "boot"
        self.one.boot_id = boot.read_text() if boot.exists() else "boot-0"
        site = self.root / "site"
        self.one.site = site.read_text() if site.exists() else "site"
        self.one.force = site.exists()
        await self.one.open()

    def _note_seal(self) -> None:
        replicator = self.one.replicator
        digest = sha256(self.one.path.read_bytes()).hexdigest()
        self.ledger.note("sealing", replicator.end.generation, replicator.live.track.epoch, digest)

    def change(self, count: int) -> None:
        """Make the next changes, each acknowledged when it is."""
        for _ in range(count):
            number = self.ledger.count("begun")
            self.ledger.note("begun", number)
            CHANGES[number].apply_image(self.one.image)
            self.ledger.note("done", number)

    async def ship(self) -> None:
        """Seal and ship; changes come in between where the scenario wants them."""
        if self.one.replicator.suspects.resync.cancelled:
            await self.one.replicator.start_resync(now=True)
        await self.one.ship()
        self.ledger.note("stored", self.one.replicator.stored.epoch)

    def change_between(self, count: int) -> None:
        """Make that many changes during the next seal, one at each opportunity."""
        left = [count]

        def act() -> None:
            if left[0]:
                left[0] -= 1
                self.change(1)

        self.one.between = act

    async def tend(self) -> None:
        """Thin the line, and collect what that dooms as if an hour had passed, twice."""
        one = self.one
        log, scratch = one.replicator.points, one.state.disk(one.disk.disk_id).directory / "thin"
        gone: set[str] = set()
        for _ in range(2):
            log.adopt(await one.vault.disk(log.record.id))
            table = await log.line_points()
            now_ns = int(table.time_ns[-1])
            held = {hold.epoch for hold in log.record.holds}
            stays = kept(table.epoch, table.time_ns, LADDER, now_ns, held)
            self.ledger.note("dropped", *table.epoch[~stays].tolist())
            thinner = Thinner(one.vault, log, writer_id=one.state.writer_id, scratch=scratch)
            await thinner.run(LADDER, now_ns, gone=gone)
            await log.line.load()
            assert log.line.ledger is not None
            later_ns = now_ns + (GRACE_S + 1) * NS
            gone = (await collect(one.store, log.line.ledger, later_ns)).gone

    async def leaked(self) -> set[str]:
        """Return the objects below the horizon that no ledger knows of."""
        log = self.one.replicator.points
        await log.line.load()
        found = {info.name async for info in self.one.store.list(f"segments/{log.record.id}/")}
        async for info in self.one.store.list(f"disks/{log.record.id}/g"):
            slot, joined = parse_slot(info.name), parse_joined(info.name)
            epoch = slot[1] if slot is not None else joined[2] if joined is not None else 0
            if epoch < log.line.floor:
                found.add(info.name)
        for piece in log.line.cover:
            opened = await log.tables.piece(piece)
            for number in range(1, opened.objects + 1):
                found.discard((await opened.object_ref(number)).name(log.record.id))
        if log.line.ledger is not None and log.line.ref is not None:
            found -= log.line.ledger.live(log.record.id) | set(log.line.ledger.doomed)
            found.discard(ledger_name(log.record.id, log.generation, log.line.ref.id))
        return found

    def expected(self) -> tuple[bytes, bytes]:
        """Return the bytes after what was acknowledged, and with the change under way."""
        data = bytearray(START)
        done, begun = self.ledger.count("done"), self.ledger.count("begun")
        for number in range(done):
            CHANGES[number].apply_bytes(data)
        before = bytes(data)
        for number in range(done, begun):
            CHANGES[number].apply_bytes(data)
        return before, bytes(data)


@asynccontextmanager
async def acting(root: Path) -> AsyncIterator[Actor]:
    """Give an actor; at the end its process is as good as killed."""
    actor = Actor(root)
    with hooked(actor.one):
        try:
            yield actor
        finally:
            if actor.one.is_open:
                await actor.one.kill()


@dataclass(frozen=True)
class Scenario:
    """``past`` makes the template, ``act`` is what is killed."""

    name: str
    past: Step
    act: Step


async def _nothing(actor: Actor) -> None:
    assert len(START) <= MAX_SIZE
    await actor.one.init(len(START), START)


async def _enabled(actor: Actor) -> None:
    await _nothing(actor)
    await actor.open()
    await actor.ship()


async def _enable(actor: Actor) -> None:
    await actor.open()
    actor.change_between(3)
    await actor.ship()


async def _epochs(actor: Actor) -> None:
    """Writes, a seal with writes during the capture, and an orderly end."""
    await actor.open()
    actor.change(6)
    actor.change_between(3)
    await actor.ship()
    actor.one.image.sync()
    actor.change(2)
    await actor.one.seal()
    await actor.one.stop()


async def _spooled(actor: Actor) -> None:
    await _enabled(actor)
    for _ in range(3):
        actor.change(4)
        await actor.one.seal()
    actor.change(2)


async def _frozen(actor: Actor) -> None:
    await _spooled(actor)
    native.seal([actor.one.image])
    actor.change(1)
    os._exit(0)  # whoever closes a track would give the epoch up


async def _restart(actor: Actor) -> None:
    """A killed daemon left a spool, and an epoch that was sealed and not captured."""
    await actor.open()
    await actor.ship()
    actor.change(1)
    await actor.one.stop()
    await actor.open()
    await actor.ship()


async def _power_cut(actor: Actor) -> None:
    await _spooled(actor)
    (actor.root / "boot").write_text("boot-1")


async def _host_died(actor: Actor) -> None:
    """Frozen and running changes when the host dies; what the intent log says is believed.

    In one process: a copy of the directory has other files, and its log is not believed.
    """
    began = time.monotonic()
    await actor.open()
    actor.change(6)
    await actor.one.seal()
    actor.change(3)
    native.seal([actor.one.image])
    actor.change(2)
    await actor.one.kill()
    settled = time.monotonic() - began > INTENT_STAMP_S
    (actor.root / "boot").write_text("boot-1")
    await actor.open()
    # Where the machine stood still for so long the log may have let go of its regions.
    assert actor.one.replicator.live.counts().suspect_pages or settled
    actor.change_between(2)
    await actor.ship()


async def _resync(actor: Actor) -> None:
    await actor.open()
    actor.change_between(4)
    await actor.ship()
    actor.one.image.suspect_mark(0, MAX_SIZE)
    actor.change(3)
    await actor.one.replicator.cancel_resync()
    await actor.ship()


async def _give_up(actor: Actor) -> None:
    """The spool is full: the epoch is given up; then there is room again."""
    await actor.open()
    actor.change(5)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    actor.change_between(2)
    with mock.patch.object(DeltaWriter, "finish", side_effect=full):
        try:
            await actor.one.seal()
        except LocalError:
            actor.ledger.note("given-up")
    actor.change(1)
    await actor.ship()


async def _fifteen(actor: Actor) -> None:
    await _enabled(actor)
    for _ in range(14):
        actor.change(1)
        actor.one.image.mark(0, 1)
        await actor.ship()


async def _join(actor: Actor) -> None:
    await actor.open()
    for _ in range(2):
        actor.change(1)
        actor.one.image.mark(0, 1)
        await actor.ship()


async def _unthinned(actor: Actor) -> None:
    """Two blocks of points, of which the third is held; those who come next thin."""
    await _enabled(actor)
    for _ in range(20):
        actor.change(1)
        actor.one.image.mark(0, 1)
        await actor.ship()
    log = actor.one.replicator.points
    await hold_point(actor.one.vault, log, (await log.points())[2], "held")
    actor.ledger.note("tended")


async def _thin(actor: Actor) -> None:
    await actor.open()
    await actor.tend()
    # No change under way, that would be sought by a pass: of what that stores some is never used.
    actor.one.image.mark(0, 1)
    await actor.ship()
    await actor.tend()


async def _rolled_back(actor: Actor) -> None:
    """A state directory from before the newest points: they were not made by it."""
    await _enabled(actor)
    await actor.one.stop()
    actor.ledger.note("next-generation")
    old = actor.root / "old"
    shutil.copytree(actor.root / "state-site", old)
    await actor.open()
    actor.change(5)
    await actor.ship()
    await actor.one.stop()
    shutil.rmtree(actor.root / "state-site")
    old.rename(actor.root / "state-site")


async def _left_by_another(actor: Actor) -> None:
    """The site that owns the disk is gone; another one is to go on with a copy of it."""
    await _spooled(actor)
    (actor.root / "site").write_text("other")
    actor.ledger.note("next-generation")


async def _next_generation(actor: Actor) -> None:
    await actor.open()
    actor.change(2)
    await actor.ship()


async def _changed_behind(actor: Actor) -> None:
    """Ended in order, then somebody writes to the image directly."""
    await _enabled(actor)
    actor.change(2)
    await actor.one.stop()
    number = actor.ledger.count("begun")
    actor.ledger.note("begun", number)
    data = bytearray(actor.one.path.read_bytes())
    CHANGES[number].apply_bytes(data)
    actor.one.path.write_bytes(data)
    actor.ledger.note("done", number)


async def _look(actor: Actor) -> None:
    await actor.open()
    await actor.ship()
    await actor.one.stop()


SCENARIOS = {
    one.name: one
    for one in (
        Scenario("enable", _nothing, _enable),
        Scenario("epochs", _enabled, _epochs),
        Scenario("restart", _frozen, _restart),
        Scenario("host", _enabled, _host_died),
        Scenario("resync", _power_cut, _resync),
        Scenario("give-up", _enabled, _give_up),
        Scenario("join", _fifteen, _join),
        Scenario("thin", _unthinned, _thin),
        Scenario("behind", _changed_behind, _look),
        Scenario("takeover", _left_by_another, _next_generation),
        Scenario("generation", _rolled_back, _next_generation),
    )
}
