"""vdiskfs umount."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from click.testing import Result

from vdiskfs.registry import write_entry
from vdiskfs_tools import umount

Run = Callable[..., Result]


@pytest.fixture
def ending(daemon: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The fake daemon in the registry as a process that ends when its input does."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        write_entry(replace(daemon.entry, pid=process.pid, pid_start=0))
        yield process


def test_it_comes_back_when_the_daemon_has_ended(
    daemon: Any, ending: subprocess.Popen[bytes], run: Run
) -> None:
    daemon.answer("POST", "/umount", {"unmounted": True})
    assert ending.stdin is not None
    ending.stdin.close()
    result = run("umount", daemon.entry.mountpoint, "--drain")
    assert result.exit_code == 0
    assert result.stderr == f"{daemon.entry.mountpoint}: unmounted\n"
    assert daemon.asked == [("POST", "/umount", {"drain": True, "lazy": False})]


def test_a_daemon_that_goes_on_is_said(
    daemon: Any,
    ending: subprocess.Popen[bytes],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(umount, "END_S", 0.01)
    daemon.answer("POST", "/umount", {"unmounted": True})
    result = run("umount", daemon.entry.mountpoint)
    assert result.exit_code == 1
    assert f"process {ending.pid}" in result.stderr


def test_lazily_nobody_waits(daemon: Any, ending: subprocess.Popen[bytes], run: Run) -> None:
    daemon.answer("POST", "/umount", {"unmounted": True})
    assert run("umount", "--lazy", "--json").exit_code == 0
    assert ending.poll() is None
    assert daemon.asked == [("POST", "/umount", {"drain": False, "lazy": True})]


def test_a_dry_run_asks_for_nothing(daemon: Any, run: Run, run_json: Callable[..., Any]) -> None:
    document = run_json("umount", "--dry-run")
    assert document == {
        "mountpoint": daemon.entry.mountpoint,
        "unmounted": False,
        "dry_run": True,
    }
    assert daemon.asked == []


@pytest.mark.parametrize("place", ["/nowhere", "/", "/proc"])
def test_what_is_no_mount_of_ours_is_left_alone(run: Run, place: str) -> None:
    assert run("umount", place).exit_code == 3


def test_a_mount_without_its_daemon_is_cleared_away(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def fake_run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(umount, "mounted_types", lambda _: ["fuse.vdiskfs"])
    monkeypatch.setattr(subprocess, "run", fake_run)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert run("umount", "/mnt/gone", "--dry-run").exit_code == 0
    assert ran == []
    result = run("umount", "/mnt/gone")
    assert result.exit_code == 0
    assert ran == [["umount", "-c", "--", "/mnt/gone"]]


def test_what_the_host_says_against_it_is_passed_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = subprocess.CompletedProcess([], 32, "", "umount: target is busy.\n")
    monkeypatch.setattr(umount, "mounted_types", lambda _: ["fuse.vdiskfs"])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    result = run("umount", "/mnt/gone")
    assert result.exit_code == 4
    assert "target is busy" in result.stderr
