"""The loop device tools make, check and mount file systems and leave nothing behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e.loopdev import (
    KINDS,
    ToolError,
    attached,
    check_fs,
    check_point,
    file_system,
    make_image,
)

pytestmark = [pytest.mark.e2e, pytest.mark.root]
SIZE = 384 << 20  # xfs takes no less than 300 MiB


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_system_copied_while_mounted_is_checked_after_log_replay(
    tmp_path: Path, kind: str
) -> None:
    """What was synced before a copy is in it, and the copy passes the check."""
    image = make_image(tmp_path / "disk.img", SIZE)
    with file_system(kind, image, tmp_path / "root") as root:
        (root / "etc").mkdir()
        (root / "etc/hello").write_text("hello")
    copy = tmp_path / "point.img"
    shutil.copy(image, copy)
    assert "etc/hello" in check_point(kind, copy, tmp_path / "check")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_system_does_not_pass(tmp_path: Path, kind: str) -> None:
    """The check fails on a file system whose inner blocks were overwritten."""
    image = make_image(tmp_path / "disk.img", SIZE)
    with file_system(kind, image, tmp_path / "root") as root:
        for number in range(50):
            (root / f"file{number}").write_bytes(bytes(5000))
    with image.open("r+b") as file:
        for offset in range(8 << 10, SIZE, 1 << 20):
            file.seek(offset)
            file.write(b"\xa5" * (256 << 10))
    with pytest.raises(ToolError):
        check_fs(kind, image)


def test_a_read_only_device_refuses_writes(tmp_path: Path) -> None:
    """A loop device attached read-only cannot be written."""
    image = make_image(tmp_path / "disk.img", 1 << 20)
    with (
        attached(image, read_only=True) as device,
        pytest.raises(PermissionError),
        device.open("r+b", buffering=0) as file,
    ):
        file.write(bytes(512))
