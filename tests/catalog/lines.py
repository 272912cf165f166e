"""A disk with several lines: generations and branches, each with a model of its bytes."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.catalog.harness import Bench, bench
from tests.delta.model import PAGE, DiskModel
from tests.vaults import newcomer
from vdiskfs.catalog import DiskLog, Point

Place = tuple[int, int]
"""A generation and an epoch."""


@dataclass
class Lines:
    """The lines of one disk; ``states`` and ``digests`` are those of all points."""

    bench: Bench
    directory: Path
    models: dict[int, DiskModel] = field(default_factory=dict)
    states: dict[Place, bytes] = field(default_factory=dict)
    digests: dict[Place, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.models[1] = self.bench.model

    async def publish(self, generation: int) -> None:
        """Seal a line and store it."""
        model = self.models[generation]
        spooled = model.seal()
        await self.log(generation).publish(spooled)
        place = (generation, model.epoch)
        self.states[place], self.digests[place] = bytes(model.data), model.digest

    async def join(self, generation: int) -> None:
        """Join what can be joined of a line."""
        await self.log(generation).publish_joins()

    def fork(self, place: Place) -> int:
        """Start a line from a point; return its generation."""
        record = self.bench.record
        number = record.next_generation
        model = DiskModel(
            self._spool(number), vault_id=self.bench.vault.vault_id, disk_id=record.id,
            generation=number,
        )  # fmt: skip
        model.data = bytearray(self.states[place])
        model.epoch, model.digest = place[1], self.digests[place]
        model.cut = model.from_size = len(model.data)
        self.models[number] = model
        self.bench.record = replace(record, parents={**record.parents, number: place})
        return number

    def _spool(self, number: int) -> Path:
        path = self.directory / f"g{number}"
        path.mkdir()
        return path

    def log(self, generation: int) -> DiskLog:
        """Return a log that knows nothing yet."""
        vault = newcomer(self.bench.vault, self.bench.store)
        return vault.log(self.bench.record, generation)

    async def point(self, place: Place) -> tuple[DiskLog, Point]:
        """Return a point, and the log of its generation."""
        log = self.log(place[0])
        return log, await log.find(place[1])


@asynccontextmanager
async def lines(directory: Path) -> AsyncIterator[Lines]:
    """Give a disk with one line and no points."""
    async with bench() as test:
        yield Lines(test, directory)


def differing(one: bytes, two: bytes) -> list[int]:
    """Return the pages in which two disks differ; what is beyond the end is zeros."""
    size = -(-max(len(one), len(two)) // PAGE) * PAGE
    one, two = one.ljust(size, b"\0"), two.ljust(size, b"\0")
    return [at // PAGE for at in range(0, size, PAGE) if one[at : at + PAGE] != two[at : at + PAGE]]


def act(model: DiskModel, rng: random.Random, pages: int) -> None:
    """Change a disk in one of the ways there are."""
    offset = rng.randrange(pages * PAGE)
    kind = rng.choice(["write", "write", "same", "pages", "discard", "truncate", "shrink"])
    if kind == "write":
        model.write(offset, rng.randbytes(rng.choice([1, 700, PAGE, 5 * PAGE])))
    elif kind == "same":
        model.write(offset // PAGE * PAGE, b"same" * (PAGE // 4))
    elif kind == "pages":
        for _ in range(5):
            model.write(rng.randrange(pages) * PAGE, rng.randbytes(PAGE))
    elif kind == "discard":
        model.discard(offset // PAGE * PAGE, rng.choice([PAGE, 20 * PAGE, pages * PAGE]))
    elif kind == "truncate":
        model.truncate(offset)
    else:
        before = len(model.data)
        model.truncate(offset // 2)
        model.truncate(before)
