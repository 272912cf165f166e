"""What is told of failovers is kept before a step is answered; a kill in between is made up for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_failover import RECORD
from vdiskfs.events import Events
from vdiskfs.failover import State
from vdiskfs.failover.told import tell_change, tell_made, tell_missed, tell_removed

STARTED = replace(RECORD, state=State.STARTING)
OVER = replace(RECORD, state=State.FAILED_OVER)


def texts(state: Path) -> list[str]:
    """Return what is on the disk: all that a daemon leaves that is killed."""
    return [one.text for one in Events(state).since(0, 99)]


async def test_each_state_is_kept_when_its_step_is_answered(tmp_path: Path) -> None:
    events = Events(tmp_path)
    await tell_made(events, STARTED)
    await tell_change(events, STARTED, OVER)
    assert texts(tmp_path) == ["Starting: test of web01", "Starting -> FailedOver"]
    await tell_removed(events, OVER)
    assert texts(tmp_path)[2:] == ["removed: fine"]


@pytest.mark.parametrize("told", [0, 1, 2])
async def test_what_a_killed_daemon_did_not_tell_its_successor_tells_once(
    tmp_path: Path, told: int
) -> None:
    events = Events(tmp_path)
    if told > 0:
        await tell_made(events, STARTED)
    if told > 1:
        await tell_change(events, STARTED, OVER)
    for _ in range(2):
        await tell_missed(Events(tmp_path), OVER)
    said = ["? -> FailedOver"], ["Starting -> FailedOver"], ["Starting -> FailedOver"]
    assert texts(tmp_path)[bool(told) :] == said[told]
