"""An image on its way home that is killed at any durable step becomes exactly its point.

All of each recovery: ``VDISKFS_CRASH_SECOND_EVERY=1``, or ``python -m tests.crash.homewalk``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.homewalk import SCENARIOS
from tests.crash.hooknames import unpassed

SECOND_EVERY = os.environ.get("VDISKFS_CRASH_SECOND_EVERY", "6")
TOP = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_a_crash_anywhere_on_the_way_home_loses_nothing(scenario: str, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "tests.crash.homewalk", scenario,
        "--second-every", SECOND_EVERY, "--directory", str(tmp_path),
    ]  # fmt: skip
    # Children are forked: no library may have started threads of its own.
    environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=TOP, env=environ, stdout=subprocess.PIPE, text=True, check=False
    )
    [report] = json.loads(done.stdout)
    assert report["problems"] == []
    left = [] if scenario.startswith("full") else ["homeward.marked"]
    assert unpassed("crash/test_homewalk.py", report["hooks"]) == left
    assert report["crashes"] > 8
    assert report["second_crashes"] > 3
