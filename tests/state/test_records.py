"""Which file is which disk: by device, inode and birth time, never by name alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from vdiskfs.errors import StateError
from vdiskfs.native import FileIdentity, file_identity
from vdiskfs.state import DiskRecord, FileStamp, find_record

RECORD = DiskRecord("d" * 32, "web01", "web01.img", "a" * 32, "b" * 32, 1, 2, 3)
SAME = FileIdentity(device=1, inode=2, birth_ns=3, change_ns=4, modify_ns=5, size=6)


def test_a_renamed_file_is_its_disk() -> None:
    assert find_record([RECORD], SAME, "other.img") is RECORD


@pytest.mark.parametrize("change", [{"inode": 9}, {"birth_ns": 9}])
def test_another_file_under_the_name_is_no_disk(change: dict[str, int]) -> None:
    assert find_record([RECORD], replace(SAME, **change), "web01.img") is None


def test_a_device_with_another_number_is_the_same_where_births_are_kept() -> None:
    moved = replace(SAME, device=7)
    assert find_record([RECORD], moved, "web01.img") is RECORD
    assert find_record([replace(RECORD, birth_ns=0)], replace(moved, birth_ns=0), "x") is None


def test_the_exact_record_wins_over_one_of_another_device() -> None:
    clone = replace(RECORD, disk_id="e" * 32, device=7)
    assert find_record([clone, RECORD], SAME, "web01.img") is RECORD


def test_two_disks_that_could_be_meant_are_an_error() -> None:
    clone = replace(RECORD, disk_id="e" * 32, name="web02", device=8)
    with pytest.raises(StateError, match="web01, web02"):
        find_record([RECORD, clone], replace(SAME, device=9), "web01.img")


def test_without_a_birth_time_the_name_must_be_the_same() -> None:
    record, identity = replace(RECORD, birth_ns=0), replace(SAME, birth_ns=0)
    assert find_record([record], identity, "web01.img") is record
    assert find_record([record], identity, "new.img") is None


def test_retired_disks_are_not_found() -> None:
    assert find_record([replace(RECORD, retired=True)], SAME, "web01.img") is None


def test_a_real_file_keeps_its_identity_over_renames_and_writes(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "a", os.O_CREAT | os.O_RDWR, 0o600)
    before = file_identity(fd)
    record = replace(RECORD, device=before.device, inode=before.inode, birth_ns=before.birth_ns)
    (tmp_path / "a").rename(tmp_path / "b")
    os.pwrite(fd, b"x" * 4096, 0)
    after = file_identity(fd)
    os.close(fd)
    assert find_record([record], after, "b") is (record if before.birth_ns else None)
    assert FileStamp.of(after) != FileStamp.of(before)
