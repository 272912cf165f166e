"""Forced split-brains of one disk, step by step: `split_round` plays one and checks what is left.

Three sites on one store in memory; a has the disk. At any instant another one fails over, from
any point, or asks for the disk; it changes the point, rolls back, replicates from there, is
failed over from in its turn, gives the disk back. Meanwhile sites are cut off from the store and
write on, learn late that they are displaced, take over by force, crash at every request and hook,
and come back with an older state directory.

Of each state of disk.json: a generation has one owner for ever, and none that was ended is
current again. In the end: every epoch that was captured, and not thrown away by a rollback or a
change of point, is a point of the main line or of a branch, byte for byte; a disk that was
handed over holds the last that was written where it came from; who is not the owner knows it,
and the owner goes on.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast
from unittest import mock

import trio

from tests.catalog.memory import MemoryStore
from tests.races import PAGES, SHM, Race, inline, silence
from tests.splitsites import STEPS, Site
from vdiskfs import handovers, leftovers, lineclaims, ownership
from vdiskfs.catalog import DiskRecord, Vault, check, moves, owners
from vdiskfs.catalog.records import decode_disk

NAMES = ("a", "b", "c")


@dataclass
class Split(Race):
    """What all sites of a round share."""

    released: dict[str, bytes] = field(default_factory=dict)
    thrown: set[int] = field(default_factory=set)
    current: list[int] = field(default_factory=lambda: [1])
    sleeps: int = 0

    async def sleep(self, _: float) -> None:
        """Stand in for `trio.sleep`: whoever waits, waits until it is killed."""
        await self.turn()
        self.maybe_crash("waiting", 0.05)
        self.sleeps += 1
        if not self.faults and self.sleeps % 40 == 0:
            self.faults = True
            try:
                self.maybe_crash("waiting", 1.0)
            finally:
                self.faults = False

    def seen(self) -> DiskRecord:
        """Return the disk's record as it is now; a request of nobody."""
        name = f"disks/{self.disk_id}/disk.json"
        return decode_disk(self.store.objects[name][0], self.disk_id, where=name)

    def watch(self) -> None:
        """Check each state of disk.json as it is written."""
        name = f"disks/{self.disk_id}/disk.json"
        owner_of: dict[int, str] = {}
        put = self.store.put

        def watched(
            object_name: str, data: Any, metadata: Mapping[str, str] = MappingProxyType({})
        ) -> str:
            if object_name == name:
                self._check(decode_disk(bytes(data), self.disk_id, where=name), owner_of)
            return put(object_name, data, metadata)

        self.store.put = watched  # type: ignore[assignment,method-assign]

    def _check(self, record: DiskRecord, owner_of: dict[int, str]) -> None:
        if record.generation != self.current[-1]:
            assert record.generation not in self.current, "a generation that was ended is back"
            self.current.append(record.generation)
        writer = record.owner.writer if record.owner is not None else ""
        assert owner_of.setdefault(record.generation, writer) in (writer, ""), "two owners"
        owner_of[record.generation] = writer
        for number, branch in record.branches.items():
            assert owner_of.setdefault(number, branch.writer) == branch.writer, "a branch of two"
        before = self.seen()
        assert before.parents.items() <= record.parents.items(), "a parent was changed"


async def verify(race: Split) -> None:
    """Check the vault as it is left."""
    vault = Vault(cast("Any", race.store), race.vault_id, "")
    record = await vault.disk(race.disk_id)
    found: dict[int, set[int]] = {}
    read: set[tuple[int, int]] = set()
    for generation in (record.generation, *record.branches):
        log = vault.log(record, generation)
        for point in await log.points():
            if (point.generation, point.epoch) in read:
                continue
            read.add((point.generation, point.epoch))
            async with await log.open(point) as reader:
                assert bytes(await reader.read_pages(0, PAGES)) == race.captured[point.time_ns], (
                    f"a mixed point: generation {point.generation}, epoch {point.epoch}"
                )
            found.setdefault(point.generation, set()).add(point.time_ns)
    for generation, moments in found.items():
        writers = [race.by[one] for one in sorted(moments)]
        assert len({*writers}) == 1, f"generation {generation}: {writers}"
    lost = sorted(set(race.captured) - set().union(*found.values()) - race.thrown)
    assert not lost, [(moment, race.by[moment]) for moment in lost]
    report = await check(vault, read_data=True)
    assert report.ok, report.problems
    race.counts["points"] += len(set().union(*found.values()))
    race.counts["branches"] += len(record.branches)
    race.counts["generations"] += len(record.parents)


async def _play(race: Split) -> None:
    vault = await Vault.init(cast("Any", race.store))
    record = await vault.create_disk("web01", file="web01.img", size=0, site="a")
    race.vault_id, race.disk_id = vault.vault_id, record.id
    race.watch()
    race.hosts.extend(Site(race, name, f"{ord(name):032x}") for name in NAMES)
    async with trio.open_nursery() as nursery:
        await race.referee(nursery)
    # The trouble is over: all come back, and what was begun is ended.
    race.faults = False
    sites = [cast("Site", host) for host in race.hosts]
    for _ in range(4):
        async with trio.open_nursery() as nursery:
            for site in sites:
                nursery.start_soon(site.settle)
            await race.referee(nursery)
    for site in sites:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(site.finish)
            await race.referee(nursery)
    assert race.counts["owner went on"] == 1, "nobody could go on"
    await verify(race)


def split_round(seed: int) -> Counter[str]:
    """Play one split-brain; return what happened in it.

    Raises:
        AssertionError: something was lost, mixed, or owned twice; says the seed.
    """
    rng = random.Random(seed)
    with silence(), tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as root:
        race = Split(rng, Path(root), MemoryStore())
        hooked = (owners, ownership, lineclaims, moves, leftovers, handovers)
        with (
            mock.patch.multiple(handovers, users_of=lambda _: []),
            mock.patch.object(trio, "sleep", race.sleep),
            # In threads the order of steps would be the machine's.
            mock.patch.object(trio.to_thread, "run_sync", inline),
        ):
            patches = [mock.patch.object(module, "hook", race.hook) for module in hooked]
            try:
                for patch in patches:
                    patch.start()
                # Also the order in which trio wakes tasks follows the seed.
                trio._core._run._r.seed(seed)
                trio.run(_play, race)
            except BaseException as error:
                error.add_note(f"reproduce: python -m tests.splitbrain {seed} {seed}")
                raise
            finally:
                for patch in patches:
                    patch.stop()
    race.counts["rounds"] += 1
    race.counts["epochs"] += len(race.captured)
    race.counts["steps"] += STEPS * len(NAMES)
    return race.counts


def main() -> None:
    """Play the seeds FIRST to LAST and print what happened."""
    first, last = int(sys.argv[1]), int(sys.argv[2])
    total: Counter[str] = Counter()
    for seed in range(first, last + 1):
        total += split_round(seed)
    for what, count in sorted(total.items()):
        print(f"{count:8} {what}")


if __name__ == "__main__":
    main()
