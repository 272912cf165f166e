"""Who may do what in a real mount, recovery points in it, and other mounts."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fs.harness import Mount
from tests.fs.posix import (
    NOBODY,
    UMOUNT,
    as_nobody,
    listdir,
)

pytestmark = pytest.mark.e2e
ROOT = pytest.mark.root


SAFE = {"nosuid", "nodev", "noexec"}


def mount_options(path: Path) -> set[str]:
    """What the kernel keeps to at a mountpoint."""
    rows = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return next(set(row[5].split(",")) for row in rows if row[4] == str(path))


# -- who may --------------------------------------------------------------


@ROOT
def test_another_user_may_what_the_modes_of_the_source_say(here: Path, source: Path) -> None:
    here.chmod(0o777)
    (here / "secret").write_bytes(b"secret")
    (here / "secret").chmod(0o600)
    (here / "public").write_bytes(b"public")
    (here / "public").chmod(0o644)
    assert as_nobody("cat", str(here / "public")).stdout == "public"
    assert "Permission denied" in as_nobody("cat", str(here / "secret")).stderr
    assert "Permission denied" in as_nobody("tee", str(here / "public")).stderr
    assert as_nobody("touch", str(here / "mine")).returncode == 0
    assert ((source / "mine").stat().st_uid, (source / "mine").stat().st_gid) == (NOBODY, NOBODY)
    assert as_nobody("mkdir", str(here / "dir")).returncode == 0
    assert (source / "dir").stat().st_uid == NOBODY
    assert as_nobody("ln", "-s", "x", str(here / "link")).returncode == 0
    assert (source / "link").lstat().st_uid == NOBODY
    assert "not permitted" in as_nobody("chown", "0", str(here / "mine")).stderr
    assert "not permitted" in as_nobody("chmod", "666", str(here / "public")).stderr


@ROOT
def test_access_control_lists_of_the_source_hold(here: Path, source: Path) -> None:
    (here / "a").write_bytes(b"acl")
    (here / "a").chmod(0o600)
    entries = [(1, 6, -1), (2, 4, NOBODY), (4, 0, -1), (16, 4, -1), (32, 0, -1)]
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little")
        + perm.to_bytes(2, "little")
        + (who & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, perm, who in entries
    )
    os.setxattr(here / "a", "system.posix_acl_access", acl)
    assert os.getxattr(source / "a", "system.posix_acl_access") == acl
    assert as_nobody("cat", str(here / "a")).stdout == "acl"
    os.removexattr(here / "a", "system.posix_acl_access")
    (here / "a").chmod(0o600)
    assert "Permission denied" in as_nobody("cat", str(here / "a")).stderr


@ROOT
def test_another_user_reads_through_points_only_what_he_reads_live(mount: Mount) -> None:
    point = mount.points / "web01" / "latest"
    live = mount.disks / "web01.img"
    for mode, readable in ((0o600, False), (0o644, True), (0o640, False)):
        live.chmod(mode)
        for name in ("web01.img", "point.json"):
            for _ in range(100):  # attributes are believed for a second
                if stat.S_IMODE((point / name).stat().st_mode) == mode & 0o444:
                    break
                threading.Event().wait(0.05)
            assert stat.S_IMODE((point / name).stat().st_mode) == mode & 0o444
            done = as_nobody("head", "-c1", str(point / name))
            assert (done.returncode == 0) == readable


# -- recovery points ------------------------------------------------------


def test_nobody_changes_anything_but_disks(mount: Mount) -> None:
    image = mount.points / "web01" / "latest" / "web01.img"
    day = next(entry for entry in (mount.points / "web01").iterdir() if entry.name[0] == "2")
    changes: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (os.mkdir, (mount.path / "new",)),
        (os.mkdir, (mount.path / "failovers" / "new",)),
        (os.open, (mount.points / "web01" / "new", os.O_CREAT | os.O_RDWR)),
        (os.open, (image, os.O_RDWR)),
        (os.truncate, (image, 0)),
        (os.unlink, (image,)),
        (os.chmod, (image, 0o777)),
        (os.utime, (image,)),
        (os.setxattr, (image, "user.x", b"")),
        (os.link, (mount.disks / "web01.img", day / "x")),
        (os.rename, (mount.disks / "web01.img", day / "x")),
        (os.rmdir, (day,)),
        (os.rename, (mount.disks, mount.path / "x")),
    ]
    for change, arguments in changes:
        with pytest.raises(OSError, match=r"Read-only file system|Permission denied") as caught:
            change(*arguments)
        assert caught.value.errno == errno.EROFS or os.geteuid() != 0


def test_a_day_of_10000_points_is_listed_in_the_order_of_time(mount: Mount) -> None:
    days = sorted(entry for entry in (mount.points / "web01").iterdir() if entry.name[0] == "2")
    names = [name for day in days for name in subprocess_ls(day)]
    assert len(names) == 10000
    assert names == sorted(names)
    assert names[0] == "01-40-05.000Z"


def subprocess_ls(directory: Path) -> list[str]:
    return subprocess.run(
        ["ls", "-U", str(directory)], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()


def test_a_point_is_read_by_its_name_its_links_and_its_time(mount: Mount) -> None:
    disk = mount.points / "web01"
    assert (disk / "2026-11-21" / "01-40-09.000Z" / "web01.img").read_bytes()[:2] == b"5\0"
    assert str((disk / "@2026-11-21T01:40:09Z").readlink()) == "2026-11-21/01-40-09.000Z"
    assert (disk / "@2026-11-21T01:40:09Z" / "web01.img").read_bytes()[:2] == b"5\0"
    assert (disk / "@-59m" / "web01.img").read_bytes()[:3] == b"61\0"
    assert (disk / "latest" / "web01.img").read_bytes()[:6] == b"10000\0"
    assert (disk / "latest" / "point.json").read_bytes() == b'{"epoch": 1}\n'
    assert not (disk / "latest-proven").exists()
    assert "latest-proven" not in listdir(disk)
    for absent in ("@2020-01-01T00:00:00Z", "@nonsense", "@", "2026-11-22", "2026-11-21x", "x"):
        with pytest.raises(FileNotFoundError):
            (disk / absent).lstat()


def test_a_point_is_copied_sparse_and_mapped(mount: Mount, tmp_path: Path) -> None:
    image = mount.points / "web01" / "latest" / "web01.img"
    subprocess.run(["cp", "--sparse=auto", image, tmp_path / "copy"], check=True, timeout=20)
    assert (tmp_path / "copy").stat().st_size == 1 << 20
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 16
    with image.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert view[:6] == b"10000\0"


# -- other mounts ---------------------------------------------------------


def test_at_the_end_nothing_is_left(tmp_path: Path) -> None:
    mounted = Mount(tmp_path, options=["--points", "3"])
    try:
        mounted.wait_ready()
        assert mount_options(mounted.path) >= SAFE
        (mounted.disks / "a").write_bytes(b"x")
        subprocess.run(["find", mounted.path], check=True, capture_output=True, timeout=20)
        said = mounted.close(by=UMOUNT)
    finally:
        mounted.abort()
    assert "descriptors 0" in said
    assert mounted.heard() == ["created a", "closed a"]


def test_a_bug_in_a_handler_is_an_io_error_and_not_the_end_of_the_mount(tmp_path: Path) -> None:
    mounted = Mount(tmp_path)
    try:
        mounted.wait_ready()
        with pytest.raises(OSError, match="Input/output error"):
            (mounted.disks / "trap").write_bytes(b"")
        assert listdir(mounted.disks) == []
        (mounted.disks / "a").write_bytes(b"alive")
        assert (mounted.disks / "a").read_bytes() == b"alive"
        said = mounted.close(by=UMOUNT)
    finally:
        mounted.abort()
    assert "RuntimeError: a bug of ours" in said


@ROOT
def test_a_mount_survives_its_source_being_mounted_over(tmp_path: Path) -> None:
    mounted = Mount(tmp_path)
    try:
        mounted.wait_ready()
        subprocess.run(["mount", "--bind", mounted.disks, mounted.source], check=True)
        (mounted.source / "a").write_bytes(b"over")
        assert (mounted.disks / "a").read_bytes() == b"over"
        assert (mounted.source / "a").stat().st_dev == mounted.disks.stat().st_dev
        subprocess.run(["umount", mounted.source], check=True)
        assert (mounted.source / "a").read_bytes() == b"over"
        mounted.close()
    finally:
        subprocess.run(["umount", "-l", mounted.source], check=False, capture_output=True)
        mounted.abort()


@ROOT
def test_an_ordinary_user_mounts_his_own_directory(open_tmp: Path, fuse_for_all: None) -> None:
    directory = open_tmp / "own"
    for made in (directory, directory / "source", directory / "mnt"):
        made.mkdir()
        os.chown(made, NOBODY, NOBODY)
    user = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    mounted = Mount(directory, before=user)
    try:
        mounted.wait_ready()
        assert mount_options(mounted.path) >= SAFE
        script = f"""
set -e
cd {mounted.disks}
echo hello > a; mkdir d; mv a d/b; cat d/b; ln d/b c; rm d/b
dd if=/dev/zero of=big bs=1M count=3 conv=fsync 2>/dev/null
umask 0777; echo unwritable > e; ls -l e | cut -c1-10
"""
        done = as_nobody("bash", "-c", script)
        assert done.stdout == "hello\n----------\n", done.stderr
        assert (directory / "source" / "big").stat().st_size == 3 << 20
        with pytest.raises(PermissionError):  # not even root, without allow_other
            mounted.disks.stat()
        done = as_nobody("fusermount3", "-u", str(mounted.path))
        assert done.returncode == 0, done.stderr
        mounted.process.communicate(timeout=20)
        assert mounted.process.returncode == 0, mounted.log.read_text()
    finally:
        mounted.abort()
