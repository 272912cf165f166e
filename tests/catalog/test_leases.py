"""Leases: what a command reads is not thinned away meanwhile, and is let go when it has ended."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import trio

from tests.catalog.harness import bench, content
from tests.catalog.memory import MemoryStore
from tests.catalog.test_thinning import Site
from tests.catalog.test_upkeep import Tender
from tests.vaults import FILE_KEY, is_encrypted, newcomer
from vdiskfs.catalog import SiteRecord, Vault, check, leases, repair, walk
from vdiskfs.catalog.garbage import GRACE_S
from vdiskfs.catalog.leases import (
    OLD_S,
    SITE_S,
    Lease,
    decode_lease,
    leased,
    leased_whole,
)
from vdiskfs.catalog.look import look
from vdiskfs.catalog.records import WHOLE_LINE
from vdiskfs.crypto import Secrets
from vdiskfs.errors import FormatError, RefusedError
from vdiskfs.sealed import Seen
from vdiskfs.units import NS, format_time

pytestmark = pytest.mark.usefixtures("each_vault")

POINT = 13
"""One that the ladder drops."""

YEAR_S = 366 * 86400
LOST = "1f" * 16


class Bed:
    """A disk of 100 points; whoever reads one, and whoever tends it, have vaults of their own."""

    def __init__(self, site: Site, tender: Tender) -> None:
        self.site = site
        self.tender = tender

    @property
    def names(self) -> list[str]:
        return [name for name in self.tender.test.store.objects if name.startswith("leases/")]

    async def lease(self) -> Lease:
        store = newcomer(self.site.bench.vault).store
        (name,) = [info.name async for info in store.list("leases/")]
        return decode_lease((await store.read(name))[0], where=name)

    async def is_doubted(self) -> bool:
        return (await self.lease()).doubted

    async def open_points(self) -> set[tuple[int, int]]:
        vault = self.tender.upkeep.vault
        return await leases.open_points(vault, await self.site.record(), self.tender.store_ns)

    async def epochs(self) -> list[int]:
        return [point.epoch for point in await (await self.site.log()).points()]

    async def tend_at(self, seconds: float) -> int:
        self.tender.at(seconds)
        return (await self.tender.tend()).collected.deleted

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Any]:
        log = await self.site.log()
        point = await log.find(POINT)
        vault = self.site.bench.vault
        async with leased(vault, [(log.record, point)], "test"), await log.open(point) as reader:
            yield reader

    async def abandon(self) -> None:
        """Read, and be killed: nothing is cleared away."""
        before = {}
        async with self.reading():
            before = {name: self.tender.test.store.objects[name] for name in self.names}
        for name, (data, metadata, _) in before.items():
            self.tender.test.store.put(name, data, metadata)


async def renewed(one: Bed) -> None:
    while await one.is_doubted():  # noqa: ASYNC110  nobody tells
        await trio.sleep(0.001)


@asynccontextmanager
async def bed(directory: Path) -> AsyncIterator[Bed]:
    async with bench() as test:
        found = Bed(Site(test, directory, random.Random(7)), Tender(test, directory))
        await found.site.publish(100)
        found.tender.at(101)
        yield found


async def test_what_a_command_reads_stays_until_it_has_ended(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        async with one.reading() as reader:
            await one.tend_at(101)
            assert await one.tend_at(102 + GRACE_S) > 50
            assert POINT in await one.epochs()
            assert await content(reader) == one.site.bench.model.states[POINT]
        assert one.names == []
        await one.tend_at(103 + GRACE_S)
        assert POINT not in await one.epochs()


async def test_what_was_thinned_away_just_before_can_be_read_to_the_end(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        log = await one.site.log()
        point = await log.find(POINT)
        async with await log.open(point) as reader:
            await one.tend_at(101)
            assert POINT not in await one.epochs()
            async with leased(one.site.bench.vault, [(log.record, point)], "test"):
                assert await one.tend_at(102 + GRACE_S) == 0
                assert await content(reader) == one.site.bench.model.states[POINT]
        assert await one.tend_at(103 + GRACE_S) > 50


async def test_a_lease_that_nobody_renews_lapses(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        await one.abandon()
        await one.tend_at(100 + OLD_S)
        assert not await one.is_doubted()
        await one.tend_at(102 + OLD_S)
        assert await one.is_doubted()
        await one.tend_at(101 + 2 * OLD_S)
        assert POINT in await one.epochs()
        await one.tend_at(103 + 2 * OLD_S)
        assert POINT not in await one.epochs()
        assert one.names == []


async def test_what_is_open_of_a_branch_is_a_point_of_the_line_that_it_is_on(
    tmp_path: Path,
) -> None:
    async with bed(tmp_path) as one:
        record = replace(await one.site.record(), parents={1: None, 2: (1, 50)})
        now, vault = one.tender.store_ns, one.tender.upkeep.vault
        await vault.write_site(SiteRecord(
            site="b", host="b", time=format_time(now), version="1", disks=(), pid=1, started="",
            writer="dd" * 16, uses=((record.id, 2, 50), (record.id, 2, 51)),
        ))  # fmt: skip
        assert await leases.open_points(vault, record, now) == {(1, 50), (2, 51)}


async def test_a_lease_that_was_written_in_the_future_lapses_too(tmp_path: Path) -> None:
    """By a clock that was put right since."""
    async with bed(tmp_path) as one:
        one.tender.at(101 + YEAR_S)
        await one.abandon()
        await one.tend_at(101)
        assert await one.is_doubted()
        await one.tend_at(101 + OLD_S)
        assert POINT in await one.epochs()
        await one.tend_at(103 + OLD_S)
        assert POINT not in await one.epochs()


async def test_a_clock_that_jumps_takes_no_lease_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEW_S", 0.001)
    async with bed(tmp_path) as one, one.reading() as reader:
        for ahead_s in (YEAR_S, 2 * YEAR_S, 0):  # set back, too
            one.tender.at(101 + ahead_s)
            for _ in range(2):
                assert (1, POINT) in await one.open_points()
            await renewed(one)
        await one.tend_at(101)
        assert await content(reader) == one.site.bench.model.states[POINT]


async def test_a_lease_that_cannot_be_read_stops_thinning_for_an_hour(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        name = f"leases/{LOST}" if is_encrypted() else "leases/damaged.json"
        one.tender.test.store.put(name, b"{")
        with pytest.raises(FormatError, match=rf"leases/({LOST}|damaged\.json): "):
            await one.tend_at(100 + OLD_S)
        await one.tend_at(102 + OLD_S)
        assert one.names == []
        assert POINT not in await one.epochs()


async def test_a_dry_run_leaves_leases_as_they_are(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        await one.abandon()
        before = await one.lease()
        one.tender.at(102 + OLD_S)
        await one.tender.tend(dry_run=True)
        assert await one.lease() == before


async def test_a_key_that_may_only_read_reads_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("@#13 may be thinned away meanwhile: there is no lease: the vault refused")

    async def refuse(*_: object, **__: object) -> str:
        raise RefusedError("the vault refused")

    async with bed(tmp_path) as one:
        with monkeypatch.context() as patched:
            patched.setattr(one.site.bench.vault.store, "replace", refuse)
            async with one.reading() as reader:
                assert one.names == []
                assert await content(reader) == one.site.bench.model.states[POINT]


@contextmanager
def looked_meanwhile(step: Callable[[], Awaitable[None]]) -> Iterator[None]:
    """Do something each time when a check is about to look at a delta."""

    async def looked(*args: Any) -> Any:
        await step()
        return await look(*args)

    with mock.patch.object(walk, "look", looked):
        yield


async def test_what_a_check_reads_is_thinned_and_not_deleted(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        await one.tend_at(101)
        before = set(one.tender.test.store.objects)
        dropped: list[int] = []

        async def tend() -> None:
            if len(dropped) < 3:
                await one.site.publish(20)
                one.tender.at(200 + GRACE_S + len(dropped) * 30)
                tended = await one.tender.tend()
                assert tended.collected.deleted == 0
                dropped.append(tended.thinned.points)

        vault = newcomer(one.site.bench.vault)
        with looked_meanwhile(tend):
            report = await check(vault, read_data=True)
        assert report.problems == []
        assert sum(dropped) > 20
        assert before <= set(one.tender.test.store.objects)
        assert one.names == []
        assert await one.tend_at(300 + GRACE_S) > 50


async def test_a_check_that_is_interrupted_lets_go(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        held = []
        with trio.CancelScope() as scope:

            async def interrupt() -> None:
                held.extend(one.names)
                scope.cancel()
                await trio.lowlevel.checkpoint()

            with looked_meanwhile(interrupt):
                await check(newcomer(one.site.bench.vault), read_data=True)
        assert len(held) == 1
        assert one.names == []


async def test_a_check_without_a_lease_does_not_take_thinning_for_damage(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        vault = newcomer(one.site.bench.vault)
        await one.tend_at(101)
        deleted: list[int] = []
        write = vault.store.replace

        async def refuse(name: str, *args: Any, **rest: Any) -> str:
            if name.startswith("leases/"):
                raise RefusedError("the vault refused")
            return await write(name, *args, **rest)

        async def tend() -> None:
            if not deleted:
                await one.site.publish(20)
                one.tender.at(200 + GRACE_S)
                await one.tender.tend()
                deleted.append(await one.tend_at(201 + 2 * GRACE_S))

        with looked_meanwhile(tend), mock.patch.object(vault.store, "replace", refuse):
            report = await check(vault, read_data=True)
        assert deleted[0] > 0
        assert report.problems == []


async def test_each_line_of_a_disk_that_is_read_as_a_whole_is_kept() -> None:
    async with bench() as test:
        record = await test.vault.update_disk(
            test.record.id, lambda old: replace(old, generation=2, parents={1: None, 2: (1, 9)})
        )
        async with leased_whole(test.vault, record, "test"):
            found = await leases.open_points(test.vault, record, test.store.now_ns)
        assert found == {(1, WHOLE_LINE), (2, WHOLE_LINE)}


async def test_who_may_not_delete_leaves_a_lease_that_holds_nothing(tmp_path: Path) -> None:
    async def refuse(*_: object) -> None:
        raise RefusedError("the vault refused")

    async with bed(tmp_path) as one:
        with mock.patch.object(one.site.bench.vault.store, "delete", refuse):
            async with one.reading():
                assert await one.open_points() == {(1, POINT)}
        assert len(one.names) == 1
        assert await one.open_points() == set()


async def test_a_repair_reads_under_a_lease_a_dry_run_without(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        for dry_run in (False, True):
            held: list[str] = []

            async def note(held: list[str] = held) -> None:
                held.extend(one.names)

            with looked_meanwhile(note):
                assert (await repair(newcomer(one.site.bench.vault), dry_run=dry_run)).ok
            assert bool(held) == (not dry_run)
            assert one.names == []


async def test_leases_of_an_encrypted_vault_are_renewed_whatever_the_clocks_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who thins has a clock that is ahead of that of the command, and so are its revisions."""
    monkeypatch.setattr(leases, "RENEW_S", 0.001)
    store, key = MemoryStore(), Secrets(file_key=FILE_KEY)
    mine = await Vault.init(store, key)
    ahead = Seen(clock=lambda: time.time_ns() + YEAR_S * NS)
    theirs = await Vault.open(store, key, seen=lambda _: ahead)
    disk = await mine.create_disk("web01", file="web01.img", size=0, site="here")
    point: Any = SimpleNamespace(generation=1, epoch=POINT)
    async with leased(mine, [(disk, point)], "test"):
        (name,) = [name for name in store.objects if name.startswith("leases/")]
        for number in (1, 2, 3):
            store.now_ns = number * YEAR_S * NS
            assert await leases.open_points(theirs, disk, store.now_ns) == {(1, POINT)}
            doubted = store.objects[name]
            while store.objects[name] == doubted:  # noqa: ASYNC110  nobody tells
                await trio.sleep(0.001)
    assert name not in store.objects


async def test_a_heartbeat_that_cannot_be_read_counts_for_a_week(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        store = one.tender.test.store
        now = one.tender.store_ns
        await one.site.bench.vault.write_site(
            SiteRecord("gone", "host", "2026-01-01T00:00:00Z", "1", (), 7, "", "ab" * 16)
        )
        [name] = [name for name in store.objects if name.startswith("sites/")]
        data, metadata, _ = store.objects[name]
        store.put(name, data[:20] + bytes([data[20] ^ 1]) + data[21:], metadata)
        vault, record = one.tender.upkeep.vault, await one.site.record()
        with pytest.raises(FormatError, match="nothing is thinned"):
            await leases.open_points(vault, record, now + (SITE_S - 1) * NS)
        assert await leases.open_points(vault, record, now + SITE_S * NS) == set()
