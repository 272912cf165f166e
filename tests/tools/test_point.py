"""vdiskfs point, with a mount."""

from collections.abc import Callable
from typing import Any

from click.testing import Result

Run = Callable[..., Result]

POINT = {"disk": "web01", "epoch": 9, "time": "2026-11-21T01:40:05.000Z", "consistency": "crash",
         "proof": "stored", "label": "a\x1b[1mb", "held": False, "changed_bytes": 4096,
         "stored_bytes": 100, "generation": 1}  # fmt: skip


def test_points_are_listed(daemon: Any, run: Run, run_json: Callable[..., Any]) -> None:
    daemon.answer("GET", "/disks/web01/points", {"points": [POINT]})
    lines = run("point", "list", "web01").stdout.splitlines()
    assert lines[0].split()[:3] == ["EPOCH", "TIME", "CONSISTENCY"]
    assert lines[1].split() == [
        *("9", "2026-11-21T01:40:05.000Z", "crash", "stored", "4.0", "KiB", "100", "B", "ab"),
    ]
    assert run_json("point", "list", "web01") == {"points": [POINT]}


def test_a_range_is_asked_for_in_utc(daemon: Any, run: Run) -> None:
    daemon.answer("GET", "/disks/web01/points", {"points": []})
    since, until = "2026-11-21T01:40:05+01:00", "2026-11-21T00:40:06.5Z"
    result = run("point", "list", "web01", "--since", since, "--until", until, "--limit", "5")
    assert result.exit_code == 0
    ((_, path, _),) = daemon.asked
    assert "limit=5" in path
    assert "since=2026-11-21T00%3A40%3A04.999999Z" in path
    assert "until=2026-11-21T00%3A40%3A06.599999Z" in path
    assert result.stderr == "web01: no points\n"


def test_a_time_that_is_none_is_wrong_use(daemon: Any, run: Run) -> None:
    assert run("point", "list", "web01", "--since", "yesterday").exit_code == 2
    assert run("point", "list", "web01", "--limit", "0").exit_code == 2
    assert daemon.asked == []


def test_a_point_is_created_of_several_disks(daemon: Any, run: Run) -> None:
    daemon.answer("POST", "/points", {"points": [POINT, {**POINT, "disk": "db01"}]})
    result = run("point", "create", "web01", "db01", "--label", "before", "--wait")
    assert result.stdout.splitlines() == [
        "web01@#9  2026-11-21T01:40:05.000Z",
        "db01@#9  2026-11-21T01:40:05.000Z",
    ]
    body = {"disks": ["web01", "db01"], "label": "before", "consistency": "crash", "wait": True}
    assert daemon.asked == [("POST", "/points", body)]


def test_a_point_that_fell_back_is_shown_and_is_exit_1(daemon: Any, run: Run) -> None:
    """One line says why; with --json the document says it, too."""
    daemon.answer("POST", "/points", {"points": [POINT], "fell_back": "guest agent x: no answer"})
    words = ("point", "create", "web01", "--consistency", "application")
    for more in ((), ("--json",)):
        result = run(*words, *more)
        assert result.exit_code == 1
        assert "web01" in result.stdout
        assert result.stderr.splitlines()[-1] == (
            "vdiskfs: the point is crash-consistent only: guest agent x: no answer; "
            "vdiskfs event list"
        )
    assert daemon.asked[0][2]["consistency"] == "application"


def test_a_label_has_a_limit(daemon: Any, run: Run) -> None:
    assert run("point", "create", "web01", "--label", "ä" * 61).exit_code == 2
    assert daemon.asked == []


def test_a_dry_run_makes_no_point(daemon: Any, run: Run) -> None:
    daemon.answer("GET", "/disks/web01", {})
    assert run("point", "create", "web01", "--dry-run").exit_code == 0
    assert run("point", "create", "web01", "absent", "--dry-run").exit_code == 3
    assert {method for method, _, _ in daemon.asked} == {"GET"}


def test_a_point_is_shown(daemon: Any, run: Run) -> None:
    daemon.answer("GET", "/disks/web01/points/9", {**POINT, "objects": 3, "requests": 7})
    for name in ("web01@9", "web01@#9"):
        shown = run("point", "show", name).stdout
        assert "changed_bytes  4.0 KiB" in shown
        assert "requests       7" in shown
        assert "\x1b" not in shown


def test_a_point_that_is_none_is_wrong_use(daemon: Any, run: Run) -> None:
    for line in (["show", "web01"], ["diff", "web01@1", "web01@x"], ["restore", "web01", "f"]):
        assert run("point", *line).exit_code == 2
    assert daemon.asked == []
