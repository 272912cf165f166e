"""Commands that read a point hold it: another host thins the disk, and the point stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import Result

from tests.vaults import given
from vdiskfs.catalog import DiskLog, Vault, garbage
from vdiskfs.catalog.retention import parse_ladder
from vdiskfs.catalog.upkeep import Upkeep
from vdiskfs.point import PointReader
from vdiskfs.store import open_store

Run = Callable[..., Result]

COMMANDS = {
    "restore": ("restore", "web01@#1", "OUT"),
    "prove": ("prove", "web01@#1"),
    "diff": ("diff", "web01@#1", "web01@#3"),
}


async def thin(url: str, scratch: Path) -> list[int]:
    """Thin the disk twice, as another host does; return the points that are left."""
    store = open_store(url)
    vault = await Vault.open(store, given())
    for _ in range(2):
        log = vault.log(await vault.find_disk("web01"))
        await Upkeep(vault, "cc" * 16).tend(log, parse_ladder("1d for 2d"), scratch)
    points = await log.points()
    await store.aclose()
    return [point.epoch for point in points]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_reads_is_not_thinned_away(
    history: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(garbage, "GRACE_S", -1)
    left = []
    original = DiskLog.open

    async def opened(log: DiskLog, point: Any) -> PointReader:
        reader = await original(log, point)
        left.append(await thin(history.url, tmp_path / "thin"))
        return reader

    monkeypatch.setattr(DiskLog, "open", opened)
    out = tmp_path / "out.img"
    words = [str(out) if word == "OUT" else word for word in COMMANDS[command]]
    result = run("point", *words, "--vault", history.url)
    assert result.exit_code == 0, result.stderr
    assert left
    assert all(1 in epochs for epochs in left)
    assert command != "restore" or out.read_bytes() == history.states[1]
    assert not any((history.directory / "leases").iterdir())
    if command != "prove":  # the newest point that was proven stays
        assert trio.run(thin, history.url, tmp_path / "thin") == [2, 3]  # 2 has a label
