"""Claims, fences, generations and branches: two writers, and one that is cut off."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.catalog.harness import Bench, bench, content_at
from tests.vaults import PLAIN, newcomer
from vdiskfs.catalog import Branch, DiskLog, DiskRecord, Owner, SiteRecord, check
from vdiskfs.catalog.owners import Claim, add_branch, claim, fence, next_generation, take_over
from vdiskfs.catalog.publish import is_stored
from vdiskfs.catalog.records import decode_disk, encode_disk
from vdiskfs.delta.rehead import rehead
from vdiskfs.errors import ConflictError, FormatError, NotFoundError

pytestmark = pytest.mark.usefixtures("each_vault")

A, B = "a" * 32, "b" * 32
NEVER: frozenset[str] = frozenset()


def claims(writer: str, start: str, known: frozenset[str] = NEVER) -> Claim:
    return Claim(f"site-{writer[0]}", writer, start, known)


def branch(token: str) -> Branch:
    return Branch("site-a", "site-a", A, token, "2026-11-21T01:40:05Z")


async def owned(test: Bench) -> DiskRecord:
    return await claim(test.vault, test.record, claims(A, "a1"))


async def test_a_disk_without_an_owner_is_the_first_claimants() -> None:
    async with bench() as test:
        record = await owned(test)
        assert record.owner is not None
        assert (record.owner.site, record.owner.writer, record.owner.start) == ("site-a", A, "a1")
        with pytest.raises(ConflictError):
            await claim(test.vault, record, claims(B, "b1"))


async def test_an_owner_that_starts_again_keeps_the_time_since_when_it_owns() -> None:
    async with bench() as test:
        record = await owned(test)
        owner = replace(record.owner or Owner("", "", "", ""), since="2020-01-01T00:00:00Z")
        await test.vault.update_disk(record.id, lambda found: replace(found, owner=owner))
        again = await claim(test.vault, record, claims(A, "a2", frozenset({"a1"})))
        assert again.owner == replace(owner, start="a2")


async def test_a_copy_that_does_not_know_the_last_start_may_not_claim() -> None:
    async with bench() as test:
        record = await owned(test)
        await claim(test.vault, record, claims(A, "a2", frozenset({"a1"})))
        with pytest.raises(ConflictError):
            await claim(test.vault, record, claims(A, "a3", frozenset({"a1"})))


async def test_a_fence_is_put_at_the_tip_and_the_writer_is_refused_by_the_store() -> None:
    async with bench() as test:
        await test.publish()
        late = test.model.seal()
        tip = await fence(test.fresh_log(), B, test.scratch)
        assert (tip.epoch, tip.fenced) == (1, True)
        with pytest.raises(ConflictError, match="fence"):
            await test.log.publish(late)
        # Done again, it is found.
        assert await fence(test.fresh_log(), A, test.scratch) == tip


@PLAIN
async def test_a_writer_that_is_faster_than_the_fence_is_fenced_at_its_next_slot() -> None:
    async with bench() as test:
        await test.publish()
        late = [test.model.seal(), test.model.seal()]
        log = test.fresh_log()
        create = test.store.create_from_file

        async def slow(name: str, path: Path, **options: object) -> str:
            if late:
                test.store.create_from_file = create  # type: ignore[method-assign]
                await test.log.publish(late.pop(0))
                test.store.create_from_file = slow  # type: ignore[method-assign]
            return await create(name, path, **options)  # type: ignore[arg-type]

        test.store.create_from_file = slow  # type: ignore[method-assign]
        tip = await fence(log, B, test.scratch)
        assert tip.epoch == 3
        assert await content_at(test.fresh_log(), 3) == test.model.states[3]


async def test_of_two_takeovers_at_once_the_later_one_has_to_be_decided_anew() -> None:
    async with bench() as test:
        await test.publish()
        record = await owned(test)
        tip = await fence(test.fresh_log(), B, test.scratch)
        second = await next_generation(test.vault, record, tip, claims(B, "b1"))
        assert (second.generation, second.parents[2]) == (2, (1, 1))
        with pytest.raises(ConflictError):
            await next_generation(test.vault, record, tip, claims(A, "a2"))
        with pytest.raises(ConflictError):
            await take_over(test.vault, record, claims(A, "a2"), test.vault.log, test.scratch)
        third, at = await take_over(
            test.vault, second, claims(A, "a2"), test.vault.log, test.scratch
        )
        assert (third.generation, third.parents[3], at.epoch) == (3, (2, 1), 1)
        assert third.owner is not None
        assert third.owner.writer == A
        assert (await check(test.vault)).ok


async def test_a_takeover_cut_off_at_any_step_is_finished_by_the_same_call() -> None:
    async with bench() as test:
        await test.publish()
        record = await owned(test)
        await fence(test.fresh_log(), B, test.scratch)
        taken, _ = await take_over(
            test.vault, record, claims(B, "b1"), test.vault.log, test.scratch
        )
        again = await next_generation(
            test.vault, record, await test.fresh_log().tip(), claims(B, "b1")
        )
        assert again == taken
        assert again.generation == 2


async def test_a_branch_is_made_once_for_a_token_and_is_never_the_main_line() -> None:
    async with bench() as test:
        await test.publish()
        await owned(test)
        record, number = await add_branch(test.vault, test.record, (1, 1), branch("t1"))
        assert (record.generation, number, record.branches[2].name) == (1, 2, "site-a-2")
        assert (await add_branch(test.vault, test.record, (1, 1), branch("t1")))[1] == 2
        assert (await add_branch(test.vault, test.record, (1, 1), branch("t2")))[1] == 3
        taken, _ = await take_over(
            test.vault, record, claims(B, "b1"), test.vault.log, test.scratch
        )
        assert taken.generation == 4


async def test_what_was_captured_for_one_generation_is_moved_into_a_branch(tmp_path: Path) -> None:
    async with bench() as test:
        test.model.write(0, b"first" * 1000)
        await test.publish()
        test.model.write(8192, b"second" * 1000)
        late = [test.model.seal(label="mine")]
        test.model.write(0, b"third" * 1000)
        late.append(test.model.seal())
        await fence(test.fresh_log(), B, test.scratch)
        record, number = await add_branch(test.vault, test.record, (1, 1), branch("t1"))
        log = test.vault.log(record, number)
        digest = (await log.tip()).digest
        shared = tmp_path / "shared"
        os.link(late[0].path, shared)
        before = shared.read_bytes()
        for spooled in late:
            moved = rehead(spooled, number, digest)
            assert (moved.head.generation, moved.path) == (number, spooled.path)
            await log.publish(moved)
            assert await is_stored(test.vault.store, moved.head)
            assert not await is_stored(test.vault.store, spooled.head)
            digest = moved.head.to_digest
        # A vault in a folder may hold the same file: it was not written to.
        assert shared.read_bytes() == before
        seen = await test.vault.find_log("web01@site-a-2")
        for epoch in (1, 2, 3):
            assert await content_at(seen, epoch) == test.model.states[epoch]
        assert [point.generation for point in await seen.points()] == [1, number, number]
        assert (await seen.points())[1].label == "mine"
        # The main line does not have them, and ends where it was fenced.
        assert [point.epoch for point in await test.vault.log(record).points()] == [1]
        with pytest.raises(NotFoundError, match="no branch 'other'"):
            await test.vault.find_log("web01@other")
        assert (await check(test.vault, read_data=True)).ok


async def test_the_place_of_an_epoch_is_the_generation_that_made_it() -> None:
    async with bench() as test:
        await test.publish()
        await test.publish()
        record, _ = await take_over(
            test.vault, test.record, claims(B, "b1"), test.vault.log, test.scratch
        )
        log: DiskLog = test.vault.log(record)
        place = await log.place(2)
        assert place is not None
        assert place == (1, test.model.digest)
        assert await log.place(3) is None
        assert (await log.place(0) or (0, b""))[0] == 1


def test_a_record_says_what_it_was_told_and_refuses_what_cannot_be() -> None:
    record = DiskRecord(
        "c" * 32, "web01", "t", "s", "f", 1, generation=2, parents={1: None, 2: (1, 5), 3: (1, 4)},
        owner=Owner("s", A, "n", "t"), branches={3: Branch("s-3", "s", A, "k", "t")},
    )  # fmt: skip
    assert decode_disk(encode_disk(record), record.id, where="x") == record
    for bad in (
        replace(record, branches={2: record.branches[3]}),  # the main line itself
        replace(record, branches={9: record.branches[3]}),  # no generation
        replace(record, branches={3: replace(record.branches[3], name="../etc")}),
        replace(record, branches={3: replace(record.branches[3], name="")}),
    ):
        with pytest.raises(FormatError):
            decode_disk(encode_disk(bad), record.id, where="x")


async def test_two_state_directories_of_one_name_have_a_sign_of_life_each() -> None:
    async with bench() as test:
        one = SiteRecord("berlin", "h", "2026-11-21T01:00:00Z", "1", (), 7, "t", writer=A)
        two = replace(one, writer=B, pid=8)
        vault, other = test.vault, newcomer(test.vault)
        assert not await vault.write_site(one)
        assert not await other.write_site(two)
        assert not await vault.write_site(one)
        assert [found.pid for found in await vault.sites()] == [7, 8]
        assert await vault.site("berlin", B) == two
        assert await vault.site("berlin", "c" * 32) is None
        # A takeover touches it: its writer notices, once.
        await other.touch_site("berlin", A)
        assert await vault.write_site(one)
        assert not await vault.write_site(one)
