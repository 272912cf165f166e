"""What is damaged in a vault is healed from where its bytes are still known."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.catalog.damage import Here, Site, kind_of, site, thin
from tests.catalog.harness import bench, content_at
from tests.delta.model import PAGE
from tests.vaults import is_encrypted, newcomer
from vdiskfs.catalog import IndexCache, healer, reframe, repair
from vdiskfs.catalog.ledger import read_ledger, write_ledger
from vdiskfs.catalog.proofs import proof_name
from vdiskfs.catalog.publish import keep_tail
from vdiskfs.delta import open_spooled
from vdiskfs.delta.layout import decode_head, encode_head
from vdiskfs.errors import DamagedError, NotFoundError, RefusedError, VaultUnreachableError

pytestmark = pytest.mark.usefixtures("each_vault")


ALL = (0, 1 << 62)
KINDS = ["slot"] * 6 + ["segment", "leaf", "joined"] * 3 + ["ledger", "record", "name"]


class Killed:
    """A hook at which the program ends when it was passed so often."""

    def __init__(self, after: int) -> None:
        self._left = after

    def __call__(self, _: str) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt


@contextmanager
def immutable(one: Site) -> Iterator[None]:
    """Let the vault refuse to replace what is there; what is missing may be created."""
    replace_object = one.bench.store.replace

    async def refuse(name: str, data: bytes, *, etag: str | None, **rest: Any) -> str:
        if etag is not None:
            raise RefusedError(f"the vault refused: {name}: BlobImmutableDueToPolicy")
        return await replace_object(name, data, etag=etag, **rest)

    with mock.patch.object(one.bench.store, "replace", refuse):
        yield


def held_and_gone(one: Site) -> tuple[str, str]:
    """Return a slot of which the source lacks pages, and one of which it has all."""
    slots = [name for name in one.names("slot")[:-1] if name in one.frames]
    has = {name: one.has(name, ALL) for name in slots}
    gone = [name for name in slots if not has[name]]
    return gone[-1], next(name for name in slots if has[name])


def named(one: Site, report_hurt: list[tuple[str, int, int]]) -> set[int]:
    assert {disk for disk, _, _ in report_hurt} <= {"web01"}
    return {epoch for _, _, epoch in report_hurt}


async def test_of_100_random_damages_those_are_healed_whose_pages_the_source_has(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """The check names exactly the points hurt, the repair heals them to the same bytes."""
    seed = random.randrange(1 << 32)
    tell(f"damages healed, seed {seed}")
    rng = random.Random(seed)
    tally: Counter[str] = Counter()
    async with site(tmp_path) as one:
        assert await one.hurt() == set()
        newest = one.names("slot")[-1]
        for _ in range(40 if is_encrypted() else 100):
            name = rng.choice(one.names(rng.choice(KINDS)))
            kind, span = one.damage(name, rng, "flip" if name == newest else "")
            hurt = await one.hurt()
            report = await one.checked()
            assert named(one, report.hurt) == hurt, (name, kind)
            done = await one.repaired()
            left = await one.hurt()
            assert left <= hurt
            assert {epoch for rest in done.left for epochs in rest.problem.points.values()
                    for epoch in epochs} == left, (name, kind)  # fmt: skip
            if one.has(name, span):
                tally["healable"] += bool(report.problems)
                tally["healed"] += bool(report.problems) and done.ok and not left
            else:
                tally["gone"] += 1
                tally["reported"] += bool(done.left)
            tally["points hurt"] += len(hurt)
            tally["points left"] += len(left)
            one.restore()
    tell(f"  {dict(tally)}")
    assert tally["healable"] > (10 if is_encrypted() else 30)
    assert tally["healed"] >= 0.95 * tally["healable"]


async def test_the_newest_slots_are_put_back_that_only_the_source_knows_of(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        [*_, last] = one.names("slot")
        epoch = one.bench.model.epoch
        del one.bench.store.objects[last]
        assert (await one.checked()).ok, "nothing in the vault tells of it"
        one.here.expected = [(1, epoch - 1, epoch)]
        done = await one.repaired()
        assert [(healed.problem.object, healed.problem.points) for healed in done.healed] == [
            (last, {1: [epoch]})
        ]
        assert await one.hurt() == set()


async def test_a_dry_run_says_what_would_be_healed_and_stores_nothing(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        gone, held = held_and_gone(one)
        for name in (gone, held):
            one.damage(name, random.Random(1), "lost")
        before = dict(one.bench.store.objects)
        planned = await one.repaired(dry_run=True)
        assert one.bench.store.objects == before
        assert held in {healed.problem.object for healed in planned.healed}
        assert gone in {left.problem.object for left in planned.left}
        done = await one.repaired()
        assert one.bench.store.objects != before
        assert {healed.problem.object for healed in planned.healed} == {
            healed.problem.object for healed in done.healed
        }
        assert "nowhere" in next(one.why for one in done.left if one.problem.object == gone)


async def test_what_is_known_of_a_delta_is_put_back_though_some_of_it_is_gone(
    tmp_path: Path,
) -> None:
    """A slot that is missing hurts all that follows; put back in part, it hurts few points."""
    async with site(tmp_path) as one:
        gone, _ = held_and_gone(one)
        one.damage(gone, random.Random(1), "lost")
        before = await one.hurt()
        done = await one.repaired()
        after = await one.hurt()
        assert after
        assert after < before
        assert named(one, (await one.checked()).hurt) == after
        assert [left.problem.object for left in done.left] == [gone]


async def test_a_vault_that_lets_nothing_be_replaced_is_said_with_what_was_found(
    tmp_path: Path,
) -> None:
    async with site(tmp_path) as one:
        _, held = held_and_gone(one)
        lost = next(name for name in one.names("segment") if one.has(name, ALL))
        one.damage(held, random.Random(1), "flip")
        one.damage(lost, random.Random(1), "lost")
        with immutable(one):
            report = await one.repaired()
        assert report.refused
        assert [healed.problem.object for healed in report.healed] == [lost]
        [left] = report.left
        assert left.problem.object == held
        assert left.why.startswith(f"{held}: what is damaged cannot be replaced")
        assert lost in one.bench.store.objects, "what is missing may be created"
        assert (await one.repaired()).ok


async def test_an_error_that_ends_a_repair_leaves_what_was_found(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    async with site(tmp_path) as one:
        held = [name for name in one.names("slot")[:-1] if one.has(name, ALL)][:2]
        for name in held:
            one.damage(name, random.Random(1), "lost")

        async def cut_off() -> None:
            if one.here.turns == 2:
                raise VaultUnreachableError("cut off")

        one.here.meanwhile = cut_off
        expect_log("its repair ended: cut off")
        report = await one.repaired()
        assert [healed.problem.object for healed in report.healed] == held[:1]
        assert [(left.problem.object, left.why) for left in report.left] == [(held[1], "cut off")]
        with (
            mock.patch.object(one.bench.store, "list", side_effect=VaultUnreachableError("gone")),
            pytest.raises(VaultUnreachableError),
        ):
            await one.repaired()


async def test_an_object_is_not_made_of_nothing(tmp_path: Path) -> None:
    """Of a segment nothing but its name and its size is known."""
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 4_000}
        test.model.write(0, random.Random(1).randbytes(8 * PAGE))
        await test.publish()
        [name] = [name for name in test.store.objects if name.startswith("segments/")]
        del test.store.objects[name]
        report = await repair(test.vault)
        assert name not in test.store.objects
        assert report.healed == []
        assert "8 pages are nowhere" in report.left[0].why


async def test_what_can_never_be_replaced_is_not_put_back_in_part(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        gone, _ = held_and_gone(one)
        one.damage(gone, random.Random(1), "lost")
        with immutable(one):
            report = await one.repaired()
        assert gone not in one.bench.store.objects
        assert "for ever" in report.left[0].why
        assert report.healed == []
        assert [healed.in_part for healed in (await one.repaired()).healed] == [True]


async def test_a_frame_that_an_encoder_makes_shorter_is_filled_up(tmp_path: Path) -> None:
    text = " ".join(str(number * number) for number in range(20_000)).encode()
    async with bench() as test:
        test.log = test.vault.log(test.record, cache=(cache := IndexCache(tmp_path / "indexes")))
        test.model.write(0, text)
        await test.publish()
        [name] = [name for name in test.store.objects if kind_of(name) == "slot"]
        before = test.store.objects[name][0]
        test.store.put(name, before[:600])
        with mock.patch.object(reframe, "_LEVELS", (19,)):
            report = await repair(test.vault, sources=lambda _: Here(test.model, cache))
        assert report.ok
        after = test.store.objects[name][0]
        assert (len(after), after != before) == (len(before), True)
        assert await content_at(test.fresh_log(), 1) == text


async def test_a_page_is_taken_from_another_delta_that_holds_it(tmp_path: Path) -> None:
    rng = random.Random(2)
    page = [rng.randbytes(PAGE) for _ in range(2)]
    async with bench() as test:
        for content in (page[0], page[1], page[0], page[1]):
            test.model.write(5 * PAGE, content)
            await test.publish()
        first = next(name for name in test.store.objects if kind_of(name) == "slot")
        del test.store.objects[first]
        # Nothing here has its index, and nothing but the third slot its page.
        vault = newcomer(test.vault)
        report = await repair(vault)
        assert "no copy" in report.left[0].why
        cache = IndexCache(tmp_path / "indexes")
        open_spool = open_spooled(test.model.spool / f"{0:016x}.delta")
        keep_tail(cache, first, open_spool)
        report = await repair(vault, sources=lambda _: Here(test.model, cache))
        assert report.ok
        assert [healed.pages_vault for healed in report.healed] == [1]
        assert await content_at(test.fresh_log(), 1) == test.model.states[1]


async def test_joined_deltas_are_made_again_from_what_they_join(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        for name in one.names("joined"):
            one.damage(name, random.Random(1), "cut")
        report = await repair(one.vault())
        assert report.ok
        assert len(report.healed) == len(one.names("joined"))
        for name in one.names("joined"):
            read, _ = await one.bench.vault.store.read(name)
            one.restore()
            assert read == (await one.bench.vault.store.read(name))[0]


async def test_a_ledger_is_put_back_from_its_copy(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        [name] = [name for name in one.whole if ".ledger/" in name]
        del one.bench.store.objects[name]
        assert "no copy" in (await repair(one.vault())).left[0].why
        assert (await one.repaired()).ok
        assert await one.hurt() == set()


async def test_of_a_damaged_proof_it_is_said_that_it_may_go() -> None:
    async with bench() as test:
        await test.churn(2)
        await test.vault.store.create(proof_name(test.record.id, (1, 1)), b"{")
        [left] = (await repair(test.vault)).left
        assert (left.problem.points, left.why) == ({}, "it may be deleted: no point is hurt by it")


async def test_whoever_is_faster_wins(tmp_path: Path) -> None:
    """An object that somebody else puts back meanwhile is left as it is."""
    async with site(tmp_path) as one:
        _, held = held_and_gone(one)
        one.damage(held, random.Random(1), "lost")
        store = one.bench.store

        def restore(hook: str) -> None:
            if hook == "repair.assembled" and held not in store.objects:
                store.put(held, *one.whole[held][:2])

        with mock.patch.object(healer, "hook", restore):
            report = await one.repaired()
        assert store.objects[held][0] == one.whole[held][0]
        assert report.ok
        assert report.healed == []


@pytest.mark.parametrize("each_vault", ["plain"], indirect=True)
async def test_killed_anywhere_it_goes_on(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        held = [name for kind in ("slot", "leaf", "segment") for name in one.names(kind)
                if one.has(name, ALL)]  # fmt: skip
        for name in held:
            one.damage(name, random.Random(1), "cut")
        hurt, kills = await one.hurt(), 0
        while True:
            die = Killed(3)
            with mock.patch.object(healer, "hook", die):
                try:
                    assert (await one.repaired()).ok
                    break
                except KeyboardInterrupt:
                    kills += 1
            after = await one.hurt()
            assert after <= hurt
            hurt = after
        assert kills > 3
        assert await one.hurt() == set()


async def test_a_copy_of_another_history_is_not_believed(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        [*_, before, last] = one.names("slot")
        [tail] = one.here.cache.copies(before)
        head = decode_head(tail[-512:])
        other = encode_head(replace(head, to_digest=bytes(32)))
        one.here.cache.put(before, tail[:-512] + other)
        one.damage(before, random.Random(1), "lost")
        report = await one.repaired()
        assert "does not fit" in report.left[0].why
        assert before not in one.bench.store.objects
        assert last in one.bench.store.objects


async def test_what_is_stored_is_not_replaced_by_another_delta_of_its_place(tmp_path: Path) -> None:
    """A slot with another writer's delta is damaged; here is one that was never stored."""
    async with site(tmp_path) as one:
        *_, last = one.names("slot")
        [tail] = one.here.cache.copies(last)
        other = encode_head(replace(decode_head(tail[-512:]), to_digest=bytes(32)))
        one.here.cache.put(last, tail[:-512] + other)
        one.damage(last, random.Random(1), "cut")
        damaged = one.bench.store.objects[last][0]
        report = await one.repaired()
        assert [left.problem.object for left in report.left] == [last]
        assert one.bench.store.objects[last][0] == damaged


