"""How far the vault is behind: an idle disk that is written was not behind while it was idle."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from vdiskfs.image import ChainEnd
from vdiskfs.spool import Spool
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
