"""The folder vault: what is durable when, who may read it, and what a folder can hold."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from vdiskfs.errors import (
    DamagedError,
    LocalError,
    NotFoundError,
    RefusedError,
    UsageError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.store.folder import Folder
from vdiskfs.store.local import LocalStore, file_system_of

NAME = "disks/0a/g00000001/0000000000000000"


@pytest.fixture
async def root(tmp_path: Path) -> Path:
    await LocalStore(tmp_path / "vault").prepare()
    return tmp_path / "vault"


@pytest.fixture
async def store(root: Path) -> AsyncIterator[LocalStore]:
    store = LocalStore(root)
    yield store
    await store.aclose()


async def names(store: LocalStore, prefix: str) -> list[str]:
    return [info.name async for info in store.list(prefix)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record syncs, links, renames: what they were done to."""
    made: list[str] = []

    def record(name: str, describe: Any) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(f"{name} {describe(*args)}")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    def what(descriptor: int) -> str:
        path = Path(f"/proc/self/fd/{descriptor}")
        return "directory" if path.is_dir() else "file"

    record("fsync", what)
    record("link", lambda source, target: "temporary")
    record("rename", lambda source, target: "temporary")
    record("unlink", lambda name: "temporary" if name.startswith("new-") else "object")
    return made


async def test_an_object_is_durable_before_it_has_its_name(
    store: LocalStore, calls: list[str]
) -> None:
    calls.clear()
    await store.create("a", b"")
    assert calls == ["fsync file", "link temporary", "unlink temporary", "fsync directory"]


async def test_new_directories_are_durable_before_what_is_in_them(
    store: LocalStore, calls: list[str]
) -> None:
    calls.clear()
    await store.create("a/b/c", b"")
    assert calls[:2] == ["fsync directory"] * 2
    assert calls[2:4] == ["fsync file", "link temporary"]
    assert calls[-1] == "fsync directory"


async def test_a_replacement_is_durable_before_it_has_its_name(
    store: LocalStore, calls: list[str]
) -> None:
    etag = await store.create("a", b"")
    calls.clear()
    await store.replace("a", b"x", etag=etag)
    assert calls == ["fsync file", "rename temporary", "fsync directory"]


async def test_a_deletion_is_durable(store: LocalStore, calls: list[str]) -> None:
    await store.create("a", b"")
    calls.clear()
    await store.delete("a")
    assert calls == ["unlink object", "fsync directory"]


