"""Failback between two sites on one vault: a disk goes away and comes home, round and round."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.gauges import write_at
from tests.e2e.test_relocation import DISK, MIB, SIZE, Sites, refused, refuses_writes, vault_record

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.timeout(300)]


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    two = Sites(tmp_path)
    with two.home, two.away:
        two.begin()
        yield two


def fetched(document: dict[str, Any]) -> int:
    return int(document["moving"][DISK]["fetched_bytes"])


def follows(sites: Sites, content: bytes) -> None:
    """Check that home replicates what it has, and only what is changed."""
    home, live = sites.home, sites.home.image(DISK)
    assert live.read_bytes() == content
    home.wait_shipped(DISK)
    write_at(live, 5 * 4096, os.urandom(4096))
    home.wait_shipped(DISK)
    assert home.points(DISK)[-1]["changed_bytes"] == 4096
    assert home.point(DISK).read_bytes() == live.read_bytes()


def come_home(sites: Sites, *extra: str) -> dict[str, Any]:
    """Fail back and commit; return what the start said."""
    home = sites.home
    begun: dict[str, Any] = home.json("failback", "start", DISK, *extra)
    assert begun["state"] == "FailingBack"
    assert home.json("failback", "complete", DISK)["state"] == "FailbackUncommitted"
    return begun


def test_a_disk_comes_home_with_what_was_changed_there_and_nothing_else(sites: Sites) -> None:
    home, away = sites.home, sites.away
    live = home.image(DISK)
    name = sites.start()["name"]
    assert "is not replicated from site away" in refused(home, "failback", "start", DISK)
    away.json("failover", "commit", name)
    write_at(sites.copy, 0, os.urandom(MIB // 4))
    away.json("reprotect", DISK)
    begun = home.json("failback", "start", DISK)
    assert begun["state"] == "FailingBack"
    assert MIB // 4 <= fetched(begun) < MIB // 2
    assert refuses_writes(live)
    assert live.read_bytes() == sites.copy.read_bytes()
    # It is written on, there, until the disk is asked for.
    write_at(sites.copy, 2 * MIB, b"the last write")
    content = sites.copy.read_bytes()
    assert "commit is not possible in state FailingBack; possible: failback, complete" in refused(
        home, "failback", "commit", DISK
    )
    done = home.json("failback", "complete", DISK)
    assert done["state"] == "FailbackUncommitted"
    assert refuses_writes(sites.copy)
    assert away.json("failover", "show", name)["state"] == "HandedOver"
    assert vault_record(sites)["moved"]["state"] == "FailbackUncommitted"
    follows(sites, content)
    home.json("failback", "commit", DISK)
    assert vault_record(sites)["moved"] is None
    away.json("failover", "cleanup", name)
    for end in (home.kill_daemon, home.umount):
        end()
        if end == home.umount:
            home.mount()
        home.wait("it goes on", lambda: home.disk(DISK)["state"] == "Protected")
        follows(sites, live.read_bytes())
    # And away again.
    name = sites.start()["name"]
    assert sites.copy.read_bytes() == live.read_bytes()
    away.json("failover", "rollback", name)
    home.wait("home is back", lambda: home.disk(DISK)["state"] == "Protected")
    follows(sites, live.read_bytes())


def test_what_home_wrote_on_its_own_is_kept_as_a_branch_and_undone_by_the_failback(
    sites: Sites,
) -> None:
    home, away = sites.home, sites.away
    live = home.image(DISK)
    old = sites.write(home, live, b"old")
    for number in range(4):
        sites.write(home, live, b"newer", at=number * 65536)
    name = sites.start("--unplanned", "--point", f"#{old}")["name"]
    home.wait("home is displaced", lambda: home.disk(DISK)["state"] == "Displaced")
    lost = live.read_bytes()
    away.json("failover", "commit", name)
    write_at(sites.copy, SIZE - 4096, b"away")
    away.json("reprotect", DISK)
    content = sites.copy.read_bytes()
    # It comes home while home is off and on again at any time.
    home.kill_daemon()
    begun = come_home(sites)
    assert fetched(begun) < MIB
    home.json("failback", "commit", DISK)
    follows(sites, content)
    away.json("failover", "cleanup", name)
    branches = home.json("disk", "branches", DISK)["branches"]
    assert any(
        home.point(f"{DISK}@{one['name']}").with_name(f"{DISK}.img").read_bytes() == lost
        for one in branches
    )


@pytest.mark.parametrize("extra", ["--mode=full-download", "--create-vm"])
def test_an_image_that_is_not_to_be_believed_or_is_gone_is_brought_whole(
    sites: Sites, extra: str
) -> None:
    home, away = sites.home, sites.away
    name = sites.start()["name"]
    away.json("failover", "commit", name)
    write_at(sites.copy, 3 * MIB, b"away")
    away.json("reprotect", DISK)
    content = sites.copy.read_bytes()
    if extra == "--create-vm":
        home.umount()
        (home.source / f"{DISK}.img").unlink()
        for path in sorted(home.state.rglob("*"), reverse=True):
            path.unlink() if not path.is_dir() else path.rmdir()
        home.mount()
        assert "no image of it is known here" in refused(home, "failback", "start", DISK)
    begun = come_home(sites, extra)
    assert fetched(begun) >= SIZE - MIB
    home.json("failback", "commit", DISK)
    follows(sites, content)
    away.json("failover", "cleanup", name)


def test_a_group_goes_away_and_comes_home_at_one_instant(tmp_path: Path) -> None:
    sites = Sites(tmp_path)
    home, away = sites.home, sites.away
    names = ("db01", "log01")
    with home, away:
        for name in names:
            home.add_image(name, MIB, os.urandom(MIB))
        home.init().mount()
        for name in names:
            home.wait_shipped(name)
        home.json("group", "create", "shop", *names)
        for number in range(5):
            for name in names:
                write_at(home.image(name), 0, f"{number}".encode())
        for name in names:
            home.wait_shipped(name)
        away.mount(recovery=True)
        found = away.json("failover", "start", "shop", "--unplanned")
        first, second = (Path(row["path"]) for row in found["disks"])
        # What was written first is never behind.
        assert first.read_bytes()[:1] >= second.read_bytes()[:1]
        assert len({row["point_time"] for row in found["disks"]}) == 1
        away.json("failover", "rollback", found["name"])
        for name in names:
            home.wait("home is back", lambda name=name: home.disk(name)["state"] == "Protected")  # type: ignore[misc]
        found = away.json("failover", "start", "shop")
        assert found["kind"] == "planned"
        away.json("failover", "commit", found["name"])
        copies = [Path(row["path"]) for row in found["disks"]]
        for copy in copies:
            write_at(copy, 4096, b"away")
        away.json("reprotect", "shop")
        contents = [copy.read_bytes() for copy in copies]
        home.json("failback", "start", "shop")
        assert home.json("failback", "complete", "shop")["state"] == "FailbackUncommitted"
        home.json("failback", "commit", "shop")
        for name, content in zip(names, contents, strict=True):
            assert home.image(name).read_bytes() == content
            home.wait_shipped(name)
        away.json("failover", "cleanup", found["name"])
