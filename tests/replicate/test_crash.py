"""Killed at each durable step of shipping and resynchronizing, and again while recovering."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.hooknames import unpassed

TOP = Path(__file__).parents[2]
EXPECTED = {
    "spool.synced", "epoch.forgotten", "slot.published", "publish.noted", "spool.emptied",
    "part.durable", "pass.settled", "segment.uploaded", "part.uploaded", "resync.marked",
    "spool.given-back", "changed.suspect", "resync.settled", "distrust.noted", "distrust.cleared",
}  # fmt: skip


def live(root: Path, what: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.replicate.crashing", str(root), what],
        cwd=TOP, env={**os.environ, "PYTHONPATH": f"{TOP}:{TOP}/tools", **environ},
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """The hooks that one life passes, by count."""
    root = tmp_path_factory.mktemp("whole")
    log = root / "hooks"
    done = live(root, "work", VDISKFS_CRASH_LOG=str(log))
    assert done.returncode == 0, done.stderr
    return Counter(log.read_text().split())


def test_every_durable_step_has_a_hook(passed: Counter[str], tell: Callable[[str], None]) -> None:
    tell(f"{len(passed)} hooks, passed {passed.total()} times: {dict(passed)}")
    assert set(passed) >= EXPECTED
    assert unpassed("replicate/test_crash.py", EXPECTED) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_kill_at_a_durable_step_loses_nothing(
    tmp_path: Path, passed: Counter[str], name: str, tell: Callable[[str], None]
) -> None:
    """At the first and the last time, and once more in the middle of the recovery from it."""
    kills = 0
    for number in sorted({1, max(1, passed[name] - 1)}):
        root = tmp_path / str(number)
        root.mkdir()
        done = live(root, "work", VDISKFS_CRASH=f"{name}:{number}")
        # Timing decides how often some are passed; the first time is always reached.
        assert done.returncode in ((-signal.SIGKILL,) if number == 1 else (-signal.SIGKILL, 0))
        kills += done.returncode != 0
        again = live(root, "recover", VDISKFS_CRASH=f"*:{1 + number % 5}")
        assert again.returncode in (-signal.SIGKILL, 0), again.stderr
        kills += again.returncode != 0
        healed = live(root, "recover")
        assert healed.returncode == 0, healed.stderr
        assert "points right" in healed.stdout
    tell(f"{name}: killed {kills} times")
    assert kills >= 2
