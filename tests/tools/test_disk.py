"""vdiskfs disk, with a mount."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

Run = Callable[..., Result]

DISK = {"name": "web01", "size": 1 << 30, "state": "Protected", "health": "Normal", "epoch": 9,
        "usable_point_age_s": 3.0, "spool": {"objects": 2}, "suspect_bytes": 4096}  # fmt: skip


def test_disks_are_listed(daemon: Any, run: Run, run_json: Callable[..., Any]) -> None:
    daemon.answer("GET", "/disks", {"disks": [DISK]})
    lines = run("disk", "list").stdout.splitlines()
    assert lines[0].split() == ["DISK", "SIZE", "STATE", "HEALTH", "EPOCH", "POINT", "AGE"]
    assert lines[1].split() == ["web01", "1.0", "GiB", "Protected", "Normal", "9", "3.0", "s"]
    assert run_json("disk", "list") == {"disks": [DISK]}


def test_no_disks_is_a_message(daemon: Any, run: Run) -> None:
    daemon.answer("GET", "/disks", {"disks": []})
    result = run("disk", "list")
    assert (result.stdout, result.stderr) == ("", "no disks\n")


def test_a_disk_is_shown(daemon: Any, run: Run) -> None:
    daemon.answer("GET", "/disks/web01", DISK)
    shown = run("disk", "show", "web01").stdout
    assert "spool.objects       2" in shown
    assert "suspect_bytes       4096 (4.0 KiB)" in shown


@pytest.mark.parametrize(("verb", "body"), [("protect", {"policy": None}), ("unprotect", {})])
def test_a_disk_is_changed(daemon: Any, run: Run, verb: str, body: dict[str, Any]) -> None:
    daemon.answer("POST", f"/disks/data.bin/{verb}", {"name": "data"})
    result = run("disk", verb, "data.bin")
    assert result.exit_code == 0
    assert result.stderr == f"data: {verb}ed\n"
    assert daemon.asked == [("POST", f"/disks/data.bin/{verb}", body)]


@pytest.mark.parametrize("verb", ["protect", "unprotect", "retry", "resync"])
def test_a_dry_run_only_looks(daemon: Any, run: Run, verb: str) -> None:
    daemon.answer("GET", "/disks/web01", DISK)
    result = run("disk", verb, "web01", "--dry-run", "--json")
    assert json.loads(result.stdout) == {"dry_run": True, "disk": "web01", "would": verb}
    assert [method for method, _, _ in daemon.asked] == ["GET"]


@pytest.mark.parametrize(
    "verb", ["show", "protect", "unprotect", "resync --dry-run", "protect --policy none --dry-run"]
)
def test_no_such_disk_is_exit_3(daemon: Any, run: Run, verb: str) -> None:
    result = run("disk", *verb.split(), "absent")
    assert result.exit_code == 3
    assert daemon.asked
    assert "--dry-run" not in verb or {method for method, _, _ in daemon.asked} == {"GET"}


@pytest.mark.parametrize("verb", ["show", "protect", "unprotect"])
def test_what_is_no_name_is_not_asked_for(daemon: Any, run: Run, verb: str) -> None:
    assert run("disk", verb, "../etc").exit_code == 2
    assert daemon.asked == []
