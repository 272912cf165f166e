"""What maintenance says of a vault that keeps what is to be deleted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vdiskfs.events import Events
from vdiskfs.jobs import Jobs
from vdiskfs.maintenance import Maintenance


async def test_a_vault_that_keeps_what_is_due_is_told_of_once(tmp_path: Path) -> None:
    site: Any = SimpleNamespace(
        vault=SimpleNamespace(vault_id="5" * 32, store=None),
        state=SimpleNamespace(writer_id="w", documents=tmp_path / "documents"),
        pace=SimpleNamespace(compression_level=1),
    )  # fmt: skip
    for _ in range(2):  # as over a restart, with two disks and two turns each
        events = Events(tmp_path)
        maintenance = Maintenance(site, list, events, Jobs(tmp_path))
        for name in ("web01", "web02") * 2:
            disk: Any = SimpleNamespace(name=name)
            await maintenance._tell_kept(disk, 7)
    found = events.since(0, 100)
    assert [(one.code, one.count, one.disk) for one in found] == [("thinning.kept", 1, "web01")]
    assert "7 objects" in found[0].text
