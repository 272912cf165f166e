"""grouppoints: points are one instant if one seal made them, and for no other reason."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.catalog.memory import MemoryStore
from tests.delta.model import T0, DiskModel
from tests.vaults import given, newcomer
from vdiskfs.catalog import DiskLog, Vault, group_points, shared_points
from vdiskfs.delta import EpochFacts, Flags
from vdiskfs.delta.names import slot_name
from vdiskfs.errors import NotFoundError, UsageError
from vdiskfs.units import NS, format_time

pytestmark = pytest.mark.usefixtures("each_vault")

NAMES = ("a", "b", "c")


@dataclass
class Disks:
    """Disks whose points a test seals: together, by a number, or alone."""

    store: MemoryStore
    vault: Vault
    models: dict[str, DiskModel]
    logs: dict[str, DiskLog]

    async def seal(
        self, names: Sequence[str], time_ns: int, seal: str = "", flags: Flags = Flags(0)
    ) -> None:
        """Publish a point of each; with one ``seal``, a hex digit, they are of one instant."""
        for name in names:
            model = self.models[name]
            model.write(0, time_ns.to_bytes(8, "little"))
            writer = model.writer()
            for batch in model.batches(sorted(model.dirty), 64):
                writer.add(batch)
            facts = model.facts(time_ns=time_ns, flags=flags)
            values = {key: getattr(facts, key) for key in EpochFacts.__slots__}
            values["group_id"] = (seal or "0") * 32
            await self.logs[name].publish(model.sealed(writer.finish(EpochFacts(**values))))

    async def find(self, name: str) -> DiskLog:
        """Return a log that knows nothing yet."""
        return await newcomer(self.vault).find_log(name)

    async def times(self, names: Sequence[str] = NAMES, **more: int) -> list[int]:
        found = await shared_points(self.find, names, **more)  # type: ignore[arg-type]
        assert all(len({one.time_ns for one in points}) == 1 for points in found)
        return [points[0].time_ns for points in found]


@asynccontextmanager
async def disks_of(directory: Path) -> AsyncIterator[Disks]:
    store = MemoryStore()
    vault = await Vault.init(store, given())
    models, logs = {}, {}
    for name in NAMES:
        record = await vault.create_disk(name, file=name, size=0, site="here")
        spool = directory / name
        spool.mkdir()
        models[name] = DiskModel(spool, vault_id=vault.vault_id, disk_id=record.id)
        logs[name] = vault.log(record)
    yield Disks(store, vault, models, logs)


async def test_points_of_one_seal_are_found_and_no_others(tmp_path: Path) -> None:
    """Neither of equal times by accident, nor of seals of fewer disks, nor of one alone."""
    async with disks_of(tmp_path) as disks:
        await disks.seal(NAMES, 10, "1")
        await disks.seal(NAMES, 20)  # each alone, at one time
        await disks.seal(("a", "b"), 30, "2")
        await disks.seal(("c",), 30, "3")  # another seal at the same time
        await disks.seal(NAMES, 40, "4")
        await disks.seal(("a",), 50, "5")
        assert await disks.times() == [10, 40]
        assert await disks.times(("a", "b")) == [10, 30, 40]
        assert await disks.times(("b", "c")) == [10, 40]
        assert await disks.times(("a",)) == [10, 20, 30, 40, 50]
        assert await disks.times(()) == []


async def test_the_newest_that_all_share_at_or_before_a_time(tmp_path: Path) -> None:
    async with disks_of(tmp_path) as disks:
        for second in range(4):
            await disks.seal(NAMES, T0 + second * NS, str(second + 1))
        await disks.seal(("b",), T0 + 9 * NS)

        async def found(spec: str) -> set[int]:
            points = await group_points(disks.find, NAMES, spec, T0 + 10 * NS)
            assert [one.epoch for one in points] == [points[0].epoch] * 3
            return {(one.time_ns - T0) // NS for one in points}

        assert await found("latest") == {3}
        assert await found(format_time(T0 + NS)) == {1}
        assert await found("-8s") == {2}
        with pytest.raises(NotFoundError, match="a, b, c: no recovery point at or before"):
            await found(format_time(T0 - NS))
        with pytest.raises(NotFoundError, match="no recovery point that all of them share"):
            await found("latest-application-consistent")
        for spec in ("3", "yesterday"):
            with pytest.raises(UsageError):
                await found(spec)
        assert await disks.times(limit=2) == [T0 + 2 * NS, T0 + 3 * NS]
        assert await disks.times(since_ns=T0 + NS, until_ns=T0 + 2 * NS) == [T0 + NS, T0 + 2 * NS]


async def test_an_application_consistent_one_is_that_of_all(tmp_path: Path) -> None:
    async with disks_of(tmp_path) as disks:
        await disks.seal(NAMES, 10, "1", Flags.APPLICATION)
        await disks.seal(NAMES, 20, "2")
        spec = "latest-application-consistent"
        assert [one.time_ns for one in await group_points(disks.find, NAMES, spec, 0)] == [10] * 3


async def test_a_disk_that_joined_later_shares_what_came_after(tmp_path: Path) -> None:
    async with disks_of(tmp_path) as disks:
        await disks.seal(("a", "b"), 10, "1")
        await disks.seal(("c",), 11)
        await disks.seal(NAMES, 20, "2")
        assert await disks.times() == [20]
        assert await disks.times(("a", "b")) == [10, 20]


async def test_where_the_clock_stood_still_the_first_of_a_time_is_the_shared_one(
    tmp_path: Path,
) -> None:
    """A point is never before its predecessor: after a clock was set back many have one time."""
    async with disks_of(tmp_path) as disks:
        await disks.seal(NAMES, 10, "1")
        for _ in range(3):
            await disks.seal(("a",), 10)
        await disks.seal(NAMES, 11, "2")
        await disks.seal(("b",), 11)
        found = await shared_points(disks.find, NAMES)
        assert [[one.epoch for one in points] for points in found] == [[1, 1, 1], [5, 2, 2]]


@pytest.mark.parametrize("joins", [False, True])
async def test_instants_far_back_are_found_among_many_points(tmp_path: Path, joins: bool) -> None:
    """Of disks that have been sealed by themselves since, one much more often than the others."""
    async with disks_of(tmp_path) as disks:
        await disks.seal(NAMES, 1, "1")
        await disks.seal(("a",), 2)
        await disks.seal(NAMES, 3, "2")
        for moment in range(4, 604):
            await disks.seal(("a",), moment)
        await disks.seal(("b",), 400)
        if joins:
            for log in disks.logs.values():
                await log.publish_joins()
        assert await disks.times() == [1, 3]
        assert await disks.times(limit=1) == [3]
        assert await disks.times(since_ns=4) == []
        assert await disks.times(until_ns=2) == [1]


async def test_each_head_is_asked_for_once(tmp_path: Path) -> None:
    """The newest instant costs one small read for each disk beside the lists."""
    async with disks_of(tmp_path) as disks:
        for moment in range(1, 40):
            await disks.seal(NAMES, moment, f"{moment % 15 + 1:x}")
        for log in disks.logs.values():
            await log.points(None, None, 65)

        async def find(name: str) -> DiskLog:
            return disks.logs[name]

        before = disks.store.requests
        await group_points(find, NAMES, "latest", 0)
        assert disks.store.requests - before == len(NAMES)


async def test_a_delta_that_cannot_be_read_proves_nothing(tmp_path: Path) -> None:
    """The instant before it is given."""
    async with disks_of(tmp_path) as disks:
        await disks.seal(NAMES, 10, "1")
        await disks.seal(NAMES, 20, "2")
        record = disks.logs["b"].record
        name = slot_name(record.id, 1, 1)
        data, metadata, _ = disks.store.objects[name]
        forged = bytearray(data)
        forged[64] ^= 1  # the number of the seal
        disks.store.put(name, forged, metadata)
        assert await disks.times() == [10]
