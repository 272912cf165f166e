"""A writer whose pass stores parts bit by bit, and looks for what nothing names."""

from __future__ import annotations

import random

from tests.catalog.harness import Bench
from tests.catalog.test_upkeep import Tender
from vdiskfs.catalog.abandoned import DOUBT_S
from vdiskfs.catalog.garbage import Collected
from vdiskfs.catalog.records import DiskRecord
from vdiskfs.catalog.remains import OLD_S
from vdiskfs.delta import Spooled
from vdiskfs.delta.names import segment_name
from vdiskfs.delta.segments import new_batch

DAY_S = 86400


class Writer:
    """A pass of a disk's writer: parts that are stored one by one, then the delta of them."""

    def __init__(self, test: Bench, rng: random.Random) -> None:
        self.test = test
        self.rng = rng
        self.batch = new_batch()
        self.parts: list[Spooled] = []
        self.page = 0

    async def store_part(self) -> None:
        """Read some pages, and store them: nothing names them yet."""
        model = self.test.model
        pages = range(self.page, self.page + 16)
        self.page += 16
        model.write(pages[0] * 4096, self.rng.randbytes(16 * 4096))
        model.dirty -= set(pages)
        writer = model.writer(inline_limit=0, batch=self.batch)  # type: ignore[arg-type]
        for one in model.batches(list(pages), 16):
            writer.add(one)
        part = writer.finish_part()
        for segment in part.segments:
            await self.test.vault.store.create_from_file(
                segment_name(self.test.record.id, segment.id), segment.path,
                metadata=segment.metadata(),
            )  # fmt: skip
            segment.path.unlink()
        self.parts.append(part)

    def seal(self) -> Spooled:
        """Make the delta of the parts; it is not published."""
        model = self.test.model
        writer = model.writer()
        for part in self.parts:
            writer.add_stored(part, len(model.data))
        return model.sealed(writer.finish(model.facts()))

    @property
    def names(self) -> set[str]:
        """What the parts have in the vault."""
        return {segment_name(self.test.record.id, one.id)
                for part in self.parts for one in part.segments}  # fmt: skip


def stored(test: Bench) -> set[str]:
    return {name for name in test.store.objects if name.startswith("segments/")}


async def record_of(test: Bench) -> DiskRecord:
    return await test.vault.disk(test.record.id)


async def look(test: Bench, tender: Tender, day: float) -> Collected:
    tender.at(day * DAY_S)
    return await tender.upkeep.sweep(test.record.id)


MONTH = (OLD_S + DOUBT_S) / DAY_S
