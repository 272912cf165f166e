"""QEMU's lock bytes, against QEMU itself."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdiskfs.errors import BusyError, LocalError
from vdiskfs.state import ImageLock


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(1 << 20))
    return path


def locked(path: Path) -> ImageLock:
    fd = os.open(path, os.O_PATH)
    try:
        return ImageLock(fd, path.name)
    finally:
        os.close(fd)


def qemu_io(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["qemu-io", "-f", "raw", *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def machine(image: Path) -> Iterator[subprocess.Popen[str]]:
    """A QEMU that has the image open for writing."""
    process = subprocess.Popen(
        ["qemu-io", "-f", "raw", str(image)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("length\n")
    process.stdin.flush()
    while "1 MiB" not in process.stdout.readline():
        assert process.poll() is None
    yield process
    if process.poll() is None:
        process.communicate("quit\n", timeout=30)


def test_qemu_refuses_a_locked_image_and_takes_it_afterwards(image: Path) -> None:
    lock = locked(image)
    done = qemu_io(image, "-c", "write 0 4k")
    assert done.returncode != 0
    assert "lock" in done.stderr
    convert = ["qemu-img", "resize", "-f", "raw", str(image), "2M"]
    assert "lock" in subprocess.run(
        convert, capture_output=True, text=True, timeout=30, check=False
    ).stderr  # fmt: skip
    assert image.read_bytes() == bytes(1 << 20)
    lock.close()
    lock.close()
    assert qemu_io(image, "-c", "write 0 4k").returncode == 0


def test_a_locked_image_can_be_looked_at_with_force_share(image: Path) -> None:
    lock = locked(image)
    info = ["qemu-img", "info", "--force-share", str(image)]
    subprocess.run(info, capture_output=True, check=True, timeout=30)
    lock.close()


def test_an_image_that_qemu_uses_is_busy_and_named(
    image: Path, machine: subprocess.Popen[str]
) -> None:
    with pytest.raises(BusyError, match=r"a\.img: QEMU uses the file directly"):
        locked(image)
    machine.communicate("quit\n", timeout=30)
    locked(image).close()


def test_a_lock_is_not_shared_and_ends_with_its_holder(image: Path) -> None:
    lock = locked(image)
    with pytest.raises(BusyError):
        locked(image)
    # Closing another descriptor of the file does not end it, as it would for POSIX locks.
    os.close(os.open(image, os.O_RDONLY))
    assert qemu_io(image, "-c", "write 0 4k").returncode != 0
    lock.close()
    locked(image).close()


def test_what_cannot_be_opened_is_a_local_error(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    os.close(fd)
    with pytest.raises(LocalError, match="gone"):
        ImageLock(fd, "gone")
