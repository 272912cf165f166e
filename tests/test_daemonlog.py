"""The daemon's log is bounded, whoever writes to it, and nothing else is."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from vdiskfs.config import MountSettings
from vdiskfs.daemonlog import BoundedHandler

PROGRAM = """
import logging, os, sys
from vdiskfs import daemonlog
from vdiskfs.serving import begin_process
daemonlog.BoundedHandler.__init__.__defaults__ = ({limit},)
begin_process("test")
for number in range({lines}):
    logging.getLogger("vdiskfs").info("line %06d", number)
    if number % 10 == 0:
        os.write(2, b"keeper %06d\\n" % number)  # as the keeper does, past the daemon's handler
"""
LIMIT, LINES = 8192, 1000


def log_to(path: Path, state: Path) -> None:
    settings = MountSettings("/srv", "/mnt/vd", "file:///v", "here", str(state))
    fd = os.memfd_create("settings")
    with os.fdopen(fd, "r+b") as file:
        file.write(settings.to_json().encode())
        file.seek(0)
        with path.open("ab") as log:
            subprocess.run(
                [sys.executable, "-c", PROGRAM.format(limit=LIMIT, lines=LINES),
                 "--settings-fd", str(fd)],
                check=True, stderr=log, pass_fds=(fd,),
            )  # fmt: skip


def test_the_log_is_cut_and_what_was_last_is_kept_whole(tmp_path: Path) -> None:
    log, before = tmp_path / "daemon.log", tmp_path / "daemon.log.1"
    log_to(log, tmp_path)
    assert log.stat().st_size <= LIMIT + 200
    assert LIMIT < before.stat().st_size <= LIMIT + 200
    assert before.stat().st_mode & 0o777 == 0o600
    lines = (before.read_text() + log.read_text()).splitlines()
    numbers = [int(line.rpartition(" ")[2]) for line in lines if " line " in line]
    assert numbers == list(range(numbers[0], LINES))
    kept = [int(line.split()[1]) for line in lines if line.startswith("keeper ")]
    assert kept[-1] == LINES - LINES // 100
    assert set(kept) >= set(range(numbers[1] // 10 * 10 + 10, LINES, 10))


def test_what_is_somebody_elses_is_not_cut(tmp_path: Path) -> None:
    other, mine = tmp_path / "journal", tmp_path / "daemon.log"
    mine.write_text("of an earlier run\n")
    log_to(other, tmp_path)
    assert other.stat().st_size > 4 * LIMIT
    assert mine.read_text() == "of an earlier run\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["daemon.log", "journal"]


def test_a_line_that_the_disk_does_not_take_is_lost_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = BoundedHandler(tmp_path / "daemon.log")
    with Path("/dev/full").open("w") as full:
        handler.setStream(full)
        handler.emit(logging.makeLogRecord({"msg": "no room"}))
        with contextlib.suppress(OSError):
            full.close()
    assert capfd.readouterr().err == ""


def test_where_there_is_no_room_for_a_copy_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: BinaryIO, copy: BinaryIO, __: int) -> None:
        copy.write(b"a part of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vdiskfs.daemonlog.shutil.copyfileobj", full)
    log, before = tmp_path / "daemon.log", tmp_path / "daemon.log.1"
    before.write_text("why it failed\n")
    handler = BoundedHandler(log, limit=10)
    with log.open("a") as stream:
        handler.setStream(stream)
        handler.emit(logging.makeLogRecord({"msg": "more than ten bytes"}))
    assert (before.read_text(), log.read_text()) == ("why it failed\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["daemon.log", "daemon.log.1"]
