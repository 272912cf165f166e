"""launch: what QEMU is not shown, and logs that stay within their bounds."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from vdiskfs.machines import launch
from vdiskfs.machines.launch import Log, check_disk


def qcow2_head(*, backing: int = 0, features: int = 0, version: int = 3) -> bytes:
    head = struct.pack(">4sIQ", b"QFI\xfb", version, backing).ljust(72, b"\0")
    return (head + struct.pack(">Q", features)).ljust(4096, b"\0")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (qcow2_head(backing=104), "overlay over another file"),
        (qcow2_head(backing=104, version=2), "overlay over another file"),
        (qcow2_head(features=4), "data in another file"),
        (b"\0" * 4096, "not a qcow2 file"),
        (b"QFI\xfb", "not a qcow2 file"),
        (b"", "not a qcow2 file"),
    ],
)
def test_a_qcow2_that_names_another_file_is_refused(
    tmp_path: Path, head: bytes, message: str
) -> None:
    """Its bytes come from the vault: they could name any file of this host."""
    path = tmp_path / "d.qcow2"
    path.write_bytes(head)
    with pytest.raises(ValueError, match=f"disk web01: .*{message}"):
        check_disk("web01", str(path), "qcow2")
    check_disk("web01", str(path), "raw")  # as raw it is only bytes


def test_a_plain_qcow2_and_no_other_kind_of_file_is_taken(tmp_path: Path) -> None:
    """What qemu-img makes passes; an overlay, a FIFO and a directory do not."""
    path, over, fifo = tmp_path / "d.qcow2", tmp_path / "o.qcow2", tmp_path / "fifo"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    check_disk("web01", str(path), "qcow2")
    backing = ["-b", str(path), "-F", "qcow2"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(over)], check=True)
    with pytest.raises(ValueError, match="overlay"):
        check_disk("web01", str(over), "qcow2")
    os.mkfifo(fifo)
    for other in (fifo, tmp_path):
        with pytest.raises(ValueError, match="is no file"):
            check_disk("web01", str(other), "raw")


def test_a_log_keeps_the_newest_within_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of the limit each at most, the end of what was written without a hole."""
    monkeypatch.chdir(tmp_path)
    log = Log("serial.log", 1000)
    written = b""
    for number in range(500):
        line = b"line %d\n" % number
        log.write(line)
        written += line
    os.close(log._fd)
    old, new = (tmp_path / "serial.log.1").read_bytes(), (tmp_path / "serial.log").read_bytes()
    assert written.endswith(old + new)
    assert 900 < len(old) <= 1000
    assert 0 < len(new) <= 1000


CONSOLE = """
import os, runpy, sys
launch = runpy.run_path(sys.argv[1])
heard, told = os.pipe()
listener = os.fork() if sys.argv[2] == "heard" else 0
if listener:
    os.close(told)
    sys.exit(os.read(heard, 10) != b"gone" or os.waitpid(listener, 0)[1])
os.close(heard)
lock = os.open("lock", os.O_RDWR | os.O_CREAT)
settings = {"log_limit": 1000, "command": ["touch", "started"], "record": {"name": "a"}}
launch["become_console"](settings, lock, told)
"""


@pytest.mark.parametrize("asker", ["heard", "gone"])
def test_without_whoever_asked_nothing_is_let_go(tmp_path: Path, asker: str) -> None:
    """A launcher that was killed before it heard of the record: QEMU's first step never comes."""
    command = [sys.executable, "-c", CONSOLE, launch.__file__, asker]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == (0 if asker == "heard" else 1), done.stderr
    assert (tmp_path / "started").exists() == (asker == "heard")
    # Either way it was on record before it could have begun.
    record = json.loads((tmp_path / "record.json").read_bytes())
    assert record["name"] == "a"
    assert record["pid"] > 1
    if asker == "heard":
        assert json.loads((tmp_path / "ended.json").read_bytes()) == {"status": 0}
