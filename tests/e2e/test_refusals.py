"""What a failover refuses while the disk is being resynchronized or paused: real mounts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.e2e.gauges import write_at
from tests.e2e.test_relocation import DISK, Sites, refused, vault_record
from tests.vaults import heartbeats
from vdiskfs.units import format_time

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.timeout(300)]


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    """Home has a window for resynchronizations that is never open now."""
    start = datetime.now().astimezone() + timedelta(hours=2)
    window = f"{start:%H:%M}-{start + timedelta(hours=1):%H:%M}"
    two = Sites(tmp_path, f'resync_window = "{window}"\n')
    with two.home, two.away:
        two.begin()
        yield two


def test_an_instant_that_a_disk_in_resynchronization_has_not_is_refused(sites: Sites) -> None:
    home, away = sites.home, sites.away
    live = home.image(DISK)
    there = sites.write(home, live, b"there")
    home.run("-m", home.mountpoint, "disk", "resync", DISK)
    home.wait("it waits", lambda: home.disk(DISK)["state"] == "ResyncRequired")
    write_at(live, 0, b"later")
    written = format_time(time.time_ns())

    def states() -> str:
        return str(heartbeats(home.state.parent.parent / "vault"))

    away.wait("home has said so", lambda: "ResyncRequired" in states())
    for command in ("start", "test"):
        kind = ["--unplanned"] if command == "start" else []
        for point in (f"#{there + 1}", written):
            line = refused(away, "failover", command, DISK, *kind, "--point", point)
            assert f"disk {DISK}: is in state ResyncRequired at site home" in line
            assert f"its newest is #{there} of " in line
            assert "--point latest" in line
    assert away.json("failover", "list")["failovers"] == []

    # A planned one would lose what is not compared yet; nothing is stopped for it.
    with live.open("r+b", buffering=0) as user:
        line = refused(away, "failover", "start", DISK, "--planned")
        assert f"disk {DISK}: is in state ResyncRequired: asked for" in line
        assert f"vdiskfs disk resync {DISK} --now" in line
        user.write(b"still")
    [failover] = away.json("failover", "list")["failovers"]
    away.json("failover", "rollback", failover["name"])
    home.wait("home goes on", lambda: home.disk(DISK)["state"] == "ResyncRequired")

    # What is there can be had all the while, and the rest as soon as it is there.
    test = away.json("failover", "test", DISK, "--point", "latest")
    assert sites.copy.read_bytes() == sites.contents[there]
    away.json("failover", "cleanup", test["name"])
    home.run("-m", home.mountpoint, "disk", "resync", DISK, "--now")
    home.wait_shipped(DISK)
    now = format_time(time.time_ns())
    test = away.json("failover", "test", DISK, "--point", now)
    assert sites.copy.read_bytes() == live.read_bytes()
    assert sites.copy.read_bytes().startswith(b"still")
    away.json("failover", "cleanup", test["name"])


def test_a_paused_disk_is_not_handed_over_and_its_points_can_be_taken(sites: Sites) -> None:
    home, away = sites.home, sites.away
    live = home.image(DISK)
    there = sites.write(home, live, b"there")
    home.json("disk", "pause", DISK)
    with live.open("r+b", buffering=0) as user:
        user.write(b"later")
        os.fsync(user.fileno())
        line = refused(away, "failover", "start", DISK, "--planned")
        assert "paused" in line
        assert f"vdiskfs disk resume {DISK}" in line
        user.write(b"again")
    [failover] = away.json("failover", "list")["failovers"]
    away.json("failover", "rollback", failover["name"])
    away.json("failover", "test", DISK)
    assert sites.copy.read_bytes() == sites.contents[there]


def test_where_one_disk_is_refused_the_others_go_on_at_home(tmp_path: Path) -> None:
    sites = Sites(tmp_path)
    home, away = sites.home, sites.away
    with home, away:
        home.add_image("log01", 1 << 20)
        sites.begin()
        home.wait_shipped("log01")
        home.json("group", "create", "shop", DISK, "log01")
        home.json("disk", "pause", DISK)
        line = refused(away, "failover", "start", "shop")
        assert "paused" in line
        home.wait("the other one is kept", lambda: home.disk("log01")["state"] == "Protected")
        write_at(home.image("log01"), 0, b"goes on")
        home.json("disk", "resume", DISK)
        found = away.json("failover", "start", "shop")
        contents = {row["disk"]: Path(row["path"]).read_bytes() for row in found["disks"]}
        assert contents == {disk: home.image(disk).read_bytes() for disk in (DISK, "log01")}
        assert contents["log01"].startswith(b"goes on")
        assert vault_record(sites, "log01")["branches"] == {}
