"""The guest and the export to compare with do what the tests count on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.guest import Disk, Guest, GuestError
from tests.e2e.loopdev import make_image
from tests.e2e.qsd import exported


@pytest.mark.guest
def test_a_guest_writes_to_its_disks_and_reports(tmp_path: Path) -> None:
    """What the guest writes and syncs is in the files, raw and qcow2; lines can be exchanged."""
    raw = make_image(tmp_path / "raw.img", 8 << 20)
    qcow2 = tmp_path / "other.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, "8M"], check=True)
    script = """
    read name
    echo "hello $name" | dd of=/dev/vda bs=512 seek=3 conv=sync,fsync 2>/dev/null
    echo "hello $name" | dd of=/dev/vdb bs=512 conv=sync,fsync 2>/dev/null
    ls /sys/class/net
    """
    disks = [Disk(raw), Disk(qcow2, format="qcow2", direct=False)]
    with Guest(disks, script, tmp_path) as guest:
        guest.wait_line("GUEST READY")
        guest.send("tester")
        console = guest.wait_exit()
    assert "lo\nGUEST EXIT" in console  # no other network device
    assert raw.read_bytes()[1536:1548] == b"hello tester"
    subprocess.run(["qemu-img", "check", "-q", qcow2], check=True)


@pytest.mark.guest
def test_a_failing_script_is_a_failing_guest(tmp_path: Path) -> None:
    """The script's exit code is what the test sees."""
    with Guest([], "exit 3", tmp_path) as guest, pytest.raises(GuestError, match="ended with 3"):
        guest.wait_exit()


@pytest.mark.e2e
def test_the_export_gives_the_image_s_bytes_and_goes_away(tmp_path: Path) -> None:
    """qemu-storage-daemon's export reads and writes the image and leaves nothing behind."""
    image = make_image(tmp_path / "disk.img", 1 << 20)
    with exported(image, tmp_path / "export") as file:
        fd = os.open(file, os.O_RDWR)
        os.pwrite(fd, b"x" * 4096, 8192)
        os.fsync(fd)
        os.close(fd)
        assert file.stat().st_size == 1 << 20
    assert image.read_bytes()[8192:12288] == b"x" * 4096
