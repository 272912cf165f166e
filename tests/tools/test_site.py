"""vdiskfs site: who keeps disks in a vault, by their heartbeats."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import Result

from tests.vaults import PLAIN, given
from vdiskfs.catalog import SiteRecord, Vault
from vdiskfs.catalog.upkeep import choose_policy
from vdiskfs.store import open_store
from vdiskfs.units import format_time

Run = Callable[..., Result]
NOW_NS = 1_800_000_000 * 10**9


@pytest.fixture
def sites(history: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two sites, of which one was last heard of an hour ago."""

    async def write() -> None:
        vault = await Vault.open(open_store(history.url), given())
        disk = next(iter(await vault.disks())).id
        for name, ago_s, states in (("berlin", 5, {disk: "Protected"}), ("paris", 3600, {})):
            moment = format_time(NOW_NS - ago_s * 10**9)
            await vault.write_site(SiteRecord(
                name, f"host-{name}", moment, "1.0", tuple(states), 7, moment, name[:1] * 32,
                states=states, healths=dict.fromkeys(states, "Warning"),
            ))  # fmt: skip

    trio.run(write)
    monkeypatch.setattr("vdiskfs.liveness.time.time_ns", lambda: NOW_NS)
    return ["--vault", history.url]


def test_sites_are_listed_with_last_contact_and_health(
    sites: list[str], run: Run, run_json: Callable[..., Any]
) -> None:
    berlin, paris = run_json("site", "list", *sites)["sites"]
    assert (berlin["contact"], berlin["health"], berlin["age_s"]) == (True, "Warning", 5.0)
    assert [(one["name"], one["state"]) for one in berlin["disks"]] == [("web01", "Protected")]
    assert (paris["contact"], paris["health"], paris["disks"]) == (False, None, [])
    lines = run("site", "list", *sites).stdout.splitlines()
    assert lines[1].split()[:5] == ["berlin", "host-berlin", "here", "5", "s"]
    assert lines[2].split()[:5] == ["paris", "host-paris", "SILENT", "60", "min"]


def test_a_site_is_shown_and_an_unknown_one_is_none(
    sites: list[str], run: Run, run_json: Callable[..., Any]
) -> None:
    [one] = run_json("site", "show", "berlin", *sites)["sites"]
    assert one["host"] == "host-berlin"
    text = run("site", "show", "berlin", *sites).stdout
    assert "Protected" in text
    assert "Warning" in text
    assert "silent for 60 min" in run("site", "show", "paris", *sites).stdout
    missing = run("site", "show", "rome", *sites)
    assert missing.exit_code == 3
    assert "there is no site rome" in missing.stderr


@PLAIN
def test_a_damaged_heartbeat_of_a_site_that_is_gone_stops_nothing_but_thinning(
    history: Any, sites: list[str], run: Run, run_json: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Thinning compares this host's clock with the store's.
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 10**9))
    [paris] = (Path(history.url.removeprefix("file://")) / "sites").glob("paris.*")
    paris.write_bytes(b"x" + paris.read_bytes()[1:])
    assert run("policy", "set", "soft", "retention=1h for 2h", *sites).exit_code == 0
    trio.run(follow, history.url)
    listed = run_json("site", "list", *sites)
    assert [one["site"] for one in listed["sites"]] == ["berlin"]
    assert [one["object"] for one in listed["unreadable"]] == [f"sites/{paris.name}"]
    assert "unreadable" in run("site", "list", *sites).stdout
    assert run("site", "show", "berlin", *sites).exit_code == 0
    assert run("site", "show", "paris", *sites).exit_code == 6
    assert f"sites/{paris.name}" in run("vault", "info", *sites).stderr
    assert run_json("policy", "set", "soft", "rpo_warning=5m", *sites)["disks"] == []
    checked = run("--json", "vault", "check", *sites)
    assert checked.exit_code == 6
    assert [(one["object"], one["points"]) for one in json.loads(checked.stdout)["problems"]] == [
        (f"sites/{paris.name}", [])
    ]
    refused = run("vault", "gc", *sites)
    assert refused.exit_code == 6
    assert f"sites/{paris.name}" in refused.stderr
    assert "removes it a week after" in run("vault", "repair", *sites).stdout
    week_ago = paris.stat().st_mtime - 7 * 86400
    os.utime(paris, (week_ago, week_ago))
    assert run("vault", "gc", *sites).exit_code == 0
    assert run("vault", "repair", *sites).exit_code == 0
    assert run("vault", "check", *sites).exit_code == 0
    assert not paris.exists()


async def follow(url: str) -> None:
    vault = await Vault.open(open_store(url))
    await choose_policy(vault, next(iter(await vault.disks())).id, "soft")
