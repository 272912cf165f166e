"""Resynchronization: the spool gives way, nothing is lost, points stay as they were."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.replicate.rig import Rig, page_of
from vdiskfs import passes, resync, spool
from vdiskfs.catalog import DiskLog
from vdiskfs.delta import Spooled
from vdiskfs.errors import LocalError, StateError
from vdiskfs.health import Level, State
from vdiskfs.state import write_record
from vdiskfs.stride import Pace
from vdiskfs.together import seal_together
from vdiskfs.units import PAGE_SIZE

MIB = 1 << 20
SIZE = MIB
PAGES = SIZE // PAGE_SIZE


async def fill(rig: Rig, pages: range | list[int], seed: int) -> None:
    """Write pages one by one, an epoch apart."""
    for number in pages:
        rig.write(number * PAGE_SIZE, page_of(seed * 100_000 + number))
        await trio.sleep(1.1)


async def force_resync(rig: Rig, seed: int) -> int:
    """Let the vault be away until the threshold is reached; return how many pages differ."""
    rig.memory.away = True
    choice = random.Random(seed)
    pages = choice.sample(range(PAGES), PAGES * 5 // 8)
    for start in range(0, len(pages), 8):
        for number in pages[start : start + 8]:
            rig.write(number * PAGE_SIZE, page_of(seed * 100_000 + number))
        await trio.sleep(60)
    await rig.wait(lambda: rig.health.state is State.RESYNC_REQUIRED)
    return len(pages)


async def test_beyond_half_of_the_disk_the_spool_is_given_back_and_all_converges(
    tmp_path: Path, autojump_clock: MockClock, expect_log: Callable[[str], None]
) -> None:
    expect_log("is to be resynchronized: .* waited while the vault was away")
    expect_log("the memory store is away")
    async with Rig(tmp_path, SIZE) as rig, rig.running():
        await fill(rig, range(0, PAGES, 16), 1)
        await rig.wait(lambda: rig.is_settled)
        before = await rig.contents()
        await force_resync(rig, 2)
        assert rig.health.level is Level.WARNING
        assert "to be resynchronized" in str(rig.health.last_error) or rig.health.next_retry_s
        assert rig.replicator.waiting == 1
        await rig.wait(lambda: len(list((rig.directory / "spool").iterdir())) == 1)
        with pytest.raises(StateError, match="resynchronization is not finished"):
            await seal_together([rig.replicator])
        rig.memory.away = False
        rig.health.vault_answers()
        await rig.wait(lambda: rig.is_settled)
        assert rig.health.state is State.PROTECTED
        assert not (rig.directory / "resync.json").exists()
        after = await rig.contents()
        assert {epoch: after[epoch] for epoch in before} == before
        await rig.check()


async def test_a_resync_sends_what_differs_and_a_second_one_next_to_nothing(
    tmp_path: Path, autojump_clock: MockClock, expect_log: Callable[[str], None]
) -> None:
    expect_log("is to be resynchronized")
    expect_log("the memory store is away")
    async with Rig(tmp_path, SIZE) as rig, rig.running():
        rig.write(0, b"".join(page_of(number) for number in range(PAGES // 4)))
        await rig.wait(lambda: rig.is_settled)
        await force_resync(rig, 3)
        kept = rig.replicator.spooled_bytes
        sent = rig.memory.bytes_sent
        rig.memory.away = False
        rig.health.vault_answers()
        await rig.wait(lambda: rig.is_settled)
        first = rig.memory.bytes_sent - sent - kept
        log = rig.fresh_log()
        differ = await _differing(log, rig)
        print(f"differ {differ} bytes, sent {first}")
        assert first <= 1.05 * differ + SIZE // 100

        sent, epoch = rig.memory.bytes_sent, rig.replicator.stored.epoch
        await rig.replicator.start_resync(now=True)
        await rig.wait(lambda: rig.health.state is State.PROTECTED and rig.is_settled)
        assert rig.replicator.pass_.done_pages >= PAGES // 2
        assert rig.memory.bytes_sent - sent < 64 << 10
        assert rig.replicator.stored.epoch == epoch
        await rig.check()


async def _differing(log: DiskLog, rig: Rig) -> int:
    """Return the bytes in which the disk differs from the point before the newest."""
    before = (await log.points())[-2]
    async with await log.open(before) as reader:
        old = await reader.read_pages(0, reader.pages)
    new = rig.file.read_bytes()
    pages = range(0, len(new), PAGE_SIZE)
    return PAGE_SIZE * sum(old[at : at + PAGE_SIZE] != new[at : at + PAGE_SIZE] for at in pages)


async def settled(rig: Rig) -> None:
    await rig.wait(lambda: rig.is_settled, 0.5)


def has_parts(rig: Rig, count: int) -> bool:
    return len(rig.replicator.pass_.parts) >= count or rig.is_settled


def hold_uploads(rig: Rig, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let that many parts go to the vault; the next one is on its way for ever."""
    real, left = rig.replicator.pass_._upload, [count]

    async def upload(part: Spooled) -> None:
        if not left[0]:
            await trio.sleep_forever()
        left[0] -= 1
        await real(part)

    monkeypatch.setattr(rig.replicator.pass_, "_upload", upload)


