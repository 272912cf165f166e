"""Races of writers of one disk, step by step: `race_round` plays one and checks what is left.

Two hosts, and copies of their state directories, write, seal, ship, start, take over, crash
and come back, on one store in memory. One of them runs at a time, and hands on at each
request to the store: the seed decides to whom. Requests fail, or are applied and their
answers lost; processes end at requests and at every crash hook; who asks whether another
one lives is lied to. In the end every epoch that anybody captured must be a point of the
main line or of a branch, byte for byte, and no generation may have had two owners.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast
from unittest import mock

import trio
from trio.testing import wait_all_tasks_blocked

from tests.catalog.memory import MemoryStore
from tests.delta.model import PAGE, T0, DiskModel
from vdiskfs import leftovers, lineclaims, ownership
from vdiskfs.catalog import Owner, Vault, check, moves, owners
from vdiskfs.delta import EpochFacts, Flags, Spooled, open_spooled, remove_spooled
from vdiskfs.errors import StateError, VaultUnreachableError
from vdiskfs.image import ChainEnd
from vdiskfs.leftovers import spooled_deltas
from vdiskfs.liveness import Liveness
from vdiskfs.ownernote import Remembered, Start
from vdiskfs.ownership import DiskLine
from vdiskfs.state import LastEnd

PAGES = 8
STEPS = 30
# A deterministic place in memory: thousands of small files are synced.
SHM = Path("/dev/shm")


class CrashError(Exception):
    """The process ended here."""


@dataclass
class Race:
    """What all hosts of a round share."""

    rng: random.Random
    root: Path
    store: MemoryStore
    counts: Counter[str] = field(default_factory=Counter)
    captured: dict[int, bytes] = field(default_factory=dict)
    by: dict[int, str] = field(default_factory=dict)
    hosts: list[Host] = field(default_factory=list)
    clock: itertools.count[int] = field(default_factory=lambda: itertools.count(T0))
    faults: bool = True
    vault_id: str = ""
    disk_id: str = ""
    _waiting: list[trio.Event] = field(default_factory=list)

    async def turn(self) -> None:
        """Hand on; return when it is this task's turn again."""
        turn = trio.Event()
        self._waiting.append(turn)
        await turn.wait()

    async def referee(self, nursery: trio.Nursery) -> None:
        """Let one task run at a time, until all hosts have ended."""
        begun = 0
        while True:
            while begun < len(self.hosts) and self.faults:
                nursery.start_soon(self.hosts[begun].life)
                begun += 1
            await wait_all_tasks_blocked()
            if not self._waiting:
                return
            self._waiting.pop(self.rng.randrange(len(self._waiting))).set()

    def maybe_crash(self, what: str, chance: float) -> None:
        if self.faults and self.rng.random() < chance:
            self.counts[f"crash at {what}"] += 1
            raise CrashError(what)

    def hook(self, name: str) -> None:
        """Stand in for `vdiskfs.crash.hook`."""
        self.counts[f"passed {name}"] += 1
        self.maybe_crash(name, 0.08)


class HostStore:
    """One host's way to the store: turns, lost requests, lost answers."""

    def __init__(self, race: Race, host: Host) -> None:
        self._race = race
        self._host = host

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._race.store, name)
        if name not in ("create", "create_from_file", "replace", "read", "read_range", "stat"):
            return real

        async def call(*args: Any, **options: Any) -> Any:
            race = self._race
            await race.turn()
            race.maybe_crash("request", 0.015)
            if race.faults and race.rng.random() < 0.02:
                race.counts["request lost"] += 1
                raise VaultUnreachableError("lost on the way")
            result = await real(*args, **options)
            if race.faults and race.rng.random() < 0.02:
                race.counts["answer lost"] += 1
                raise VaultUnreachableError("the answer was lost")
            race.maybe_crash("answer", 0.01)
            return result

        return call

    async def list(self, prefix: str) -> Any:
        await self._race.turn()
        async for info in self._race.store.list(prefix):
            yield info


class Guess(Liveness):
    """Mostly right about who lives."""

    def __init__(self, race: Race, asking: Host) -> None:
        self._race = race
        self._asking = asking

    async def last_sign(self, owner: Owner) -> None:
        return None

    async def is_alive(self, owner: Owner) -> bool:
        truth = any(
            host.line is not None and host is not self._asking and host.writer == owner.writer
            for host in self._race.hosts
        )
        if self._race.faults and self._race.rng.random() < 0.3:
            self._race.counts["lied to"] += 1
            return not truth
        return truth


