"""A vault that goes away under a real mount, and what the user sees and can do about it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.azurite import AzureVault
from tests.e2e.gauges import assert_same, digest, digests, overwrite_pages, write_at
from tests.e2e.mounted import MountedSite
from tests.store.proxy import Fault, FaultProxy
from vdiskfs.browse import STALE_S

pytestmark = [pytest.mark.e2e, pytest.mark.root]

MIB = 1 << 20
SIZE = 32 * MIB
PAGE = 4096
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"


@pytest.fixture
def proxy(azure_vault: AzureVault) -> Iterator[FaultProxy]:
    with FaultProxy(azure_vault.azurite.port) as running:
        yield running


def began(root: Path, options: str = FAST, **more: object) -> MountedSite:
    """Return a site with one disk of random bytes; not mounted yet."""
    site = MountedSite(root, options=options, **more)  # type: ignore[arg-type]
    site.add_image("web01", SIZE, os.urandom(SIZE))
    return site.init()


def state(site: MountedSite) -> str:
    return str(site.disk("web01")["state"])


def differing(old: bytes, new: bytes) -> int:
    """Return the bytes of the pages that differ."""
    return sum(
        PAGE for at in range(0, len(new), PAGE) if old[at : at + PAGE] != new[at : at + PAGE]
    )


def points_made(site: MountedSite, count: int) -> dict[str, str]:
    """Mount and write a page for each point; return the points' digests."""
    site.mount()
    site.wait_shipped("web01")
    for number in range(count):
        write_at(site.image("web01"), number * PAGE, os.urandom(PAGE))
        site.wait_shipped("web01")
    return digests(site.point_images("web01"))


