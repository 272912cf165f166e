"""Failovers for good between two sites on one vault: no machine, real mounts."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.gauges import write_at
from tests.e2e.mounted import CommandError, MountedSite
from tests.vaults import disk_records
from vdiskfs.stopping import STOPPED

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.timeout(300)]

MIB = 1 << 20
SIZE = 4 * MIB
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
DISK = "web01"


class Sites:
    """Home, where the disk is at first, and a recovery site without a source."""

    def __init__(self, root: Path, home_options: str = "", away_options: str = "") -> None:
        vault = f"file://{root}/vault"
        self.home = MountedSite(root, vault=vault, name="home", options=FAST + home_options)
        self.away = MountedSite(root, vault=vault, name="away", options=FAST + away_options)
        self.contents: dict[int, bytes] = {}

    def begin(self) -> None:
        self.home.add_image(DISK, SIZE, os.urandom(SIZE))
        self.home.init().mount().wait_shipped(DISK)
        self.away.mount(recovery=True)

    def write(self, site: MountedSite, image: Path, text: bytes, at: int = 0) -> int:
        """Write at home, make a point of it, and return its epoch."""
        write_at(image, at, text)
        [row] = site.json("point", "create", DISK, "--wait")["points"]
        self.contents[row["epoch"]] = image.read_bytes()
        return int(row["epoch"])

    def start(self, *extra: str) -> dict[str, Any]:
        found: dict[str, Any] = self.away.json("failover", "start", DISK, *extra)
        return found

    @property
    def copy(self) -> Path:
        [one] = self.away.json("failover", "list")["failovers"]
        return Path(one["disks"][0]["path"])


def refuses_writes(image: Path) -> bool:
    try:
        with image.open("r+b"):
            return False
    except OSError as error:
        return error.errno == errno.EROFS


def refused(site: MountedSite, *arguments: str) -> str:
    """Run, be refused with exit 4 and one line, and return it."""
    result = site.run("-m", str(site.mountpoint), *arguments, code=4)
    lines = result.stderr.strip().split("\n")
    assert len(lines) == 1, lines
    return lines[0]


def jobs_of(site: MountedSite, failover: str) -> dict[str, str]:
    """Return the kinds and states of a failover's jobs."""
    rows = site.json("job", "list")["jobs"]
    return {row["kind"]: row["state"] for row in rows if row["failover"] == failover}


def vault_record(sites: Sites, disk: str = DISK) -> dict[str, Any]:
    found = disk_records(sites.home.state.parent.parent / "vault")
    [record] = [one for one in found if one["name"] == disk]
    return record


def known(sites: Sites) -> dict[str, Any]:
    """Return what the sites know of failovers, and the vault of the disk and of who has it."""
    disk = {key: value for key, value in vault_record(sites).items() if key != "branches"}
    records = {
        str(path): path.read_bytes()
        for site in (sites.home, sites.away)
        for path in site.state.glob("failovers/**/*.json")
    }
    return {"disk.json": disk, **records}


def done(sites: Sites, site: MountedSite, *command: str) -> dict[str, Any]:
    """Take a step, once with --dry-run, which changes nothing, and then in earnest."""
    before = known(sites)
    assert site.json(*command, "--dry-run")["dry_run"] is True
    assert known(sites) == before, command
    found: dict[str, Any] = site.json(*command)
    return found