@dataclass
class Local:
    """What a host keeps beside its directory: record, image, bitmaps; all survive a crash."""

    last: Remembered = field(default_factory=lambda: Remembered(1, 0, ""))
    data: bytes = bytes(PAGES * PAGE)
    dirty: frozenset[int] = frozenset(range(PAGES))
    epoch: int = 1


class Host:
    """A state directory, an image, and the process over them while `line` is set."""

    def __init__(self, race: Race, name: str, writer: str, local: Local) -> None:
        self.race = race
        self.name = name
        self.writer = writer
        self.local = local
        self.directory = race.root / name
        self.line: DiskLine | None = None
        self.last_end = LastEnd.NONE
        self.queue: list[Spooled] = []
        self.end: ChainEnd | None = None
        self.steps = STEPS
        self.saved: tuple[Path, Local] | None = None

    async def life(self) -> None:
        while self.steps > 0:
            self.steps -= 1
            await self.race.turn()
            await self.act(self.pick())

    def pick(self) -> Callable[[], Any]:
        rng = self.race.rng
        if self.line is None:
            return rng.choice([self.start, self.start, self.force, self.roll_back])
        return rng.choices(
            [self.write, self.seal, self.ship, self.look, self.stop, self.kill, self.clone,
             self.save],
            [6, 6, 9, 1, 1, 1, 0.4, 0.7],
        )[0]  # fmt: skip

    async def act(self, action: Callable[[], Any]) -> None:
        try:
            await action()
        except CrashError:
            self.line = None
            self.last_end = self.race.rng.choice([LastEnd.DAEMON_DIED, LastEnd.HOST_DIED])
        except VaultUnreachableError:
            self.race.counts["vault away"] += 1

    def vault(self) -> Vault:
        return Vault(cast("Any", HostStore(self.race, self)), self.race.vault_id, "")

    # ---- what a host does --------------------------------------------------------------

    async def start(self, *, force: bool = False, fork: moves.Fork | None = None) -> None:
        local, spool = self.local, self.directory / "spool"
        newest = max((one.head.to_epoch for one in spooled_deltas(spool)), default=0)
        line = DiskLine(
            vault=self.vault(), name="web01", disk_id=self.race.disk_id, directory=self.directory,
            site=self.name, writer=self.writer, liveness=Guess(self.race, self),
            sleep=self.patience,
        )  # fmt: skip
        try:
            end, known = await line.start(local.last, Start(self.last_end, force, fork=fork))
        except StateError as error:
            if "the vault lacks" in str(error):
                raise
            self.race.counts["refused"] += 1
            return
        self.race.counts["forced" if force else "started"] += 1
        trusted = known and self.last_end is not LastEnd.HOST_DIED
        if self.last_end is LastEnd.DAEMON_DIED and line.moved:
            trusted = False
        if not trusted:
            local.dirty = frozenset(range(PAGES))
        local.last = Remembered(end.generation, end.epoch, end.digest.hex())
        self.queue = []
        for path in sorted(spool.glob("*.delta")):
            one = open_spooled(path)
            if one.head.to_epoch <= end.epoch:
                remove_spooled(one)
                continue
            assert known
            assert one.head.from_epoch == (self.queue[-1].head.to_epoch if self.queue else
                                           end.epoch)  # fmt: skip
            self.queue.append(one)
        self.end = ChainEnd.of(self.queue[-1].head) if self.queue else end
        local.epoch = max(local.epoch, newest + 1, self.end.epoch + 1)
        self.line, self.last_end = line, LastEnd.DAEMON_DIED

    async def force(self) -> None:
        # Takeovers are rare, or nobody would ever ship.
        await self.start(force=self.race.rng.random() < 0.4)

    async def patience(self, _: float) -> None:
        for _ in range(self.race.rng.randrange(4)):
            await self.race.turn()

    async def write(self) -> None:
        rng, data = self.race.rng, bytearray(self.local.data)
        pages = rng.sample(range(PAGES), rng.randrange(1, 4))
        for page in pages:
            data[page * PAGE : (page + 1) * PAGE] = rng.randbytes(16).ljust(PAGE, b"\1")
        self.local.data = bytes(data)
        self.local.dirty |= set(pages)

    async def seal(self) -> None:
        if not self.local.dirty:
            return
        assert self.end is not None
        local, end = self.local, self.end
        model = DiskModel(
            self.directory / "spool", vault_id=self.race.vault_id, disk_id=self.race.disk_id,
            writer_id=self.writer,
        )  # fmt: skip
        model.data = bytearray(local.data)
        time_ns = next(self.race.clock)
        writer = model.writer()
        for batch in model.batches(sorted(local.dirty), 64):
            writer.add(batch)
        spooled = writer.finish(
            EpochFacts(
                generation=end.generation, from_epoch=end.epoch, to_epoch=local.epoch,
                time_ns=time_ns, size=len(local.data), cut=end.size, from_size=end.size,
                from_digest=end.digest, flags=Flags.LABELLED, label=self.name,
            )
        )  # fmt: skip
        self.race.captured[time_ns] = local.data
        self.race.by[time_ns] = self.name
        local.dirty, local.epoch = frozenset(), local.epoch + 1
        self.queue.append(spooled)
        self.end = ChainEnd.of(spooled.head)

    async def ship(self) -> None:
        if not self.queue:
            return
        assert self.line is not None
        captured = self.queue[0]
        spooled = await self.line.publish(captured)
        if self.end == ChainEnd.of(captured.head):
            self.end = ChainEnd.of(spooled.head)
        self.queue[0] = spooled
        self.race.maybe_crash("published", 0.05)
        head = spooled.head
        self.local.last = Remembered(head.generation, head.to_epoch, head.to_digest.hex())
        self.race.maybe_crash("recorded", 0.05)
        remove_spooled(spooled)
        self.queue.pop(0)
        self.race.counts["shipped"] += 1

    async def look(self) -> None:
        assert self.line is not None
        await self.line.look()

    async def stop(self) -> None:
        self.line, self.last_end = None, LastEnd.CLEAN

    async def kill(self) -> None:
        raise CrashError("killed")

    async def save(self) -> None:
        """Keep an older state of the directory: a snapshot."""
        if self.saved is None:
            place = self.race.root / f"saved-{self.name}"
            shutil.copytree(self.directory, place)
            self.saved = (place, self.copied())

    async def roll_back(self) -> None:
        """Restore it; where nothing would be thrown away with what is there."""
        if self.saved is None or any((self.directory / "spool").glob("*.delta")):
            return
        place, local = self.saved
        shutil.rmtree(self.directory)
        place.rename(self.directory)
        # The image is as it is: only what was known of it is older.
        self.local.last, self.local.epoch = local.last, local.epoch
        self.last_end = self.race.rng.choice([LastEnd.CLEAN, LastEnd.HOST_DIED])
        self.local.dirty = frozenset(range(PAGES))
        self.saved = None
        self.race.counts["rolled back"] += 1

    async def clone(self) -> None:
        if len(self.race.hosts) >= 4:
            return
        twin = Host(self.race, f"{self.name}-copy{len(self.race.hosts)}", self.writer,
                    self.copied())  # fmt: skip
        shutil.copytree(self.directory, twin.directory)
        twin.last_end = self.race.rng.choice(list(LastEnd)[1:])
        twin.steps = STEPS // 2
        self.race.hosts.append(twin)
        self.race.counts["cloned"] += 1

    def copied(self) -> Local:
        return Local(self.local.last, self.local.data, self.local.dirty, self.local.epoch)

    async def drain(self) -> None:
        """Ship everything, and end in order."""
        if self.line is not None:
            while self.queue:
                await self.ship()
            await self.stop()

    async def come_back(self) -> None:
        """Start once more: go on, or be refused and leave what was not shipped in a branch."""
        await self.start()
        await self.drain()
        assert not list((self.directory / "spool").glob("*.delta")), self.name
        assert not (self.directory / "set-aside").exists(), self.name


