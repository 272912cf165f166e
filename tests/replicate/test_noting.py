"""What was stored is noted on this host; where that fails it is tried again, and said once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.model.onedisk import OneDisk, opened
from vdiskfs import shipping
from vdiskfs.errors import LocalError
from vdiskfs.state import DiskRecord, StateDirectory


async def test_a_note_that_cannot_be_written_is_written_later(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expect_log: Callable[[str], None],
) -> None:
    expect_log("no space left")
    await OneDisk(tmp_path).init(1 << 20, b"data")
    left, write = [2], StateDirectory.write_disk

    def write_or_fail(state: StateDirectory, record: DiskRecord) -> None:
        if record.epoch and left[0]:
            left[0] -= 1
            raise LocalError("/state: no space left on device")
        write(state, record)

    monkeypatch.setattr(shipping, "NOTE_AGAIN_S", 0.01)
    monkeypatch.setattr(StateDirectory, "write_disk", write_or_fail)
    async with opened(tmp_path) as one, trio.open_nursery() as nursery:
        nursery.start_soon(one.disk.run)
        with trio.fail_after(60):
            await one.replicator.seal_if_changed()
            await one.replicator.wait_shipped()
        assert one.disk.record.epoch == one.replicator.stored.epoch > 0
        assert one.disk.line.displaced is None
        assert one.disk.health.last_error is None
        nursery.cancel_scope.cancel()
    assert left == [0]
    said = [one for one in caplog.records if "no space left" in one.message]
    assert len(said) == 1
    assert not any(record.exc_info for record in caplog.records)
