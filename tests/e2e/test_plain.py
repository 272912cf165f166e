"""Daemons die again and again: the mount is served plainly, and nothing is lost by it."""

from __future__ import annotations

import json
import os
import signal
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.gauges import assert_same, overwrite_pages
from tests.e2e.listeners import web_server
from tests.e2e.mounted import CommandError, MountedSite
from tests.e2e.oracle import Oracle
from tests.e2e.workload import Mix, Workload
from vdiskfs.registry import is_alive

pytestmark = [pytest.mark.e2e, pytest.mark.root]

MIB = 1 << 20
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
MIX = Mix(max_size=12 * MIB, min_size=2 * MIB, truncate=0.01, extend=0.03, zero=0.08)
THREE = {"VDISKFS_DEATHS": "3"}


@contextmanager
def protected(root: Path, **environ: str) -> Iterator[MountedSite]:
    """Have a mount with one disk that is in the vault, whose keeper counts to three."""
    with MountedSite(root, options=FAST, environ=THREE | environ) as site:
        site.add_image("web01", 8 * MIB, os.urandom(8 * MIB))
        site.init().mount().wait_shipped("web01")
        yield site
        if site.pid:
            site.umount()
        assert_nothing_left(site)


def wait_plain(site: MountedSite) -> None:
    """Wait until the files are served, and nothing else."""

    def is_plain() -> bool:
        try:
            return bool(site.json("status")["plain"])
        except CommandError:
            return False

    site.wait("it is served plainly", is_plain)


def assert_nothing_left(site: MountedSite) -> None:
    """Nobody serves, nothing is mounted, no entry and no socket are left."""
    assert not is_alive(site.keeper)
    assert f" {site.mountpoint} " not in Path("/proc/self/mountinfo").read_text()
    site.run("status", "-m", site.mountpoint, code=3)


def kill_until_plain(site: MountedSite) -> dict[str, object]:
    """Kill three daemons; return the plain one's status."""
    for _ in range(3):
        before = site.pid
        os.kill(before, signal.SIGKILL)
        site.wait_successor(before, set())
    return dict(site.json("status"))


def seal(site: MountedSite) -> None:
    """Have a point that holds all that was written so far."""
    site.json("point", "create", "web01", "--wait")


