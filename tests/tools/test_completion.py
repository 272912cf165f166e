"""vdiskfs completion, and what it completes."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import Result

from vdiskfs_tools import completion
from vdiskfs_tools.main import cli
from vdiskfs_tools.names import LATEST

Run = Callable[..., Result]


def completed(*args: str, incomplete: str = "") -> list[str]:
    shell = ShellComplete(cli, {}, "vdiskfs", "_VDISKFS_COMPLETE")
    return [item.value for item in shell.get_completions(list(args), incomplete)]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(run: Run, shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_VDISKFS_COMPLETE" in result.stdout


def test_bash_can_read_its_script(run: Run) -> None:
    script = run("completion", "bash").stdout
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)


def test_another_shell_is_wrong_use(run: Run) -> None:
    assert run("completion", "tcsh").exit_code == 2


def test_commands_and_options_are_completed() -> None:
    assert completed(incomplete="vau") == ["vault"]
    assert completed("point", incomplete="re") == ["release", "restore"]
    assert "--drain" in completed("umount", incomplete="--")


def test_disks_are_completed(daemon: Any) -> None:
    rows = [{"name": "web01"}, {"name": "db01"}, {"name": "we\x1b[1m"}, {}, 3]
    daemon.answer("GET", "/disks", {"disks": rows})
    assert completed("disk", "show") == ["web01", "db01"]
    assert completed("disk", "show", incomplete="w") == ["web01"]
    assert completed("-m", daemon.entry.mountpoint, "point", "list", incomplete="d") == ["db01"]


def test_points_are_completed(daemon: Any) -> None:
    daemon.answer("GET", "/disks", {"disks": [{"name": "web01"}]})
    names = [f"web01@{point}" for point in LATEST]
    assert completed("point", "show", incomplete="we") == names
    assert completed("point", "show", incomplete="web01@latest-p") == ["web01@latest-proven"]


@pytest.mark.parametrize("answer", [b"{", [], {"disks": None}, "close"])
def test_no_answer_is_no_names(daemon: Any, answer: object) -> None:
    daemon.answer("GET", "/disks", answer)
    assert completed("disk", "show") == []


def test_without_a_mount_there_are_no_names() -> None:
    assert completed("disk", "show") == []


def test_a_daemon_that_hangs_is_given_up(daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "ANSWER_S", 0.05)
    daemon.answer("GET", "/disks", "hang")
    assert completed("disk", "show") == []
    assert daemon.asked


def test_the_script_and_the_program_fit() -> None:
    environ = {
        **os.environ,
        "_VDISKFS_COMPLETE": "bash_complete",
        "COMP_WORDS": "vdiskfs po",
        "COMP_CWORD": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    result = subprocess.run(
        [sys.executable, "-m", "vdiskfs_tools"],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "plain,point\nplain,policy\n"