async def verify(race: Race) -> None:
    """Check the vault as it is left."""
    vault = Vault(cast("Any", race.store), race.vault_id, "")
    record = await vault.disk(race.disk_id)
    found: dict[int, list[int]] = {}
    for generation in record.parents:
        log = vault.log(record, generation)
        writers: list[str] = []
        for point in await log.points():
            if point.generation != generation:
                continue
            expected = race.captured[point.time_ns]
            async with await log.open(point) as reader:
                assert bytes(await reader.read_pages(0, PAGES)) == expected, (
                    f"a mixed point: generation {generation}, epoch {point.epoch}"
                )
            found.setdefault(point.time_ns, []).append(generation)
            if not writers or writers[-1] != point.label:
                writers.append(point.label)
        assert len(writers) == len(set(writers)), f"generation {generation}: {writers}"
        race.counts["generations"] += 1
    lost = sorted(set(race.captured) - set(found))
    assert not lost, [(moment, race.by[moment]) for moment in lost]
    report = await check(vault, read_data=True)
    assert report.ok, report.problems
    race.counts["points"] += len(found)
    race.counts["branches"] += len(record.branches)


def _watch_owners(race: Race) -> None:
    """Check each state of disk.json as it is written: one owner a generation, for ever."""
    name = f"disks/{race.disk_id}/disk.json"
    owner_of: dict[int, str] = {}
    put, newest = race.store.put, [0]

    def watched(
        object_name: str, data: Any, metadata: Mapping[str, str] = MappingProxyType({})
    ) -> str:
        if object_name == name:
            values = json.loads(bytes(data))
            generation = values["generation"]
            assert generation >= newest[0]
            newest[0] = generation
            writer = (values["owner"] or {}).get("writer", "")
            assert owner_of.setdefault(generation, writer) in (writer, ""), "two owners"
            owner_of[generation] = writer
            assert str(generation) not in values["branches"]
        return put(object_name, data, metadata)

    race.store.put = watched  # type: ignore[assignment,method-assign]


