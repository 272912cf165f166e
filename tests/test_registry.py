"""vdiskfs.registry: which mounts run on this host."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vdiskfs import registry
from vdiskfs.errors import RefusedError
from vdiskfs.registry import MountEntry

ENTRY = MountEntry("/mnt/vd", os.getpid(), "/run/s", "/state", "file:///v", "a", "/srv")


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_an_entry_is_read_back(tmp_path: Path) -> None:
    registry.write_entry(ENTRY, tmp_path)
    (found,) = registry.mount_entries(tmp_path)
    assert replace(found, pid_start=0) == ENTRY
    assert found.pid_start == registry.process_start(os.getpid())


def test_an_entry_of_a_process_that_is_gone_is_removed(tmp_path: Path) -> None:
    path = registry.write_entry(replace(ENTRY, pid=ended_process()), tmp_path)
    assert registry.mount_entries(tmp_path) == []
    assert not path.exists()


def test_a_later_process_with_the_same_number_is_not_the_daemon(tmp_path: Path) -> None:
    registry.write_entry(replace(ENTRY, pid_start=1), tmp_path)
    assert registry.mount_entries(tmp_path) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": 1}', "{", "null"])
def test_a_file_that_is_no_entry_is_removed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "0123.json"
    path.write_text(text)
    assert registry.mount_entries(tmp_path) == []
    assert not path.exists()


def test_an_entry_with_values_of_other_kinds_is_no_entry(tmp_path: Path) -> None:
    path = registry.write_entry(ENTRY, tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "socket": 3}))
    assert registry.mount_entries(tmp_path) == []


def test_a_later_mount_on_the_same_place_replaces_the_entry(tmp_path: Path) -> None:
    registry.write_entry(ENTRY, tmp_path)
    registry.write_entry(replace(ENTRY, site="b"), tmp_path)
    assert [entry.site for entry in registry.mount_entries(tmp_path)] == ["b"]


def test_entries_come_by_mountpoint(tmp_path: Path) -> None:
    for place in ("/c", "/a", "/b"):
        registry.write_entry(replace(ENTRY, mountpoint=place), tmp_path)
    assert [e.mountpoint for e in registry.mount_entries(tmp_path)] == ["/a", "/b", "/c"]


def test_removing_twice_is_no_error(tmp_path: Path) -> None:
    registry.write_entry(ENTRY, tmp_path)
    registry.remove_entry(ENTRY.mountpoint, tmp_path)
    registry.remove_entry(ENTRY.mountpoint, tmp_path)
    assert registry.mount_entries(tmp_path) == []


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(RefusedError):
        registry.mount_entries(tmp_path)
    with pytest.raises(RefusedError):
        registry.write_entry(ENTRY, tmp_path)


def test_a_link_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(RefusedError):
        registry.mount_entries(link)


def test_a_directory_that_is_not_there_has_no_mounts(tmp_path: Path) -> None:
    assert registry.mount_entries(tmp_path / "absent") == []


def test_the_directory_is_made_for_one_user_alone(tmp_path: Path) -> None:
    registry.write_entry(ENTRY, tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_each_user_has_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert registry.registry_directory({"XDG_RUNTIME_DIR": "/x"}) == Path("/run/vdiskfs")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert registry.registry_directory({"XDG_RUNTIME_DIR": "/x"}) == Path("/x/vdiskfs")
    assert registry.registry_directory({}) == Path("/tmp/vdiskfs-1000")
