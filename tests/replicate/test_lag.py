"""How far the vault is behind: an idle disk that is written was not behind while it was idle."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

import vdiskfs.image
from tests.replicate.rig import Rig
from vdiskfs.image import ChainEnd
from vdiskfs.spool import Spool
from vdiskfs.stride import Pace
from vdiskfs.units import NS

DAYS = 3 * 86400


def waiting() -> Any:
    return cast("Any", SimpleNamespace(
        head=SimpleNamespace(stored_bytes=1, time_ns=time.time_ns())
    ))  # fmt: skip


def spool_of(tmp_path: Path, stored_ago_s: float) -> Spool:
    return Spool(tmp_path, ChainEnd(1, 5, b"", 0, time.time_ns() - int(stored_ago_s * NS)))


def test_the_lag_counts_from_when_something_began_to_wait(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, DAYS)
    spool.add(waiting(), time.monotonic_ns() - 2 * NS)
    assert 2 <= spool.lag_s() < DAYS / 2
    # What comes behind it does not make it younger.
    spool.add(waiting(), time.monotonic_ns())
    assert spool.lag_s() >= 2


def test_a_disk_that_is_written_all_the_time_is_as_far_behind_as_its_newest_epoch(
    tmp_path: Path,
) -> None:
    spool = spool_of(tmp_path, 5)
    spool.add(waiting(), time.monotonic_ns() - DAYS * NS)
    assert 5 <= spool.lag_s() < DAYS / 2


def test_after_a_restart_nothing_is_said_to_be_younger_than_it_may_be(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, DAYS)
    spool.add(waiting())
    assert spool.lag_s() >= DAYS


async def test_what_is_written_counts_until_the_vault_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between the bitmaps, which have forgotten it, and the spool, which has not got it."""
    forgotten, go_on = threading.Event(), threading.Event()

    def hook(name: str) -> None:
        if name == "epoch.forgotten":
            forgotten.set()
            assert go_on.wait(60)

    async with Rig(tmp_path, 1 << 20, pace=Pace(0.05, 64 << 20, 1)) as rig, rig.running():
        await rig.wait(lambda: rig.is_settled)
        replicator = rig.replicator
        assert (replicator.dirty_bytes(), replicator.spooled_bytes, replicator.lag_s()) == (0, 0, 0)
        monkeypatch.setattr(vdiskfs.image, "hook", hook)
        rig.write(4096, b"written")
        assert await trio.to_thread.run_sync(forgotten.wait, 60)
        assert not replicator.live.counts().changed
        assert replicator.dirty_bytes() == 4096
        assert replicator.lag_s() > 0
        go_on.set()
        await rig.wait(lambda: rig.is_settled)
        assert (replicator.dirty_bytes(), replicator.spooled_bytes, replicator.lag_s()) == (0, 0, 0)
