"""Names through a real mount: the kernel on one side, the source directory on the other."""

from __future__ import annotations

import mmap
import os
import random
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from tests.fs.harness import Mount
from tests.fs.posix import (
    KEEP_SIZE,
    PUNCH,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    ZERO,
    fallocate,
    listdir,
    renameat2,
)

pytestmark = pytest.mark.e2e
ROOT = pytest.mark.root


# -- files ----------------------------------------------------------------


def test_a_new_file_lies_in_the_source_with_its_bytes_and_mode(here: Path, source: Path) -> None:
    old = os.umask(0o027)
    try:
        fd = os.open(here / "a", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    finally:
        os.umask(old)
    os.write(fd, b"bytes")
    os.fsync(fd)
    os.close(fd)
    assert (source / "a").read_bytes() == b"bytes"
    assert stat.S_IMODE((source / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((here / "a").stat().st_mode) == 0o640


def test_a_file_that_its_owner_may_not_write_can_be_created_and_written(here: Path) -> None:
    fd = os.open(here / "a", os.O_CREAT | os.O_RDWR, 0o400)
    os.write(fd, b"once")
    os.close(fd)
    assert (here / "a").read_bytes() == b"once"


def test_o_excl_on_a_file_that_is_there_is_eexist(here: Path) -> None:
    (here / "a").write_bytes(b"")
    with pytest.raises(FileExistsError):
        os.open(here / "a", os.O_CREAT | os.O_EXCL | os.O_RDWR)


def test_o_trunc_empties_and_o_append_appends(here: Path, source: Path) -> None:
    (here / "a").write_bytes(b"x" * 10000)
    (here / "a").write_bytes(b"new")
    assert (source / "a").read_bytes() == b"new"
    with (here / "a").open("ab") as file:
        file.write(b"er")
    assert (source / "a").read_bytes() == b"newer"
    assert (here / "a").stat().st_size == 5


def test_truncate_by_path_and_by_handle_changes_the_size(here: Path, source: Path) -> None:
    (here / "a").write_bytes(b"0123456789")
    os.truncate(here / "a", 4)
    assert (source / "a").read_bytes() == b"0123"
    with (here / "a").open("r+b") as file:
        file.truncate(1 << 40)
        assert os.fstat(file.fileno()).st_size == 1 << 40
        file.truncate(2)
    assert (here / "a").read_bytes() == b"01"


def test_the_size_grows_as_it_is_written_elsewhere(here: Path) -> None:
    with (here / "a").open("wb", buffering=0) as file:
        for i in range(1, 5):
            file.write(b"x" * 1000)
            assert (here / "a").stat().st_size == 1000 * i


def test_fallocate_in_all_modes_does_on_the_source_what_it_says(here: Path, source: Path) -> None:
    (here / "a").write_bytes(b"\xff" * (1 << 20))
    with (here / "a").open("r+b", buffering=0) as file:
        fd = file.fileno()
        fallocate(fd, PUNCH | KEEP_SIZE, 65536, 65536)
        fallocate(fd, ZERO, 262144, 4096)
        fallocate(fd, KEEP_SIZE, 1 << 20, 1 << 20)
        assert os.fstat(fd).st_size == 1 << 20
        fallocate(fd, 0, 0, 2 << 20)
        assert os.fstat(fd).st_size == 2 << 20
    data = (source / "a").read_bytes()
    assert data[65536:131072] == bytes(65536)
    assert data[262144:266240] == bytes(4096)
    assert data[131072:262144] == b"\xff" * 131072
    assert data[1 << 20 :] == bytes(1 << 20)


def test_holes_are_found(here: Path) -> None:
    with (here / "a").open("w+b", buffering=0) as file:
        fd = file.fileno()
        file.truncate(1 << 20)
        os.pwrite(fd, b"data", 1 << 19)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 19
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        assert os.lseek(fd, 1 << 19, os.SEEK_HOLE) == (1 << 19) + 4096
        assert os.lseek(fd, -1, os.SEEK_END) == (1 << 20) - 1
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(fd, 1 << 20, os.SEEK_DATA)


def test_a_file_can_be_mapped_read_and_written(here: Path, source: Path) -> None:
    (here / "a").write_bytes(bytes(65536))
    with (here / "a").open("r+b") as file, mmap.mmap(file.fileno(), 65536) as view:
        view[100:104] = b"mmap"
        view.flush()
        assert (source / "a").read_bytes()[100:104] == b"mmap"
        os.pwrite(file.fileno(), b"beside", 8192)
    assert (source / "a").read_bytes()[8192:8198] == b"beside"
    assert (here / "a").read_bytes()[100:104] == b"mmap"


def test_a_map_outlives_its_handle(here: Path, source: Path) -> None:
    (here / "a").write_bytes(bytes(8192))
    with (here / "a").open("r+b") as file:
        view = mmap.mmap(file.fileno(), 8192)
    view[0:4] = b"late"
    view.close()
    assert (source / "a").read_bytes()[:4] == b"late"


def test_an_unlinked_file_lives_while_it_is_open(here: Path, source: Path) -> None:
    with (here / "a").open("w+b", buffering=0) as file:
        (here / "a").unlink()
        assert not (source / "a").exists()
        file.write(b"still")
        assert os.pread(file.fileno(), 10, 0) == b"still"
        assert os.fstat(file.fileno()).st_nlink == 0
        os.ftruncate(file.fileno(), 2)
        assert os.fstat(file.fileno()).st_size == 2


def test_fsync_and_fdatasync_of_files_and_directories_succeed(here: Path) -> None:
    with (here / "a").open("wb") as file:
        file.write(b"x")
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
    fd = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


# -- names ----------------------------------------------------------------


def test_rename_over_a_file_replaces_it_and_the_open_old_one_stays(
    mount: Mount, here: Path, source: Path
) -> None:
    (here / "old").write_bytes(b"old")
    (here / "new").write_bytes(b"new")
    with (here / "old").open("rb") as file:
        (here / "new").rename(here / "old")
        assert file.read() == b"old"
        assert (here / "old").read_bytes() == b"new"
    assert sorted(listdir(source)) == ["old"]
    name = here.name
    assert [line for line in mount.heard() if name in line and "re" in line.split()[0]][-2:] == [
        f"replaced {name}/old last",
        f"renamed {name}/new {name}/old",
    ]


def test_rename_knows_noreplace_and_exchange(here: Path) -> None:
    (here / "a").write_bytes(b"a")
    (here / "b").write_bytes(b"b")
    with pytest.raises(FileExistsError):
        renameat2(here / "a", here / "b", RENAME_NOREPLACE)
    renameat2(here / "a", here / "b", RENAME_EXCHANGE)
    assert (here / "a").read_bytes() == b"b"
    assert (here / "b").read_bytes() == b"a"


def test_hard_links_are_one_file(here: Path, source: Path) -> None:
    (here / "a").write_bytes(b"one")
    os.link(here / "a", here / "b")
    assert (here / "a").stat().st_ino == (here / "b").stat().st_ino
    assert (here / "b").stat().st_nlink == 2
    with (here / "a").open("r+b", buffering=0) as first, (here / "b").open("rb") as second:
        first.write(b"two")
        assert second.read() == b"two"
    (here / "a").unlink()
    assert (here / "b").read_bytes() == b"two"
    assert (source / "b").stat().st_nlink == 1


def test_renaming_one_link_onto_the_other_leaves_both(here: Path) -> None:
    (here / "a").write_bytes(b"one")
    os.link(here / "a", here / "b")
    (here / "a").rename(here / "b")
    assert sorted(listdir(here)) == ["a", "b"]


def test_sub_directories_are_made_moved_and_removed(here: Path, source: Path) -> None:
    (here / "one" / "two").mkdir(parents=True)
    (here / "one" / "two" / "file").write_bytes(b"x")
    (here / "one").rename(here / "uno")
    assert (source / "uno" / "two" / "file").read_bytes() == b"x"
    assert (here / "uno" / "two" / ".." / "two" / "file").read_bytes() == b"x"
    with pytest.raises(OSError, match="not empty"):
        (here / "uno").rmdir()
    (here / "uno" / "two" / "file").unlink()
    (here / "uno" / "two").rmdir()
    (here / "uno").rmdir()
    assert listdir(source) == []


def test_a_directory_keeps_its_setgid_group(here: Path, source: Path) -> None:
    (here / "d").mkdir()
    if os.geteuid() == 0:
        os.chown(here / "d", 0, 1234)
    (here / "d").chmod(0o2775)
    (here / "d" / "f").write_bytes(b"")
    (here / "d" / "e").mkdir()
    assert (source / "d" / "f").stat().st_gid == (source / "d").stat().st_gid
    assert (source / "d" / "e").stat().st_mode & stat.S_ISGID


def test_symbolic_links_are_passed_through_and_never_followed_on_the_host(
    here: Path, source: Path
) -> None:
    (here / "link").symlink_to("../../nowhere")
    (source / "out").symlink_to("/etc/hostname")
    assert str((here / "link").readlink()) == "../../nowhere"
    assert str((source / "link").readlink()) == "../../nowhere"
    assert str((here / "out").readlink()) == "/etc/hostname"
    assert (here / "out").lstat().st_size == len("/etc/hostname")
    os.utime(here / "link", ns=(5, 7), follow_symlinks=False)
    assert (source / "link").lstat().st_mtime_ns == 7
    if os.geteuid() == 0:
        os.chown(here / "link", 11, 12, follow_symlinks=False)
        assert ((source / "link").lstat().st_uid, (source / "link").lstat().st_gid) == (11, 12)
    os.link(here / "link", here / "again", follow_symlinks=False)
    assert str((source / "again").readlink()) == "../../nowhere"


def test_times_modes_and_extended_attributes_reach_the_source(here: Path, source: Path) -> None:
    (here / "a").write_bytes(b"x")
    os.utime(here / "a", ns=(1_000_000_001, 2_000_000_002))
    assert (source / "a").stat().st_mtime_ns == 2_000_000_002
    (here / "a").chmod(0o604)
    assert stat.S_IMODE((source / "a").stat().st_mode) == 0o604
    os.setxattr(here / "a", "user.note", b"value")
    assert os.getxattr(source / "a", "user.note") == b"value"
    assert "user.note" in os.listxattr(here / "a")
    with pytest.raises(FileExistsError):
        os.setxattr(here / "a", "user.note", b"other", os.XATTR_CREATE)
    os.removexattr(here / "a", "user.note")
    with pytest.raises(OSError, match="No data available"):
        os.getxattr(here / "a", "user.note")


def test_fifos_can_be_made_and_devices_cannot(here: Path, source: Path) -> None:
    os.mkfifo(here / "fifo", 0o600)
    assert stat.S_ISFIFO((source / "fifo").lstat().st_mode)
    os.mknod(here / "plain", stat.S_IFREG | 0o640)
    assert stat.S_IMODE((here / "plain").stat().st_mode) == 0o640
    with pytest.raises(PermissionError):
        os.mknod(here / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert sorted(listdir(source)) == ["fifo", "plain"]


def test_statfs_is_the_sources(mount: Mount) -> None:
    inside, outside = os.statvfs(mount.disks), os.statvfs(mount.source)
    assert inside.f_blocks * inside.f_frsize == outside.f_blocks * outside.f_frsize
    assert inside.f_namemax == outside.f_namemax


def test_names_of_any_bytes_work(here: Path, source: Path) -> None:
    name = b"a \xff\n\xc3\xa4" + b"n" * 200
    path = bytes(here) + b"/" + name
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    assert listdir(source) == [os.fsdecode(name)] == listdir(here)
    with pytest.raises(OSError, match="File name too long"):
        os.open(bytes(here) + b"/" + b"n" * 256, os.O_CREAT | os.O_WRONLY)


def test_what_changes_behind_the_mount_shows_within_the_timeout(here: Path, source: Path) -> None:
    (source / "a").write_bytes(b"1")
    assert (here / "a").read_bytes() == b"1"
    (source / "b").write_bytes(b"22")
    (source / "b").rename(source / "a")
    for _ in range(100):
        if (here / "a").stat().st_size == 2:
            break
        threading.Event().wait(0.05)
    assert (here / "a").read_bytes() == b"22"


def test_a_directory_of_10000_names_is_listed_whole_and_can_be_sought(
    here: Path, source: Path
) -> None:
    names = {f"file-{i:05}" for i in range(10000)}
    for name in names:
        os.close(os.open(source / name, os.O_CREAT | os.O_WRONLY))
    assert set(listdir(here)) == names
    script = (
        "opendir my $d, $ARGV[0] or die; my @n; my %at; "
        "while (defined(my $e = readdir $d)) { push @n, $e; $at{$e} = telldir $d; } "
        "my $i = int(@n / 2); seekdir $d, $at{$n[$i]}; "
        "for my $j ($i + 1 .. $#n) { my $e = readdir $d; die qq($j) unless $e eq $n[$j]; } "
        "die if defined readdir $d; rewinddir $d; my $c = 0; $c++ while readdir $d; print $c;"
    )
    done = subprocess.run(
        ["perl", "-e", script, str(here)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "10002"


def test_names_that_come_and_go_while_listing_hide_no_others(here: Path) -> None:
    lasting = {f"lasting-{i}" for i in range(500)}
    for name in lasting | {f"going-{i}" for i in range(500)}:
        (here / name).write_bytes(b"")
    seen: list[str] = []
    with os.scandir(here) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number < 500:
                (here / f"going-{number}").unlink(missing_ok=True)
                (here / f"coming-{number}").write_bytes(b"")
    assert len(seen) == len(set(seen))
    assert lasting <= set(seen)


def test_a_storm_of_creates_renames_and_unlinks_ends_as_the_model_says(
    here: Path, source: Path
) -> None:
    failures: list[BaseException] = []

    def storm(number: int) -> None:
        rng = random.Random(number)
        model: dict[str, bytes] = {}
        try:
            for step in range(150):
                name = f"{number}-{rng.randrange(8)}"
                what = rng.randrange(4)
                if what == 0 or not model:
                    model[name] = f"{number}.{step}".encode()
                    (here / name).write_bytes(model[name])
                elif what == 1:
                    old = rng.choice(list(model))
                    (here / old).rename(here / name)
                    model[name] = model.pop(old)
                elif what == 2:
                    old = rng.choice(list(model))
                    (here / old).unlink()
                    del model[old]
                else:
                    old = rng.choice(list(model))
                    assert (here / old).read_bytes() == model[old]
            found = {p.name: p.read_bytes() for p in source.iterdir() if p.match(f"{number}-*")}
            assert found == model
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)

    threads = [threading.Thread(target=storm, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_that_rename_over_one_name_leave_one_whole_file(here: Path, source: Path) -> None:
    failures: list[BaseException] = []

    def replace(number: int) -> None:
        try:
            for step in range(60):
                (here / f"new-{number}").write_bytes(f"{number}.{step}".encode() * 100)
                (here / f"new-{number}").rename(here / "target")
                assert len((here / "target").read_bytes()) >= 300
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)

    threads = [threading.Thread(target=replace, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert listdir(source) == ["target"]
