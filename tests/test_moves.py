"""A disk between sites: what a fork, a release and a return leave; met by `tests.splitbrain`."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from tests.catalog.memory import MemoryStore
from tests.races import silence
from tests.splitbrain import Split, verify
from tests.splitowner import Disk
from tests.splitsites import Move, Site
from vdiskfs.catalog import Vault, moves
from vdiskfs.catalog.moves import RELEASED, answer, ask_for, fork_off, give_back, withdraw
from vdiskfs.catalog.owners import Claim, take_over
from vdiskfs.catalog.records import Handover
from vdiskfs.errors import ConflictError
from vdiskfs.failover.choose import with_tokens
from vdiskfs.failover.states import Kind, State, Step
from vdiskfs.ownernote import read_note, write_note
from vdiskfs.ownership import DiskLine
from vdiskfs.state import LastEnd

MOVE = "f" * 32


async def two_sites(root: Path) -> tuple[Split, Site, Site, Vault]:
    """A disk of site a with three points in the vault; and site b, where it is not."""
    race = Split(random.Random(3), root, MemoryStore(), faults=False)
    race.turn = trio.lowlevel.checkpoint  # type: ignore[method-assign]
    vault = await Vault.init(cast("Any", race.store))
    record = await vault.create_disk("web01", file="web01.img", size=0, site="a")
    race.vault_id, race.disk_id = vault.vault_id, record.id
    race.watch()
    a, b = (Site(race, name, f"{ord(name):032x}") for name in "ab")
    race.hosts.extend([a, b])
    await a.start()
    await add_points(a, 3)
    return race, a, b, vault


async def add_points(site: Site, number: int) -> None:
    for _ in range(number):
        await site.write()
        await site.seal()
        await site.ship_all()


async def fail_over(site: Site, vault: Vault, epoch: int | None = None) -> Move:
    """Take the disk, unplanned, at an epoch of the current line; or at its newest."""
    record = await vault.disk(site.race.disk_id)
    points = await vault.log(record).points()
    site.race.rng = random.Random(1)
    chosen = next(one for one in points if one.epoch == epoch) if epoch else points[-1]
    async with await vault.log(record).open(chosen) as reader:
        digest = reader.digest.hex()
    member = await site.choose(vault, record, record.generation)
    assert member is not None
    member = replace(
        member, generation=chosen.generation, epoch=chosen.epoch, time_ns=chosen.time_ns,
        size=chosen.size, digest=digest,
    )  # fmt: skip
    members = with_tokens((member,), (record,))
    site.move = Move(MOVE, Kind.UNPLANNED, State.STARTING, members, Step.START)
    await site.go_on()
    return site.move


async def restart(site: Site, last_end: LastEnd, *, force: bool = False) -> None:
    site.leave(last_end)
    await site.start(force=force)


@pytest.mark.parametrize("restarted", [False, True])
async def test_points_beyond_the_chosen_one_are_a_branch(tmp_path: Path, restarted: bool) -> None:
    """Also where the current generation has none of its own: its owner has only begun it."""
    with silence():
        race, a, b, vault = await two_sites(tmp_path)
        if restarted:
            await restart(a, LastEnd.CLEAN, force=True)
            a.last_end = LastEnd.CLEAN
            record = race.seen()
            claim = Claim("a", a.writer, "9" * 32, {record.owner.start if record.owner else ""})
            await take_over(vault, record, claim, vault.log, tmp_path / "scratch")
            assert race.seen().generation == 2
        await fail_over(b, vault, 1)
        record = race.seen()
        assert [one.name for one in record.branches.values()] == ["a-2" if restarted else "a-1"]
        await verify(race)


async def test_what_goes_on_from_the_newest_point_leaves_no_branch(tmp_path: Path) -> None:
    with silence():
        race, _, b, vault = await two_sites(tmp_path)
        await fail_over(b, vault)
        assert race.seen().branches == {}
        await verify(race)


async def test_a_failover_is_not_taken_back_by_a_start_that_was_decided_before_it(
    tmp_path: Path,
) -> None:
    with silence():
        race, a, b, vault = await two_sites(tmp_path)
        before = race.seen()
        await fail_over(b, vault)
        claim = Claim("a", a.writer, "9" * 32, ())
        with pytest.raises(ConflictError):
            await take_over(vault, before, claim, vault.log, tmp_path / "scratch")
        assert race.seen().site == "b"


async def test_a_rollback_takes_nothing_from_who_took_the_disk_by_force(tmp_path: Path) -> None:
    with silence():
        race, a, b, vault = await two_sites(tmp_path)
        await fail_over(b, vault)
        await restart(a, LastEnd.CLEAN, force=True)
        await add_points(a, 2)
        record = race.seen()
        assert (record.site, record.moved) == ("a", None)
        assert await give_back(vault, race.disk_id, MOVE, vault.log) == record
        await verify(race)


async def test_a_disk_is_given_back_to_an_owner_that_started_anew_meanwhile(
    tmp_path: Path,
) -> None:
    """The site that fails over has read the record before the owner's last start."""
    with silence():
        race, a, b, vault = await two_sites(tmp_path)
        record = race.seen()
        await restart(a, LastEnd.CLEAN)
        member = await b.choose(vault, record, record.generation)
        assert member is not None
        move = Move(MOVE, Kind.UNPLANNED, State.STARTING, with_tokens((member,), (record,)), None)
        fork = b.fork(move, move.members[0], record)
        wanted = Claim("b", b.writer, "9" * 32, ())
        await fork_off(vault, record, fork, wanted, log=vault.log, scratch=tmp_path / "scratch")
        await a.look()
        assert a.refuses()
        await give_back(vault, race.disk_id, MOVE, vault.log)
        await a.look()
        assert not a.refuses()
        await add_points(a, 1)
        await verify(race)


