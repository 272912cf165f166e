"""An encrypted vault under a real mount: the key is where it is needed, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mounted import CommandError, MountedSite
from tests.vaults import VARIABLE

MIB = 1 << 20
SECRET = "a passphrase that nobody reads anywhere"

pytestmark = pytest.mark.e2e


@pytest.fixture
def plain_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def environ_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def files_below(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file())


@pytest.mark.usefixtures("plain_environ")
def test_the_key_survives_an_upgrade_and_a_kill_and_is_in_no_file(tmp_path: Path) -> None:
    """The daemon has it in memory, its successors from there; what was written is restored."""
    with MountedSite(tmp_path, environ={"VDISKFS_PASSPHRASE": SECRET}) as site:
        site.run("vault", "init", site.vault)
        image = site.source / "verysecretname.img"
        image.write_bytes(os.urandom(2 * MIB))
        site.mount().wait_shipped("verysecretname")
        disk = site.mountpoint / "disks" / image.name

        def write(page: int) -> None:
            with disk.open("r+b", buffering=0) as file:
                os.pwrite(file.fileno(), os.urandom(4096), page * 4096)
            site.run("-m", site.mountpoint, "point", "create", "verysecretname", "--wait")

        write(1)
        site.run("-m", site.mountpoint, "upgrade")
        site.pid = int(site.json("status")["pid"])
        write(2)
        site.kill_daemon()
        write(3)
        for pid in (site.pid, site.keeper):
            assert SECRET.encode() not in environ_of(pid)
            assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        restored = tmp_path / "restored.img"
        site.run("--vault", site.vault, "point", "restore", "verysecretname@latest", restored)
        site.umount("--drain")
        assert restored.read_bytes() == image.read_bytes()
        for path in files_below(site.state):
            assert SECRET.encode() not in path.read_bytes(), path
        vault = Path(site.vault.removeprefix("file://"))
        for path in files_below(vault):
            text = path.read_bytes()
            assert b"verysecretname" not in text + str(path).encode(), path
            assert image.read_bytes()[4096:8192] not in text, path


@pytest.mark.usefixtures("plain_environ")
def test_a_wrong_key_or_none_is_exit_7_and_one_line(tmp_path: Path) -> None:
    with MountedSite(tmp_path) as site:
        key = tmp_path / "key"
        site.run("vault", "init", site.vault, "--key-file", key)
        other = tmp_path / "other"
        site.run("vault", "init", f"file://{tmp_path}/elsewhere", "--key-file", other)
        for option in ([], ["--key-file", str(other)]):
            for command in (["vault", "info", "--vault", site.vault],
                            ["mount", str(site.source), str(site.mountpoint), "--vault", site.vault,
                             "--state", str(site.state)]):  # fmt: skip
                with pytest.raises(CommandError) as caught:
                    site.run(*command, *option)
                assert caught.value.returncode == 7
                assert "key" in str(caught.value)
        site.run("vault", "info", "--vault", site.vault, "--key-file", key)


@pytest.mark.usefixtures("plain_environ")
def test_a_vault_that_was_rolled_back_is_refused_until_that_is_accepted(tmp_path: Path) -> None:
    """The records of disks and the keys, older than what the site has seen, stop the mount."""
    with MountedSite(tmp_path, options="heartbeat_s = 3600\n") as site:
        key = tmp_path / "key"
        site.environ["VDISKFS_KEY_FILE"] = str(key)
        site.run("vault", "init", site.vault, "--key-file", key)
        (site.source / "web01.img").write_bytes(os.urandom(MIB))
        site.mount()
        site.run("-m", site.mountpoint, "point", "create", "web01", "--wait")
        site.umount("--drain")
        vault = Path(site.vault.removeprefix("file://"))
        (record,) = vault.glob("disks/*/disk.json")
        old = record.read_bytes()
        site.mount()  # a start is noted in the record
        site.umount("--drain")
        assert record.read_bytes() != old
        record.write_bytes(old)
        with pytest.raises(CommandError, match="gone back in time"):
            site.mount()
        site.mount("--accept-rollback")
        site.umount("--drain")
