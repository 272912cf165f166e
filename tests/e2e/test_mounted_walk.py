"""A daemon killed at a durable step, under a mount that is used: no error, nothing lost.

All hooks: ``python -m tests.e2e.mounted_walk --every 1``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.hooknames import unpassed

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.slow]

EVERY = os.environ.get("VDISKFS_WALK_EVERY", "16")
TOP = Path(__file__).parents[2]


@pytest.mark.timeout(3600)
def test_a_kill_at_a_step_costs_no_error_and_no_byte(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    command: list[str | Path] = [
        sys.executable, "-m", "tests.e2e.mounted_walk", "--every", EVERY, "--directory", tmp_path,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=TOP, stdout=subprocess.PIPE, text=True, check=False)
    report = json.loads(done.stdout)
    tell(f"kills of a mount, every {EVERY}th step: {report}")
    assert report["problems"] == []
    assert report["names"] > 20
    assert unpassed("e2e/test_mounted_walk.py", report["passed"]) == []
    assert report["reached"] >= report["walked"] * 2 // 3 > 0
