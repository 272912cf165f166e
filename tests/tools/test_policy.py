"""vdiskfs policy, and what it does to disks; point hold and release; vault gc."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import Result

from tests.vaults import PLAIN

Run = Callable[..., Result]


def test_presets_are_listed_and_shown(history: Any, run_json: Callable[..., Any]) -> None:
    names = {
        item["name"] for item in run_json("policy", "list", "--vault", history.url)["policies"]
    }
    assert names == {"default", "asr-standard", "asr-premium"}
    shown = run_json("policy", "show", "default", "--vault", history.url)
    assert shown["retention"] == "1s for 1h, 1m for 1d, 1h for 15d, 1d for 1y"
    assert shown["disks"] == []


def test_a_policy_that_is_none_is_wrong_use(history: Any, run: Run) -> None:
    for line in (["shop", "retention=often"], ["shop", "speed=1"], ["shop", "retention"],
                 ["a/b", "retention=all"], ["shop", "rpo_warning=soon"],
                 ["shop", "rpo_warning=1m", "rpo_warning=2m"]):  # fmt: skip
        result = run("policy", "set", *line, "--vault", history.url)
        assert result.exit_code == 2, line
        assert result.stderr.count("\n") == 1
    assert run("policy", "show", "shop", "--vault", history.url).exit_code == 3


@PLAIN
def test_a_damaged_policy_is_said_and_the_others_are_listed(
    history: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    vault = ("--vault", history.url)
    for name in ("gold", "asr-premium"):
        assert run("policy", "set", name, "retention=1h for 2h", *vault).exit_code == 0
        path = Path(history.url.removeprefix("file://")) / "policies" / f"{name}.json"
        path.write_bytes(b"x" + path.read_bytes()[1:])
    listed = run_json("policy", "list", *vault)
    assert [one["name"] for one in listed["policies"]] == ["asr-standard", "default"]
    assert sorted(one["object"] for one in listed["unreadable"]) == [
        "policies/asr-premium.json", "policies/gold.json",
    ]  # fmt: skip
    assert "policies/gold.json: not a document" in run("policy", "list", *vault).stderr


def test_what_a_policy_deletes_is_said_and_asked_first(
    history: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    vault = ("--vault", history.url)
    before = run_json("point", "list", "web01", *vault)["points"]
    first, labelled, newest = (item["epoch"] for item in before)
    assert run_json("policy", "set", "tight", "retention=1h for 2h", *vault)["disks"] == []
    refused = run("disk", "protect", "web01", "--policy", "tight", *vault)
    assert refused.exit_code == 4
    assert "would be deleted" in refused.stderr
    said = run_json("disk", "protect", "web01", "--policy", "tight", "--dry-run", *vault)
    assert said["preview"]["points"] == 1
    # What is held is not lost, and nothing is asked then.
    run_json("point", "hold", f"web01@{first}", *vault)
    run_json("disk", "protect", "web01", "--policy", "tight", *vault)
    (kept,) = run_json("vault", "gc", *vault)["lines"]
    assert kept["points"] == 0
    held = [item["held"] for item in run_json("point", "list", "web01", *vault)["points"]]
    assert held == [True, False, False]
    # A change of the policy says it, too.
    looser = run_json("policy", "set", "tight", "retention=1s for 2h", "--dry-run", *vault)
    assert looser["disks"][0]["points"] == 0
    run_json("point", "release", f"web01@{first}", *vault)
    again = run("policy", "set", "tight", "retention=2h for 3h", *vault, "--json")
    assert again.exit_code == 4
    assert json.loads(again.stdout or "{}") == {}
    (planned,) = run_json("vault", "gc", "--dry-run", *vault)["lines"]
    (done,) = run_json("vault", "gc", *vault)["lines"]
    assert planned["points"] == done["points"] == 1
    left = run_json("point", "list", "web01", *vault)["points"]
    assert [item["epoch"] for item in left] == [labelled, newest]
    assert run_json("vault", "check", "--read-data", *vault)["ok"]
    assert run("disk", "protect", "web01", "--policy", "none", "--yes", *vault).exit_code == 0
    assert run("vault", "gc", *vault).stderr == "no disk has a policy\n"