async def test_a_writer_joins_and_thinning_go_on_while_it_heals(tmp_path: Path) -> None:
    """What others do to the disk at any moment of a repair, nothing is lost and nothing undone."""
    async with site(tmp_path) as one:
        names = [name for kind in ("slot", "segment", "joined") for name in one.names(kind)[:-1]]
        for name in names:
            one.damage(name, random.Random(1), "lost")
        rng = random.Random(4)

        async def meanwhile() -> None:
            one.bench.model.churn(rng, writes=1, pages=120)
            await one.bench.publish()
            with contextlib.suppress(DamagedError, NotFoundError):
                await one.bench.log.publish_joins()
                if one.here.turns % 4 == 0:
                    await thin(one.bench, tmp_path)

        one.here.meanwhile = meanwhile
        report = await one.repaired()
        one.here.meanwhile = None
        assert one.here.turns > 5
        assert report.healed
        again = await one.repaired()
        one.points = await (await one.log()).points()
        left = await one.hurt()
        assert named(one, (await one.checked()).hurt) == left
        assert {epoch for rest in again.left for epoch in rest.problem.points.get(1, [])} == left
        # The image has all pages of the newest point; a frame of some pages may be too long.
        is_long = any("longer" in rest.why for rest in again.left)
        assert one.bench.model.epoch not in left or is_long


