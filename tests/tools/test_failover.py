"""vdiskfs failover, with a mount."""

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

Run = Callable[..., Result]

FAILOVER: dict[str, Any] = {
    "name": "t1", "id": "a" * 32, "kind": "test", "state": "TestFailover",
    "created": "2026-11-21T01:40:05.000Z", "notes": None, "path": "/mnt/failovers/t1",
    "machine": None, "health": None, "possible": ["change-point", "commit"], "moving": {},
    "members": [{"disk": "web01", "id": "b" * 32, "epoch": 9,
                 "point_time": "2026-11-21T01:40:00.000Z"}],
    "disks": [{"disk": "web01", "id": "b" * 32, "epoch": 9,
               "point_time": "2026-11-21T01:40:00.000Z", "path": "/mnt/failovers/t1/web01.img",
               "size": 1 << 30, "present_bytes": 4096}],
}  # fmt: skip


def test_a_test_names_the_image_and_how_to_end_it(daemon: Any, run: Run) -> None:
    daemon.answer("POST", "/failovers", FAILOVER)
    result = run("failover", "test", "web01", "--point", "-15m", "--name", "t1")
    assert "/mnt/failovers/t1/web01.img" in result.stderr
    assert "vdiskfs failover cleanup t1" in result.stderr
    body = {"disk": "web01", "point": "-15m", "name": "t1", "vm": "auto", "dry_run": False}
    assert daemon.asked == [("POST", "/failovers", body)]


def test_an_epoch_is_named_by_its_number(daemon: Any, run: Run) -> None:
    daemon.answer("POST", "/failovers", FAILOVER)
    run("failover", "test", "web01", "--point", "#9")
    assert daemon.asked[0][2]["point"] == "9"


def test_failovers_are_listed_and_shown(
    daemon: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    daemon.answer("GET", "/failovers", {"failovers": [FAILOVER]})
    lines = run("failover", "list").stdout.splitlines()
    assert lines[1].split()[:2] == ["t1", "TestFailover"]
    assert lines[1].split()[-4:] == ["1.0", "GiB", "4.0", "KiB"]
    assert run_json("failover", "list") == {"failovers": [FAILOVER]}
    daemon.answer("GET", "/failovers/t1", FAILOVER)
    shown = run("failover", "show", "t1").stdout
    assert "web01.present_bytes  4096 (4.0 KiB)" in shown
    assert "change-point, commit" in shown


@pytest.mark.parametrize("kind", ["planned", "failback"])
def test_one_that_has_no_copies_is_listed_and_shown(daemon: Any, run: Run, kind: str) -> None:
    """It has just begun, and waits for the other site; or its images are those at home."""
    waits = {"id": "a-1", "state": "running", "waits_for": "disk web01: site home"}
    moving = {"web01": {"done_bytes": 4096, "total_bytes": 8192}} if kind == "failback" else {}
    begun = {**FAILOVER, "kind": kind, "state": "Starting", "disks": [], "job": waits,
             "moving": moving}  # fmt: skip
    daemon.answer("GET", "/failovers", {"failovers": [begun]})
    assert "t1        Starting  2026-11-21T01:40:05.000Z  web01" in run("failover", "list").stdout
    daemon.answer("GET", "/failovers/t1", begun)
    shown = run("failover", "show", "t1").stdout
    assert "job.waits_for" in shown
    assert ("web01.done_bytes" in shown) is (kind == "failback")


def test_one_that_is_rolled_back_while_it_is_waited_for_did_not_succeed(
    daemon: Any, run: Run
) -> None:
    begun = {**FAILOVER, "state": "Starting", "job": {"id": "a-1", "state": "running"}}
    daemon.answer("POST", "/failovers/start", begun)
    result = run("failover", "start", "web01")
    assert result.exit_code == 4
    assert "failover t1: was rolled back" in result.stderr
    daemon.answer("POST", "/failovers/t1/rollback", {**begun, "state": "RollingBack"})
    assert run("failover", "rollback", "t1").exit_code == 0


def test_no_failovers_is_a_message(daemon: Any, run: Run) -> None:
    daemon.answer("GET", "/failovers", {"failovers": []})
    result = run("failover", "list")
    assert (result.stdout, result.stderr) == ("", "no failovers\n")


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_failover_is_cleaned_up(daemon: Any, run: Run, dry_run: bool) -> None:
    daemon.answer("POST", "/failovers/t1/cleanup", {"name": "t1"})
    words = ["--dry-run"] if dry_run else []
    result = run("failover", "cleanup", "t1", "--notes", "fine", *words)
    assert ("would be" in result.stderr) is dry_run
    body = {"notes": "fine", "dry_run": dry_run}
    assert daemon.asked == [("POST", "/failovers/t1/cleanup", body)]


@pytest.mark.parametrize("words", [["../etc"], ["web01", "--point", "yesterday"]])
def test_what_names_nothing_is_not_asked_for(daemon: Any, run: Run, words: list[str]) -> None:
    assert run("failover", "test", *words).exit_code == 2
    assert daemon.asked == []


@pytest.mark.parametrize("healthy", [True, False])
def test_a_machine_is_waited_for_and_judged(daemon: Any, run: Run, healthy: bool) -> None:
    machine = {"name": "shop", "state": "running", "directory": "/state/machine"}
    health = {"healthy": healthy, "seconds": 12.5, "detail": "TCP port 80: passed"}
    daemon.answer("POST", "/failovers", {**FAILOVER, "machine": machine})
    daemon.answer("GET", "/failovers/t1", {**FAILOVER, "machine": machine, "health": health})
    result = run("failover", "test", "web01")
    assert result.exit_code == (0 if healthy else 6)
    assert "TCP port 80: passed" in result.stderr
    assert ("/state/machine" in result.stderr) is not healthy
    assert run("failover", "test", "web01", "--no-wait").exit_code == 0
