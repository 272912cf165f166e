"""How long an epoch lasts."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.test_native_engine import Disk, read_all
from vdiskfs import native
from vdiskfs.native import PageReader
from vdiskfs.stride import LONGEST_S, PRESERVE_PAGES, Stride
from vdiskfs.units import PAGE_SIZE


def test_epochs_grow_while_changes_outrun_captures_and_shrink_again() -> None:
    stride = Stride(1.0)
    seen = []
    for _ in range(7):
        seen.append(stride.interval_s)
        stride.outrun()
    assert seen == [1, 2, 4, 8, 16, 32, 32]
    for _ in range(6):
        stride.kept()
    assert stride.interval_s == 1.0


def test_the_longest_epoch_is_carried_through_whatever_it_costs() -> None:
    stride = Stride(1.0)
    while stride.interval_s < LONGEST_S:
        assert stride.budget_pages == PRESERVE_PAGES
        stride.outrun()
    assert stride.budget_pages is None


@pytest.mark.parametrize("asked", [0.05, 1.0, 60.0, 3600.0])
def test_never_shorter_than_what_was_asked_for(asked: float) -> None:
    stride = Stride(asked)
    for _ in range(20):
        stride.outrun()
    assert stride.interval_s >= asked
    for _ in range(20):
        stride.kept()
    assert stride.interval_s == asked


def test_an_epoch_that_changes_outrun_is_given_up_at_its_budget_and_loses_nothing(
    tmp_path: Path,
) -> None:
    disk = Disk(tmp_path, 1 << 20)
    disk.track.set_budget(3)
    for page in range(4):
        disk.image.write(page * PAGE_SIZE, b"old")
    native.seal([disk.image])
    for page in range(3):
        disk.image.write(page * PAGE_SIZE, b"new")
    assert not disk.track.counts().abandoned
    disk.image.write(3 * PAGE_SIZE, b"new")
    assert disk.track.counts().abandoned
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        read_all(PageReader(disk.image))
    disk.image.abandon()
    disk.track.set_budget(None)
    disk.capture()
    assert disk.vault == disk.file.read_bytes()
    disk.close()
