"""vdiskfs point restore, from a real vault."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from vdiskfs.registry import MountEntry, write_entry

Run = Callable[..., Result]


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_the_file_is_the_disk_at_that_point(
    history: Any, run: Run, tmp_path: Path, epoch: int
) -> None:
    out = tmp_path / "out" / "web01.img"
    out.parent.mkdir()
    result = run("point", "restore", f"web01@{epoch}", str(out), "--vault", history.url)
    assert result.exit_code == 0, result.stderr
    assert out.read_bytes() == history.states[epoch]
    assert out.stat().st_blocks * 512 < 100_000
    assert leftovers(out.parent) == ["web01.img"]
    assert f"web01@#{epoch}" in result.stderr
    assert result.stdout == ""


def test_the_vault_is_the_mounts(history: Any, entry: MountEntry, run: Run, tmp_path: Path) -> None:
    write_entry(replace(entry, vault=history.url))
    assert run("point", "restore", "web01@latest", str(tmp_path / "out")).exit_code == 0
    assert (tmp_path / "out").read_bytes() == history.states[3]


def test_the_document_says_what_was_restored(
    history: Any, run_json: Callable[..., Any], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    document = run_json("point", "restore", "web01@#2", out, "--vault", history.url)
    assert document["disk"] == "web01"
    assert document["epoch"] == 2
    assert document["file"] == out
    assert document["size"] == len(history.states[2])
    assert 0 < document["data_bytes"] < 20_000


def test_a_dry_run_writes_nothing(
    history: Any, run_json: Callable[..., Any], tmp_path: Path
) -> None:
    before = leftovers(tmp_path)
    line = ("point", "restore", "web01@latest", str(tmp_path / "out"), "--vault", history.url)
    assert run_json(*line, "--dry-run")["dry_run"] is True
    assert leftovers(tmp_path) == before


def test_a_file_that_is_there_is_kept(history: Any, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    line = ("point", "restore", "web01@1", str(out), "--vault", history.url)
    result = run(*line)
    assert result.exit_code == 4
    assert "--force" in result.stderr
    assert out.read_text() == "precious"
    assert run(*line, "--force").exit_code == 0
    assert out.read_bytes() == history.states[1]


def test_a_link_that_leads_nowhere_is_there_too(history: Any, run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("nowhere")
    line = ("point", "restore", "web01@1", str(tmp_path / "out"), "--vault", history.url)
    assert run(*line).exit_code == 4


@pytest.mark.parametrize("place", ["source", "mountpoint"])
def test_a_live_image_is_never_replaced(
    history: Any, entry: MountEntry, run: Run, place: str
) -> None:
    image = Path(getattr(entry, place)) / "web01.img"
    image.write_text("live")
    result = run("point", "restore", "web01@1", str(image), "--force", "--vault", history.url)
    assert result.exit_code == 4
    assert image.read_text() == "live"


@pytest.mark.parametrize(("target", "code"), [("", 2), (".", 2), ("absent/out", 1), ("a\0b", 2)])
def test_a_target_that_cannot_be_is_refused(
    history: Any, run: Run, in_tmp_path: None, target: str, code: int
) -> None:
    result = run("point", "restore", "web01@1", target, "--vault", history.url)
    assert result.exit_code == code
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "code"),
    [("absent@latest", 3), ("web01@99", 3), ("web01@-10y", 3), ("web01@2001-01-01T00:00:00Z", 3),
     ("web01@latest-application-consistent", 3)],
)  # fmt: skip
def test_a_point_that_is_not_there_is_exit_3(
    history: Any, run: Run, tmp_path: Path, name: str, code: int
) -> None:
    result = run("point", "restore", name, str(tmp_path / "out"), "--vault", history.url)
    assert result.exit_code == code, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_vault_leaves_no_file(history: Any, run: Run, tmp_path: Path) -> None:
    (slot,) = [path for path in history.directory.rglob("*0001") if path.parent.name[0] == "g"]
    data = bytearray(slot.read_bytes())
    data[len(data) // 2] ^= 1
    data[700] ^= 1
    slot.chmod(0o600)
    slot.write_bytes(data)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "web01.img"
    result = run("point", "restore", "web01@latest", str(out), "--vault", history.url)
    assert result.exit_code == 6, result.stderr
    assert leftovers(out.parent) == []


def program(*args: str) -> tuple[list[str], dict[str, str]]:
    paths = os.pathsep.join(path for path in sys.path if path)
    return [sys.executable, "-m", "vdiskfs_tools", *args], {**os.environ, "PYTHONPATH": paths}


def test_standard_output_is_the_disk_and_nothing_else(history: Any, run: Run) -> None:
    command, environ = program("point", "restore", "web01@2", "-", "--vault", history.url)
    result = subprocess.run(command, env=environ, capture_output=True, check=True)
    assert result.stdout == history.states[2]
    assert b"restored to -" in result.stderr
    line = ("point", "restore", "web01@2", "-", "--vault", history.url)
    assert run(*line, "--json").exit_code == 2
    assert run(*line, "--format", "qcow2").exit_code == 2


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_file(history: Any, tmp_path: Path, end: signal.Signals) -> None:
    out = tmp_path / "out" / "web01.img"
    out.parent.mkdir()
    # The restore is stopped in its middle, where its partial file is there.
    starter = (
        "import os, sys, signal, trio\n"
        "from vdiskfs.point import reader\n"
        "async def stuck(*_):\n"
        f"    print(os.listdir({str(out.parent)!r}), flush=True)\n"
        "    await trio.sleep_forever()\n"
        "reader.PointReader.read_mapped = stuck\n"
        "from vdiskfs_tools.main import main\n"
        f"sys.argv = ['vdiskfs', 'point', 'restore', 'web01@2', {str(out)!r},"
        f" '--vault', {history.url!r}]\n"
        "main()"
    )
    _, environ = program()
    with subprocess.Popen(
        [sys.executable, "-c", starter],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert ".web01.img." in process.stdout.readline()
        process.send_signal(end)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip() == "vdiskfs: interrupted"
    assert leftovers(out.parent) == []


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")
def test_qcow2_is_made_by_qemu_img(history: Any, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "web01.qcow2"
    line = ("point", "restore", "web01@3", str(out), "--vault", history.url)
    assert run(*line, "--format", "qcow2").exit_code == 0
    shown = subprocess.run(
        ["qemu-img", "info", "--output=json", str(out)], capture_output=True, check=True
    )
    assert json.loads(shown.stdout)["format"] == "qcow2"