async def test_only_the_owner_may_read(store: LocalStore, root: Path) -> None:
    await store.create(NAME, b"")
    modes = {stat_mode(path) for path in [root, *root.rglob("*")] if path.is_dir()}
    assert modes == {0o700}
    assert {stat_mode(path) for path in root.rglob("*") if path.is_file()} == {0o600}


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def test_a_write_that_fails_leaves_nothing(
    store: LocalStore, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(LocalError):
        await store.create_from_file("a", tmp_path / "absent")
    with pytest.raises(LocalError):
        await store.create_from_file("a", tmp_path)
    assert [path.name for path in root.rglob("*") if path.is_file()] == []


async def test_what_a_dead_writer_left_is_never_listed_and_goes_after_a_day(root: Path) -> None:
    old, young = (root / ".vdiskfs" / f"new-{word}" for word in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    store = LocalStore(root)
    assert await names(store, "") == []
    assert old.exists()
    await store.create("a", b"")
    assert not old.exists()
    assert young.exists()
    assert await names(store, "") == ["a"]


async def test_links_are_not_followed(store: LocalStore, root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/b").write_bytes(b"secret")
    (root / "file").symlink_to(tmp_path / "secret")
    (root / "directory").symlink_to(tmp_path / "outside")
    for name in ("file", "directory/b"):
        with pytest.raises(DamagedError, match="symbolic"):
            await store.read(name)
    with pytest.raises(DamagedError, match="symbolic"):
        await store.create("directory/c", b"")
    assert await names(store, "") == []
    assert not (tmp_path / "outside/c").exists()


async def test_what_is_not_a_file_is_not_an_object(store: LocalStore, root: Path) -> None:
    os.mkfifo(root / "fifo")
    (root / "directory").mkdir()
    for name in ("fifo", "directory"):
        with pytest.raises(NotFoundError):
            await store.read(name)
        with pytest.raises(NotFoundError):
            await store.delete(name)
    assert await names(store, "") == []


async def test_a_copied_vault_is_the_same_vault(
    store: LocalStore, root: Path, tmp_path: Path
) -> None:
    await store.create(NAME, b"bytes", metadata={"k": "v"})
    subprocess.run(["cp", "-a", root, tmp_path / "copy"], check=True)
    copy = LocalStore(tmp_path / "copy")
    assert await copy.stat(NAME) == await store.stat(NAME)
    assert await names(copy, "") == [NAME]


async def test_a_copy_that_loses_metadata_keeps_the_rest(store: LocalStore, root: Path) -> None:
    etag = await store.create(NAME, b"bytes", metadata={"k": "v"})
    os.removexattr(root / NAME, "user.vdiskfs")
    data, info = await store.read(NAME)
    assert (data, info.etag, info.metadata) == (b"bytes", etag, {})
    assert [item async for item in store.list("")] == [info]


@pytest.mark.parametrize("raw", [b"", b"no equals", b"\xff=\n=\n==", b"k=v\nk"])
async def test_hostile_metadata_is_harmless(store: LocalStore, root: Path, raw: bytes) -> None:
    await store.create(NAME, b"bytes")
    os.setxattr(root / NAME, "user.vdiskfs", raw)
    assert (await store.read(NAME))[0] == b"bytes"


async def test_a_file_system_without_attributes_holds_a_vault(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "setxattr", raiser(errno.ENOTSUP))
    await store.create(NAME, b"bytes", metadata={"k": "v"})
    assert (await store.read(NAME))[1].metadata == {}


async def test_coarse_times_make_different_etags(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that keeps times to two seconds."""
    real = os.utime

    def coarse(file: int, *, ns: tuple[int, int]) -> None:
        moment = ns[0] // 2_000_000_000 * 2_000_000_000
        real(file, ns=(moment, moment))

    monkeypatch.setattr(os, "utime", coarse)
    etags = [await store.create("a", b"")]
    for _ in range(5):
        etags.append(await store.replace("a", b"", etag=etags[-1]))
    assert len(set(etags)) == 6


async def test_a_clock_that_jumps_back_makes_different_etags(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    etags = [await store.create("a", b"")]
    monkeypatch.setattr("vdiskfs.store.file.time.time_ns", lambda: 10**18)
    for _ in range(3):
        etags.append(await store.replace("a", b"", etag=etags[-1]))
    assert len(set(etags)) == 4


async def test_a_listing_reads_only_the_directories_of_its_prefix(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("disks/a/g1/0", "disks/a/g1/1", "disks/a/g2/0", "disks/b/g1/0", "names/a.json"):
        await store.create(name, b"")
    read: list[str] = []
    real = Folder.entries

    def entries(self: Folder, directory: str, rest: str) -> list[Any]:
        read.append(directory)
        return real(self, directory, rest)

    monkeypatch.setattr(Folder, "entries", entries)
    assert await names(store, "disks/a/g1/") == ["disks/a/g1/0", "disks/a/g1/1"]
    assert await names(store, "disks/a/g1/1") == ["disks/a/g1/1"]
    assert read == ["disks/a/g1/"] * 2
    read.clear()
    assert len(await names(store, "disks/a")) == 3
    assert read == ["disks/", "disks/a/", "disks/a/g1/", "disks/a/g2/"]


async def test_a_range_reads_only_the_range(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.create("a", bytes(1_000_000))
    read = 0
    real = os.pread

    def pread(file: int, length: int, offset: int) -> bytes:
        nonlocal read
        data = real(file, length, offset)
        read += len(data)
        return data

    monkeypatch.setattr(os, "pread", pread)
    await store.read_range("a", 500_000, 4096)
    assert read == 4096


async def test_short_reads_are_put_together(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 10
    await store.create("a", content)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, n, offset: real(file, min(n, 1000), offset))
    assert await store.read_range("a", 1, 2500) == content[1:2501]
    assert (await store.read("a"))[0] == content


@pytest.mark.parametrize("how", ["other file system", "copies nothing"])
async def test_a_file_is_copied_where_the_kernel_cannot(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    content = bytes(range(256)) * 20_000
    (tmp_path / "file").write_bytes(content)
    fake = raiser(errno.EXDEV) if how == "other file system" else lambda *args: 0
    monkeypatch.setattr(os, "copy_file_range", fake)
    await store.create_from_file("a", tmp_path / "file")
    assert (await store.read("a"))[0] == content


def raiser(number: int) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [
        (errno.ENOSPC, VaultUnreachableError, "make room"),
        (errno.EDQUOT, VaultUnreachableError, "make room"),
        (errno.EIO, VaultUnreachableError, ""),
        (errno.EACCES, RefusedError, "owner"),
        (errno.EROFS, RefusedError, "owner"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "write", "link"])
async def test_what_the_disk_says_is_passed_on_and_nothing_is_stored(
    store: LocalStore,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    number: int,
    kind: type[VdiskfsError],
    hint: str,
    call: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, raiser(number))
        with pytest.raises(kind, match=os.strerror(number)) as raised:
            await store.create("a", b"bytes")
    assert hint in raised.value.hint
    assert str(root) in str(raised.value)
    assert await names(store, "") == []
    assert list((root / ".vdiskfs").iterdir()) == []


@contextmanager
def mounted_tmpfs(where: Path) -> Iterator[Path]:
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.root
async def test_a_full_file_system_is_unreachable_and_keeps_what_it_has(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "small") as small:
        store = LocalStore(small / "vault")
        await store.prepare()
        await store.create("a", bytes(500_000))
        with pytest.raises(VaultUnreachableError, match="make room"):
            await store.create("b", bytes(700_000))
        assert await names(store, "") == ["a"]
        await store.create("c", bytes(400_000))


@pytest.mark.root
async def test_the_owner_of_another_vault_is_refused(tmp_path: Path) -> None:
    """As another user: the errors of the real kernel."""
    vault = LocalStore(tmp_path / "vault")
    await vault.prepare()
    await vault.create("a", b"")
    tmp_path.chmod(0o755)
    reached = 0

    def as_nobody() -> None:
        nonlocal reached
        with pytest.raises(RefusedError, match="Permission denied"):
            Folder(tmp_path / "vault").read("a", 10)
        reached += 1

    await trio.to_thread.run_sync(with_user, 65534, as_nobody)
    assert reached == 1


def with_user(uid: int, call: Any) -> None:
    """Run with another user's rights to files, in this thread alone."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(122, uid)  # setfsuid, which drops the rights of root over files
    try:
        call()
    finally:
        libc.syscall(122, 0)


async def test_a_writer_waits_for_the_lock(store: LocalStore, root: Path) -> None:
    etag = await store.create("a", b"1")
    with (root / ".vdiskfs/lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        async with trio.open_nursery() as nursery:
            results: list[str] = []

            async def replace() -> None:
                results.append(await store.replace("a", b"2", etag=etag))

            before = store.requests
            nursery.start_soon(replace)
            while store.requests < before + 3:
                await trio.lowlevel.checkpoint()
            assert results == []
            fcntl.flock(held, fcntl.LOCK_UN)
    assert (await store.stat("a")).etag == results[0]


async def test_a_lock_that_is_never_given_back_is_an_error(
    store: LocalStore, root: Path, autojump_clock: trio.testing.MockClock
) -> None:
    etag = await store.create("a", b"1")
    with (root / ".vdiskfs/lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for call in (store.replace("a", b"2", etag=etag), store.delete("a")):
            with pytest.raises(VaultUnreachableError, match="lock"):
                await call
    assert (await store.read("a"))[0] == b"1"


async def test_a_vault_that_is_a_file_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "vault").write_bytes(b"")
    with pytest.raises(NotFoundError):
        await LocalStore(tmp_path / "vault").read("a")
    with pytest.raises(VdiskfsError):
        await LocalStore(tmp_path / "vault").prepare()


async def test_a_vault_needs_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", raiser(errno.EPERM))
    with pytest.raises(UsageError, match="hard links"):
        await LocalStore(tmp_path / "vault").prepare()


MOUNTS = r"""
21 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw
22 21 0:5 / /mnt/nfs rw shared:2 - nfs4 server:/x rw
23 21 0:6 / /mnt/with\040space rw - cifs //server/x rw
24 22 259:2 / /mnt/nfs/local rw - xfs /dev/sdb rw
25 21 0:7 / /srv rw - nfs server:/y rw
26 21 259:3 / /srv rw master:9 - btrfs /dev/sdc rw,subvol=/@
27 21 0:9 / /mnt/vd rw - fuse.vdiskfs vdiskfs rw
garbage
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/mnt/nfsother", "ext4"),
        ("/mnt/nfs", "nfs4"),
        ("/mnt/nfs/a/b", "nfs4"),
        ("/mnt/nfs/local/a", "xfs"),
        ("/mnt/with space/a", "cifs"),
        ("/srv/vault", "btrfs"),
        ("/mnt/vd/disks", "fuse.vdiskfs"),
    ],
)
def test_the_file_system_of_a_path_is_its_nearest_mount(path: str, kind: str) -> None:
    assert file_system_of(Path(path), MOUNTS) == kind


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "fuse.vdiskfs"])
def test_a_network_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("vdiskfs.store.local.file_system_of", lambda path, text: kind)
    with pytest.raises(UsageError, match=r"network file system|mount of vdiskfs"):
        LocalStore(tmp_path)
