"""What a host gives to a repair, of what it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
import trio

from vdiskfs import repairing
from vdiskfs.catalog import Owner, RepairReport
from vdiskfs.catalog.records import DiskRecord
from vdiskfs.catalog.report import Healed, Left, Problem
from vdiskfs.delta.names import slot_name
from vdiskfs.point import PieceInfo
from vdiskfs.repairing import Here, Repairs

DISK, OURS = "ab" * 16, "cd" * 16


def here(
    directory: Path, *, owner: str = OURS, displaced: object = None, handed: bool = False
) -> Here:
    """Return what a host has whose line goes to epoch 2, and whose spool has slots 1 and 2."""
    for start in (1, 2):
        (directory / f"{start:016x}.delta").write_bytes(b"delta %d" % start)
    cover = [PieceInfo("", 1, 0, at, at + 1, 1) for at in range(2)]
    paths = SimpleNamespace(spool=directory, pass_=directory)
    disk = SimpleNamespace(
        disk_id=DISK, started=True, line=SimpleNamespace(displaced=displaced, handed=handed),
        points=SimpleNamespace(cache=None, line=SimpleNamespace(generation=1, cover=cover)),
        site=SimpleNamespace(state=SimpleNamespace(writer_id=OURS, disk=lambda _: paths)),
    )  # fmt: skip
    owned = Owner("here", owner, "ef" * 16, "2026-11-22T00:00:00Z")
    record = DiskRecord(DISK, "web01", "2026-11-22T00:00:00Z", "here", "a", 1, owner=owned)
    return Here(cast("Any", disk), record)


async def test_a_spooled_delta_is_given_that_the_vault_has_had(tmp_path: Path) -> None:
    assert await here(tmp_path).ends(slot_name(DISK, 1, 1)) == [b"delta 1"]


@pytest.mark.parametrize(("generation", "start"), [(1, 2), (2, 1)])
async def test_a_spooled_delta_is_not_given_that_was_not_published(
    tmp_path: Path, generation: int, start: int
) -> None:
    assert await here(tmp_path).ends(slot_name(DISK, generation, start)) == []


@pytest.mark.parametrize("lost", [{"owner": "12" * 16}, {"displaced": object()}, {"handed": True}])
async def test_the_spool_of_a_site_that_lost_the_disk_is_not_given(
    tmp_path: Path, lost: dict[str, Any]
) -> None:
    assert await here(tmp_path, **lost).ends(slot_name(DISK, 1, 1)) == []


def test_what_is_healed_in_part_is_not_told_as_healed(expect_log: Callable[[str], None]) -> None:
    expect_log("were healed")
    expect_log("stay damaged")
    told: list[str] = []
    events = SimpleNamespace(tell=lambda code, _, text, **__: told.append(f"{code}: {text}"))
    healed = [Healed(Problem(name, "", "web01"), 1, 0, 0, in_part=name == "a") for name in "ab"]
    report = RepairReport(healed=healed, left=[Left(healed[0].problem, "gone")])
    repairs = Repairs(cast("Any", None), cast("Any", events))
    repairs._tell(cast("Any", SimpleNamespace(name="web01")), report)
    assert told == [
        "repair.healed: 1 damaged objects of the vault were healed: b",
        "repair.left: 1 objects of the vault stay damaged, 0 points are hurt: a: gone",
    ]


async def test_a_dry_run_of_a_repair_is_one_of_each_of_its_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is told then either: there are no events here."""
    asked: dict[str, bool] = {}

    def part(name: str, outcome: object) -> None:
        async def act(*_: object, dry_run: bool, **__: object) -> object:
            await trio.lowlevel.checkpoint()
            asked[name] = dry_run
            return outcome

        monkeypatch.setattr(repairing, name, act)

    part("restore_record", None)
    part("restore_name", None)
    part("repair", RepairReport(healed=[Healed(Problem("a", "", "web01"), 1, 0, 0)]))
    site = SimpleNamespace(vault=None, state=SimpleNamespace(writer_id=OURS))
    disk = SimpleNamespace(name="web01", disk_id=DISK, started=False, site=site)
    here = SimpleNamespace(ends=AsyncMock(return_value=[]))
    monkeypatch.setattr(repairing, "Here", lambda *_: here)
    repairs = Repairs(cast("Any", SimpleNamespace(find=lambda _: disk)), cast("Any", None))
    await repairs.run(["web01"], dry_run=True)
    assert asked == {"restore_record": True, "restore_name": True, "repair": True}
