"""Crash hooks end the process exactly where they are told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from vdiskfs.crash import hook
for name in ("spool.synced", "slot.created", "spool.synced"):
    hook(name)
    print(name, flush=True)
"""


def run(**environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **environ}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "passed"),
    [("spool.synced:1", 0), ("spool.synced:2", 2), ("slot.created:1", 1), ("*:3", 2)],
)
def test_the_process_dies_at_the_nth_hook_of_that_name(plan: str, passed: int) -> None:
    done = run(VDISKFS_CRASH=plan)
    assert done.returncode == -signal.SIGKILL
    assert len(done.stdout.splitlines()) == passed


@pytest.mark.parametrize("plan", ["", "spool.synced:3", "other:1", "spool.synced", "*:0"])
def test_without_such_a_hook_nothing_happens(plan: str) -> None:
    assert run(VDISKFS_CRASH=plan).returncode == 0


def test_every_hook_is_logged(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run(VDISKFS_CRASH_LOG=str(log))
    assert log.read_text().split() == ["spool.synced", "slot.created", "spool.synced"]
