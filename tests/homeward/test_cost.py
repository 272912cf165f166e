"""What a way home costs: as much as has changed elsewhere, not as much as the disk holds."""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trio

from tests.delta.model import PAGE, DiskModel
from tests.point.test_reader import Sparse
from tests.vaults import given, newcomer
from vdiskfs.catalog import DiskLog, DiskRecord, Point, Vault
from vdiskfs.homeward import HomeMover, prepare_home
from vdiskfs.store import Store, open_store

MIB = 1 << 20
SIZE = 8 << 30
DATA = 1 << 30
CHANGED = 100 * MIB


class BigDisk:
    """A sparse disk of 8 GiB in a folder vault, and its image."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rng = random.Random(4)
        self.noise = np.random.default_rng(1).bytes(MIB)
        self.pages: dict[int, bytes] = {}
        self.store: Store
        self.vault: Vault
        self.disk_id = ""

    def write(self, model: DiskModel, pages: list[int]) -> None:
        """Write pages that compress to nothing less."""
        for page in pages:
            at = self.rng.randrange(MIB - PAGE)
            data = self.rng.randbytes(16) + self.noise[at : at + PAGE - 16]
            self.pages[page] = data
        model.dirty.update(pages)

    async def make(self) -> None:
        """Write 1 GiB; then elsewhere, from a fork, 100 MiB over 10 epochs."""
        self.store = open_store(f"file://{self.directory / 'vault'}")
        self.vault = await Vault.init(self.store, given())
        disk = await self.vault.create_disk("web01", file="web01.img", size=SIZE, site="here")
        self.disk_id = disk.id
        home = self._model(1)
        for start in range(0, DATA // PAGE, 16384):
            # In stretches over the whole disk, as a file system would.
            self.write(home, list(range(start * 8, start * 8 + 16384)))
            await self._publish(home)
            if start == 0:
                home.cut = home.from_size = SIZE
        record = await self.vault.update_disk(
            disk.id, lambda found: _with_parent(found, (1, home.epoch))
        )
        self._image()
        away = self._model(2)
        away.epoch, away.digest, away.cut, away.from_size = home.epoch, home.digest, SIZE, SIZE
        used = sorted(self.pages)
        for _ in range(10):
            # Files that are written at once, and pages here and there, some of them once more.
            begin = self.rng.randrange(len(used) - 1536)
            self.write(away, used[begin : begin + 1536])
            self.write(away, sorted(self.rng.sample(used, 1024)))
            await self._publish(away)
            await self.vault.log(record, 2).publish_joins()

    def _model(self, generation: int) -> DiskModel:
        spool = self.directory / f"spool{generation}"
        spool.mkdir()
        model = DiskModel(
            spool, vault_id=self.vault.vault_id, disk_id=self.disk_id, generation=generation
        )
        data = Sparse(SIZE)
        data.pages = self.pages
        model.data = data  # type: ignore[assignment]
        return model

    async def _publish(self, model: DiskModel) -> None:
        spooled = await trio.to_thread.run_sync(model.seal)
        record = await self.vault.disk(self.disk_id)
        await self.vault.log(record, model.generation).publish(spooled)
        for path in (self.directory / f"spool{model.generation}").iterdir():
            path.unlink()

    def _image(self) -> None:
        with (self.directory / "image").open("wb") as file:
            file.truncate(SIZE)
            for page, data in self.pages.items():
                os.pwrite(file.fileno(), data, page * PAGE)

    def check_image(self) -> None:
        """Compare every page that has data, and see that there is no other."""
        with (self.directory / "image").open("rb") as file:
            fd, at, seen = file.fileno(), 0, 0
            while True:
                try:
                    at = os.lseek(fd, at, os.SEEK_DATA)
                except OSError:
                    break
                end = os.lseek(fd, at, os.SEEK_HOLE)
                for page in range(at // PAGE, -(-end // PAGE)):
                    assert os.pread(fd, PAGE, page * PAGE) == self.pages.get(page, bytes(PAGE))
                    seen += page in self.pages
                at = end
            assert seen == len(self.pages)
            assert os.fstat(fd).st_size == SIZE


def _with_parent(record: DiskRecord, place: tuple[int, int]) -> DiskRecord:
    return replace(record, parents={1: None, 2: place}, generation=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_100_mib_of_8_gib_come_home_with_110_mib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that is read from the vault: data, indexes, listings' objects."""
    disk = BigDisk(tmp_path)
    await disk.make()
    await disk.store.aclose()
    before = (await _tip(disk, 1)).epoch
    store = open_store(f"file://{tmp_path / 'vault'}")
    vault = newcomer(disk.vault, store)
    prepare_home(tmp_path / "note", disk.disk_id, (1, before))

    async def make_log(generation: int) -> DiskLog:
        return vault.log(await vault.disk(disk.disk_id), generation)

    mover = HomeMover(tmp_path / "image", tmp_path / "note", make_log, verify=True)
    to = (2, (await (await make_log(2)).find("latest")).epoch)
    began, cpu = time.monotonic(), time.process_time()
    progress = await mover.move(to)
    took, cpu = time.monotonic() - began, time.process_time() - cpu
    received = store.bytes_received
    await store.aclose()
    disk.check_image()
    with capsys.disabled():
        print(
            f"\n8 GiB, {progress.total_bytes / MIB:.1f} MiB of pages differ: "
            f"{received / MIB:.1f} MiB read in {store.requests} requests, "
            f"{progress.fetched_bytes / MIB:.1f} MiB of them data; {took:.1f} s, {cpu:.1f} s CPU"
        )
    assert progress.total_bytes > CHANGED * 0.9
    assert received <= progress.total_bytes * 1.1


async def _tip(disk: BigDisk, generation: int) -> Point:
    store = open_store(f"file://{disk.directory / 'vault'}")
    vault = newcomer(disk.vault, store)
    point = await vault.log(await vault.disk(disk.disk_id), generation).find("latest")
    await store.aclose()
    return point
