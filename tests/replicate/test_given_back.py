"""What goes on while a spool is given back because its segments were collected."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import trio
from trio.testing import MockClock

from tests.catalog.harness import is_slot
from tests.replicate.test_given_up import (
    MONTHS,
    SIZE,
    WEEK,
    full_disk,
    look,
    segments,
)
from tests.replicate.test_resync import has_parts, hold_uploads, settled
from tests.replicate.test_room import Segmented
from vdiskfs import passes
from vdiskfs.errors import LocalError, VaultUnreachableError
from vdiskfs.handovers import Handovers
from vdiskfs.protection import Protection
from vdiskfs.storing import is_stored
from vdiskfs.units import PAGE_SIZE


@pytest.fixture
def told(expect_log: Callable[[str], None]) -> None:
    expect_log("is to be resynchronized: .* this site was away for too long")


class NoSlots:
    """Lets the vault take no slot while ``away``."""

    def __init__(self, rig: Segmented, monkeypatch: pytest.MonkeyPatch) -> None:
        self.away = True
        create = rig.memory.create

        async def refuse(name: str, *args: Any, **options: Any) -> str:
            if self.away and is_slot(name):
                raise VaultUnreachableError("the store takes no slot")
            return await create(name, *args, **options)

        monkeypatch.setattr(rig.memory, "create", refuse)


async def half_stored_and_collected(rig: Segmented, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a delta wait for its slot until what it has stored is given up, and deleted."""
    await rig.fill()
    slots = NoSlots(rig, monkeypatch)
    await rig.one_waits()
    for day in (WEEK, MONTHS):
        await look(rig, day)
    slots.away = False


@pytest.mark.usefixtures("told")
async def test_a_disk_is_not_handed_over_without_what_was_given_back(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    expect_log("takes no slot")

    async def tell(*_: object) -> None:
        return

    async with Segmented(tmp_path, SIZE) as rig, rig.running():
        await half_stored_and_collected(rig, monkeypatch)
        disk = SimpleNamespace(
            name="web01", replicator=rig.replicator, health=SimpleNamespace(shown_state="x")
        )
        await Handovers._ship(
            cast("Any", SimpleNamespace(_tell=tell)), cast("Any", disk), cast("Any", None)
        )
        assert is_stored(rig.replicator)
        await rig.check()


@pytest.mark.usefixtures("told")
async def test_a_disk_is_not_retired_without_what_was_given_back(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    expect_log("takes no slot")

    async def done(*_: object, **__: object) -> None:
        return

    async with Segmented(tmp_path, SIZE) as rig, rig.running():
        await half_stored_and_collected(rig, monkeypatch)
        disk = SimpleNamespace(
            name="web01", disk_id="", replicator=rig.replicator, stop=done,
            health=SimpleNamespace(until_done=done),
        )  # fmt: skip
        site = SimpleNamespace(state=SimpleNamespace(remove_disk=lambda _: None))
        kept = SimpleNamespace(_site=site, _forget=lambda _: None)
        with patch("vdiskfs.protection.source_file"):
            await Protection._let_go(cast("Any", kept), cast("Any", disk), gone=True)
        await rig.check()


async def test_a_pass_under_way_begins_anew_once_its_batch_was_given_up(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    """The vault was away for it, not for others; it does not store for months for nothing."""
    expect_log("what was stored is not there any more")
    monkeypatch.setattr(passes, "PART_SIZE", 16 * PAGE_SIZE)
    monkeypatch.setattr(passes, "READ_PAGES", 16)
    async with full_disk(tmp_path) as rig:
        hold_uploads(rig, monkeypatch, 3)
        async with rig.running():
            await rig.wait(partial(has_parts, rig, 5), 0.01)
            for day in (WEEK, MONTHS):
                await look(rig, day)
            assert not segments(rig)
            monkeypatch.undo()
            assert rig.vault is not None
            points = rig.replicator.points
            points.learned(await rig.vault.disk(points.record.id))
            await rig.replicator.suspects.renew()
            await settled(rig)
            assert await rig.check() == 1


@pytest.mark.usefixtures("told")
async def test_a_disk_that_refuses_to_note_it_is_not_asked_at_once_again(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    expect_log("takes no slot|no room")
    async with Segmented(tmp_path, SIZE) as rig, rig.running():
        await half_stored_and_collected(rig, monkeypatch)
        suspects, tries = rig.replicator.suspects, 0

        def refuse(*_: object) -> None:
            nonlocal tries
            tries += 1
            raise LocalError("no room")

        with patch.object(suspects, "mark_given_back", refuse):
            await rig.wait(lambda: tries > 0)
            before = rig.memory.requests
            await trio.sleep(60)
        assert 2 < tries < 30
        assert rig.memory.requests - before < 60
        await settled(rig)
        await rig.check()
