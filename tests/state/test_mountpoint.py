"""The directory beneath a mount, and who keeps a mount busy."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdiskfs.errors import BusyError, NotFoundError, RefusedError, UsageError
from vdiskfs.state import (
    MountUser,
    open_mountpoint,
    seal_mountpoint,
    unseal_mountpoint,
    users_of,
)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    if path.exists():
        unseal_mountpoint(str(path))


def sealed(path: Path) -> bool:
    fd = open_mountpoint(str(path))
    try:
        return seal_mountpoint(fd)
    finally:
        os.close(fd)


def test_what_cannot_be_mounted_on_is_said(mountpoint: Path) -> None:
    with pytest.raises(NotFoundError, match="no such mountpoint"):
        open_mountpoint(str(mountpoint / "absent"))
    (mountpoint / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="not empty"):
        open_mountpoint(str(mountpoint))
    with pytest.raises(UsageError, match="not a directory"):
        open_mountpoint(str(mountpoint / "file"))
    for mounted in ("/proc", "/"):
        with pytest.raises(BusyError, match="mounted there"):
            open_mountpoint(mounted)


@pytest.mark.root
def test_a_mount_of_the_same_file_system_is_seen(mountpoint: Path, tmp_path: Path) -> None:
    with_blank = mountpoint / "a b"
    with_blank.mkdir()
    (tmp_path / "other").mkdir()
    subprocess.run(["mount", "--bind", tmp_path / "other", with_blank], check=True)
    try:
        with pytest.raises(BusyError):
            open_mountpoint(str(with_blank))
        assert MountUser(0, "mount", str(with_blank)) in users_of(str(mountpoint))
    finally:
        subprocess.run(["umount", with_blank], check=True)


@pytest.mark.root
def test_nobody_creates_anything_in_a_sealed_directory_and_it_can_be_mounted_on(
    mountpoint: Path,
) -> None:
    mode = mountpoint.stat().st_mode
    assert sealed(mountpoint)
    with pytest.raises(PermissionError):
        (mountpoint / "disk.img").write_bytes(b"")
    with pytest.raises(PermissionError):
        mountpoint.rmdir()
    assert sealed(mountpoint)
    subprocess.run(["mount", "-t", "tmpfs", "none", mountpoint], check=True)
    (mountpoint / "file").write_bytes(b"")
    subprocess.run(["umount", mountpoint], check=True)
    unseal_mountpoint(str(mountpoint))
    unseal_mountpoint(str(mountpoint))
    assert mountpoint.stat().st_mode == mode
    (mountpoint / "disk.img").write_bytes(b"")


@pytest.mark.root
def test_an_ordinary_user_seals_by_mode(mountpoint: Path) -> None:
    os.chown(mountpoint, 65534, 65534)
    for above in mountpoint.parents:
        if not above.stat().st_mode & stat.S_IXOTH:
            os.chmod(above, 0o711)  # noqa: PTH101
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            first = sealed(mountpoint)
            again = sealed(mountpoint)
            try:
                (mountpoint / "x").write_bytes(b"")
            except PermissionError:
                code = 0 if first and again else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert stat.S_IMODE(mountpoint.stat().st_mode) == 0
    unseal_mountpoint(str(mountpoint))
    assert stat.S_IMODE(mountpoint.stat().st_mode) == 0o700


def test_users_are_found_by_directory_file_and_map(tmp_path: Path) -> None:
    inside = tmp_path / "mnt"
    inside.mkdir()
    (inside / "file").write_bytes(bytes(4096))
    (tmp_path / "mnt-beside").write_bytes(b"")
    script = "import mmap,sys,time; f=open('file','rb'); m=mmap.mmap(f.fileno(),0,prot=1)\n"
    script += "f.close(); print('ready', flush=True); sys.stdin.read()"
    mapper = subprocess.Popen(
        ["python3", "-c", script], cwd=inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with (tmp_path / "mnt-beside").open("rb") as beside:
        other = subprocess.Popen(["sleep", "60"], stdin=beside)
        assert mapper.stdout is not None
        mapper.stdout.readline()
        found = users_of(str(inside))
        own = users_of(str(tmp_path / "mnt-beside"))
    other.kill()
    other.wait()
    mapper.communicate()
    assert {(user.pid, user.path) for user in found} == {
        (mapper.pid, str(inside)), (mapper.pid, str(inside / "file")),
    }  # fmt: skip
    assert found[0].name.startswith("python3")
    assert str(mapper.pid) in str(found[0])
    assert [user.pid for user in own] == [other.pid]


@pytest.mark.root
def test_loop_devices_are_users(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    loop = subprocess.run(
        ["losetup", "--find", "--show", "-r", tmp_path / "disk.img"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    try:
        found = users_of(str(tmp_path))
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)
    assert MountUser(0, loop, str(tmp_path / "disk.img")) in found


def test_a_mountpoint_that_may_not_be_entered_is_refused(mountpoint: Path) -> None:
    if os.geteuid() == 0:
        with pytest.raises(NotFoundError):
            open_mountpoint(str(mountpoint / "x"))
        return
    mountpoint.chmod(0o100)
    with pytest.raises(RefusedError):
        open_mountpoint(str(mountpoint))
    mountpoint.chmod(0o700)
