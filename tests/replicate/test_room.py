"""What waits gives way to images: all of it that the vault cannot have, whatever runs meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.catalog.harness import is_slot
from tests.replicate.rig import Rig, page_of
from vdiskfs import passes
from vdiskfs.delta import DeltaWriter
from vdiskfs.errors import LocalError, PassStoppedError, VaultUnreachableError
from vdiskfs.storing import is_stored, store_all
from vdiskfs.units import PAGE_SIZE

MIB = 1 << 20
SIZE = MIB
PAGES = SIZE // PAGE_SIZE


@pytest.fixture
def away(expect_log: Callable[[str], None]) -> None:
    expect_log("the memory store is away")


@pytest.fixture
def given_back(expect_log: Callable[[str], None]) -> None:
    expect_log("is to be resynchronized: images needed the room")


class Segmented(Rig):
    """Its deltas hold no frames themselves."""

    def _make_writer(self, directory: Path, *, inside: bool, batch: str = "") -> DeltaWriter:
        return super()._make_writer(directory, inside=False, batch=batch)

    def segments(self, where: str = "spool") -> list[Path]:
        return sorted((self.directory / where).glob("*.segment"))

    async def fill(self) -> None:
        self.write(0, b"".join(page_of(number) for number in range(PAGES // 2)))
        await self.wait(lambda: self.is_settled)

    async def one_waits(self, seed: int = 1000) -> None:
        """Write for a vault that takes no more, until it waits."""
        self.write(0, page_of(seed) + page_of(seed + 1))
        await self.wait(lambda: self.replicator.waiting == 1)
        await trio.sleep(60)

    async def fall_behind(self) -> None:
        """One delta waits for a vault that is away."""
        await self.fill()
        self.memory.away = True
        await self.one_waits()

    async def converge(self) -> None:
        self.memory.away = False
        self.health.vault_answers()
        await self.wait(lambda: self.is_settled)
        await self.check()


@pytest.mark.usefixtures("away", "given_back")
async def test_who_waits_until_all_is_stored_waits_for_what_was_given_back(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Whoever retires a disk, unmounts it for good or hands it over; nothing waits meanwhile."""
    async with Segmented(tmp_path, SIZE) as rig, rig.running():
        await rig.fall_behind()
        done = trio.Event()

        async def wait() -> None:
            await store_all(rig.replicator)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(60)
            assert not is_stored(rig.replicator)
            assert await rig.replicator.give_room()
            assert rig.replicator.waiting == 0
            await trio.sleep(60)
            assert not done.is_set()
            assert not is_stored(rig.replicator)
            rig.memory.away = False
            rig.health.vault_answers()
        assert is_stored(rig.replicator)
        await rig.check()


