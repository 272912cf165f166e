"""vdiskfs site: who keeps disks in a vault, by their heartbeats."""

from collections.abc import Callable
from typing import Any

import pytest
import trio
from click.testing import Result

from tests.vaults import given
from vdiskfs.catalog import SiteRecord, Vault
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
