"""vdiskfs_tools.mounts: which mount is meant."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result

from vdiskfs.errors import NotFoundError, UsageError
from vdiskfs.registry import MountEntry, write_entry
from vdiskfs_tools.call import Call
from vdiskfs_tools.mounts import find_mount, mounted_types, real_mountpoint, real_path, vault_url

Run = Callable[..., Result]


@pytest.fixture
def other(entry: MountEntry) -> MountEntry:
    second = replace(entry, mountpoint=entry.mountpoint + "2", vault="file:///other")
    write_entry(second)
    return second


def test_the_only_mount_is_meant(entry: MountEntry) -> None:
    assert find_mount(Call()).mountpoint == entry.mountpoint


def test_of_several_one_must_be_named(entry: MountEntry, other: MountEntry) -> None:
    with pytest.raises(UsageError) as caught:
        find_mount(Call())
    assert entry.mountpoint in str(caught.value)
    assert find_mount(Call(mount=other.mountpoint)).vault == other.vault


def test_the_option_wins_over_the_environment(
    entry: MountEntry, other: MountEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VDISKFS_MOUNT", other.mountpoint)
    assert find_mount(Call()).mountpoint == other.mountpoint
    assert find_mount(Call(mount=entry.mountpoint)).mountpoint == entry.mountpoint


def test_a_mount_is_found_by_any_path_to_it(
    entry: MountEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in ("mnt", "mnt/", "./mnt/../mnt", f"{tmp_path}/link/mnt"):
        assert find_mount(Call(mount=path)).mountpoint == entry.mountpoint


def test_no_mount_is_exit_3(run: Run) -> None:
    for line in (["status"], ["-m", "/nowhere", "status"]):
        result = run(*line)
        assert result.exit_code == 3
        assert result.stderr.count("\n") == 1


def test_the_vault_is_the_one_named_or_the_mounts(entry: MountEntry) -> None:
    assert vault_url(Call()) == entry.vault
    assert vault_url(Call(vault="file:///named")) == "file:///named"


def test_without_a_mount_a_vault_must_be_named() -> None:
    with pytest.raises(NotFoundError, match="--vault"):
        vault_url(Call())


def test_what_is_mounted_is_known_without_touching_it() -> None:
    assert mounted_types("/proc")[-1] == "proc"
    assert mounted_types("/nowhere") == []


def test_the_mountpoint_itself_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = os.lstat

    def lstat(path: str | Path, **more: int | None) -> os.stat_result:
        asked.append(os.fspath(path))
        return real(path, **more)

    monkeypatch.setattr(os, "lstat", lstat)
    assert real_mountpoint("/usr/lib") == "/usr/lib"
    assert "/usr" in asked
    assert "/usr/lib" not in asked


def test_a_real_path_is_found_without_asking_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is mounted there may have nobody who answers."""
    end = tmp_path / "images" / "now"
    end.mkdir(parents=True)
    (tmp_path / "link").symlink_to("images")
    (tmp_path / "images" / "last").symlink_to("../link/now")
    (tmp_path / "loop").symlink_to("loop")

    def asked(path: str, **_: object) -> None:
        pytest.fail(f"asked: {path}")

    with monkeypatch.context() as patched:
        patched.setattr(os, "lstat", asked)
        for path in ("images/now", "link/now", "link/last", "link/../images//./last"):
            assert real_path(f"{tmp_path}/{path}") == str(end)
        assert real_path("/") == "/"
        assert real_path(f"{tmp_path}/images/none/x") == f"{tmp_path}/images/none/x"
        assert real_path(f"{tmp_path}/loop") == f"{tmp_path}/loop"
        patched.chdir(tmp_path)
        assert real_path("link/now") == str(end)
