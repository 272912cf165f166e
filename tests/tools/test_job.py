"""vdiskfs job, with a mount."""

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

Run = Callable[..., Result]

JOB: dict[str, Any] = {"id": "1f0c77aa-1", "kind": "finalize", "disk": "web01", "failover": None,
       "state": "running", "began": "2026-11-21T01:40:05.000Z", "ended": None, "steps": [],
       "step_times": {}, "progress": None, "waits_for": None, "outcome": None, "error": None,
       "hint": None, "exit_code": 0}  # fmt: skip


def test_waiting_for_a_job_asks_for_that_one_alone(
    daemon: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.answer("GET", "/jobs/1f0c77aa-1", JOB)
    failed = {**JOB, "state": "failed", "error": "it is rotten", "exit_code": 6}
    monkeypatch.setattr(
        "vdiskfs_tools.job.time.sleep",
        lambda _: daemon.answer("GET", "/jobs/1f0c77aa-1", failed),
    )
    result = run("job", "wait", "1f0c77aa-1")
    assert (result.exit_code, "it is rotten" in result.stderr) == (6, True)
    assert daemon.asked == [("GET", "/jobs/1f0c77aa-1", None)] * 2


def test_a_dry_run_of_a_cancel_asks_the_daemon_for_no_more(daemon: Any, run: Run) -> None:
    daemon.answer("POST", "/jobs/1f0c77aa-1/cancel", JOB)
    result = run("job", "cancel", "1f0c77aa-1", "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "job 1f0c77aa-1: would be cancelled\n")
    assert daemon.asked == [("POST", "/jobs/1f0c77aa-1/cancel", {"dry_run": True})]