async def test_what_was_doomed_while_it_was_made_is_deleted_again(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        name = one.names("leaf")[0]
        one.damage(name, random.Random(1), "lost")
        vault, ref = one.vault(), (await one.log()).record.ledgers[1]

        async def meanwhile() -> None:
            one.here.meanwhile = None
            ledger = await read_ledger(vault.store, one.bench.record.id, 1, ref.id, 0)
            newer = replace(ledger, doomed={name: 1}, now_ns=ledger.now_ns + 1)
            again = await write_ledger(vault.store, one.bench.record.id, newer)
            ledgers = {1: replace(ref, id=again)}
            await vault.update_disk(one.bench.record.id, lambda one: replace(one, ledgers=ledgers))

        one.here.meanwhile = meanwhile
        with mock.patch.object(sys.modules[repair.__module__], "ROUNDS", 1):
            await one.repaired()
        assert one.here.turns == 1
        assert name not in one.bench.store.objects


@pytest.mark.parametrize("each_vault", ["plain"], indirect=True)
async def test_pages_that_are_nowhere_do_not_hurt_the_others_of_their_frame(tmp_path: Path) -> None:
    """Raw and compressed frames alike: with the check that the index says of what is gone."""
    rng = random.Random(1)
    async with bench() as test:
        test.log = test.vault.log(test.record, cache=(cache := IndexCache(tmp_path / "indexes")))
        text = " ".join(str(number * number) for number in range(9_000)).encode()[: 8 * PAGE]
        test.model.write(0, rng.randbytes(8 * PAGE) + bytes(8 * PAGE) + text)
        await test.publish()
        test.model.write(2 * PAGE, rng.randbytes(PAGE))
        test.model.write(18 * PAGE, rng.randbytes(PAGE))
        await test.publish()
        first = min(name for name in test.store.objects if kind_of(name) == "slot")
        del test.store.objects[first]
        report = await repair(test.vault, sources=lambda _: Here(test.model, cache))
        assert report.left[0].problem.points == {1: [1]}
        assert "2 of 2 damaged frames, of which 2 pages are nowhere" in report.left[0].why
        assert await content_at(test.fresh_log(), 2) == test.model.states[2]
