"""A failback that is called off, and one whose other site is gone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.gauges import write_at
from tests.e2e.test_failback import follows, shown
from tests.e2e.test_relocation import (
    DISK,
    MIB,
    Sites,
    done,
    refused,
    refuses_writes,
    vault_record,
)

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.timeout(300)]


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    """Give two sites; the disk is at the other one, and replicated from there."""
    two = Sites(tmp_path)
    # Where a failback is called off the daemon dies once.
    two.home.environ["VDISKFS_CRASH"] = "failback.left:1"
    with two.home, two.away:
        two.begin()
        two.away.json("failover", "commit", two.start()["name"])
        write_at(two.copy, 0, os.urandom(MIB // 4))
        two.away.json("reprotect", DISK)
        yield two


def call_off(sites: Sites) -> None:
    """Call the failback off; the daemon is killed while it does so, and goes on by itself."""
    home = sites.home
    name, dead = shown(home)["name"], home.pid
    home.run_any("-m", str(home.mountpoint), "failover", "cleanup", name)
    home.wait_successor(dead, set())
    home.wait("it is called off", lambda: not home.json("failover", "list")["failovers"])
    assert not list(home.state.glob("failovers/*/*"))
    jobs = [row for row in home.json("job", "list")["jobs"] if row["failover"]]
    assert [(row["kind"], row["state"]) for row in jobs[-2:]] == [
        ("complete", "interrupted"), ("cleanup", "done"),
    ]  # fmt: skip


def test_a_failback_is_called_off_and_the_next_one_goes_on_where_it_was(sites: Sites) -> None:
    home, away = sites.home, sites.away
    name = home.json("failback", "start", DISK)["name"]
    with sites.copy.open("rb"):
        home.json("failback", "complete", DISK, "--no-wait")
        away.wait("it is asked for", lambda: "waits for" in str(vault_record(sites)["handover"]))
        before = home.json("failover", "show", name)["state"]
        home.json("failover", "cleanup", name, "--dry-run")
        assert home.json("failover", "show", name)["state"] == before == "Completing"
        call_off(sites)
    assert vault_record(sites)["handover"] is None
    # There all goes on, whatever is done here.
    away.wait("it is kept", lambda: not refuses_writes(sites.copy))
    write_at(sites.copy, 2 * MIB, b"written after it was called off")
    away.wait_shipped(DISK)
    home.umount()
    home.mount()
    assert refuses_writes(home.image(DISK))
    assert "is on its way home" in refused(home, "failover", "start", DISK, "--unplanned")
    content = sites.copy.read_bytes()
    begun = done(sites, home, "failback", "start", DISK)
    assert begun["moving"][DISK]["total_bytes"] == 4096  # what was brought before is there
    done(sites, home, "failback", "complete", DISK)
    assert "complete is not possible" not in home.json("failback", "commit", DISK)["state"]
    follows(sites, content)


def test_a_machine_that_writes_on_its_branch_does_so_again(tmp_path: Path) -> None:
    """What it wrote cannot be shipped: nothing of the image was moved."""
    sites = Sites(tmp_path, 'when_displaced = "keep"\n')
    home, away = sites.home, sites.away
    with home, away:
        sites.begin()
        away.json("failover", "commit", sites.start("--unplanned")["name"])
        away.json("reprotect", DISK)
        home.wait("home is displaced", lambda: home.disk(DISK)["state"] == "Displaced")
        write_at(home.image(DISK), 0, b"in the branch")
        home.json("disk", "pause", DISK)
        assert "its replication is paused" in refused(home, "failback", "start", DISK)
        assert refuses_writes(home.image(DISK))
        home.json("failover", "cleanup", shown(home)["name"])
        write_at(home.image(DISK), 4096, b"in the branch, too")


def test_a_failback_of_an_image_that_is_made_anew_is_called_off_without_a_trace(
    sites: Sites,
) -> None:
    home = sites.home
    home.umount()
    (home.source / f"{DISK}.img").unlink()
    for path in sorted(home.state.rglob("*"), reverse=True):
        path.unlink() if not path.is_dir() else path.rmdir()
    home.mount()
    name = home.json("failback", "start", DISK, "--create-vm")["name"]
    home.json("failover", "cleanup", name)
    assert not any(home.source.iterdir())
    assert not list(home.state.glob("failovers/*"))
    home.json("failback", "start", DISK, "--create-vm")
    home.json("failback", "complete", DISK)
    follows(sites, sites.copy.read_bytes())
    assert f"failover {name}: cleanup is not possible in state FailbackUncommitted" in refused(
        home, "failover", "cleanup", name
    )


@pytest.mark.parametrize("asked", [False, True], ids=["at once", "after it was asked in vain"])
def test_a_disk_comes_home_although_the_other_site_is_gone(sites: Sites, asked: bool) -> None:
    home, away = sites.home, sites.away
    [row] = away.json("point", "create", DISK, "--wait")["points"]
    older = sites.copy.read_bytes()
    write_at(sites.copy, 2 * MIB, b"the last that is shipped")
    away.wait_shipped(DISK)
    content, copy = sites.copy.read_bytes(), sites.copy
    away.kill_for_good()
    home.json("failback", "start", DISK)
    if asked:
        home.json("failback", "complete", DISK, "--no-wait")
        home.wait("it is asked", lambda: vault_record(sites)["handover"] is not None)
    point = () if asked else (f"--point=#{row['epoch']}",)
    planned = home.json("failback", "complete", DISK, "--unplanned", *point, "--dry-run")
    assert planned["dry_run"]
    found = home.json("failback", "complete", DISK, "--unplanned", *point)
    assert found["state"] == "FailbackUncommitted"
    home.json("failback", "commit", DISK)
    jobs = [row for row in home.json("job", "list")["jobs"] if row["failover"]]
    assert [(row["kind"], row["state"]) for row in jobs[-2:]] == [
        ("complete", "done"), ("commit", "done"),
    ]  # fmt: skip
    assert jobs[-2]["steps"] == ["chosen", "home", "machine", "over"]
    follows(sites, content if asked else older)
    home.json("failover", "cleanup", found["name"])
    home.umount()
    home.mount()
    home.wait("it goes on", lambda: home.disk(DISK)["state"] == "Protected")
    away.umount()
    away.mount(recovery=True)
    away.wait("it is displaced", lambda: refuses_writes(copy))
    if not asked:
        branches = home.json("disk", "branches", DISK)["branches"]
        kept = [home.point(f"{DISK}@{one['name']}").parent / f"{DISK}.img" for one in branches]
        assert any(image.read_bytes() == content for image in kept)


def test_a_disk_that_came_home_is_taken_again_before_that_was_committed(sites: Sites) -> None:
    """Home is gone, which alone could commit; when it is back nothing stands in the way."""
    home, away = sites.home, sites.away
    home.json("failback", "start", DISK)
    home.json("failback", "complete", DISK)
    follows(sites, home.image(DISK).read_bytes())
    content = home.image(DISK).read_bytes()
    away.json("failover", "cleanup", f"{DISK}-failover-1")
    home.umount()
    line = refused(away, "failover", "start", DISK)
    assert f"there: vdiskfs failback commit {DISK}; if that site is gone: --unplanned" in line
    name = sites.start("--unplanned")["name"]
    assert sites.copy.read_bytes() == content
    away.json("failover", "commit", name)
    write_at(sites.copy, MIB, b"away again")
    content = sites.copy.read_bytes()
    away.json("reprotect", DISK)
    home.mount()
    home.wait("home is displaced", lambda: home.disk(DISK)["state"] == "Displaced")
    assert "possible: commit" in refused(home, "failback", "start", DISK)
    assert home.json("failback", "commit", DISK)["state"] == "FailedBack"
    assert vault_record(sites)["moved"]["state"] == "FailbackReady"
    home.json("failback", "start", DISK)
    home.json("failback", "complete", DISK)
    home.json("failback", "commit", DISK)
    assert home.image(DISK).read_bytes() == content
    assert vault_record(sites)["moved"] is None