@pytest.mark.azurite
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_outage_is_counted_down_cut_short_and_forgotten(
    tmp_path: Path, azure_vault: AzureVault, proxy: FaultProxy, tell: Callable[[str], None]
) -> None:
    """Writes go on, the lag grows and returns, half of the disk makes a resynchronization."""
    environ = azure_vault.azurite.environ(proxy.port)
    with began(tmp_path, vault=azure_vault.url, environ=environ) as site:
        before = points_made(site, 3)
        old = site.image("web01").read_bytes()

        away = proxy.add(Fault("answer", "*", count=1 << 30, status=503))
        write_at(site.image("web01"), 5 * PAGE, os.urandom(PAGE))
        site.wait("the wait is shown", lambda: site.disk("web01")["next_retry_s"] is not None)
        row = site.disk("web01")
        assert row["health"] == "Warning"
        assert 0 < row["next_retry_s"] <= 66
        assert row["shipped_lag_s"] > 1
        shown = site.run("-m", site.mountpoint, "status").stdout
        assert "(tried again in 0:" in shown or "(tried again in 1:" in shown
        assert site.json("disk", "retry", "web01")["retried"] is True

        overwrite_pages(site.image("web01"), SIZE // PAGE * 5 // 8, 1)
        site.wait("it is marked", lambda: state(site) == "ResyncRequired")
        assert site.disk("web01")["points_waiting"] == 1
        log = (site.state / "daemon.log").read_text()
        assert "is to be resynchronized" in log
        fired, differs = away.fired, differing(old, site.image("web01").read_bytes())
        taken, given = proxy.taken_bytes, proxy.given_bytes
        proxy.clear()
        site.wait_shipped("web01")
        assert fired > 10
        # What differs is sent once; what is compared with is the index, and no data.
        sent, read = proxy.taken_bytes - taken, proxy.given_bytes - given
        tell(f"resynchronized: {differs} bytes differed, {sent} sent, {read} read")
        assert SIZE // 2 < differs <= sent <= 1.05 * differs + SIZE // 100
        assert read < SIZE // 50
        assert site.disk("web01")["shipped_lag_s"] == 0
        assert_same(site.point("web01"), site.image("web01"))
        after = digests(site.point_images("web01"))
        assert {name: after[name] for name in before} == before

        taken = proxy.taken_bytes
        site.json("disk", "resync", "web01", "--now")
        site.wait("it is over", lambda: site.json("disk", "show", "web01")["resync"] is None)
        site.wait_shipped("web01")
        assert proxy.taken_bytes - taken < 64 << 10


@pytest.mark.azurite
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_points_are_read_while_a_disk_is_resynchronized(
    tmp_path: Path, azure_vault: AzureVault, proxy: FaultProxy
) -> None:
    """Ten points at random moments; what was before stays; a second one makes no delta."""
    environ = azure_vault.azurite.environ(proxy.port)
    with began(tmp_path, vault=azure_vault.url, environ=environ) as site:
        before = points_made(site, 10)
        # Everything differs and nobody was told. What is found cannot be stored for a while.
        site.umount()
        (site.source / "web01.img").write_bytes(os.urandom(SIZE))
        stuck = proxy.add(Fault("answer", "PUT", "/segments/", count=1 << 30, status=503))
        site.mount()
        site.wait("it has begun", lambda: stuck.fired > 0)
        choice = random.Random(1)
        for _ in range(10):
            image = choice.choice(site.point_images("web01"))
            assert digest(image) == before[image.parent.name]
            row = site.disk("web01")
            assert row["state"] == "Resyncing"
            progress = row["progress"]
            assert 0 < progress["sent_bytes"] <= progress["done_bytes"] <= progress["total_bytes"]
        shown = site.run("-m", site.mountpoint, "status").stdout
        assert re.search(r"web01: Resyncing: .* of 32.0 MiB compared, .* differ", shown)
        proxy.clear()
        site.run("-m", site.mountpoint, "disk", "retry", "web01")
        site.wait_shipped("web01")
        after = digests(site.point_images("web01"))
        assert {name: after[name] for name in before} == before
        assert_same(site.point("web01"), site.image("web01"))

        epoch = site.disk("web01")["epoch"]
        document = site.json("disk", "resync", "web01", "--now")
        assert document["resync"]["reason"] == "asked for"
        site.wait("it is over", lambda: site.json("disk", "show", "web01")["resync"] is None)
        site.wait_shipped("web01")
        assert site.disk("web01")["epoch"] == epoch


@pytest.mark.azurite
def test_a_guest_does_not_wait_for_a_vault_that_takes_a_few_bytes_at_a_time(
    tmp_path: Path, azure_vault: AzureVault, proxy: FaultProxy, tell: Callable[[str], None]
) -> None:
    """What it writes waits in the spool, the status says so, and it arrives when the line is well."""
    environ = azure_vault.azurite.environ(proxy.port)
    with MountedSite(tmp_path, options=FAST, vault=azure_vault.url, environ=environ) as site:
        site.add_image("web01", 8 * MIB, os.urandom(MIB))
        site.init()
        before = points_made(site, 1)
        sip = proxy.add(Fault("sip", "PUT", count=1 << 30, bytes_per_s=8 << 10))
        taken = proxy.taken_bytes
        with site.image("web01").open("r+b", buffering=0) as guest:
            for number in range(8):
                data = os.urandom(MIB)
                assert os.pwrite(guest.fileno(), data, number * MIB) == MIB
                os.fsync(guest.fileno())
                assert os.pread(guest.fileno(), MIB, number * MIB) == data
        site.wait("it waits in the spool", lambda: site.disk("web01")["spooled_bytes"] > MIB)
        site.wait("its lag is shown", lambda: site.disk("web01")["shipped_lag_s"] > 1)
        arrived = proxy.taken_bytes - taken
        tell(f"few bytes at a time: {sip.fired} uploads, {arrived} bytes of 8 MiB arrived")
        assert sip.fired > 0
        assert arrived < MIB
        assert digests(site.point_images("web01")[: len(before)]) == before
        proxy.hang_up()
        site.wait_shipped("web01")
        assert_same(site.point("web01"), site.image("web01"))
        assert site.disk("web01")["health"] == "Normal"


@pytest.mark.azurite
@pytest.mark.slow
def test_a_daemon_replaced_while_the_vault_is_away_says_so_and_drains_later(
    tmp_path: Path, azure_vault: AzureVault, proxy: FaultProxy
) -> None:
    environ = azure_vault.azurite.environ(proxy.port)
    with MountedSite(tmp_path, vault=azure_vault.url, environ=environ, options=FAST) as site:
        site.add_image("web01", MIB, os.urandom(MIB))
        site.init().mount().wait_shipped("web01")
        proxy.add(Fault("reset", "*", count=1 << 30))
        write_at(site.image("web01"), 0, os.urandom(PAGE))
        before = site.pid
        os.kill(before, signal.SIGKILL)
        site.wait_successor(before, set())
        write_at(site.image("web01"), PAGE, os.urandom(PAGE))
        drain = site.begin("umount", site.mountpoint, "--drain")

        def row() -> dict[str, Any]:
            [found] = site.json("status")["disks"]
            return dict(found)

        site.wait("the wait is shown", lambda: row()["next_retry_s"] is not None)
        shown = row()
        assert site.json("disk", "retry", "web01")["retried"] is True
        assert (shown["name"], shown["state"]) == ("web01", "Enabling")
        assert (shown["health"], shown["epoch"]) == ("Warning", 1)
        assert "the connection was lost" in shown["last_error"]
        assert "no disk is protected" not in site.run("-m", site.mountpoint, "status").stdout
        refused = site.run("-m", site.mountpoint, "disk", "pause", "web01", code=4)
        assert "web01: tracked, not replicated yet" in refused.stderr
        site.wait("it is told", lambda: "vault.away" in {
            event["code"] for event in site.json("event", "list", "--disk", "web01")["events"]})  # fmt: skip
        assert drain.poll() is None
        proxy.clear()
        assert drain.wait(60) == 0
        site.pid = 0
        restored = tmp_path / "restored.img"
        site.run("point", "restore", "web01@latest", restored, "--vault", site.vault)
        assert_same(restored, site.source / "web01.img")


@pytest.mark.azurite
@pytest.mark.slow
def test_a_file_made_while_the_vault_is_away_becomes_one_disk_when_it_is_back(
    tmp_path: Path, azure_vault: AzureVault, proxy: FaultProxy
) -> None:
    environ = azure_vault.azurite.environ(proxy.port)
    with MountedSite(tmp_path, vault=azure_vault.url, environ=environ, options=FAST) as site:
        site.init().mount()
        # It goes away when the disk was made there, and not started yet.
        away = proxy.add(Fault("reset", "*", r"/disk\.json", count=1 << 30, skip=1))
        made = site.image("web01")
        made.write_bytes(os.urandom(MIB))

        def failed() -> list[dict[str, Any]]:
            jobs = site.json("job", "list")["jobs"]
            return [job for job in jobs if job["disk"] == "web01.img" and job["state"] == "failed"]

        site.wait("it is told", lambda: bool(failed()))
        assert away.fired > 0
        write_at(made, 0, os.urandom(PAGE))
        proxy.clear()
        site.wait_shipped("web01")
        assert_same(site.point("web01"), made)
        assert len(failed()) == 1
        site.umount()
        site.mount().wait_shipped("web01")
        listed = site.json("disk", "list")["disks"]
        assert [disk["name"] for disk in listed] == ["web01"]


def test_disks_are_listed_while_the_vault_is_away(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        for name in ("web01", "db01"):
            site.add_image(name, MIB)
        site.init().mount()
        for name in ("web01", "db01"):
            site.wait_shipped(name)
        site.json("disk", "unprotect", "db01")
        before = site.json("disk", "list")
        assert before["vault_error"] is None
        vault = tmp_path / "vault"
        vault.rename(tmp_path / "elsewhere")
        time.sleep(STALE_S)
        line = ("-m", site.mountpoint, "disk", "list")
        told = site.run(*line, code=5)
        assert "as they were last seen" in told.stderr
        assert [row.split()[0] for row in told.stdout.splitlines()[1:]] == ["web01", "db01"]
        document = json.loads(site.run("--json", *line, code=5).stdout)
        assert [(row["name"], row["here"], row["state"]) for row in document["disks"]] == [
            (row["name"], row["here"], row["state"]) for row in before["disks"]
        ]
        (tmp_path / "elsewhere").rename(vault)
        assert site.json("disk", "list")["vault_error"] is None


def test_a_disk_is_paused_resumed_and_its_resync_cancelled(tmp_path: Path) -> None:
    with began(tmp_path) as site:
        site.mount()
        site.wait_shipped("web01")
        epoch = site.disk("web01")["epoch"]
        site.json("disk", "pause", "web01")
        write_at(site.image("web01"), 0, os.urandom(PAGE))
        row = site.disk("web01")
        assert row["paused"] is True
        assert row["epoch"] == epoch
        shown = site.run("-m", site.mountpoint, "status").stdout
        assert "Protected (paused)" in shown
        assert "replication is paused; changes are tracked" in shown
        site.run("-m", site.mountpoint, "point", "create", "web01", code=4)
        site.run("umount", site.mountpoint, "--drain", code=4)
        site.umount()
        site.mount()
        assert site.disk("web01")["paused"] is True
        site.json("disk", "resume", "web01")
        site.wait_shipped("web01")
        assert site.disk("web01")["epoch"] > epoch

        site.run("-m", site.mountpoint, "disk", "resync", "web01", "--cancel", code=4)
        site.run("-m", site.mountpoint, "disk", "resync", "web01", "--now", "--cancel", code=2)
        assert site.json("disk", "retry", "web01")["retried"] is False
        assert_same(site.point("web01"), site.image("web01"))


def test_a_resync_waits_for_its_window_and_for_nobody_who_asks(tmp_path: Path) -> None:
    """A window that is never open now: two hours from now, an hour long."""
    start = datetime.now().astimezone() + timedelta(hours=2)
    window = f"{start:%H:%M}-{start + timedelta(hours=1):%H:%M}"
    with began(tmp_path, options=f'{FAST}resync_window = "{window}"\n') as site:
        site.mount()
        site.wait_shipped("web01")
        site.run("-m", site.mountpoint, "disk", "resync", "web01")
        site.wait("it waits", lambda: state(site) == "ResyncRequired")
        shown = site.json("disk", "show", "web01")["resync"]
        assert shown == {"reason": "asked for", "cancelled": False, "in_window": False}
        write_at(site.image("web01"), 0, os.urandom(PAGE))
        site.run("-m", site.mountpoint, "disk", "resync", "web01", "--cancel")
        assert site.json("disk", "show", "web01")["resync"]["cancelled"] is True
        site.run("-m", site.mountpoint, "disk", "resync", "web01", "--now")
        site.wait_shipped("web01")
        assert_same(site.point("web01"), site.image("web01"))