def test_a_disk_is_failed_over_to_a_point_changed_rolled_back_and_replicated_on(
    sites: Sites,
) -> None:
    home, away = sites.home, sites.away
    live = home.image(DISK)
    old = sites.write(home, live, b"old")
    new = sites.write(home, live, b"new")
    dry = sites.start("--unplanned", "--point", f"#{old}", "--dry-run")
    assert dry["members"][0]["epoch"] == old
    assert away.json("failover", "list")["failovers"] == []
    document = sites.start("--unplanned", "--point", f"#{old}")
    name = document["name"]
    assert (document["state"], document["job"]["state"]) == ("FailedOver", "done")
    assert sites.copy.read_bytes() == sites.contents[old]
    # Home learns of it, and what was there is kept.
    home.wait("home is displaced", lambda: home.disk(DISK)["state"] == "Displaced")
    assert refuses_writes(live)
    assert vault_record(sites)["moved"]["state"] == "FailedOver"
    # Nothing is replicated before it is asked for, and nothing of what is written is lost.
    write_at(sites.copy, 8192, b"written away")
    assert away.disk(DISK)["state"] == "FailedOver"
    assert "reprotect is not possible in state FailedOver" in refused(away, "reprotect", DISK)
    # No second failover of the disk, of whatever kind.
    for extra in ("--unplanned", "--unplanned --dry-run"):
        assert refused(away, "failover", "start", DISK, *extra.split()) == (
            f"vdiskfs: failover {name}: start is not possible in state FailedOver; "
            f"possible: change-point, commit, rollback; vdiskfs failover show {name}"
        )
    # Another point: the branch that the failover left there is still to be had.
    changed = done(sites, away, "failover", "change-point", name, "--point", f"#{new}")
    assert changed["state"] == "FailedOver"
    assert sites.copy.read_bytes() == sites.contents[new]
    write_at(sites.copy, 8192, b"written away")
    rolled = done(sites, away, "failover", "rollback", name)
    assert rolled["state"] in ("RollingBack", "FailedOver")
    assert away.json("failover", "list")["failovers"] == []
    home.wait("home is back", lambda: home.disk(DISK)["state"] == "Protected")
    assert not refuses_writes(live)
    assert live.read_bytes() == sites.contents[new]
    record = vault_record(sites)
    assert (record["owner"]["site"], record["moved"]) == ("home", None)
    # It goes on there without a comparison, and can be failed over again.
    third = sites.write(home, live, b"third")
    document = sites.start("--unplanned")
    name = document["name"]
    assert sites.copy.read_bytes() == sites.contents[third]
    write_at(sites.copy, 0, b"away")
    done(sites, away, "failover", "commit", name)
    for step in ("commit", "rollback"):
        assert f"{step} is not possible in state Committed; possible: reprotect" in refused(
            away, "failover", step, name
        )
    before = away.disk(DISK)["epoch"]
    assert done(sites, away, "reprotect", DISK)["state"] == "FailbackReady"
    away.wait_shipped(DISK)
    assert away.disk(DISK)["epoch"] > before
    assert away.point(DISK).read_bytes() == sites.copy.read_bytes()
    assert away.points(DISK)[-1]["changed_bytes"] == 4096
    for _ in range(2):
        away.kill_daemon()
        away.wait_shipped(DISK)
    write_at(sites.copy, SIZE - 4096, b"more")
    away.wait_shipped(DISK)
    assert away.point(DISK).read_bytes() == sites.copy.read_bytes()
    away.umount()
    away.mount(recovery=True)
    away.wait("it goes on", lambda: away.disk(DISK)["state"] == "Protected")
    write_at(sites.copy, MIB, b"after a mount")
    away.wait_shipped(DISK)
    assert away.points(DISK)[-1]["changed_bytes"] == 4096
    assert away.point(DISK).read_bytes() == sites.copy.read_bytes()


def test_what_is_not_to_be_is_refused(sites: Sites) -> None:
    home, away = sites.home, sites.away
    assert "in use at this very site" in refused(home, "failover", "start", DISK, "--unplanned")
    for arguments in (("--planned", "--unplanned"), ("--point", "-1s")):
        with pytest.raises(CommandError, match="exit 2"):
            sites.start(*arguments)
    with pytest.raises(CommandError, match="exit 3"):
        sites.start("--unplanned", "--point", "2001-01-01T00:00:00Z")
    test = away.json("failover", "test", DISK)["name"]
    assert away.json("failover", "show", test)["job"]["state"] == "done"
    for step in ("commit", "rollback"):
        assert f"{step} is not possible in state TestFailover; possible: cleanup" in refused(
            away, "failover", step, test
        )
    assert "is not failed over" in refused(away, "reprotect", DISK)
    away.json("failover", "cleanup", test)
    assert jobs_of(away, test) == {"test": "done", "cleanup": "done"}
    name = sites.start("--unplanned")["name"]
    assert "cleanup is not possible in state FailedOver" in refused(
        away, "failover", "cleanup", name
    )
    assert "is a failover's" in refused(away, "disk", "unprotect", DISK)


