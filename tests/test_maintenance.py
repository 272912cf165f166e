"""What maintenance does where a disk cannot be thinned, and what it says of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import trio
from trio.testing import MockClock

from tests.catalog.harness import Bench, bench
from vdiskfs.catalog.garbage import Collected
from vdiskfs.catalog.policy import Policy, changed_policy, set_policy
from vdiskfs.catalog.records import Owner
from vdiskfs.catalog.thinning import Thinned
from vdiskfs.catalog.upkeep import Tended, choose_policy
from vdiskfs.errors import ConflictError, DamagedError, VaultUnreachableError
from vdiskfs.events import Events
from vdiskfs.health import Health
from vdiskfs.jobs import Jobs
from vdiskfs.maintenance import Maintenance


async def test_a_vault_that_keeps_what_is_due_is_told_of_once(tmp_path: Path) -> None:
    site: Any = SimpleNamespace(
        vault=SimpleNamespace(vault_id="5" * 32, store=None),
        state=SimpleNamespace(writer_id="w", documents=tmp_path / "documents"),
        pace=SimpleNamespace(compression_level=1),
    )  # fmt: skip
    for _ in range(2):  # as over a restart, with two disks and two turns each
        events = Events(tmp_path)
        maintenance = Maintenance(site, list, events, Jobs(tmp_path))
        for name in ("web01", "web02") * 2:
            disk: Any = SimpleNamespace(name=name)
            await maintenance._tell_kept(disk, 7)
    found = events.since(0, 100)
    assert [(one.code, one.count, one.disk) for one in found] == [("thinning.kept", 1, "web01")]
    assert "7 objects" in found[0].text


async def free() -> None:
    """Take no time."""


class Mount:
    """Maintenance of two disks of a vault in memory; what tending them comes to is told."""

    def __init__(self, test: Bench, directory: Path) -> None:
        self.test = test
        self.fails: dict[str, Exception] = {}
        self.tended: list[str] = []
        self.swept: list[str] = []
        self.renewed = 0
        self.sweep_fails: Exception | None = None
        self.levels: set[int] = set()
        self.takes: list[Any] = []
        self.slow: dict[str, Callable[[], Awaitable[None]]] = {}
        pace = SimpleNamespace(compression_level=1)
        state = SimpleNamespace(
            writer_id="cc" * 16, documents=directory / "documents",
            disk=lambda disk_id: SimpleNamespace(directory=directory / disk_id),
        )  # fmt: skip
        site: Any = SimpleNamespace(vault=test.vault, state=state, pace=pace)
        self.site = site
        self.disks: list[Any] = []
        self.events = Events(directory)
        self.jobs = Jobs(directory)
        self.maintenance = Maintenance(site, lambda: self.disks, self.events, self.jobs)
        self.maintenance._upkeep = Mock(tend=self._tend, sweep=self._sweep)

    async def add(self, name: str) -> Any:
        vault = self.test.vault
        owner = Owner("here", self.site.state.writer_id, "1" * 32, "")
        record = await vault.create_disk(name, file=name, size=0, site="here", owner=owner)
        record = await choose_policy(vault, record.id, "default")
        disk = SimpleNamespace(
            name=name, disk_id=record.id, started=True, site=self.site, health=Health(name),
            points=vault.log(record), line=SimpleNamespace(displaced=None), replicator=Mock(),
        )  # fmt: skip
        disk.replicator.shipper.is_bounded = False
        disk.replicator.suspects.renew = self._renew
        self.disks.append(disk)
        return disk

    async def _tend(
        self, log: Any, ladder: Any, scratch: Path, *, compression_level: int, take: Any
    ) -> Tended:
        del ladder, scratch
        self.takes.append(take)
        self.levels.add(compression_level)
        self.tended.append(log.record.name)
        await self.slow.get(log.record.name, free)()
        if (error := self.fails.get(log.record.name)) is not None:
            raise error
        return Tended(Thinned(log.generation, 0, 0, None, 1), Collected())

    async def _sweep(self, disk_id: str) -> Collected:
        self.swept.append(disk_id)
        if self.sweep_fails is not None:
            raise self.sweep_fails
        return Collected(deleted=2 * (len(self.swept) == 3))

    async def _renew(self) -> None:
        self.renewed += 1

    async def turn(self) -> None:
        """Have a turn, and wait for those that are tended aside."""
        async with trio.open_nursery() as nursery:
            await self.maintenance.turn(nursery)

    async def minutes(self, count: int, clock: MockClock) -> list[str]:
        """Return which disks were tended in so many turns, one each minute."""
        self.tended = []
        for _ in range(count):
            await self.turn()
            clock.jump(60)
        return self.tended


@pytest.fixture
async def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mount]:
    monkeypatch.setattr("vdiskfs.maintenance.follow", Mock())
    async with bench() as test:
        yield Mount(test, tmp_path)


async def test_damage_is_met_by_the_retry_table_and_makes_a_disk_critical(
    mount: Mount, mock_clock: MockClock, expect_log: Any
) -> None:
    expect_log("not thinned: g0/5: damaged")
    disk, other = await mount.add("db01"), await mount.add("web02")
    mount.fails["db01"] = DamagedError("g0/5: damaged")
    tended = await mount.minutes(240, mock_clock)
    # At 0, 1, 3, 7, 15, 25, 55 minutes, and so on.
    assert tended.count("db01") == 7 + 6
    assert tended.count("web02") == 16
    assert str(disk.health.level) == "Critical"
    assert disk.health.last_error == (
        "not thinned: g0/5: damaged; vdiskfs vault repair --disk db01; "
        "then: vdiskfs disk retry db01"
    )
    assert list(disk.health.conditions()) == ["chain.damaged"]
    assert str(other.health.level) == "Normal"
    assert not mount.events.since(0, 100), "the condition is the event"
    # It is healed: nobody has to say so.
    mount.fails.clear()
    await mount.minutes(31, mock_clock)
    assert str(disk.health.level) == "Normal"
    # And who has healed it, or asks, does not wait.
    mount.fails["db01"] = DamagedError("g0/5: damaged")
    await mount.minutes(60, mock_clock)
    disk.health.retry_now()
    assert await mount.minutes(1, mock_clock) == ["db01"]


@pytest.mark.parametrize("error", [OverflowError("int too large"), RuntimeError("oops")])
async def test_whatever_ends_the_turn_of_a_disk_the_others_have_theirs(
    mount: Mount, mock_clock: MockClock, expect_log: Any, error: Exception
) -> None:
    expect_log("disk db01: is not thinned")
    await mount.add("db01")
    await mount.add("web02")
    mount.fails["db01"] = error
    assert await mount.minutes(2, mock_clock) == ["db01", "web02", "db01"]
    (event,) = mount.events.since(0, 100)
    assert (event.code, event.disk) == ("thinning.failed", "db01")
    assert str(error) in event.text


async def test_a_vault_that_is_away_is_not_told_of_as_damage(
    mount: Mount, mock_clock: MockClock, expect_log: Any
) -> None:
    expect_log("is not thinned: no route")
    disk = await mount.add("db01")
    mount.fails["db01"] = VaultUnreachableError("no route")
    assert len(await mount.minutes(5, mock_clock)) == 3
    assert str(disk.health.level) == "Normal"
    assert not mount.events.since(0, 100)


async def test_leaves_are_compressed_and_sent_as_the_policy_says(mount: Mount) -> None:
    def change(policy: Policy) -> Policy:
        return changed_policy(policy, {"compression_level": "11"})

    await set_policy(mount.test.vault.store, "default", change)
    disk = await mount.add("db01")
    await mount.turn()
    assert mount.levels == {11}
    assert mount.takes == [disk.replicator.shipper.take_aside], "the bandwidth is the disk's"


async def test_a_disk_that_may_send_only_slowly_keeps_nobody_from_his_turn(
    mount: Mount, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    expect_log("disk db01: is not thinned")
    following = Mock()
    monkeypatch.setattr("vdiskfs.maintenance.follow", following)
    disk, other = await mount.add("db01"), await mount.add("web02")
    done = trio.Event()
    disk.replicator.shipper.is_bounded, mount.slow["db01"] = True, done.wait
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            await mount.maintenance.turn(nursery)
            mock_clock.jump(60)
        # All follow their policies, one is thinned once more, and the other is at it still.
        assert [one.args[0] for one in following.call_args_list] == 20 * [disk, other]
        assert sorted(mount.tended) == ["db01", "web02", "web02"]
        mount.fails["db01"] = RuntimeError("too much")
        done.set()
    assert [one.disk for one in mount.events.since(0, 100)] == ["db01"]
    mount.fails.clear()
    assert "db01" in await mount.minutes(3, mock_clock)


async def test_once_a_day_segments_are_looked_at_and_each_minute_what_a_pass_has_stored(
    mount: Mount, mock_clock: MockClock, expect_log: Any
) -> None:
    expect_log("disk db01: is not thinned")
    disk = await mount.add("db01")
    await mount.minutes(30, mock_clock)
    assert (mount.swept, mount.renewed) == ([disk.disk_id], 30)
    mock_clock.jump(86400)
    mount.sweep_fails = ConflictError("its writer claims all the time")
    await mount.minutes(1, mock_clock)
    assert len(mount.swept) == 2
    mount.sweep_fails = None
    # Tried again soon; and thinning has had its turns.
    assert "db01" in await mount.minutes(16, mock_clock)
    assert len(mount.swept) == 3
    (job,) = [job for job in mount.jobs.all() if "segments deleted" in str(job)]
    assert "2 segments deleted that no point ever named" in str(job)


async def test_what_is_doubted_is_known_while_a_disk_is_thinned_aside(
    mount: Mount, mock_clock: MockClock
) -> None:
    """For weeks, where it may send only slowly; who thins it has a record of his own."""
    disk, done = await mount.add("db01"), trio.Event()
    disk.replicator.shipper.is_bounded, mount.slow["db01"] = True, done.wait
    async with trio.open_nursery() as nursery:
        await mount.maintenance.turn(nursery)
        await mount.test.vault.log(disk.points.record).claims.need(["ab" * 8])
        assert not disk.points.claims.holds("ab" * 8)
        mock_clock.jump(60)
        await mount.maintenance.turn(nursery)
        assert disk.points.claims.holds("ab" * 8)
        done.set()
