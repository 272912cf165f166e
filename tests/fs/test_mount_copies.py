"""A writable copy through a real mount: what waits for the vault, and what does not."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fs import copymount
from tests.fs.copymount import PAGES, base_page
from tests.fs.posix import KEEP_SIZE, PUNCH, fallocate
from vdiskfs import native
from vdiskfs.native import Core, Image, ImageFlags
from vdiskfs.units import PAGE_SIZE

pytestmark = [pytest.mark.e2e, pytest.mark.root]


class CopyMount:
    """The program, told what to do."""

    def __init__(self, directory: Path) -> None:
        self.source, self.path = directory / "source", directory / "mnt"
        self.presence = directory / "presence"
        for made in (self.source, self.path, self.presence):
            made.mkdir()
        self.file = self.source / "copy.img"
        self.file.touch()
        os.truncate(self.file, PAGES * PAGE_SIZE)
        native.create_presence(self.presence, PAGES * PAGE_SIZE)
        root = Path(__file__).parents[2]
        program = [sys.executable, copymount.__file__]
        self.process = subprocess.Popen(
            [*program, str(self.source), str(self.path), str(self.presence)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, "PYTHONPATH": str(root)}, cwd="/",
        )  # fmt: skip
        assert self.line() == "ready"
        self.fd = os.open(self.path / "disks" / "copy.img", os.O_RDWR)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def wanted(self, page: int, count: int = 1) -> None:
        assert self.line() == f"want {page * PAGE_SIZE} {count * PAGE_SIZE}"

    def switch(self) -> None:
        """The vault comes back, or goes away."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")

    def close(self) -> None:
        """Kill it: nothing in it is closed in order."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        if self.fd >= 0:
            subprocess.run(["umount", "-l", str(self.path)], check=True)
            with contextlib.suppress(OSError):  # nobody answers the flush
                os.close(self.fd)
            self.fd = -1


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[CopyMount]:
    made = CopyMount(tmp_path)
    try:
        yield made
    finally:
        made.close()


def read_page(fd: int, page: int) -> bytes:
    return os.pread(fd, PAGE_SIZE, page * PAGE_SIZE)


def test_a_machine_writes_on_while_the_vault_is_away_and_what_waits_is_done_once_it_is_back(
    mount: CopyMount,
) -> None:
    fd = mount.fd
    assert os.pwrite(fd, b"w" * 3 * PAGE_SIZE, 5 * PAGE_SIZE) == 3 * PAGE_SIZE
    assert read_page(fd, 6) == b"w" * PAGE_SIZE
    done: list[int] = []
    part = threading.Thread(
        target=lambda: done.append(os.pwrite(fd, b"p" * 2 * PAGE_SIZE, 9 * PAGE_SIZE + 10))
    )
    part.start()
    mount.wanted(9)
    mount.wanted(11)
    # The same file, meanwhile; also the page in the middle of what waits. (Not fsync: the
    # kernel takes the file's lock for it, which a direct write holds.)
    assert os.pwrite(fd, b"m" * PAGE_SIZE, 10 * PAGE_SIZE) == PAGE_SIZE
    assert read_page(fd, 10) == b"m" * PAGE_SIZE
    assert not done
    mount.switch()
    part.join(timeout=30)
    assert done == [2 * PAGE_SIZE]
    assert read_page(fd, 9) == base_page(9)[:10] + b"p" * (PAGE_SIZE - 10)
    assert read_page(fd, 10) == b"p" * PAGE_SIZE
    assert read_page(fd, 11) == b"p" * 10 + base_page(11)[10:]
    fallocate(fd, PUNCH | KEEP_SIZE, 17 * PAGE_SIZE + 5, 2 * PAGE_SIZE)
    mount.wanted(17)
    mount.wanted(19)
    assert read_page(fd, 17) == base_page(17)[:5] + bytes(PAGE_SIZE - 5)
    assert read_page(fd, 18) == bytes(PAGE_SIZE)
    assert os.lseek(fd, 16 * PAGE_SIZE, os.SEEK_DATA) == 17 * PAGE_SIZE


@pytest.mark.parametrize("host_lived", [True, False])
def test_after_its_daemon_was_killed_a_copy_holds_what_was_acknowledged(
    mount: CopyMount, host_lived: bool
) -> None:
    fd = mount.fd
    os.pwrite(fd, b"s" * PAGE_SIZE, 5 * PAGE_SIZE)
    mount.switch()
    os.pwrite(fd, b"part", 9 * PAGE_SIZE)
    os.fsync(fd)
    os.pwrite(fd, b"a" * PAGE_SIZE, 21 * PAGE_SIZE)
    mount.close()
    with Core() as core:
        left = os.open(mount.file, os.O_RDWR)
        with Image(core, left, ImageFlags.LAZY, 1) as image:
            os.close(left)
            native.open_presence(image, mount.presence, host_lived=host_lived)
            assert image.read(5 * PAGE_SIZE, 1) == b"s"
            assert image.read(9 * PAGE_SIZE, 5) == b"part" + base_page(9)[:1]
            assert image.read(13 * PAGE_SIZE, 1) is None
            assert image.read(21 * PAGE_SIZE, 1) == (b"a" if host_lived else None)