def test_a_planned_failover_waits_for_who_uses_the_disk_and_loses_nothing(sites: Sites) -> None:
    home, away = sites.home, sites.away
    live = home.image(DISK)
    with live.open("r+b", buffering=0) as user:
        document = sites.start("--no-wait")
        name = document["name"]
        assert document["kind"] == "planned"

        def waits_for() -> str:
            return away.json("failover", "show", name)["job"]["waits_for"] or ""

        away.wait("it says who uses it", lambda: f"(pid {os.getpid()})" in waits_for())
        # Nobody is kept from writing meanwhile.
        user.write(b"the last word")
        os.fsync(user.fileno())
        assert refused(away, "failover", "start", DISK, "--unplanned") == (
            f"vdiskfs: failover {name}: a planned failover of {DISK} is under way in state "
            f"Starting; possible: start, rollback; vdiskfs failover show {name}"
        )
        assert [one["name"] for one in away.json("failover", "list")["failovers"]] == [name]
        # It can be called off, and asked for again.
        away.json("failover", "rollback", name)
        assert away.json("failover", "list")["failovers"] == []
        user.write(b", and more")
        home.wait("home goes on", lambda: vault_record(sites)["handover"] is None)
        name = sites.start("--no-wait")["name"]
        away.wait("it says who uses it", lambda: f"(pid {os.getpid()})" in waits_for())
        user.write(b", and the very last")
    with contextlib.suppress(CommandError):
        sites.start()  # the same command goes on with it, unless it has come to its end
    assert away.json("failover", "show", name)["state"] == "FailedOver"
    assert sites.copy.read_bytes() == live.read_bytes()
    assert sites.copy.read_bytes().startswith(b"the last word, and more, and the very last")
    handed = home.disk(DISK)
    assert (handed["state"], handed["health"]) == ("HandedOver", "Normal"), handed
    assert "handed over to site" in handed["last_error"]
    assert refuses_writes(live)
    assert vault_record(sites)["branches"] == {}
    first, last = (one for one in home.json("job", "list")["jobs"] if one["kind"] == "handover")
    assert (first["state"], last["state"]) == ("failed", "done")
    assert "was withdrawn" in first["error"]
    assert last["steps"] == ["unused", "shipped", "released"]
    # After a restart, of whatever kind, home still knows that it has let go.
    for end in (home.kill_daemon, home.umount):
        end()
        if end == home.umount:
            home.mount()
        home.wait("home knows", lambda: home.disk(DISK)["state"] == "HandedOver")
        assert refuses_writes(live)
        assert vault_record(sites)["branches"] == {}
    away.json("failover", "rollback", name)
    home.wait("home is back", lambda: home.disk(DISK)["state"] == "Protected")
    write_at(live, 0, b"home again")
    home.wait_shipped(DISK)
    assert home.point(DISK).read_bytes() == live.read_bytes()
    assert vault_record(sites)["branches"] == {}


def test_the_host_stops_its_machine_when_it_is_asked_or_displaced(tmp_path: Path) -> None:
    told, script, start = tmp_path / "told", tmp_path / "stop", tmp_path / "start"
    tell = f'#!/bin/sh\necho "$VDISKFS_REASON $VDISKFS_DISK $VDISKFS_IMAGE" >> {told}\n'
    script.write_text(f"{tell}kill $(cat {tmp_path}/pid) || true\n")
    start.write_text(tell)
    script.chmod(0o755)
    start.chmod(0o755)
    sites = Sites(
        tmp_path,
        f'when_displaced = "stop-machine"\n[machines]\nstop_command = ["{script}"]\n'
        f'start_command = ["{start}"]\n',
    )
    home, away = sites.home, sites.away
    with home, away:
        sites.begin()
        live = home.image(DISK)
        for reason, extra in (("handover", ()), ("displaced", ("--unplanned",))):
            machine = subprocess.Popen(["tail", "-f", live], stdout=subprocess.DEVNULL)
            (tmp_path / "pid").write_text(str(machine.pid))
            name = sites.start(*extra)["name"]
            assert machine.wait(60) != 0
            home.wait("it is away", lambda: refuses_writes(live))
            assert told.read_text().splitlines()[-1] == f"{reason} {DISK} {live}"
            away.json("failover", "rollback", name)
            home.wait("home is back", lambda: home.disk(DISK)["state"] == "Protected")
            assert not refuses_writes(live)
            # It has its machine again, once; also where its daemon was another one meanwhile.
            returned = f"returned {DISK} {live}\n"
            home.wait("it is started", lambda: told.read_text().endswith(returned))
        # Killed before that is noted, it would be started once more.
        home.wait("it is noted", lambda: not [*(home.state / "disks").glob(f"*/{STOPPED}")])
        home.kill_daemon()
        home.wait("it goes on", lambda: home.disk(DISK)["state"] == "Protected")
        sites.start()
        home.wait("it is away", lambda: home.disk(DISK)["state"] == "HandedOver")
        # No machine ran on it this time: none is started.
        away.json("failover", "rollback", away.json("failover", "list")["failovers"][0]["name"])
        home.wait("home is back", lambda: home.disk(DISK)["state"] == "Protected")
        assert [line.split()[0] for line in told.read_text().splitlines()] == [
            "handover", "returned", "displaced", "returned", "handover"
        ]  # fmt: skip