async def _play(race: Race) -> None:
    vault = await Vault.init(cast("Any", race.store))
    record = await vault.create_disk("web01", file="web01.img", size=0, site="a")
    race.vault_id, race.disk_id = vault.vault_id, record.id
    _watch_owners(race)
    for name in ("a", "b"):
        host = Host(race, name, f"{ord(name):032x}", Local())
        (host.directory / "spool").mkdir(parents=True)
        race.hosts.append(host)
    race.hosts[1].local.data = race.rng.randbytes(PAGE) * PAGES
    async with trio.open_nursery() as nursery:
        await race.referee(nursery)
    # The trouble is over. A copy is refused as long as its original runs: first all end.
    race.faults = False
    for step in (Host.drain, Host.come_back):
        for host in race.hosts:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(step, host)
                await race.referee(nursery)
    await verify(race)


async def inline(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    return function(*args)


@contextmanager
def silence() -> Iterator[None]:
    """Log nothing: what is said of thousands of displacements is nobody's to read."""
    logger = logging.getLogger("vdiskfs")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def race_round(seed: int) -> Counter[str]:
    """Play one race; return what happened in it.

    Raises:
        AssertionError: something was lost, mixed, or owned twice; says the seed.
    """
    rng = random.Random(seed)
    with silence(), tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as root:
        race = Race(rng, Path(root), MemoryStore())
        with (
            mock.patch.object(owners, "hook", race.hook),
            mock.patch.object(ownership, "hook", race.hook),
            mock.patch.object(lineclaims, "hook", race.hook),
            mock.patch.object(moves, "hook", race.hook),
            mock.patch.object(leftovers, "hook", race.hook),
            # In threads the order of steps would be the machine's.
            mock.patch.object(trio.to_thread, "run_sync", inline),
        ):
            try:
                # Also the order in which trio wakes tasks follows the seed.
                trio._core._run._r.seed(seed)
                trio.run(_play, race)
            except BaseException as error:
                error.add_note(f"reproduce: python -m tests.races {seed} {seed}")
                raise
    race.counts["rounds"] += 1
    race.counts["epochs"] += len(race.captured)
    return race.counts


def main() -> None:
    """Play the seeds FIRST to LAST and print what happened."""
    first, last = int(sys.argv[1]), int(sys.argv[2])
    total: Counter[str] = Counter()
    for seed in range(first, last + 1):
        total += race_round(seed)
    for what, count in sorted(total.items()):
        print(f"{count:8} {what}")


if __name__ == "__main__":
    main()
