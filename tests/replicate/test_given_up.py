"""A host that comes back after its segments were given up: nothing of its disk is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from trio.testing import MockClock

from tests.replicate.rig import Rig, page_of
from tests.replicate.test_resync import has_parts, hold_uploads, settled
from tests.replicate.test_room import Segmented
from vdiskfs import passes
from vdiskfs.catalog.abandoned import DOUBT_S, sweep
from vdiskfs.catalog.garbage import Collected
from vdiskfs.catalog.records import CLAIMED, DOUBTED, GIVEN_UP
from vdiskfs.catalog.remains import OLD_S
from vdiskfs.units import NS, PAGE_SIZE

SIZE = 1 << 20
PAGES = SIZE // PAGE_SIZE


def full_disk(root: Path) -> Rig:
    """Return a disk, not taken up yet, without a page of zeros."""
    rig = Rig(root, SIZE)
    rig.image_bytes(0, b"".join(page_of(number) for number in range(PAGES)))
    return rig


async def look(rig: Rig, day: float) -> Collected:
    """Look for segments that nothing names, so many days from now."""
    assert rig.vault is not None
    now_ns = time.time_ns() + int(day * 86400 * NS)
    return await sweep(rig.vault, rig.replicator.points.record.id, now_ns)


WEEK, MONTHS = OLD_S / 86400 + 1, (OLD_S + DOUBT_S) / 86400 + 2


def segments(rig: Rig) -> list[str]:
    return [name for name in rig.memory.objects if name.startswith("segments/")]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PART_SIZE", 16 * PAGE_SIZE)
    monkeypatch.setattr(passes, "READ_PAGES", 16)


async def half_replicated(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a first replication until some parts are stored, and end the daemon."""
    hold_uploads(rig, monkeypatch, 3)
    async with rig.running():
        await rig.wait(partial(has_parts, rig, 5), 0.01)
    assert len(segments(rig)) == 3
    rig.close()
    await rig.open()
    assert len(rig.replicator.pass_.parts) >= 5


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("looks", [0, 1, 2, 4])
async def test_a_first_replication_goes_on_or_begins_anew(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None], *, looks: int,
) -> None:  # fmt: skip
    """The host is away for months: its segments are claimed, doubted, given up, and gone."""
    if looks > 1:
        expect_log("what was stored is not there any more")
    async with full_disk(tmp_path) as rig:
        await half_replicated(rig, monkeypatch)
        before = set(segments(rig))
        for day in [WEEK, MONTHS, MONTHS + 1, MONTHS + 400][:looks]:
            await look(rig, day)
        assert len(segments(rig)) == (3 if looks < 2 else 0)
        async with rig.running():
            await settled(rig)
            # The claim comes before what it is for.
            assert await rig.check() == 1
        assert (before <= set(segments(rig))) == (looks < 2)
        for day in (100, 140, 180):
            assert (await look(rig, day)).deleted == 0
        assert await rig.check() == 1
        assert rig.vault is not None
        said = (await rig.vault.disk(rig.replicator.points.record.id)).batches
        assert [one.state for one in said.values()] == [GIVEN_UP] * (looks > 1)
        requests = rig.memory.requests
        await rig.replicator.suspects.renew()
        assert rig.memory.requests == requests, "there is nothing to claim"


@pytest.mark.usefixtures("small_parts")
async def test_parts_without_a_batch_are_not_believed(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an older program leaves them: nobody has claimed what they have stored."""
    async with full_disk(tmp_path) as rig:
        await half_replicated(rig, monkeypatch)
        rig.close()
        base = rig.directory / "pass/base"
        base.write_text(base.read_text().splitlines()[0] + "\n")
        await rig.open()
        assert not rig.replicator.pass_.parts
        async with rig.running():
            await settled(rig)
            assert await rig.check() == 1


@pytest.mark.usefixtures("small_parts")
async def test_a_pass_that_takes_months_claims_again(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its maintenance looks each minute; what is doubted in between is claimed."""
    async with full_disk(tmp_path) as rig:
        await half_replicated(rig, monkeypatch)
        assert rig.vault is not None
        points, batch = rig.replicator.points, rig.replicator.pass_.batch
        for day in range(1, 200, 20):
            assert (await look(rig, day)).deleted == 0
            said = await rig.vault.disk(points.record.id)
            assert said.batches[batch].state == DOUBTED
            points.learned(said)
            await rig.replicator.suspects.renew()
            said = await rig.vault.disk(points.record.id)
            assert said.batches[batch].state == CLAIMED
        assert len(segments(rig)) == 3
        requests = rig.memory.requests
        await rig.replicator.suspects.renew()
        assert rig.memory.requests == requests
        async with rig.running():
            await settled(rig)
            await rig.check()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("looks", [1, 2, 3])
async def test_a_delta_that_was_half_stored_is_stored_or_compared(
    tmp_path: Path, autojump_clock: MockClock, expect_log: Callable[[str], None],
    *, first: bool, looks: int,
) -> None:  # fmt: skip
    """The host went away between its segments and its slot, and more had been captured."""
    expect_log("the memory store was told to fail")
    if looks > 1:
        expect_log("is to be resynchronized: .* this site was away for too long")
    async with Segmented(tmp_path, SIZE) as rig:
        async with rig.running():
            if not first:
                rig.write(0, b"".join(page_of(number) for number in range(64)))
                await settled(rig)
            stored = len(segments(rig))
            disk_id = rig.replicator.points.record.id
            fault = rig.memory.fail("create", count=9999, prefix=f"disks/{disk_id}/g")
            rig.write(PAGE_SIZE, page_of(1000))
            await rig.wait(lambda: fault.fired > 0)
            rig.write(2 * PAGE_SIZE, page_of(1001))
            await rig.wait(lambda: rig.health.next_retry_s is not None)
            assert rig.replicator.waiting == 2
        assert len(segments(rig)) > stored
        fault.count = 0
        rig.close()
        await rig.open()
        for day in [WEEK, MONTHS, MONTHS + 1][:looks]:
            await look(rig, day)
        assert (len(segments(rig)) > stored) == (looks == 1)
        async with rig.running():
            await settled(rig)
            await rig.check()
            rig.write(3 * PAGE_SIZE, page_of(1002))
            await settled(rig)
        # What was stored again before anybody could know goes at once.
        for day in (100, 140, 180):
            assert (await look(rig, day)).deleted == (looks > 1 and day == 100)
        await rig.check()
