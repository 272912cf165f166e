"""A vault in memory with one disk whose model is known."""

from __future__ import annotations

import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.catalog.memory import MemoryStore
from tests.delta.model import DiskModel
from tests.vaults import given, newcomer
from vdiskfs.catalog import DiskLog, DiskRecord, Vault
from vdiskfs.delta import Spooled
from vdiskfs.point import PointReader


@dataclass
class Bench:
    store: MemoryStore
    vault: Vault
    record: DiskRecord
    model: DiskModel
    log: DiskLog
    scratch: Path

    async def publish(self, **facts: object) -> Spooled:
        spooled = self.model.seal(**facts)  # type: ignore[arg-type]
        await self.log.publish(spooled)
        return spooled

    async def churn(
        self, epochs: int, *, seed: int = 1, joins: bool = True, pages: int = 64
    ) -> None:
        rng = random.Random(seed)
        for _ in range(epochs):
            self.model.churn(rng, pages=pages)
            await self.publish()
            if joins:
                await self.log.publish_joins()

    def fresh_log(self) -> DiskLog:
        """Return a log that knows nothing, with an empty cache of blocks."""
        return newcomer(self.vault).log(self.record)

    def without_joins(self) -> None:
        for name in [name for name in self.store.objects if is_joined(name)]:
            del self.store.objects[name]


def is_joined(name: str) -> bool:
    return name.startswith("disks/") and "." in name and not name.endswith(".json")


def is_slot(name: str) -> bool:
    return name.startswith("disks/") and "." not in name


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    store = MemoryStore()
    vault = await Vault.init(store, given())
    record = await vault.create_disk("web01", file="web01.img", size=0, site="here")
    with tempfile.TemporaryDirectory() as directory:
        model = DiskModel(Path(directory), vault_id=vault.vault_id, disk_id=record.id)
        yield Bench(store, vault, record, model, vault.log(record), Path(directory, "fence"))


async def content(reader: PointReader) -> bytes:
    """Return all bytes of a point."""
    return bytes(await reader.read_pages(0, reader.pages))[: reader.size]


async def content_at(log: DiskLog, epoch: int) -> bytes:
    async with await log.open(epoch) as reader:
        return await content(reader)