def test_writers_see_no_error_and_the_next_point_is_the_live_image(tmp_path: Path) -> None:
    with protected(tmp_path) as site:
        os.truncate(site.image("web01"), 0)
        os.truncate(site.image("web01"), 8 * MIB)
        with Workload(site.image("web01"), seed=3, writers=6, mix=MIX) as load:
            load.wait_operations(200)
            seal(site)
            status = kill_until_plain(site)
            before = {row["epoch"]: row for row in plain_points(site, tmp_path)}
            load.wait_operations(400)
            plain = status["plain"]
            assert isinstance(plain, dict)
            assert "3 times within 60 s; the last one was killed by signal 9" in plain["reason"]
            assert 500 < plain["again_s"] <= 600
            rows = status["disks"]
            assert isinstance(rows, list)
            row = rows[0]
            assert (row["name"], row["state"], row["health"]) == (
                "web01", "ResyncRequired", "Critical",
            )  # fmt: skip
            text = site.run("status", "-m", site.mountpoint).stdout
            assert "NOT PROTECTED: served plainly, untracked" in text
            assert site.json("upgrade")["pid"] != status["pid"]
            load.wait_operations(200)
        site.wait_successor(int(str(status["pid"])), {"web01"})
        assert site.json("status")["plain"] is None
        seal(site)
        oracle = Oracle(load.log)
        oracle.check(site.image("web01"))
        assert_same(site.point("web01"), site.image("web01"))
        # Each point is still a cut, those from before are as they were.
        after = {row["epoch"]: row for row in site.points("web01")}
        assert before
        assert {epoch: after[epoch] for epoch in before} == before
        images = site.point_images("web01")[2:]
        for image in images[:: max(1, len(images) // 6)]:
            if image.stat().st_size:
                oracle.check(image)
        assert "served plainly, untracked, for 600 s" in (site.state / "daemon.log").read_text()


def plain_points(site: MountedSite, root: Path) -> list[dict[str, object]]:
    """The vault's points, asked without the mount."""
    command = ["--json", "--vault", site.vault, "point", "list", "web01"]
    return list(json.loads(site.run(*command).stdout)["points"])


def test_only_what_differs_is_stored_afterwards(tmp_path: Path) -> None:
    with protected(tmp_path) as site:
        kill_until_plain(site)
        overwrite_pages(site.image("web01"), 10, seed=1)
        site.json("upgrade")
        site.wait_successor(site.pid, {"web01"})
        seal(site)
        assert_same(site.point("web01"), site.image("web01"))
        last = site.points("web01")[-1]
        assert 0 < last["stored_bytes"] < MIB
        assert not list((site.state / "disks").glob("*/distrusted"))


def test_a_first_replication_goes_on_from_what_it_had(tmp_path: Path) -> None:
    """Daemons die in the midst of it: what was read has become old by then."""
    crash = {"VDISKFS_CRASH": "part.durable:1,pass.settled:1,part.uploaded:1"}
    with MountedSite(tmp_path, options=FAST, environ=THREE | crash) as site:
        site.add_image("web01", 8 * MIB, os.urandom(8 * MIB))
        site.init().mount()
        wait_plain(site)
        assert [row["epoch"] for row in site.json("status")["disks"]] == [0]
        overwrite_pages(site.image("web01"), 200, seed=1)
        before = int(site.json("status")["pid"])
        site.json("upgrade")
        site.wait_successor(before, {"web01"})
        overwrite_pages(site.image("web01"), 200, seed=2)
        seal(site)
        assert_same(site.point("web01"), site.image("web01"))


def test_names_change_and_the_disk_stays_the_same_one(tmp_path: Path) -> None:
    with protected(tmp_path) as site:
        disk = site.disk("web01")["id"]
        disks = site.mountpoint / "disks"
        kill_until_plain(site)
        (disks / "dir").mkdir()
        (disks / "web01.img").rename(disks / "dir" / "system.disk")  # no pattern matches it
        (disks / "new.img").write_bytes(b"n" * MIB)
        (disks / "note.txt").write_text("note")
        with pytest.raises(OSError, match="Remote I/O"):
            list((site.mountpoint / "recovery-points").iterdir())
        site.json("upgrade")
        site.wait_successor(site.pid, {"web01", "new"})
        assert site.disk("web01")["id"] == disk
        seal(site)
        site.wait_shipped("new")
        assert_same(site.point("web01"), disks / "dir" / "system.disk")
        assert_same(site.point("new"), disks / "new.img")


def test_an_open_point_is_the_same_one_afterwards(tmp_path: Path) -> None:
    with protected(tmp_path) as site:
        content = site.image("web01").read_bytes()
        with site.point("web01").open("rb", buffering=0) as point:
            plain = kill_until_plain(site)
            overwrite_pages(site.image("web01"), 10, seed=1)
            site.json("upgrade")
            site.wait_successor(int(str(plain["pid"])), {"web01"})
            assert point.read() == content


def test_it_goes_on_by_itself_and_falls_back_by_itself(tmp_path: Path) -> None:
    """The keeper's ten minutes are one second here."""
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "sitecustomize.py").write_text(
        "import os\n"
        "if plain := os.environ.get('VDISKFS_PLAIN'):\n"
        "    again_s, _, reason = plain.partition(' ')\n"
        "    os.environ['VDISKFS_PLAIN'] = f'{int(again_s) / 600} {reason}'\n"
    )
    with protected(tmp_path, PYTHONPATH=str(tmp_path / "quick")) as site:
        for _ in range(3):
            before = site.pid
            os.kill(before, signal.SIGKILL)
            site.wait_successor(before, set())

        def is_tracked() -> bool:
            try:
                status = site.json("status")
            except CommandError:
                return False
            site.pid = int(status["pid"])
            return status["plain"] is None and len(status["disks"]) == 1

        site.wait("a daemon again", is_tracked)
        seal(site)
        assert_same(site.point("web01"), site.image("web01"))
        before = site.pid
        os.kill(before, signal.SIGKILL)  # on trial
        overwrite_pages(site.image("web01"), 10, seed=2)
        site.wait("a daemon again", lambda: is_tracked() and site.pid != before)
        seal(site)
        assert_same(site.point("web01"), site.image("web01"))
        log = (site.state / "daemon.log").read_text()
        assert "the daemon died again; the last one was killed by signal 9" in log
        assert "served plainly, untracked, for 1200 s" in log


def test_a_daemon_that_fails_says_why(tmp_path: Path) -> None:
    """A bug: each daemon fails when it takes up a disk that it knows."""
    (tmp_path / "bug").mkdir()
    (tmp_path / "bug" / "sitecustomize.py").write_text(
        "import os\n"
        "if os.path.exists(os.environ['BUG']):\n"
        "    from vdiskfs import protection\n"
        "    async def start(*_, **__):\n"
        "        raise ValueError('a hostile object')\n"
        "    protection.Protection.start = start\n"
    )
    flag = tmp_path / "bug" / "on"
    with protected(tmp_path, PYTHONPATH=str(tmp_path / "bug"), BUG=str(flag)) as site:
        flag.touch()
        before = site.pid
        os.kill(before, signal.SIGKILL)
        overwrite_pages(site.image("web01"), 10, seed=1)
        wait_plain(site)
        reason = site.json("status")["plain"]["reason"]
        assert reason.endswith("ended with status 1: ValueError: a hostile object")
        findings = {one["name"]: one for one in json.loads(
            site.run("--json", "-m", site.mountpoint, "doctor", code=1).stdout)["checks"]}  # fmt: skip
        assert findings["daemon"]["status"] == "missing"
        overwrite_pages(site.image("web01"), 10, seed=2)
        flag.unlink()
        site.json("upgrade")
        site.wait_successor(before, {"web01"})
        seal(site)
        assert_same(site.point("web01"), site.image("web01"))


def test_the_next_mount_after_one_that_ended_plain_compares_all(tmp_path: Path) -> None:
    with protected(tmp_path) as site:
        kill_until_plain(site)
        overwrite_pages(site.image("web01"), 20, seed=1)
        with pytest.raises(CommandError, match="nothing is tracked or replicated"):
            site.run("umount", site.mountpoint, "--drain")
        site.run("point", "create", "web01", "-m", site.mountpoint, code=4)
        site.umount()
        assert_nothing_left(site)
        assert list((site.state / "disks").glob("*/distrusted"))
        site.mount()
        seal(site)
        assert_same(site.point("web01"), site.image("web01"))
        assert len({point["generation"] for point in site.points("web01")}) == 1


def patched(root: Path, text: str) -> dict[str, str]:
    """The environment of daemons that do this at their start, as long as ``root/on`` exists."""
    root.mkdir()
    (root / "sitecustomize.py").write_text(
        f"import os\nif os.path.exists({str(root / 'on')!r}):\n" + textwrap.indent(text, "    ")
    )
    return {"PYTHONPATH": str(root), "VDISKFS_DEATHS": "1000"}


DIES_WHEN_READY = """
from vdiskfs import fdstore
def ready(self, status, ready=fdstore.FdStore.ready):
    ready(self, status)
    os.kill(os.getpid(), 9)
fdstore.FdStore.ready = ready
"""
DIES_WHEN_ASKED = """
from vdiskfs import api
async def unmount(*_, **__):
    os.kill(os.getpid(), 9)
import vdiskfs.control
vdiskfs.control.MountControl.unmount = unmount
"""
DIES_WHEN_DONE = """
import vdiskfs.serving
def unmount(self, lazy, unmount=vdiskfs.serving.Serving.unmount):
    unmount(self, lazy)
    os.kill(os.getpid(), 9)
vdiskfs.serving.Serving.unmount = unmount
"""


@pytest.mark.parametrize("how", [DIES_WHEN_READY, DIES_WHEN_ASKED, DIES_WHEN_DONE])
def test_umount_where_daemons_die(tmp_path: Path, how: str) -> None:
    with protected(tmp_path, **patched(tmp_path / "bug", how)) as site:
        (tmp_path / "bug" / "on").touch()
        before = site.pid
        os.kill(before, signal.SIGKILL)
        overwrite_pages(site.image("web01"), 5, seed=1)
        site.umount()
        assert_nothing_left(site)
        (tmp_path / "bug" / "on").unlink()
        site.mount()
        seal(site)
        assert_same(site.point("web01"), site.image("web01"))


def test_umount_says_that_a_drain_was_cut_short(tmp_path: Path) -> None:
    with protected(tmp_path, **patched(tmp_path / "bug", DIES_WHEN_DONE)) as site:
        (tmp_path / "bug" / "on").touch()
        site.run("upgrade", "-m", site.mountpoint)
        with pytest.raises(CommandError, match="died before everything was shipped"):
            site.run("umount", site.mountpoint, "--drain")
        site.pid = 0


def test_an_answer_that_comes_too_late_is_no_failure(tmp_path: Path) -> None:
    """As on a host so busy that the end does not wait for the last answer."""
    late = "import vdiskfs.serving\nvdiskfs.serving.ANSWER_S = 0.0\n"
    with protected(tmp_path, **patched(tmp_path / "bug", late)) as site:
        (tmp_path / "bug" / "on").touch()
        site.run("upgrade", "-m", site.mountpoint)
        site.umount("--drain")
        assert_nothing_left(site)


ENDED_AT_START = """
import subprocess
import vdiskfs.serving
def begin(self, *arguments, begin=vdiskfs.serving.Serving.begin):
    subprocess.run(["umount", "-c", "--", self._settings.mountpoint], check=True)
    begin(self, *arguments)
vdiskfs.serving.Serving.begin = begin
"""


@pytest.mark.parametrize("deaths", ["1", "1000"])
def test_a_mount_that_is_ended_while_a_successor_starts(tmp_path: Path, deaths: str) -> None:
    environ = patched(tmp_path / "bug", ENDED_AT_START) | {"VDISKFS_DEATHS": deaths}
    with protected(tmp_path, **environ) as site:
        (tmp_path / "bug" / "on").touch()
        os.kill(site.pid, signal.SIGKILL)
        site.wait("the keeper has ended", lambda: not is_alive(site.keeper))
        site.pid = 0


def test_everybody_is_told_that_nothing_is_protected_and_when_it_is_again(tmp_path: Path) -> None:
    with web_server() as web:
        hook = f'[watch]\njournal_socket = ""\n[webhook]\nurl = "http://127.0.0.1:{web.port}/"\n'
        with MountedSite(tmp_path, options=FAST + hook, environ=THREE) as site:
            site.add_image("web01", MIB, os.urandom(MIB))
            site.init().mount().wait_shipped("web01")
            kill_until_plain(site)
            site.wait("it is told", lambda: "mount.plain" in web.codes())
            [told] = [one for one in web.events() if one["code"] == "mount.plain"]
            assert (told["level"], told["disk"]) == ("error", "web01")
            assert "3 times within 60 s" in told["text"]
            assert site.json("event", "list")["events"][-1]["code"] == "mount.plain"
            site.json("upgrade")
            site.wait("it is over", lambda: "mount.plain.over" in web.codes())
