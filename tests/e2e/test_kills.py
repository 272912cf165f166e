"""Programs notice nothing but a pause when the daemon is killed, and nothing is lost."""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.fsx import Fsx
from tests.e2e.kills import Counts, Findings, ViolationError, kill_guest_round, kill_round
from tests.e2e.mounted import MountedSite
from tests.e2e.names import Names

pytestmark = [pytest.mark.e2e, pytest.mark.root]


def show(tell: Callable[[str], None], scenario: str, seed: int, counts: Counts) -> None:
    """Tell what was counted, and how to do it again."""
    pauses = counts["pauses_s"]
    assert isinstance(pauses, list)
    words = ", ".join(f"{key} {value}" for key, value in counts.items() if key != "pauses_s")
    middle, worst = statistics.median(pauses), max(pauses)
    tell(f"./run soak --scenario {scenario} --seed {seed}: {words}")
    tell(f"  pauses: median {middle:.2f} s, worst {worst:.2f} s")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_daemon_costs_programs_a_pause_and_nothing_else(
    tmp_path: Path, seed: int, tell: Callable[[str], None]
) -> None:
    """Points are cuts, live images and names are what the programs made them."""
    counts = kill_round(tmp_path, seed, kills=3)
    show(tell, "kill", seed, counts)
    assert counts["kills"] in range(3, 7)  # each may be followed by one of the successor
    assert counts["violations"] == counts["io_errors"] == 0


@pytest.mark.slow
@pytest.mark.guest
@pytest.mark.timeout(500)
def test_a_guest_does_not_notice_that_the_daemon_was_killed(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    show(tell, "kill-guest", 3, kill_guest_round(tmp_path, 3))


# ---- the programs notice what is wrong ---------------------------------------------------


def test_fsx_finds_a_byte_that_somebody_changed(tmp_path: Path) -> None:
    """Alone it finds its model; when somebody else writes to the file it says what differs."""
    image, model = tmp_path / "disk.img", tmp_path / "model"
    image.write_bytes(os.urandom(1 << 20))
    with Fsx(image, model, seed=1) as fsx:
        threading.Event().wait(0.5)  # it works meanwhile; how much does not matter
        fsx.stop()
        assert (fsx.status, fsx.message) == (0, "")
    assert fsx.operations > 0
    assert image.read_bytes() == model.read_bytes()
    with Fsx(image, model, seed=2) as fsx:
        with image.open("r+b", buffering=0) as file:
            while fsx.is_running():
                os.pwrite(file.fileno(), os.urandom(4096), 8192)
        fsx.stop()
    assert fsx.status == 1
    assert "from byte" in fsx.message


def test_names_finds_a_file_that_somebody_removed_or_made(tmp_path: Path) -> None:
    for what in ("removed", "made"):
        directory = tmp_path / what
        directory.mkdir()
        with Names(directory, 1) as names:
            while not names.wrong:
                (directory / "n-foreign.txt").touch() if what == "made" else None
                for path in directory.glob("n-*.txt") if what == "removed" else ():
                    path.unlink(missing_ok=True)
        assert names.wrong


def test_all_that_is_wrong_is_told_with_the_counts() -> None:
    findings = Findings(kills=2, points=7)
    findings.judge("right", lambda: None)

    def fail() -> None:
        raise AssertionError("not so")

    findings.judge("web01", fail)
    findings.judge("web02", fail)
    with pytest.raises(ViolationError, match="web01: not so\nweb02: not so") as caught:
        findings.counts()
    assert caught.value.counts["violations"] == 2
    assert caught.value.counts["points"] == 7


def test_an_open_file_without_a_name_is_no_disk_after_a_kill(tmp_path: Path) -> None:
    """It is still there for who has it open, and nothing of it goes to the vault."""
    with MountedSite(tmp_path) as site:
        site.add_image("web01", 1 << 20)
        site.init().mount()
        path = site.mountpoint / "disks" / "note.txt"
        with path.open("w+b", buffering=0) as file:
            file.write(b"secret")
            path.unlink()
            site.kill_daemon()
            site.wait_shipped("web01")
            file.seek(0)
            assert file.read() == b"secret"
            assert [row["name"] for row in site.json("disk", "list")["disks"]] == ["web01"]
        log = (site.state / "daemon.log").read_text()
        assert "note" not in log
