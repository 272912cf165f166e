"""Real mounts for the tests of names."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fs.harness import Mount

NOBODY = 65534
UMOUNT = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]


@pytest.fixture(scope="module")
def open_tmp() -> Iterator[Path]:
    """A directory that every user can get to, as pytest's are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def fuse_for_all() -> Iterator[None]:
    """/dev/fuse as every distribution has it; containers often do not."""
    device = Path("/dev/fuse")
    mode = stat.S_IMODE(device.stat().st_mode)
    device.chmod(0o666)
    yield
    device.chmod(mode)


@pytest.fixture(scope="module")
def mount(open_tmp: Path) -> Iterator[Mount]:
    directory = open_tmp / "shared"
    directory.mkdir()
    (directory / "source").mkdir()
    (directory / "source" / "web01.img").write_bytes(b"live")
    options = ["--points", "10000", *(["--allow-other"] if os.geteuid() == 0 else [])]
    mounted = Mount(directory, options=options)
    try:
        yield mounted.wait_ready()
        said = mounted.close(by=UMOUNT)
        assert "Traceback" not in said
        assert "came to the names" not in said
    finally:
        mounted.abort()


@pytest.fixture
def here(mount: Mount, request: pytest.FixtureRequest) -> Path:
    """A directory of this test's own in `disks/`."""
    directory = mount.disks / str(request.node.name)
    directory.mkdir()
    return directory


@pytest.fixture
def source(mount: Mount, here: Path) -> Path:
    """The same directory in the source."""
    return mount.source / here.name