def test_a_failover_that_nobody_commits_rolls_itself_back_and_events_tell_it(
    sites: Sites,
) -> None:
    home, away = sites.home, sites.away
    document = sites.start("--unplanned", "--rollback-after", "2")
    name, job = document["name"], document["job"]["id"]
    assert document["rolled_back"] is not None
    assert document["job"]["steps"] == ["copies", "taken", "machine", "over"]
    away.wait("it is rolled back", lambda: away.json("failover", "list")["failovers"] == [])
    home.wait("home is back", lambda: home.disk(DISK)["state"] == "Protected")
    told = [
        f"{one['kind']} {one['text']}"
        for one in away.json("event", "list", "--since", "-10m")["events"]
        if one["subject"] == name
    ]
    for text in ("failover Starting -> FailedOver", "failover FailedOver -> RollingBack",
                 f"job {job} start: taken done", "failover removed"):  # fmt: skip
        assert text in told, told
    away.kill_daemon()
    kept = {"start": "done", "rollback": "done"}
    away.wait("its jobs are kept", lambda: jobs_of(away, name) == kept)
    assert away.json("job", "show", job)["failover"] == name


def test_a_failover_whose_daemon_dies_before_its_time_is_over_rolls_itself_back(
    sites: Sites,
) -> None:
    home, away = sites.home, sites.away
    assert sites.start("--unplanned", "--rollback-after", "4")["state"] == "FailedOver"
    away.kill_daemon()
    away.wait("it is rolled back", lambda: away.json("failover", "list")["failovers"] == [])
    home.wait("home is back", lambda: home.disk(DISK)["state"] == "Protected")


def test_a_failover_that_waits_or_is_in_use_when_its_time_is_over_is_rolled_back_as_soon_as_may_be(
    sites: Sites,
) -> None:
    home, away = sites.home, sites.away
    with home.image(DISK).open("r+b"):
        line = refused(away, "failover", "start", DISK, "--rollback-after", "1")
        assert "was rolled back" in line
    assert away.json("failover", "list")["failovers"] == []
    home.wait("home goes on", lambda: home.disk(DISK)["state"] == "Protected")

    def told() -> set[str]:
        return {one["code"] for one in away.json("event", "list")["events"]}

    sites.start("--unplanned", "--rollback-after", "1", "--no-wait")
    away.wait("it is there", lambda: bool(away.json("failover", "list")["failovers"][0]["disks"]))
    with sites.copy.open("rb"):
        away.wait("it is told", lambda: "failover.overdue" in told())
        [found] = away.json("failover", "list")["failovers"]
        for words in (["rollback"], ["change-point", "--point", "latest"]):
            for extra in ([], ["--dry-run"]):
                assert "is in use" in refused(away, "failover", *words, *extra, found["name"])
        assert away.disk(DISK)["state"] == "FailedOver"
    away.wait("it is rolled back", lambda: away.json("failover", "list")["failovers"] == [])


def test_a_copy_whose_disk_was_taken_by_force_is_cleaned_up_once_it_is_a_branch(
    sites: Sites,
) -> None:
    home, away = sites.home, sites.away
    name = sites.start()["name"]
    away.json("failover", "commit", name)
    write_at(sites.copy, 0, b"away")
    content = sites.copy.read_bytes()
    home.umount()
    home.mount("--force")
    away.wait("away is displaced", lambda: away.disk(DISK)["state"] == "Displaced")
    assert "is not in its branch yet" in refused(away, "failover", "cleanup", name)
    away.json("disk", "resume", DISK)
    away.wait("it is shipped", lambda: away.disk(DISK)["dirty_bytes"] == 0
              and away.disk(DISK)["spooled_bytes"] == 0)  # fmt: skip
    away.json("failover", "cleanup", name)
    [branch] = home.json("disk", "branches", DISK)["branches"]
    point = home.mountpoint / "recovery-points" / f"{DISK}@{branch['name']}" / "latest"
    assert (point / f"{DISK}.img").read_bytes() == content


