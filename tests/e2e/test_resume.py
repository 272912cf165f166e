"""The daemon dies or is replaced under programs that use the mount: they see a pause, no error."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.azurite import AzureVault
from tests.e2e.gauges import assert_same, overwrite_pages
from tests.e2e.loopdev import attached, check_fs, file_system
from tests.e2e.mounted import MountedSite
from tests.e2e.oracle import Oracle
from tests.e2e.workload import Mix, Workload
from tests.store.proxy import Fault, FaultProxy
from vdiskfs.registry import is_alive

pytestmark = [pytest.mark.e2e, pytest.mark.root]

MIB = 1 << 20
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
MIX = Mix(max_size=12 * MIB, min_size=2 * MIB, truncate=0.01, extend=0.03, zero=0.08)
UNIT = Path(__file__).parents[2] / "tools" / "systemd" / "vdiskfs@.service"


@contextmanager
def protected(root: Path, size: int = 8 * MIB) -> Iterator[MountedSite]:
    """Have a mount with one disk of random bytes that is in the vault."""
    with MountedSite(root, options=FAST) as site:
        site.add_image("web01", size, os.urandom(size))
        site.init().mount().wait_shipped("web01")
        yield site
        if site.pid:
            site.umount()
        assert_nothing_left(site)


def assert_nothing_left(site: MountedSite) -> None:
    """After umount neither keeper nor daemon lives, and nothing is mounted."""
    assert not is_alive(site.keeper)
    assert f" {site.mountpoint} " not in Path("/proc/self/mountinfo").read_text()


def in_thread(action: Callable[[], object]) -> Callable[[], None]:
    """Start an action; the function returned waits for it, and raises what it raised."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - raised by the one who waits
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def join() -> None:
        thread.join(120)
        assert not thread.is_alive()
        if failed:
            raise failed[0]

    return join


