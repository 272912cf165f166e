"""Proofs of points on a real mount: read back, and their file systems checked after replay."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.loopdev import attached, mounted
from tests.e2e.mounted import PROGRAM, CommandError, MountedSite
from vdiskfs.proving import check_image

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.timeout(300)]

MIB = 1 << 20
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"


def prove(site: MountedSite, disk: str, level: str = "checked") -> dict[str, Any]:
    found: dict[str, Any] = site.json("point", "prove", f"{disk}@latest", "--level", level)
    return found


def partitioned(path: Path) -> None:
    """Two partitions: an ext4 file system, and nothing."""
    with path.open("r+b") as file:
        file.truncate(64 * MIB)
        entries = ((0x83, 2048, 32 * 2048), (0x82, 40 * 2048, 8 * 2048))
        table = b"".join(
            struct.pack("<B3sB3sII", 0, bytes(3), kind, bytes(3), start, count)
            for kind, start, count in entries
        )
        file.seek(446)
        file.write(table.ljust(64, b"\0") + b"\x55\xaa")
    subprocess.run(["mkfs.ext4", "-q", "-E", f"offset={MIB}", path, "32M"], check=True)


def test_points_are_read_back_and_their_file_systems_checked(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        for disk, make in (("ext", "mkfs.ext4"), ("hurt", "mkfs.ext4"), ("xfs", "mkfs.xfs")):
            subprocess.run([make, "-q", site.add_image(disk, 320 * MIB)], check=True)
        subprocess.run(["mkfs.btrfs", "-q", site.add_image("btrfs", 128 * MIB)], check=True)
        partitioned(site.add_image("parts", 64 * MIB))
        site.add_image("none", MIB, os.urandom(MIB))
        with (site.source / "hurt.img").open("r+b") as file:
            file.seek(4096)  # the descriptors of its groups
            file.write(os.urandom(4096))
        site.init().mount()
        disks = ("ext", "xfs", "btrfs", "parts", "none", "hurt")
        for disk in disks:
            site.wait_shipped(disk)
        # A point of a file system that is mounted and written to: its journal is to be replayed.
        for disk in ("ext", "xfs"):
            kind = "ext4" if disk == "ext" else disk
            with (
                attached(site.image(disk)) as device,
                mounted(device, tmp_path / "fs", kind=kind) as place,
                (place / "held").open("wb") as held,
            ):
                (place / "file").write_bytes(os.urandom(MIB))
                # Open, and deleted: what is checked before the replay counts that as damage.
                held.write(os.urandom(MIB))
                (place / "held").unlink()
                os.sync()
                [row] = site.json("point", "create", disk, "--wait")["points"]
            # Not the newest: that is of a file system that was unmounted.
            wanted_point = f"{disk}@#{row['epoch']}"
            found = site.json("point", "prove", wanted_point, "--level", "checked")
            assert found["outcome"] == "pass", found
        wanted = {"ext": "pass", "xfs": "pass", "btrfs": "pass", "parts": "pass",
                  "none": "inconclusive"}  # fmt: skip
        assert {disk: prove(site, disk)["outcome"] for disk in wanted} == wanted
        with pytest.raises(CommandError, match=r"exit 6(.|\n)*disk \(ext4\) DAMAGED"):
            prove(site, "hurt")
        proofs = {disk: site.points(disk)[-1]["proof"] for disk in disks}
        assert proofs == {"ext": "checked", "xfs": "checked", "btrfs": "checked",
                          "parts": "checked", "none": "hashed", "hurt": "checked-failed"}  # fmt: skip
        assert site.json("point", "show", "ext@latest-proven")["proof"] == "checked"
        with pytest.raises(CommandError, match="exit 3"):
            site.json("point", "show", "hurt@latest-proven")
        proven = site.mountpoint / "recovery-points" / "ext" / "latest-proven"
        assert (proven / "ext.img").stat().st_size == 320 * MIB
        # Nothing is left of the copies.
        assert site.json("failover", "list")["failovers"] == []
        listed = subprocess.run(["losetup", "--list"], capture_output=True, text=True, check=True)
        assert str(tmp_path) not in listed.stdout


def test_what_the_vault_has_lost_fails_its_proof(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        site.add_image("web01", MIB, os.urandom(MIB))
        site.init().mount().wait_shipped("web01")
        assert prove(site, "web01", "hashed")["outcome"] == "pass"
        epoch = site.points("web01")[-1]["epoch"]
        files = [one for one in (tmp_path / "vault").rglob("*") if one.is_file()]
        large = [one for one in files if one.stat().st_size > MIB // 2]
        for one in large:
            with one.open("r+b") as file:
                file.seek(MIB // 4)
                file.write(b"rotten")
        assert large
        with pytest.raises(CommandError, match="exit 6"):
            prove(site, "web01", "hashed")
        assert site.points("web01")[-1]["proof"] == "hashed-failed"
        assert site.points("web01")[-1]["epoch"] == epoch


def test_a_proof_that_is_killed_leaves_nothing_for_the_next_one(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        subprocess.run(["mkfs.ext4", "-q", site.add_image("web01", 64 * MIB)], check=True)
        site.init().mount().wait_shipped("web01")
        command = [str(PROGRAM), "-m", str(site.mountpoint), "point", "prove", "web01@latest",
                   "--level", "checked"]  # fmt: skip
        with subprocess.Popen(command, env=site.environ, stderr=subprocess.DEVNULL) as one:
            site.wait(
                "it has made its copy", lambda: bool(os.listdir(site.mountpoint / "failovers"))
            )
            one.send_signal(signal.SIGKILL)
        assert prove(site, "web01")["outcome"] == "pass"
        site.wait("nothing is left", lambda: not site.json("failover", "list")["failovers"])


@pytest.mark.parametrize("how", ["unmounted", "killed"])
def test_a_proof_under_way_holds_nothing_up_and_leaves_nothing(tmp_path: Path, how: str) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "e2fsck").write_text(
        f"#!/bin/sh\necho `nice` `ionice -p $$` > {tmp_path}/new\n"
        f"mv {tmp_path}/new {tmp_path}/checks\nexec sleep 5\n"
    )
    (tools / "e2fsck").chmod(0o755)
    options = f'{FAST}prove_interval_s = 1\nprove_level = "checked"\n'
    environ = {"PATH": f"{tools}:{os.environ['PATH']}"}
    with MountedSite(tmp_path, options=options, environ=environ) as site:
        subprocess.run(["mkfs.ext4", "-q", site.add_image("web01", 64 * MIB)], check=True)
        site.init().mount().wait_shipped("web01")
        site.wait("it is checked", (tmp_path / "checks").exists)
        assert (tmp_path / "checks").read_text() == "19 idle\n"
        if how == "killed":
            (tools / "e2fsck").unlink()
            site.kill_daemon()
            site.wait("its loop device is gone", lambda: not loops(tmp_path))
            site.wait("no copy is left", lambda: not site.json("failover", "list")["failovers"])
        else:
            site.umount()
            assert not loops(tmp_path)
            site.mount()
            assert site.json("failover", "list")["failovers"] == []


async def test_a_check_that_is_ended_while_its_device_is_made_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, tool, made = tmp_path / "copy.img", tmp_path / "losetup", tmp_path / "made"
    subprocess.run(["mkfs.ext4", "-q", image, "64M"], check=True)
    tool.write_text(
        f'#!/bin/sh\n{shutil.which("losetup")} "$@" || exit\n'
        f'case "$*" in *--show*) echo > {made}; exec sleep 60 ;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(check_image, image)
        while not made.exists():  # noqa: ASYNC110 (another process makes it)
            await trio.sleep(0.01)
        assert loops(tmp_path)
        nursery.cancel_scope.cancel()
    assert not loops(tmp_path)


def loops(directory: Path) -> str:
    """Return the loop devices over files in a directory."""
    command = ["losetup", "--list", "--noheadings"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "".join(line for line in listed.splitlines() if str(directory) in line)


def test_the_newest_point_is_proven_in_the_background(tmp_path: Path) -> None:
    options = f'{FAST}prove_interval_s = 1\nprove_level = "checked"\n'
    with MountedSite(tmp_path, options=options) as site:
        subprocess.run(["mkfs.ext4", "-q", site.add_image("web01", 64 * MIB)], check=True)
        site.init().mount().wait_shipped("web01")
        site.wait("it is proven", lambda: site.points("web01")[-1]["proof"] == "checked")
        site.wait("status says so", lambda: site.disk("web01")["proven_point_age_s"] is not None)
        [job, *_] = [one for one in site.json("job", "list")["jobs"] if one["kind"] == "prove"]
        assert (job["state"], job["steps"]) == ("done", ["hashed", "checked"])
        assert site.json("failover", "list")["failovers"] == []


async def test_xfs_is_mounted_where_nothing_in_it_can_do_harm_and_nothing_stays_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SECURITY.md says: a loop device of the image that is given, which is a copy."""
    image, seen = tmp_path / "copy.img", tmp_path / "seen"
    subprocess.run(["truncate", "-s", "320M", image], check=True)
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    shim = tmp_path / "bin" / "mount"
    shim.parent.mkdir()
    shim.write_text(
        f'#!/bin/sh\n/bin/mount "$@" && for last; do :; done && '
        f'grep " $last " /proc/mounts > {seen}\n'
    )
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    [found] = await check_image(image)
    assert (found.kind, found.ok) == ("xfs", True)
    device, place, kind, options = seen.read_text().split()[:4]
    assert (device.startswith("/dev/loop"), kind) == (True, "xfs")
    assert {"nosuid", "nodev", "noexec", "noatime"} <= set(options.split(","))
    assert place not in Path("/proc/mounts").read_text()
    assert not Path(place).exists()