def test_a_group_goes_on_without_a_disk_that_is_failed_over_until_it_is_back(
    tmp_path: Path,
) -> None:
    sites = Sites(tmp_path, 'when_displaced = "keep"\n')
    home, away = sites.home, sites.away
    with home, away:
        home.add_image("log01", MIB)
        sites.begin()
        home.wait_shipped("log01")
        home.json("group", "create", "shop", DISK, "log01")
        name = sites.start()["name"]
        home.wait("it is let go", lambda: home.disk(DISK)["state"] == "HandedOver")
        before, log_before = len(home.points(DISK)), len(home.points("log01"))
        for number in range(3):
            write_at(home.image("log01"), 0, b"%d" % number)
            home.wait_shipped("log01")
        [row] = home.json("point", "create", "shop", "--wait")["points"]
        assert row["disk"] == "log01"
        assert f"disk {DISK}: failover {name} has it, in state FailedOver; possible: chang" in (
            refused(away, "failover", "start", "shop")
        )
        home.run("-m", home.mountpoint, "point", "create", DISK, code=4)
        rows = home.json("group", "show", "shop")["disks"]
        assert {row["disk"]: row["ready"] for row in rows} == {DISK: False, "log01": True}
        assert len(home.points("log01")) >= log_before + 4
        assert len(home.points(DISK)) == before
        assert vault_record(sites)["branches"] == {}
        assert home.disk(DISK)["state"] == "HandedOver"
        away.json("failover", "rollback", name)
        home.wait("home is back", lambda: home.disk(DISK)["state"] == "Protected")
        write_at(home.image("log01"), 0, b"together again")
        for disk in (DISK, "log01"):
            home.wait_shipped(disk)
        home.wait("it is sealed with the others", lambda: len(home.points(DISK)) > before)
        assert home.points(DISK)[-1]["time"] == home.points("log01")[-1]["time"]
        # What is written to one that was taken goes into its branch, by itself.
        sites.start("--unplanned")
        home.wait("home is displaced", lambda: home.disk(DISK)["state"] == "Displaced")
        write_at(home.image(DISK), 0, b"behind its back")
        home.wait("it is in its branch", lambda: home.disk(DISK)["dirty_bytes"] == 0
                  and home.disk(DISK)["spooled_bytes"] == 0)  # fmt: skip
        [branch] = home.json("disk", "branches", DISK)["branches"]
        path = home.mountpoint / "recovery-points" / f"{DISK}@{branch['name']}" / "latest"
        assert (path / f"{DISK}.img").read_bytes() == home.image(DISK).read_bytes()


def test_a_copy_is_completed_in_the_background_over_a_kill_and_what_ends_it_is_told(
    tmp_path: Path,
) -> None:
    sites = Sites(tmp_path, away_options='hydration_limit = "768KiB"\n')
    home, away = sites.home, sites.away
    with home, away:
        sites.begin()

        def brought() -> dict[str, Any]:
            [one] = away.json("failover", "list")["failovers"]
            return dict(one["disks"][0]["hydration"] or {"absent_bytes": SIZE, "done": False})

        name = sites.start("--unplanned")["name"]
        away.wait("it comes", lambda: 0 < brought()["absent_bytes"] < SIZE)
        objects = [path for path in (tmp_path / "vault").rglob("*") if path.is_file()]
        data = max(objects, key=lambda path: path.stat().st_size)
        data.rename(tmp_path / "kept")
        away.wait("it has ended", lambda: brought()["error"])
        assert not brought()["done"]
        [event] = [one for one in away.json("event", "list", "--since", "-10m")["events"]
                   if one["code"] == "hydration.ended"]  # fmt: skip
        assert (event["subject"], event["disk"]) == (name, DISK)
        assert brought()["error"] in event["text"]
        (tmp_path / "kept").rename(data)
        before = brought()["absent_bytes"]
        away.kill_daemon()
        away.wait("it is done", lambda: brought()["done"])
        assert 0 < before < SIZE
        assert (brought()["absent_bytes"], brought()["error"]) == (0, None)
        (tmp_path / "vault").rename(tmp_path / "vault-away")
        try:
            assert sites.copy.read_bytes() == home.image(DISK).read_bytes()
        finally:
            (tmp_path / "vault-away").rename(tmp_path / "vault")
