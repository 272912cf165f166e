"""The guards of conftest see what they are there to see."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.loopdev import attached, make_image
from tests.leaks import holdings


def test_an_open_file_a_thread_and_a_temporary_file_are_seen(tmp_path: Path) -> None:
    """What is opened, started or made after the first look is named by the second."""
    before = holdings(tmp_path)
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left-behind")
    thread.start()
    with (tmp_path / "open").open("w"), tempfile.NamedTemporaryFile() as temporary:
        left = holdings(tmp_path).beyond(before)
        end.set()
        thread.join()
    assert any("left-behind" in line for line in left)
    assert any(str(tmp_path / "open") in line for line in left)
    assert f"temporary: {temporary.name}" in left
    assert holdings(tmp_path).beyond(before) == []


def test_a_process_is_seen_however_far_it_got_away(tmp_path: Path) -> None:
    """A process in a session of its own, not a child any more, still has our mark."""
    before = holdings(tmp_path)
    script = "sleep 60 >/dev/null 2>&1 & echo $!"
    done = subprocess.run(
        ["setsid", "sh", "-c", script], capture_output=True, text=True, check=True
    )
    pid = int(done.stdout)
    left = holdings(tmp_path).beyond(before)
    os.kill(pid, 9)
    assert [line for line in left if line.startswith(f"processes: {pid}: ")]


@pytest.mark.root
@pytest.mark.e2e
def test_a_loop_device_is_seen(tmp_path: Path) -> None:
    """A loop device on a file of the test's is named while it is attached."""
    before = holdings(tmp_path)
    image = make_image(tmp_path / "disk.img", 1 << 20)
    with attached(image) as device:
        left = holdings(tmp_path).beyond(before)
    assert left == [f"loops: {device.name} on {image}"]


def test_an_expected_warning_is_no_failure(expect_log: Callable[[str], None]) -> None:
    """A test may say what is going to be logged."""
    expect_log(r"WARNING vdiskfs\.test: disk web01 is late")
    logging.getLogger("vdiskfs.test").warning("disk %s is late", "web01")


_INNER = """
import logging, os, threading
def test_logs(): logging.getLogger("vdiskfs.x").error("unexpected")
def test_promises(expect_log): expect_log("never logged")
def test_opens(tmp_path): globals()["kept"] = open(tmp_path / "x", "w")
def test_good(): pass
def test_skipped():
    import pytest
    pytest.skip("no such thing here")
"""


@pytest.mark.parametrize("ci", ["true", ""])
def test_a_test_that_leaves_something_or_is_skipped_in_ci_fails_the_run(
    tmp_path: Path, ci: str
) -> None:
    """Each guard fails its test; a skip is printed loudly and fails the run with CI=true."""
    top = Path(__file__).resolve().parents[1]
    inner = tmp_path / "tests" / "test_inner.py"
    inner.parent.mkdir()
    inner.write_text(_INNER)
    for name in ("conftest.py", "leaks.py", "clock.py", "vaults.py"):
        (inner.parent / name).write_bytes((top / "tests" / name).read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((top / "pyproject.toml").read_bytes())
    environ = {**os.environ, "CI": ci, "PYTEST_ADDOPTS": ""}

    def run(*names: str) -> subprocess.CompletedProcess[str]:
        words = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--basetemp",
            str(tmp_path / "base"),
            *(f"{inner}::{n}" for n in names),
        ]
        return subprocess.run(
            words, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )

    failing = run("test_logs", "test_promises", "test_opens", "test_good")
    assert "4 passed, 3 errors" in failing.stdout
    for line in ("logged: ERROR vdiskfs.x: unexpected", "not logged: never logged", "left behind:"):
        assert line in failing.stdout
    skipping = run("test_good", "test_skipped")
    assert skipping.returncode == (1 if ci else 0), skipping.stdout
    assert "NOT RUN" in skipping.stdout
    assert skipping.stdout.rstrip().split("\n")[-1].startswith("1 passed, 1 skipped")
