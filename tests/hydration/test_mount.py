"""A copy that is completed behind a machine that reads and writes, through a real mount."""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.delta.model import PAGE, DiskModel
from tests.hydration import hydratemount
from tests.vaults import given
from vdiskfs.catalog import Vault
from vdiskfs.failover.copy import make_files
from vdiskfs.failover.record import Member
from vdiskfs.store import open_store

pytestmark = [pytest.mark.e2e, pytest.mark.root]

PAGES = 8192
LIMIT = 256 << 10  # two minutes for all of it


class Mounted:
    """The program, and what the copy is to hold."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source, self.path = directory / "source", directory / "mnt"
        self.source.mkdir()
        self.path.mkdir()
        (directory / "spool").mkdir()
        self.disk, self.epoch, data = trio.run(self._make)
        self.expected = bytearray(data)
        member = Member("web01", self.disk, "web01.img", 1, self.epoch, 0, len(data))
        make_files(directory / "copy", member)
        os.link(directory / "copy" / "image", self.source / "copy.img")
        self.process: subprocess.Popen[str] | None = None
        self.fd = -1

    async def _make(self) -> tuple[str, int, bytes]:
        """Make a point of 32 MiB: random bytes with holes, over two deltas."""
        rng = random.Random(1)
        store = open_store(f"file://{self.directory / 'vault'}")
        vault = await Vault.init(store, given())
        disk = await vault.create_disk("web01", file="web01.img", size=0, site="here")
        model = DiskModel(self.directory / "spool", vault_id=vault.vault_id, disk_id=disk.id)
        model.write(0, rng.randbytes(PAGES * PAGE))
        for _ in range(60):
            model.discard(rng.randrange(PAGES) * PAGE, rng.randrange(40) * PAGE)
        await vault.log(disk).publish(model.seal())
        for _ in range(200):
            model.write(rng.randrange(PAGES) * PAGE, rng.randbytes(PAGE))
        await vault.log(disk).publish(model.seal())
        await store.aclose()
        return disk.id, model.epoch, bytes(model.data)

    def start(self, limit: int) -> None:
        root = Path(__file__).parents[2]
        arguments = [
            self.source, self.path, self.directory / "copy", self.directory / "vault", self.disk,
            self.epoch, PAGES * PAGE, limit,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, hydratemount.__file__, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, "PYTHONPATH": str(root)}, cwd="/",
        )  # fmt: skip
        self.says("ready")
        self.fd = os.open(self.path / "disks" / "copy.img", os.O_RDWR)

    def says(self, word: str) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == word

    def said_nothing(self) -> bool:
        assert self.process is not None
        assert self.process.stdout is not None
        return not select.select([self.process.stdout], [], [], 0)[0]

    def switch(self, word: str) -> None:
        """Cut the vault off, or bring it back."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.says(word)

    def kill(self) -> None:
        """Kill it: nothing in it is closed in order."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
        if self.fd >= 0:
            subprocess.run(["umount", "-l", str(self.path)], check=True)
            with contextlib.suppress(OSError):  # nobody answers the flush
                os.close(self.fd)
            self.fd = -1

    def read(self, page: int, count: int) -> bytes:
        return os.pread(self.fd, count * PAGE, page * PAGE)

    def work(self, seed: int, rounds: int) -> None:
        """Be a machine: write, in whole pages and in parts, and check what is read."""
        rng = random.Random(seed)
        for _ in range(rounds):
            page, count = rng.randrange(PAGES - 8), rng.randrange(1, 8)
            if rng.random() < 0.5:
                start = page * PAGE + rng.choice([0, 0, 512])
                data = rng.randbytes(rng.choice([512, PAGE, 3 * PAGE]))
                assert os.pwrite(self.fd, data, start) == len(data)
                self.expected[start : start + len(data)] = data
            else:
                wanted = self.expected[page * PAGE : (page + count) * PAGE]
                assert self.read(page, count) == wanted


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounted]:
    one = Mounted(tmp_path)
    yield one
    one.kill()


def test_a_machine_works_on_while_its_copy_is_completed(mounted: Mounted) -> None:
    """Also while the vault is cut off: what is here, and what is written, goes on."""
    mounted.start(LIMIT)
    mounted.work(1, 150)
    mounted.switch("cut")
    # What a cut stops waits without an error; what is here, and whole pages, go on.
    done: list[bytes] = []
    absent = threading.Thread(target=lambda: done.append(mounted.read(2048, 2048)))
    absent.start()
    for page in (5, 4500, 8000):
        data = bytes([page % 251]) * PAGE
        os.pwrite(mounted.fd, data, page * PAGE)
        mounted.expected[page * PAGE : (page + 1) * PAGE] = data
        assert mounted.read(page, 1) == data
    assert not done
    assert mounted.said_nothing()
    mounted.switch("back")
    absent.join()
    assert done == [mounted.expected[2048 * PAGE : 4096 * PAGE]]
    mounted.work(2, 50)


def test_a_daemon_that_is_killed_goes_on_to_the_end(mounted: Mounted) -> None:
    """Twice in the middle; what was written and brought is there, and the rest comes."""
    for seed in (1, 2):
        mounted.start(LIMIT)
        mounted.work(seed, 100)
        assert mounted.said_nothing()
        mounted.kill()
    mounted.start(0)
    mounted.work(3, 200)
    mounted.says("complete")
    mounted.work(4, 50)
    mounted.kill()
    assert (mounted.directory / "copy" / "image").read_bytes() == mounted.expected
    shutil.rmtree(mounted.directory / "vault")
    mounted.start(0)
    mounted.says("complete")
    assert mounted.read(0, PAGES) == mounted.expected