@pytest.mark.usefixtures("away", "given_back")
async def test_the_only_delta_goes_if_its_slot_was_not_asked_for(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with Segmented(tmp_path, SIZE) as rig, rig.running():
        await rig.fall_behind()
        lag_s = rig.replicator.lag_s()
        assert await rig.replicator.give_room() >= 2 * PAGE_SIZE
        assert rig.replicator.waiting == 0
        assert not list((rig.directory / "spool").iterdir())
        assert rig.replicator.lag_s() >= lag_s
        assert await rig.replicator.give_room() == 0
        rig.write(PAGE_SIZE, page_of(2000))
        await rig.converge()
        assert rig.replicator.lag_s() == 0


async def test_of_one_whose_slot_was_asked_for_the_stored_segments_go(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    """It stays, as the slot may be taken; what it refers to is in the vault."""
    expect_log("takes no slot")
    async with Segmented(tmp_path, SIZE) as rig, rig.running():
        await rig.fill()
        create, away = rig.memory.create, [True]

        async def refuse(name: str, *args: Any, **options: Any) -> str:
            if away[0] and is_slot(name):
                raise VaultUnreachableError("the store takes no slot")
            return await create(name, *args, **options)

        monkeypatch.setattr(rig.memory, "create", refuse)
        await rig.one_waits()
        assert rig.segments()
        assert await rig.replicator.give_room() >= 2 * PAGE_SIZE
        assert rig.replicator.waiting == 1
        assert not rig.segments()
        await trio.sleep(300)
        epoch = rig.replicator.end.epoch
        away[0] = False
        await rig.converge()
        # Nothing was to be compared: it was published as it was.
        assert epoch in await rig.contents()


@pytest.mark.usefixtures("away")
async def test_of_an_earlier_run_it_is_not_known_and_the_oldest_stays(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with Segmented(tmp_path, SIZE) as rig:
        async with rig.running():
            await rig.fall_behind()
        rig.close()
        rig.memory.away = False
        await rig.open()
        rig.memory.away = True
        async with rig.running():
            await trio.sleep(60)
            assert await rig.replicator.give_room() == 0
            assert rig.replicator.waiting == 1
            assert rig.segments()
            await rig.converge()


@pytest.mark.usefixtures("away", "given_back")
async def test_a_pass_that_is_about_to_wait_for_all_to_be_shipped_does_not_keep_the_seal(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is asked for when the seal is taken, and the pass has not begun."""
    async with Segmented(tmp_path, SIZE) as rig, rig.running(), trio.open_nursery() as nursery:
        await rig.fall_behind()
        one, given = rig.replicator, []
        begin = one.begin_seal

        async def make_room() -> None:
            given.append(await one.give_room())

        async def late() -> None:
            await begin()
            monkeypatch.undo()
            one.suspects.distrust()
            nursery.start_soon(make_room)
            await trio.sleep(1)

        monkeypatch.setattr(one, "begin_seal", late)
        with pytest.raises(PassStoppedError), trio.fail_after(600):
            await one.seal_if_changed()
        with trio.fail_after(600):
            await rig.wait(lambda: bool(given))
        assert given[0] >= 2 * PAGE_SIZE
        await rig.converge()


@pytest.mark.usefixtures("away")
async def test_a_pause_before_the_pass_has_begun_is_not_forgotten(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Segmented(tmp_path, SIZE) as rig, rig.running():
        await rig.fall_behind()
        one = rig.replicator
        begin = one.begin_seal

        async def late() -> None:
            await begin()
            one.suspects.distrust()
            await one.pause()

        monkeypatch.setattr(one, "begin_seal", late)
        with pytest.raises(PassStoppedError), trio.fail_after(600):
            await one.seal_if_changed()
        monkeypatch.undo()
        await one.resume()
        await rig.converge()


@pytest.mark.usefixtures("given_back")
async def test_what_a_capture_under_way_holds_is_waited_for(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Segmented(tmp_path, SIZE) as rig, rig.running(), trio.open_nursery() as nursery:
        await rig.fill()
        rig.memory.away = True
        one, ended = rig.replicator, trio.Event()
        seal, order = one.seal_captured, []

        async def slow(*args: Any, **options: Any) -> Any:
            nursery.start_soon(make_room)
            await trio.sleep(5)
            order.append("captured")
            monkeypatch.undo()
            return await seal(*args, **options)

        async def make_room() -> None:
            await one.give_room()
            order.append("given")
            ended.set()

        monkeypatch.setattr(one, "seal_captured", slow)
        rig.write(0, page_of(1000))
        with trio.fail_after(600):
            await ended.wait()
        assert order == ["captured", "given"]
        assert one.waiting == 0
        await rig.converge()


async def test_parts_that_are_not_stored_go_and_those_that_are_stay(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "PART_SIZE", 16 * PAGE_SIZE)
    monkeypatch.setattr(passes, "READ_PAGES", 16)
    rig = Segmented(tmp_path, SIZE)
    rig.image_bytes(0, b"".join(page_of(number) for number in range(PAGES // 2)))
    async with rig:
        create, left = rig.memory.create, [3]

        async def refuse(name: str, *args: Any, **options: Any) -> str:
            if name.startswith("segments/") and not rig.memory.objects.get(name):
                if not left[0]:
                    raise VaultUnreachableError("the memory store is away")
                left[0] -= 1
            return await create(name, *args, **options)

        monkeypatch.setattr(rig.memory, "create", refuse)
        async with rig.running():
            await rig.wait(lambda: len(rig.replicator.pass_.parts) == 5)
            sent = rig.memory.bytes_sent
            assert rig.segments("pass")
            with trio.fail_after(600):
                assert await rig.replicator.give_room() >= 16 * PAGE_SIZE
            left[0] = 1 << 30
            await rig.converge()
            # What was stored is not sent again.
            assert rig.memory.bytes_sent - sent < (PAGES // 2 - 2 * 16) * PAGE_SIZE


@pytest.mark.usefixtures("away")
async def test_what_cannot_be_noted_is_not_given_back(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Segmented(tmp_path, SIZE) as rig, rig.running():
        await rig.fall_behind()

        def fail(*_: object) -> None:
            raise LocalError("the disk refused")

        with monkeypatch.context() as patch:
            patch.setattr(rig.replicator.suspects, "mark_given_back", fail)
            with pytest.raises(LocalError):
                await rig.replicator.give_room()
        assert rig.replicator.waiting == 1
        assert rig.segments()
        await rig.converge()
        assert not rig.replicator.suspects.needed
