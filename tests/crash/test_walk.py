"""A process killed at any durable step, and again during the recovery, loses nothing.

All hooks, and all of each recovery: ``VDISKFS_CRASH_EVERY=1 VDISKFS_CRASH_SECOND_EVERY=1``,
or ``python -m tests.crash.walk``.
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
from tests.crash.scenarios import SCENARIOS

EVERY = os.environ.get("VDISKFS_CRASH_EVERY", "16")
SECOND_EVERY = os.environ.get("VDISKFS_CRASH_SECOND_EVERY", "300")
TOP = Path(__file__).parents[2]

# Each hook that has a name is walked where the first scenario passes it; besides, each scenario
# is walked at every so many hooks.
_walked: set[str] = set()
_done: set[str] = set()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_a_crash_at_any_durable_step_loses_nothing(
    scenario: str, tmp_path: Path, crash_reports: Callable[[object], None]
) -> None:
    command = [
        sys.executable, "-m", "tests.crash.walk", scenario, "--every", EVERY,
        "--second-every", SECOND_EVERY, "--directory", str(tmp_path),
        "--known", ",".join(_walked),
    ]  # fmt: skip
    # Children are forked: no library may have started threads of its own.
    environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=TOP, env=environ, stdout=subprocess.PIPE, text=True, check=False
    )
    [report] = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["hooks"]["python"]
    assert report["hooks"]["c"]
    # The scenario passed through the crashes that it is there for.
    assert report["crashes"] > 3
    assert report["second_crashes"] > 0
    _walked.update(report["walked"])
    _done.add(scenario)
    if _done == set(SCENARIOS):
        assert unpassed("crash/test_walk.py", _walked) == []
    crash_reports(report)
