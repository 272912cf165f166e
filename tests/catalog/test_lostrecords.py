"""A disk's name and record are put back, unless somebody may have decided something since."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from tests.catalog.harness import Bench, bench
from tests.vaults import newcomer
from vdiskfs.catalog import Owner, Vault, check, repair
from vdiskfs.catalog.ledger import Ledger, write_ledger
from vdiskfs.catalog.lostrecords import restore_name, restore_record
from vdiskfs.catalog.records import DiskRecord, LedgerRef, encode_disk
from vdiskfs.catalog.report import Healed, Left
from vdiskfs.catalog.swap import disk_object
from vdiskfs.catalog.vault import name_object
from vdiskfs.delta import Flags
from vdiskfs.delta.points import make_points
from vdiskfs.sealed.names import stored_name

pytestmark = pytest.mark.usefixtures("each_vault")

OURS = "ab" * 16


@dataclass
class Owned:
    bench: Bench
    record: DiskRecord
    copy: bytes

    @property
    def vault(self) -> Vault:
        return self.bench.vault

    def lose(self, name: str) -> None:
        del self.bench.store.objects[self.stored(name)]

    def stored(self, name: str) -> str:
        key = self.bench.vault.key
        return name if key is None else stored_name(key, name)

    async def restore(self, *, age_s: float = 0, dry_run: bool = False) -> Healed | Left | None:
        return await restore_record(
            self.vault, "web01", self.record.id, [b"junk", self.copy], OURS, age_s=age_s,
            dry_run=dry_run,
        )  # fmt: skip

    async def refusal(self) -> str:
        """Return why the record is not put back."""
        self.lose(disk_object(self.record.id))
        found = await self.restore()
        assert isinstance(found, Left)
        assert self.stored(disk_object(self.record.id)) not in self.bench.store.objects
        return found.why


@asynccontextmanager
async def owned() -> AsyncIterator[Owned]:
    async with bench() as test:
        owner = Owner("here", OURS, "cd" * 16, "2026-11-22T00:00:00Z")
        record = await test.vault.update_disk(
            test.record.id, lambda found: replace(found, owner=owner)
        )
        await test.churn(3)
        yield Owned(test, record, encode_disk(record))


async def test_a_record_that_is_gone_or_damaged_is_put_back_from_its_owners_copy() -> None:
    async with owned() as one:
        where = disk_object(one.record.id)
        assert await one.restore() is None
        one.lose(where)
        report = await check(one.vault)
        assert [problem.object for problem in report.problems] == [where]
        assert isinstance(await one.restore(dry_run=True), Healed)
        assert one.stored(where) not in one.bench.store.objects
        assert isinstance(await one.restore(), Healed)
        assert await one.vault.disk(one.record.id) == one.record
        one.bench.store.put(one.stored(where), b"{")
        assert isinstance(await one.restore(), Healed)
        assert (await check(one.vault)).ok


async def test_an_old_copy_is_put_back_without_its_policy() -> None:
    """A hold may have been set since: nothing is thinned until somebody has looked."""
    async with owned() as one:
        one.copy = encode_disk(replace(one.record, policy="daily"))
        for age_s, policy in ((60, "daily"), (600, ""), (-60, "")):
            one.lose(disk_object(one.record.id))
            found = await one.restore(age_s=age_s)
            assert isinstance(found, Healed)
            assert ("without its policy daily" in found.problem.message) == (not policy)
            assert await one.vault.disk(one.record.id) == replace(one.record, policy=policy)


async def test_a_name_that_is_gone_or_damaged_is_put_back() -> None:
    async with owned() as one:
        where = name_object("web01")
        args = (one.vault, "web01", one.record.id)
        assert await restore_name(*args, dry_run=False) is None
        written = await one.vault.store.read(where)
        one.lose(where)
        assert isinstance(await restore_name(*args, dry_run=True), Healed)
        assert one.stored(where) not in one.bench.store.objects
        assert isinstance(await restore_name(*args, dry_run=False), Healed)
        assert await one.vault.find_disk("web01") == one.record
        assert (await one.vault.store.read(where))[0] == written[0]
        one.bench.store.put(one.stored(where), b"")
        assert isinstance(await restore_name(*args, dry_run=False), Healed)
        assert [record.id for record in await one.vault.disks()] == [one.record.id]


async def test_a_disk_whose_name_is_gone_is_found_and_repaired_without_a_mount() -> None:
    async with owned() as one:
        where = name_object("web01")
        written = await one.vault.store.read(where)
        one.lose(where)
        report = await check(newcomer(one.vault))
        [problem] = report.problems
        assert (problem.object, problem.disk, problem.points) == (where, "web01", {})
        assert problem.message == f"is missing: only its id leads to {one.record.id}"
        assert (report.disks, report.points) == (1, 3), "the disk is checked all the same"
        planned = await repair(newcomer(one.vault), dry_run=True)
        assert [healed.problem.object for healed in planned.healed] == [where]
        assert one.stored(where) not in one.bench.store.objects
        done = await repair(newcomer(one.vault))
        assert ([healed.problem.object for healed in done.healed], done.left) == ([where], [])
        assert (await one.vault.store.read(where))[0] == written[0]
        assert (await check(newcomer(one.vault))).ok


async def test_a_disk_without_name_and_record_is_found_by_its_points() -> None:
    async with owned() as one:
        where = disk_object(one.record.id)
        one.lose(name_object("web01"))
        one.lose(where)
        [problem] = (await check(newcomer(one.vault))).problems
        assert (problem.object, problem.points) == (where, {1: [1, 2, 3]})


async def test_a_name_that_another_disk_has_taken_stays_that_ones() -> None:
    async with owned() as one:
        one.lose(name_object("web01"))
        other = await one.vault.create_disk("web01", file="b.img", size=0, site="there")
        report = await check(newcomer(one.vault))
        assert [problem.message for problem in report.problems] == [
            f"is the name of another disk, {other.id}: only its id leads to {one.record.id}"
        ]
        done = await repair(newcomer(one.vault))
        assert [left.problem.object for left in done.left] == [name_object("web01")]
        assert await one.vault.find_disk("web01") == other


async def test_a_record_is_not_put_back_after_a_takeover() -> None:
    async with owned() as one:
        model = one.bench.model
        writer = model.writer()
        facts = model.facts(flags=Flags.FENCE)
        fence = writer.finish(replace(facts, to_epoch=facts.from_epoch))
        await one.bench.log.publish(fence)
        assert "taken the disk over" in await one.refusal()


async def test_a_record_is_not_put_back_after_a_line_was_begun() -> None:
    async with owned() as one:
        one.bench.store.put(f"disks/{one.record.id}/g00000002/{3:016x}", b"a delta")
        assert "a line was begun" in await one.refusal()


async def test_a_record_is_not_put_back_after_its_points_were_thinned() -> None:
    async with owned() as one:
        empty = Ledger(1, 0, 0, 0, 1, (), (), make_points([]))
        await write_ledger(one.vault.store, one.record.id, empty)
        assert "thinned since" in await one.refusal()


async def test_a_record_is_not_put_back_after_a_ledger_of_the_same_time() -> None:
    async with owned() as one:
        empty = Ledger(1, 0, 0, 0, 1, (), (), make_points([]))
        store, disk_id = one.vault.store, one.record.id
        first = await write_ledger(store, disk_id, empty)
        one.copy = encode_disk(replace(one.record, ledgers={1: LedgerRef(first, 0)}))
        await write_ledger(store, disk_id, replace(empty, serial=1))
        assert "thinned since" in await one.refusal()


async def test_a_record_of_another_owner_is_not_put_back() -> None:
    async with owned() as one:
        assert one.record.owner is not None
        theirs = replace(one.record, owner=replace(one.record.owner, writer="ef" * 16))
        one.copy = encode_disk(theirs)
        assert "another site owned" in await one.refusal()
