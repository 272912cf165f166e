"""vdiskfs_tools.checks: what the doctor looks at."""

import ctypes
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from vdiskfs_tools import checks


@pytest.mark.parametrize(
    ("release", "status"),
    [("6.1.0-13-amd64", "warning"), ("6.8.0-generic", "warning"), ("6.9.0", "ok"),
     ("6.18.44-fc", "ok"), ("7.0-rc1", "ok"), ("strange", "warning")],
)  # fmt: skip
def test_a_kernel_says_what_it_lacks(release: str, status: str) -> None:
    found = checks.check_kernel(release)
    assert found.status == status
    assert bool(found.fix) == (status != "ok")
    # Who runs machines there has to know what a death of the daemon is to them.
    assert ("fail with EIO" in found.detail) == (status != "ok")
    assert ("werror=stop,rerror=stop" in found.fix) == (status != "ok")
    assert ("allow_mmap = false" in found.fix) == (release in ("6.1.0-13-amd64", "strange"))


def test_without_fuse_nothing_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "FUSE", tmp_path / "fuse")
    assert checks.check_fuse().status == "missing"
    (tmp_path / "fuse").write_text("a file, and no device")
    assert checks.check_fuse().status == "missing"
    assert "modprobe fuse" in checks.check_fuse().fix


def test_users_need_the_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.check_helper().fix == "apt install fuse3"
    helper = tmp_path / "fusermount3"
    helper.write_text("#!/bin/sh\n")
    helper.chmod(0o755)
    assert "chmod u+s" in checks.check_helper().fix
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert checks.check_helper().status == "ok"


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("user_allow_other\n", True), (" user_allow_other ", True), ("#user_allow_other", False),
     ("", False)],
)  # fmt: skip
def test_letting_others_in_is_a_setting_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, allowed: bool
) -> None:
    monkeypatch.setattr(checks, "FUSE_CONF", tmp_path / "fuse.conf")
    assert not checks.allows_other_users()
    (tmp_path / "fuse.conf").write_text(text)
    assert checks.allows_other_users() == allowed
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert checks.check_other_users().status == ("ok" if allowed else "warning")


@pytest.mark.parametrize(
    ("free", "status"), [(1 << 40, "ok"), (1 << 29, "warning"), (1 << 20, "missing")]
)
def test_space_is_looked_at_where_the_directory_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, status: str
) -> None:
    info = SimpleNamespace(f_bavail=free, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path: info if path == tmp_path else None)
    found = checks.check_space("state", tmp_path / "not" / "yet")
    assert found.status == status
    assert bool(found.fix) == (status != "ok")


def test_a_place_that_may_not_be_written_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert checks.check_space("state", tmp_path).status == "missing"


@pytest.mark.parametrize(("answer", "status"), [(0, "ok"), (5, "warning"), (-1, "ok")])
def test_the_kernel_knows_whether_the_clock_is_right(
    monkeypatch: pytest.MonkeyPatch, answer: int, status: str
) -> None:
    library = SimpleNamespace(adjtimex=lambda _: answer)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    assert checks.check_clock().status == status


def test_asking_for_the_clock_works_here() -> None:
    assert checks.check_clock().name == "clock"


@pytest.mark.parametrize(
    ("hard", "status"), [(1024, "warning"), (4096, "ok"), (resource.RLIM_INFINITY, "ok")]
)
def test_few_open_files_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, hard: int, status: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, hard))
    assert checks.check_files().status == status


def test_qemu_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.check_qemu().status == "ok"
    program = tmp_path / "qemu-img"
    program.write_text("#!/bin/sh\necho 'qemu-img version 9.1 (Debian)'\n")
    program.chmod(0o755)
    assert checks.check_qemu().detail == "qemu-img version 9.1"
    program.write_text("not a program")
    assert checks.check_qemu().status == "warning"


def test_machines_need_qemu_and_want_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU is started to see: that /dev/kvm is there says little."""
    found = checks.check_machines()
    assert "qemu-system-x86_64" in found.detail
    assert bool(found.fix) == (found.status != "ok")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.check_machines().fix == "apt install qemu-system-x86"
    program = tmp_path / "qemu-system-x86_64"
    for text, status, detail in [
        ("exit 0", "ok", "starts with KVM"),
        ('for word; do [ "$word" != kvm ] || exit 1; done', "warning", "machines will be slow"),
        ("exit 1", "warning", "does not run"),
    ]:
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        found = checks.check_machines()
        assert (found.status, detail in found.detail) == (status, True)
