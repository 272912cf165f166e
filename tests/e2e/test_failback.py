"""Failback between two sites on one vault: a disk goes away and comes home, round and round."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.gauges import write_at
from tests.e2e.mounted import MountedSite
from tests.e2e.test_kept import at_third
from tests.e2e.test_relocation import (
    DISK,
    MIB,
    SIZE,
    Sites,
    done,
    refused,
    refuses_writes,
    vault_record,
)
from vdiskfs.catalog import DiskRecord, Vault
from vdiskfs.catalog.moves import RELEASED, Fork, answer, fork_off
from vdiskfs.catalog.owners import Claim, fence
from vdiskfs.catalog.records import Moved
from vdiskfs.catalog.vault import now_text
from vdiskfs.state import read_record, write_record

THIRD = "d" * 32

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.timeout(300)]


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
    name = done(sites, away, "failover", "start", DISK)["name"]
    assert "is not replicated from site away" in refused(home, "failback", "start", DISK)
    done(sites, away, "failover", "commit", name)
    write_at(sites.copy, 0, os.urandom(MIB // 4))
    done(sites, away, "reprotect", DISK)
    begun = done(sites, home, "failback", "start", DISK)
    assert begun["state"] == "FailingBack"
    assert "in mode minimize-downtime; " in refused(
        home, "failback", "start", DISK, "--mode", "full-download"
    )
    assert MIB // 4 <= fetched(begun) < MIB // 2
    assert refuses_writes(live)
    assert live.read_bytes() == sites.copy.read_bytes()
    # It is written on, there, until the disk is asked for.
    write_at(sites.copy, 2 * MIB, b"the last write")
    content = sites.copy.read_bytes()
    assert "commit is not possible in state FailingBack; possible: failback, complete" in refused(
        home, "failback", "commit", DISK
    )
    completed = done(sites, home, "failback", "complete", DISK)
    assert completed["state"] == "FailbackUncommitted"
    assert refuses_writes(sites.copy)
    assert away.json("failover", "show", name)["state"] == "HandedOver"
    assert vault_record(sites)["moved"]["state"] == "FailbackUncommitted"
    follows(sites, content)
    done(sites, home, "failback", "commit", DISK)
    for step in ("complete", "commit"):
        assert f"{step} is not possible in state FailedBack; possible: cleanup" in refused(
            home, "failback", step, DISK
        )
    assert vault_record(sites)["moved"] is None
    done(sites, away, "failover", "cleanup", name)
    for end in (home.kill_daemon, home.umount):
        end()
        if end == home.umount:
            home.mount()
        home.wait("it goes on", lambda: home.disk(DISK)["state"] == "Protected")
        follows(sites, live.read_bytes())
    # And away again.
    name = done(sites, away, "failover", "start", DISK)["name"]
    assert sites.copy.read_bytes() == live.read_bytes()
    done(sites, away, "failover", "rollback", name)
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


def insisted(site: MountedSite, *words: str) -> int:
    """Give a command that is killed, later each time, until it ends by itself; count the kills."""
    for kills in range(100):
        command = site.begin("-m", site.mountpoint, *words)
        try:
            # An earlier one has done it, or has it done; 3: what it is about is gone.
            assert command.wait(0.15 + 0.15 * kills) in (0, 3, 4)
        except subprocess.TimeoutExpired:
            command.kill()
            command.wait()
        else:
            return kills
    raise AssertionError(f"it never ends: {words}")


def test_a_command_that_is_killed_at_any_moment_is_given_again_and_nothing_is_done_twice(
    sites: Sites, tell: Callable[[str], None]
) -> None:
    home, away, kills = sites.home, sites.away, 0
    write_at(home.image(DISK), 0, b"home")

    def states(site: MountedSite) -> list[str]:
        return [row["state"] for row in site.json("failover", "list")["failovers"]]

    for site, state, words in (
        (away, "FailedOver", ("failover", "start", DISK, "--name", "f1")),
        (away, "Committed", ("failover", "commit", "f1")),
        (away, "FailbackReady", ("reprotect", DISK)),
        (home, "FailingBack", ("failback", "start", DISK)),
        (home, "FailbackUncommitted", ("failback", "complete", DISK)),
        (home, "FailedBack", ("failback", "commit", DISK)),
        (away, "", ("failover", "cleanup", "f1")),
    ):
        kills += insisted(site, *words)
        wanted = [state] if state else []
        site.wait(f"{words} is done", lambda s=site, w=wanted: states(s) == w)  # type: ignore[misc]
        if state == "FailedOver":
            write_at(sites.copy, 4096, b"away")
            content = sites.copy.read_bytes()
    follows(sites, content)
    record = vault_record(sites)
    assert (len(record["parents"]), record["branches"], record["moved"]) == (3, {}, None)
    tell(f"killed commands of a failover and a failback: {kills}")
    assert kills >= 7


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


def test_a_failback_is_not_completed_before_its_disk_was_moved(tmp_path: Path) -> None:
    """And where an older version has begun to, the image is moved once the disk is released."""
    sites = Sites(tmp_path, 'hydration_limit = "512KiB"\n')
    home, away = sites.home, sites.away
    with home, away:
        sites.begin()
        away.json("failover", "commit", sites.start()["name"])
        away.json("reprotect", DISK)
        begun = home.json("failback", "start", DISK, "--mode=full-download", "--no-wait")
        name, job = begun["name"], begun["job"]["id"]
        for extra in ((), ("--dry-run",)):
            assert refused(home, "failback", "complete", DISK, *extra) == (
                f"vdiskfs: failover {name}: complete is not possible in state FailingBack: "
                f"failback is under way; vdiskfs job wait {job}, then the same again"
            )
        assert vault_record(sites)["handover"] is None
        assert not refuses_writes(sites.copy)
        assert home.json("job", "wait", job)["state"] == "done"
        home.umount()
        write_at(sites.copy, 8192, os.urandom(8192))
        content = sites.copy.read_bytes()
        [path] = home.state.glob("failovers/*/record.json")
        record = read_record(path)
        last = {**record["jobs"][-1], "kind": "complete", "done": ["moved"], "ended_ns": 0}
        write_record(path, {**record, "state": "Completing", "jobs": [*record["jobs"], last]})
        home.mount()
        home.wait("it is home", lambda: shown(home)["state"] == "FailbackUncommitted")
        assert shown(home)["job"]["steps"][-1] == "over"
        follows(sites, content)


def begin_group(home: MountedSite, names: Sequence[str]) -> None:
    """Mount disks of random bytes, and make a group of them."""
    for name in names:
        home.add_image(name, MIB, os.urandom(MIB))
    home.init().mount()
    for name in names:
        home.wait_shipped(name)
    home.json("group", "create", "shop", *names)


def test_a_failback_goes_on_when_another_site_took_one_of_its_disks_in_its_middle(
    tmp_path: Path,
) -> None:
    """The daemon dies when one is home; what it asks for again is only the other one."""
    sites = Sites(tmp_path)
    home, away = sites.home, sites.away
    names = ("db01", "log01")
    home.environ["VDISKFS_CRASH"] = "failover.taken:1"
    with home, away:
        begin_group(home, names)
        away.mount(recovery=True)
        found = away.json("failover", "start", "shop")
        away.json("failover", "commit", found["name"])
        copies = [Path(row["path"]) for row in found["disks"]]
        for copy in copies:
            write_at(copy, 4096, b"away")
        away.json("reprotect", "shop")
        contents = [copy.read_bytes() for copy in copies]
        home.json("failback", "start", "shop")
        begun, dead, keeper = (
            home.begin("-m", home.mountpoint, "failback", "complete", "shop"),
            home.pid,
            home.keeper,
        )
        os.kill(keeper, signal.SIGSTOP)
        with os.fdopen(os.pidfd_open(dead)) as handle:
            assert select.select([handle], [], [], 60)[0], "it is not home"
        at_third(sites, take_other)
        os.kill(keeper, signal.SIGCONT)
        begun.wait()
        home.wait_successor(dead, set())
        home.wait("it stands still", lambda: "has moved on" in str(shown(home)["job"]["error"]))
        begun = home.begin("-m", home.mountpoint, "failback", "complete", "shop")
        at_third(sites, let_go)
        begun.wait()
        assert shown(home)["state"] == "FailbackUncommitted"
        home.json("failback", "commit", "shop")
        for name, content in zip(names, contents, strict=True):
            assert home.image(name).read_bytes() == content
            home.wait_shipped(name)


def shown(home: MountedSite) -> dict[str, Any]:
    [found] = home.json("failover", "list")["failovers"]
    document: dict[str, Any] = home.json("failover", "show", found["name"])
    return document


async def take_other(vault: Vault) -> None:
    """Take the disk that is not home yet, as a site does that fails over unplanned."""
    [record] = [one for one in await vault.disks() if one.owner and one.owner.site == "away"]
    assert record.owner is not None
    point = (await vault.log(record).points())[-1]
    moved = Moved("e" * 32, "b" * 32, "unplanned", "FailbackReady", "third", now_text(),
                  record.generation, record.owner)  # fmt: skip
    fork = Fork(point.generation, point.epoch, record.generation, moved)
    with tempfile.TemporaryDirectory() as scratch:
        await fork_off(vault, record, fork, Claim("third", THIRD, "9" * 32, ()), log=vault.log,
                       scratch=Path(scratch) / "fence")  # fmt: skip


async def asked_for(vault: Vault) -> DiskRecord:
    while True:
        [record] = [one for one in await vault.disks() if one.owner and one.owner.site == "third"]
        if record.handover is not None:
            return record
        await trio.sleep(0.1)


async def let_go(vault: Vault) -> None:
    """Release that disk as soon as it is asked for."""
    with trio.fail_after(60):
        record = await asked_for(vault)
    assert record.handover is not None
    with tempfile.TemporaryDirectory() as scratch:
        await fence(vault.log(record), THIRD, Path(scratch) / "fence")
    await answer(vault, record.id, record.handover.id, RELEASED)


def test_a_group_goes_away_and_comes_home_at_one_instant(tmp_path: Path) -> None:
    sites = Sites(tmp_path)
    home, away = sites.home, sites.away
    names = ("db01", "log01")
    with home, away:
        begin_group(home, names)
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
