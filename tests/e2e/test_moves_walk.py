"""The daemons of two sites die at steps of a planned failover and of a failback; see moves_walk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.hooknames import unpassed
from tests.e2e.moves_walk import Walk

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.timeout(600)]

EVERY = 5


def test_killed_at_any_step_the_same_commands_finish_and_nothing_is_done_twice(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    report = Walk(tmp_path, EVERY, first=2).run()
    tell(f"steps of a failover and a failback: {report}")
    assert report.problems == []
    assert report.kills >= 12
    assert unpassed("e2e/test_moves_walk.py", report.passed) == []