async def released(race: Split, a: Site, vault: Vault) -> None:
    """Let a release the disk to b."""
    request = Handover(MOVE, "b", "b" * 32, "2026-01-01T00:00:00Z")
    await ask_for(vault, race.disk_id, request)
    assert a.line is not None
    await a.look()
    await a.hand_over()
    found = race.seen().handover
    assert found is not None
    assert found.step == RELEASED


@pytest.mark.parametrize("late", [False, True])
async def test_what_is_given_back_while_a_disk_is_released_is_stored_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, late: bool
) -> None:
    """Images needed the room of the spool: it is empty, and the vault has not all."""
    with silence():
        race, a, b, vault = await two_sites(tmp_path)
        await a.write()
        ship, seal = a.ship_all, a.seal
        given: list[Any] = []
        sealed_again = [0]

        def give_back() -> None:
            if not a.suspects.needed and not sealed_again[0]:
                given.extend(a.queue)
                a.queue.clear()
                a.suspects.needed = True

        async def ship_all() -> None:
            if not late:
                give_back()
            await ship()

        def hold(_: Disk) -> contextlib.nullcontext[None]:
            if late:
                give_back()
            return contextlib.nullcontext()

        async def sealed() -> None:
            if a.suspects.needed:
                a.queue.extend(given)
                a.suspects.needed = False
                sealed_again[0] += 1
                return
            await seal()

        monkeypatch.setattr(a, "ship_all", ship_all)
        monkeypatch.setattr(a, "seal", sealed)
        monkeypatch.setattr(Disk, "hold", hold)
        await released(race, a, vault)
        assert sealed_again == [1]
        epochs = [point.epoch for point in await vault.log(race.seen()).points()]
        assert [one.head.to_epoch for one in given] == epochs[len(epochs) - len(given) :]
        assert bool(given) != late
        await fail_over(b, vault)
        await verify(race)


async def test_what_is_captured_of_a_released_disk_does_not_pass_its_fence(
    tmp_path: Path,
) -> None:
    """A host that died behind its release compares, and ships what it finds: into a branch."""
    with silence():
        race, a, _, vault = await two_sites(tmp_path)
        await released(race, a, vault)
        await restart(a, LastEnd.HOST_DIED)
        await a.seal()
        await a.ship_all()
        record = race.seen()
        assert record.generation == 1
        assert [one.site for one in record.branches.values()] == ["a"]
        # Nobody takes it after all: it goes on there, with what was captured.
        await withdraw(vault, race.disk_id, MOVE)
        await a.look()
        assert not a.refuses()
        assert race.seen().branches == {}
        await add_points(a, 1)
        await verify(race)


async def test_a_release_is_not_taken_back_where_the_disk_is_gone(tmp_path: Path) -> None:
    """The answer that it was released landed, and was lost; meanwhile the disk was taken."""
    with silence():
        race, a, b, vault = await two_sites(tmp_path)
        await released(race, a, vault)
        await fail_over(b, vault)
        assert a.line is not None
        with pytest.raises(ConflictError):
            await answer(vault, race.disk_id, MOVE, RELEASED)
        await a.line.keep()
        assert a.line.handed


async def test_a_refused_request_keeps_nobody_away(tmp_path: Path) -> None:
    """Its site may never read the answer: the owner that had released goes on."""
    with silence():
        race, a, _, vault = await two_sites(tmp_path)
        await released(race, a, vault)
        await answer(vault, race.disk_id, MOVE, moves.REFUSED, "no")
        await a.look()
        assert a.line is not None
        assert not a.line.handed
        await add_points(a, 1)
        assert race.seen().generation == 2


async def test_what_was_promised_of_an_ended_generation_is_void(tmp_path: Path) -> None:
    """An owner that lost its state begins a new generation: nobody can take the old one."""
    with silence():
        race, a, _, vault = await two_sites(tmp_path)
        await released(race, a, vault)
        record = race.seen()
        claim = Claim("a", a.writer, "9" * 32, ())
        await take_over(vault, record, claim, vault.log, tmp_path / "scratch")
        assert race.seen().handover is None


async def test_an_older_state_of_a_released_disk_that_is_given_back_goes_on(tmp_path: Path) -> None:
    """It does not know the start to which it is given back, only that it had released it."""
    with silence():
        race, a, b, vault = await two_sites(tmp_path)
        await released(race, a, vault)
        await fail_over(b, vault)
        a.leave(LastEnd.CLEAN)
        write_note(a.directory, replace(read_note(a.directory), start="7" * 32, pending=""))
        await give_back(vault, race.disk_id, MOVE, vault.log)
        await a.start()
        assert not a.refuses()
        await add_points(a, 1)
        await verify(race)


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_disk_given_back_while_its_owner_branches_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    """Its branch is the main line by then, and no branch any more."""
    branch_off = DiskLine._branch_off

    with silence():
        race, a, b, vault = await two_sites(tmp_path)

        async def overtaken(line: DiskLine, *args: Any) -> None:
            await branch_off(line, *args)
            await give_back(vault, race.disk_id, MOVE, vault.log)

        await fail_over(b, vault, 2)
        await a.write()
        await a.seal()
        with monkeypatch.context() as patched:
            patched.setattr(DiskLine, "_branch_off", overtaken)
            if restarted:
                await restart(a, LastEnd.DAEMON_DIED)
            else:
                await a.look()
        assert race.seen().site == "a"
        await a.ship_all()
        assert not a.refuses()
        await add_points(a, 1)
        assert race.seen().generation > 2
        await verify(race)