@pytest.mark.parametrize("seed", [1, 2])
def test_writers_see_no_error_and_every_point_stays_a_cut(tmp_path: Path, seed: int) -> None:
    with protected(tmp_path) as site:
        os.truncate(site.image("web01"), 0)
        os.truncate(site.image("web01"), 8 * MIB)
        pauses = []
        with Workload(site.image("web01"), seed=seed, writers=8, mix=MIX) as load:
            for _ in range(4):
                load.wait_operations(300)
                pauses.append(site.kill_daemon())
                epoch = site.disk("web01")["epoch"]
                load.wait_operations(100)
                site.wait("a point is made", lambda: site.disk("web01")["epoch"] > epoch)
        site.wait_shipped("web01")
        print("pauses:", " ".join(f"{pause:.2f}" for pause in pauses), "s")
        oracle = Oracle(load.log)
        oracle.check(site.image("web01"))
        checked = 0
        images = site.point_images("web01")[2:]
        # The oracle takes seconds for each: ten of them, from the first to the last.
        for image in images[:: max(1, len(images) // 10)]:
            if image.stat().st_size:
                oracle.check(image)
                checked += 1
        assert checked >= 4
        assert_same(site.point("web01"), site.image("web01"))
        assert {point["generation"] for point in site.points("web01")} == {1}


def test_every_write_that_was_answered_before_a_kill_is_in_a_later_point(tmp_path: Path) -> None:
    with protected(tmp_path) as site:
        for seed in range(3):
            overwrite_pages(site.image("web01"), 40, seed)
            site.kill_daemon()
        site.wait_shipped("web01")
        assert_same(site.point("web01"), site.image("web01"))
        assert_same(site.source / "web01.img", site.image("web01"))


def test_two_kills_in_a_row_and_a_third_are_one_pause_each(tmp_path: Path) -> None:
    with protected(tmp_path) as site:
        pages = os.urandom(64 * 4096)
        descriptor = os.open(site.image("web01"), os.O_RDWR)

        def write() -> None:
            for _ in range(40):
                assert os.pwrite(descriptor, pages, 0) == len(pages)
                os.fsync(descriptor)

        try:
            done = in_thread(write)
            for _ in range(3):
                site.kill_daemon()
            done()
            assert os.pread(descriptor, len(pages), 0) == pages
        finally:
            os.close(descriptor)


def test_syncs_under_way_succeed(tmp_path: Path) -> None:
    with protected(tmp_path) as site:
        stop = threading.Event()
        counts = [0] * 4

        def sync(number: int) -> None:
            descriptor = os.open(site.image("web01"), os.O_RDWR)
            try:
                while not stop.is_set():
                    os.pwrite(descriptor, bytes([counts[number] % 251]) * 512, number * MIB)
                    os.fdatasync(descriptor)
                    counts[number] += 1
            finally:
                os.close(descriptor)

        joins = [in_thread(lambda n=n: sync(n)) for n in range(4)]  # type: ignore[misc]
        try:
            for _ in range(2):
                site.kill_daemon()
        finally:
            stop.set()
        for join in joins:
            join()
        with site.image("web01").open("rb") as image:
            for number, count in enumerate(counts):
                image.seek(number * MIB)
                assert image.read(512) == bytes([(count - 1) % 251]) * 512
                assert count > 3


def test_a_reader_of_a_point_waits_for_the_vault_through_a_kill(
    tmp_path: Path, azure_vault: AzureVault
) -> None:
    with FaultProxy(azure_vault.azurite.port) as proxy:
        environ = azure_vault.azurite.environ(proxy.port)
        with MountedSite(tmp_path, vault=azure_vault.url, environ=environ, options=FAST) as site:
            content = os.urandom(4 * MIB)
            site.add_image("web01", len(content), content)
            site.init().mount().wait_shipped("web01")
            descriptor = os.open(site.point("web01"), os.O_RDONLY)
            try:
                outage = proxy.add(Fault("reset", "*", count=10**6))
                read: list[bytes] = []
                joins = [
                    in_thread(lambda n=n: read.append(os.pread(descriptor, 4096, n * MIB)))  # type: ignore[misc]
                    for n in range(2)
                ]
                site.wait("a read reaches the vault", lambda: outage.fired > 2)
                # Guests go on while the vault is away.
                overwrite_pages(site.image("web01"), 10, seed=1)
                before, fired = site.pid, outage.fired
                os.kill(before, signal.SIGKILL)
                overwrite_pages(site.image("web01"), 10, seed=2)
                live = site.image("web01").read_bytes()
                site.wait_successor(before, set())
                joins.append(in_thread(lambda: read.append(os.pread(descriptor, 4096, 2 * MIB))))
                site.wait("it is asked again", lambda: outage.fired > fired + 2)
                assert read == []
                proxy.clear()
                for join in joins:
                    join()
                assert sorted(read) == sorted(content[n * MIB : n * MIB + 4096] for n in range(3))
            finally:
                os.close(descriptor)
            site.wait("the disk is listed", lambda: bool(site.json("status")["disks"]))
            site.wait_shipped("web01")
            assert site.point("web01").read_bytes() == live


def test_a_file_system_on_a_loop_device_lives_on(tmp_path: Path) -> None:
    with protected(tmp_path, 64 * MIB) as site:
        written: dict[str, bytes] = {}
        with file_system("ext4", site.image("web01"), tmp_path / "fs") as root:

            def fill() -> None:
                for number in range(60):
                    data = os.urandom(100_000)
                    path = root / f"{number}"
                    with path.open("wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    written[path.name] = data

            done = in_thread(fill)
            site.wait("files", lambda: len(written) > 3)
            for _ in range(2):
                site.kill_daemon()
            done()
            for name, data in written.items():
                assert (root / name).read_bytes() == data
        check_fs("ext4", site.image("web01"))
        site.wait_shipped("web01")
        # A point too: the device over it outlives the daemon.
        with attached(site.point("web01"), read_only=True) as device:
            check_fs("ext4", device)
            site.kill_daemon()
            subprocess.run(["blockdev", "--flushbufs", device], check=True)
            check_fs("ext4", device)


def test_names_and_open_files_stay_what_they_were(tmp_path: Path) -> None:
    with protected(tmp_path) as site:
        disks = site.mountpoint / "disks"
        (disks / "dir" / "inner").mkdir(parents=True)
        (disks / "dir" / "inner" / "note.txt").write_text("one")
        inodes = {path: path.stat().st_ino for path in disks.rglob("*")}
        gone = (disks / "gone.txt").open("w+")
        gone.write("still here")
        gone.flush()
        (disks / "gone.txt").unlink()
        moved = (disks / "dir" / "inner" / "note.txt").open("r+")
        (disks / "dir").rename(disks / "other")
        before = Path.cwd()
        point = site.point("web01")
        with point.open("rb") as at:
            inodes[point] = point.stat().st_ino
            os.chdir(disks / "other" / "inner")
            try:
                for _ in range(2):
                    site.kill_daemon()
                    assert os.listdir() == ["note.txt"]
                    assert Path("note.txt").read_text() == "one"
                    gone.seek(0)
                    assert gone.read() == "still here"
                    assert os.fstat(gone.fileno()).st_nlink == 0
                    assert os.pread(moved.fileno(), 3, 0) == b"one"
                    assert at.read(4096) != b""
                    assert point.stat().st_ino == inodes[point]
                    assert (disks / "web01.img").stat().st_ino == inodes[disks / "web01.img"]
                    inner = disks / "other" / "inner"
                    assert inner.stat().st_ino == inodes[disks / "dir" / "inner"]
            finally:
                os.chdir(before)
                gone.close()
                moved.close()
        assert not (disks / "gone.txt").exists()
        assert sorted(path.name for path in disks.iterdir()) == ["other", "web01.img"]


def test_an_image_without_a_name_is_read_and_written_and_retired_at_last(tmp_path: Path) -> None:
    with protected(tmp_path) as site:
        content = site.image("web01").read_bytes()
        with site.image("web01").open("r+b", buffering=0) as image:
            site.image("web01").unlink()
            before = site.pid
            os.kill(before, signal.SIGKILL)
            site.wait_successor(before, set())
            assert image.read() == content
            image.seek(0)
            image.write(b"x" * 4096)
            os.fsync(image.fileno())
            image.seek(0)
            assert image.read(4096) == b"x" * 4096
        site.wait(
            "the disk is retired",
            lambda: [row["state"] for row in site.json("disk", "list")["disks"]] == ["Retired"],
        )


CHANGES: dict[str, Callable[[Path], object]] = {
    "create": lambda top: (top / "new.txt").touch(exist_ok=False),
    "make": lambda top: (top / "new").mkdir(),
    "make-link": lambda top: (top / "new").symlink_to("there"),
    "link": lambda top: (top / "new.txt").hardlink_to(top / "old.txt"),
    "unlink": lambda top: (top / "old.txt").unlink(),
    "rmdir": lambda top: (top / "empty").rmdir(),
    "rename": lambda top: (top / "old.txt").rename(top / "new.txt"),
    "rename-over": lambda top: (top / "old.txt").rename(top / "other.txt"),
}
AFTER = {
    "create": ["empty", "new.txt", "old.txt", "other.txt"],
    "make": ["empty", "new", "old.txt", "other.txt"],
    "make-link": ["empty", "new", "old.txt", "other.txt"],
    "link": ["empty", "new.txt", "old.txt", "other.txt"],
    "unlink": ["empty", "other.txt"],
    "rmdir": ["old.txt", "other.txt"],
    "rename": ["empty", "new.txt", "other.txt"],
    "rename-over": ["empty", "other.txt"],
}


@pytest.mark.parametrize("step", ["logged", "made"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_names_cut_off_by_a_kill_is_made_once(
    tmp_path: Path, change: str, step: str
) -> None:
    """The hook stands before the change, or after it and before its answer."""
    hook = change.partition("-")[0]
    with MountedSite(
        tmp_path, options=FAST, environ={"VDISKFS_CRASH": f"{hook}.{step}:1"}
    ) as site:  # fmt: skip
        for name in ("old.txt", "other.txt"):
            (site.source / name).write_text(name)
        (site.source / "empty").mkdir()
        site.init().mount()
        top, before = site.mountpoint / "disks", site.pid
        CHANGES[change](top)
        site.wait_successor(before, set())
        assert "was killed by signal 9" in (site.state / "daemon.log").read_text()
        assert sorted(path.name for path in top.iterdir()) == AFTER[change]
        assert sorted(path.name for path in site.source.iterdir()) == AFTER[change]
        if change.startswith("rename"):
            kept = "new.txt" if change == "rename" else "other.txt"
            assert (top / kept).read_text() == "old.txt"
        if change == "create":
            assert (top / "new.txt").stat().st_mode & 0o777 == 0o644
            (top / "new.txt").write_text("goes on")
            assert (site.source / "new.txt").read_text() == "goes on"


def test_a_refusal_stays_one(tmp_path: Path) -> None:
    """What the predecessor found there before is not taken for its own work."""
    with MountedSite(
        tmp_path, options=FAST, environ={"VDISKFS_CRASH": "make.logged:1,make.logged:1"}
    ) as site:
        (site.source / "there").mkdir()
        site.init().mount()
        with pytest.raises(FileExistsError):
            (site.mountpoint / "disks" / "there").mkdir()
        assert os.listdir(site.mountpoint / "disks") == ["there"]


def test_upgrade_under_load(tmp_path: Path) -> None:
    with protected(tmp_path) as site:
        os.truncate(site.image("web01"), 0)
        os.truncate(site.image("web01"), 8 * MIB)
        with Workload(site.image("web01"), seed=7, writers=8, mix=MIX) as load:
            for _ in range(2):
                load.wait_operations(200)
                before = site.pid
                answer = site.json("upgrade")
                assert answer["pid"] != before
                site.wait_successor(before, {"web01"})
                assert site.pid == answer["pid"]
                load.wait_operations(200)
        site.wait_shipped("web01")
        Oracle(load.log).check(site.image("web01"))
        assert_same(site.point("web01"), site.image("web01"))
        assert "hands the mount over" in (site.state / "daemon.log").read_text()


def test_a_daemon_without_its_keeper_goes_on_and_ends_in_order(tmp_path: Path) -> None:
    with protected(tmp_path) as site:
        os.kill(site.keeper, signal.SIGKILL)
        overwrite_pages(site.image("web01"), 10, seed=1)
        (site.mountpoint / "disks" / "new.txt").write_text("x")
        findings = {one["name"]: one for one in site.json("doctor")["checks"]}
        assert findings["keeper"]["status"] == "warning"
        assert_same(site.source / "web01.img", site.image("web01"))


def test_the_table_of_mounts_knows_the_new_daemon(tmp_path: Path) -> None:
    with protected(tmp_path) as site:
        before = site.pid
        site.kill_daemon()
        assert site.pid != before
        assert site.json("status")["pid"] == site.pid
        findings = {one["name"]: one for one in site.json("doctor")["checks"]}
        assert findings["keeper"]["status"] == findings["daemon"]["status"] == "ok"


def test_in_the_foreground_too_and_an_interruption_ends_it(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        site.add_image("web01", MIB)
        site.init()
        command: list[str | Path] = [
            Path(sys.executable).parent / "vdiskfs", "mount", site.source, site.mountpoint,
            "--vault", site.vault, "--site", site.name, "--state", site.state,
            "--config", site.config, "--foreground",
        ]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.PIPE, env=site.environ) as process:
            site.keeper = process.pid
            site.wait("it is mounted", lambda: site.image("web01").exists())
            site.wait_successor(0, {"web01"})
            before = site.pid
            site.kill_daemon()
            assert site.pid != before
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            process.stderr.read()
        assert process.returncode == 0
        site.pid = 0
        assert_nothing_left(site)


def test_who_asks_for_an_upgrade_need_not_wait_for_the_successor(tmp_path: Path) -> None:
    with MountedSite(tmp_path) as site:
        site.add_image("web01", MIB)
        site.init().mount().wait_shipped("web01")
        os.kill(site.keeper, signal.SIGSTOP)  # it starts no successor yet
        before = site.pid
        try:
            answer = json.loads(
                site.run("-m", site.mountpoint, "--json", "upgrade", "--no-wait").stdout
            )
            assert set(answer) == {"mountpoint", "from"}
        finally:
            os.kill(site.keeper, signal.SIGCONT)
        site.wait_successor(before, {"web01"})


def test_the_unit_file_is_one_that_systemd_takes(tmp_path: Path) -> None:
    text = UNIT.read_text()
    assert "FileDescriptorStoreMax=" in text
    # What thaws guests, and machines, live in the unit's control group: they outlive the daemon.
    assert "\nKillMode=process\n" in text
    # systemd starts no successor before what it runs to reload has ended.
    assert "vdiskfs upgrade --no-wait" in text
    assert "\nSuccessExitStatus=75\n" in text
    # A machine that is killed for want of memory takes no mount along.
    assert "\nOOMPolicy=continue\n" in text
    # In a mount namespace of its own nobody would see the mount.
    assert not re.search(
        r"^(Protect|Private|ReadOnly|ReadWrite|Inaccessible)\w+=", text, re.MULTILINE
    )
    verify = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", UNIT], capture_output=True, text=True, check=False
    )
    wrong = [
        line for line in verify.stderr.splitlines()
        if "vdiskfs@" in line and "/usr/bin/vdiskfs is not executable" not in line
    ]  # fmt: skip
    assert wrong == []


def test_where_requests_are_not_sent_again_they_fail_and_later_ones_are_served(
    tmp_path: Path,
) -> None:
    """As before Linux 6.9, which this kernel plays: what it could do is not asked of it."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sitecustomize.py").write_text(
        "from vdiskfs import native\nnative.Core.can_resend = property(lambda self: False)\n"
    )
    environ = {"PYTHONPATH": str(tmp_path / "old"), "VDISKFS_CRASH": "make.logged:1"}
    with MountedSite(tmp_path, options=FAST, environ=environ) as site:
        site.add_image("web01", MIB)
        site.init().mount().wait_shipped("web01")
        with site.image("web01").open("r+b", buffering=0) as image:
            before = site.pid
            with pytest.raises(ConnectionAbortedError):
                (site.mountpoint / "disks" / "new").mkdir()
            image.write(b"x" * 4096)
            site.wait_successor(before, {"web01"})
            os.kill(site.pid, signal.SIGKILL)
            before = site.pid
            site.wait_successor(before, {"web01"})
            image.seek(0)
            assert image.read(4096) == b"x" * 4096
        (site.mountpoint / "disks" / "new").mkdir()
        site.wait_shipped("web01")
        assert_same(site.point("web01"), site.image("web01"))