async def test_cancelled_it_waits_for_the_user_over_restarts_and_tracks_on(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_write(path: Path, body: dict[str, Any]) -> None:
        write_record(path, body)
        time.sleep(0.3 if body["cancelled"] else 0)  # a pass takes less

    monkeypatch.setattr(resync, "write_record", slow_write)
    async with Rig(tmp_path, SIZE) as rig:
        async with rig.running():
            rig.write(0, b"".join(page_of(number) for number in range(64)))
            await settled(rig)
            with pytest.raises(StateError, match="no resynchronization runs or waits"):
                await rig.replicator.cancel_resync()
            await rig.replicator.start_resync(now=True)
            await rig.replicator.cancel_resync()
            epoch = rig.replicator.end.epoch
        rig.close()
        await rig.open()
        async with rig.running():
            rig.write(7 * PAGE_SIZE, page_of(700))
            await trio.sleep(600)
            assert rig.health.state is State.RESYNC_REQUIRED
            assert rig.replicator.suspects.needed
            assert rig.replicator.live.counts().dirty_pages == 1
            assert rig.replicator.end.epoch == epoch
            with pytest.raises(StateError):
                await rig.replicator.cancel_resync()
            await rig.replicator.start_resync(now=False)
            await settled(rig)
            assert rig.replicator.end.epoch > epoch
            await rig.check()


async def test_the_first_replication_is_no_resync(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with Rig(tmp_path, SIZE) as rig:
        for act in (rig.replicator.cancel_resync, partial(rig.replicator.start_resync, now=True)):
            with pytest.raises(StateError, match="first replication"):
                await act()


# ---- restarts and what happens meanwhile --------------------------------------------------


async def test_parts_that_are_dropped_are_never_taken_up_whoever_dies_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their pages are in a delta by then, or suspect: what they hold may be old."""
    async with Rig(tmp_path, SIZE) as rig:
        pass_, place = rig.replicator.pass_, rig.directory / "pass"
        for left in range(4, -1, -1):
            for number in range(4):
                (place / f"{number}.part").write_bytes(b"of another epoch")
            (place / "base").write_bytes(b"1 7 00\n")
            with monkeypatch.context() as patch:
                patch.setattr(passes, "hook", lambda _, left=left: _die(place, left))
                with pytest.raises(KeyboardInterrupt):
                    pass_.drop()
            assert (place / "base").exists() == bool(left)
            assert pass_.load(rig.replicator.end)
            assert list(place.iterdir()) == []
        (place / "0.part").write_bytes(b"whose base is gone")
        assert pass_.load(rig.replicator.end)
        assert list(place.iterdir()) == []


def _die(place: Path, left: int) -> None:
    if len(list(place.iterdir())) == left:
        raise KeyboardInterrupt


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]) -> None:
    """A pass in parts of 16 pages, of a disk that is to be resynchronized."""
    expect_log("is to be resynchronized")
    expect_log("the memory store is away")
    monkeypatch.setattr(passes, "PART_SIZE", 16 * PAGE_SIZE)
    monkeypatch.setattr(passes, "READ_PAGES", 16)


async def quarter_then_resync(rig: Rig, seed: int) -> None:
    rig.write(0, b"".join(page_of(number) for number in range(PAGES // 4)))
    await settled(rig)
    await force_resync(rig, seed)


@pytest.mark.usefixtures("small_parts")
async def test_it_goes_on_after_a_restart_and_sends_nothing_twice(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Rig(tmp_path, SIZE) as rig:
        async with rig.running():
            await quarter_then_resync(rig, 4)
        sent = rig.memory.bytes_sent
        rig.memory.away = False
        restarts = 0
        for _ in range(3):
            rig.close()
            await rig.open()
            parts = len(rig.replicator.pass_.parts)
            hold_uploads(rig, monkeypatch, parts + 1)
            async with rig.running():
                await rig.wait(partial(has_parts, rig, parts + 2), 0.01)
            restarts += bool(rig.replicator.pass_.parts)
        assert restarts == 3
        rig.close()
        await rig.open()
        async with rig.running():
            await settled(rig)
        differ = await _differing(rig.fresh_log(), rig)
        # Of the small parts each has a head of its own, and the oldest delta was sent, too.
        assert rig.memory.bytes_sent - sent <= 1.2 * differ + SIZE // 50
        await rig.check()


async def test_what_a_part_read_and_is_suspect_again_is_stored_again(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page goes back to what the vault holds after a part has read something else."""
    monkeypatch.setattr(passes, "PART_SIZE", 4 * PAGE_SIZE)
    monkeypatch.setattr(passes, "READ_PAGES", 16)
    async with Rig(tmp_path, SIZE) as rig:
        async with rig.running():
            rig.write(0, b"".join(page_of(number) for number in range(64)))
            await settled(rig)
        rig.write(0, b"".join(page_of(100 + number) for number in range(64)))
        await rig.replicator.start_resync(now=True)
        held = trio.Event()
        monkeypatch.setattr(rig.replicator.pass_, "_upload", lambda _: held.wait())
        async with rig.running():
            await rig.wait(partial(has_parts, rig, 1), 0.01)
            await rig.replicator.cancel_resync()
        rig.write(0, b"".join(page_of(number) for number in range(64)))
        rig.close()
        await rig.open()
        assert rig.replicator.pass_.parts
        await rig.replicator.start_resync(now=True)
        async with rig.running():
            await settled(rig)
            await rig.check()


async def test_killed_while_the_spool_is_given_back_the_rest_of_it_follows(
    tmp_path: Path,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None],
) -> None:
    """The newest go first: a line with a hole would have all of the disk compared."""
    expect_log("is to be resynchronized: images needed the room")
    expect_log("the memory store is away")

    def die(_: str) -> None:
        raise KeyboardInterrupt

    async with Rig(tmp_path, SIZE) as rig:
        async with rig.running():
            rig.write(0, b"".join(page_of(number) for number in range(PAGES)))
            await settled(rig)
            rig.memory.away = True
            for number in range(4):
                rig.write(number * PAGE_SIZE, page_of(5000 + number))
                await rig.wait(lambda number=number: rig.replicator.waiting > number)  # type: ignore[misc]
            await rig.wait(lambda: rig.health.next_retry_s is not None)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(spool, "hook", die)
                await rig.replicator.give_room()
        rig.close()
        rig.memory.away = False
        await rig.open()
        assert rig.replicator.waiting == 3
        assert rig.replicator.live.counts().suspect_pages == 4
        async with rig.running():
            await settled(rig)
            await rig.check()


@pytest.mark.parametrize("regrow", [False, True])
async def test_a_truncation_in_what_was_given_back_is_kept(
    tmp_path: Path, autojump_clock: MockClock, expect_log: Callable[[str], None], *, regrow: bool
) -> None:
    expect_log("is to be resynchronized")
    expect_log("the memory store is away")
    async with Rig(tmp_path, SIZE) as rig, rig.running():
        rig.write(0, b"".join(page_of(number) for number in range(PAGES // 2)))
        await settled(rig)
        rig.memory.away = True
        rig.write(0, page_of(1))
        await trio.sleep(120)
        rig.truncate(SIZE // 4 + 1000)
        await trio.sleep(5)
        if regrow:
            rig.truncate(SIZE)
            await trio.sleep(5)
        pages = rig.image.size() // PAGE_SIZE
        for number in range(pages):
            rig.write(number * PAGE_SIZE, page_of(9000 + number))
        if not regrow:
            rig.truncate(SIZE // 4 + 1000)
        await rig.wait(lambda: rig.health.state is State.RESYNC_REQUIRED)
        rig.memory.away = False
        rig.health.vault_answers()
        await settled(rig)
        await rig.check()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("what", ["resync.json", "spool/*.delta", "pass/*.part"])
async def test_damage_to_what_it_kept_costs_time_and_no_data(
    tmp_path: Path, autojump_clock: MockClock, expect_log: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch, what: str,
) -> None:  # fmt: skip
    async with Rig(tmp_path, SIZE) as rig:
        async with rig.running():
            await quarter_then_resync(rig, 5)
            if what.startswith("pass"):
                hold_uploads(rig, monkeypatch, 0)
                rig.memory.away = False
                rig.health.vault_answers()
                await rig.wait(partial(has_parts, rig, 1), 0.01)
        rig.close()
        found = sorted(rig.directory.glob(what))
        assert found
        data = bytearray(found[0].read_bytes())
        data[len(data) // 2] ^= 1
        data[40] ^= 1
        found[0].write_bytes(data)
        rig.memory.away = False
        if not what.startswith("resync"):
            expect_log("all pages are looked at again")
        await rig.open()
        async with rig.running():
            await settled(rig)
            await rig.check()


async def test_a_record_that_cannot_be_written_gives_nothing_back(
    tmp_path: Path, autojump_clock: MockClock, expect_log: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expect_log("no room for the record")
    expect_log("is to be resynchronized")
    expect_log("the memory store is away")
    tries = 0

    def full(reason: str, regions: Iterable[int] = ()) -> None:
        nonlocal tries
        tries += 1
        if tries <= 3:
            raise LocalError("no room for the record")
        real(reason, regions)

    async with Rig(tmp_path, SIZE) as rig, rig.running():
        rig.write(0, page_of(0))
        await settled(rig)
        real = rig.replicator.resync.require
        monkeypatch.setattr(rig.replicator.resync, "require", full)
        files: list[int] = []
        rig.memory.away = True
        for number in range(PAGES):
            rig.write(number * PAGE_SIZE, page_of(7000 + number))
            if number % 16 == 0:
                await trio.sleep(3)
            if tries <= 3:
                files.append(len(list((rig.directory / "spool").glob("*.delta"))))
        assert files == sorted(files)
        assert files[-1] > 1
        await rig.wait(lambda: tries > 3, 5)
        rig.memory.away = False
        rig.health.vault_answers()
        await settled(rig)
        await rig.check()


# ---- bounds ---------------------------------------------------------------------------


async def test_a_disk_that_is_paused_is_tracked_and_nothing_is_sent(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Twice the disk is written meanwhile, over a restart; no page more is sent than changed."""
    async with Rig(tmp_path, SIZE) as rig:
        async with rig.running():
            rig.write(0, page_of(0))
            await settled(rig)
            await rig.replicator.pause()
            sent, epoch = rig.memory.bytes_sent, rig.replicator.end.epoch
            for number in range(PAGES // 2):
                rig.write(number * PAGE_SIZE, page_of(3000 + number))
            await trio.sleep(3600)
            with pytest.raises(StateError, match="paused"):
                await seal_together([rig.replicator])
        rig.close()
        await rig.open()
        async with rig.running():
            for number in range(PAGES // 2):
                rig.write(number * PAGE_SIZE, page_of(6000 + number))
            await trio.sleep(3600)
            assert (rig.memory.bytes_sent, rig.replicator.end.epoch) == (sent, epoch)
            await rig.replicator.resume()
            await settled(rig)
            assert rig.memory.bytes_sent - sent <= 1.05 * (SIZE // 2) + SIZE // 100
            await rig.check()


async def test_a_change_larger_than_the_spool_leaves_in_parts(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "PART_SIZE", 16 * PAGE_SIZE)
    monkeypatch.setattr(passes, "READ_PAGES", 16)
    async with Rig(tmp_path, SIZE, pace=Pace(1.0, 64 << 10, 1)) as rig, rig.running():
        rig.write(0, page_of(0))
        await settled(rig)
        await rig.replicator.pause()
        for number in range(PAGES // 2):
            rig.write(number * PAGE_SIZE, page_of(3000 + number))
        await rig.replicator.resume()
        most = 0
        while not rig.is_settled:
            used = sum(path.stat().st_size for path in rig.directory.rglob("*.segment"))
            used += sum(path.stat().st_size for path in rig.directory.rglob("*.delta"))
            most = max(most, used)
            await trio.sleep(0.01)
        print(f"{PAGES // 2 * PAGE_SIZE} bytes left through {most} bytes of spool and parts")
        assert most < SIZE // 3
        await rig.check()


async def test_a_line_ten_times_too_slow_keeps_order_and_bounds(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Overwrites merge while the spool is full; every point is still one instant."""
    async with Rig(tmp_path, SIZE, pace=Pace(1.0, 128 << 10, 1, 1.0)) as rig:
        slow = rig.memory.create_from_file

        async def create(name: str, path: Path, **more: Any) -> str:
            await trio.sleep(path.stat().st_size / 800)
            return await slow(name, path, **more)

        rig.memory.create_from_file = create  # type: ignore[method-assign]
        async with rig.running():
            choice = random.Random(1)
            most = 0
            for _ in range(120):
                rig.write(choice.randrange(64) * PAGE_SIZE, page_of(choice.getrandbits(40)))
                await trio.sleep(1)
                most = max(most, rig.replicator.spooled_bytes)
            await settled(rig)
            points = await rig.check()
            print(f"120 epochs of writes became {points} points; spool at most {most} bytes")
            assert points < 80
            assert most < (128 << 10) + 80 * PAGE_SIZE
            assert rig.health.state is State.PROTECTED
