"""A vault in memory that is damaged by chance, and what its source still has."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from tests.catalog.harness import Bench, bench, content, is_joined
from tests.delta.model import T0, DiskModel
from tests.vaults import is_encrypted, newcomer
from vdiskfs import native
from vdiskfs.catalog import CheckReport, DiskLog, IndexCache, Point, RepairReport, Vault, check
from vdiskfs.catalog.garbage import GRACE_S, collect
from vdiskfs.catalog.repair import repair
from vdiskfs.catalog.retention import parse_ladder
from vdiskfs.catalog.thinning import Thinner
from vdiskfs.delta.local import open_local
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.sealed import SealedStore
from vdiskfs.sealed.blocks import BLOCK, STORED_BLOCK
from vdiskfs.units import NS

LADDER = parse_ladder("1s for 16s, 64s for 400s")

Span = tuple[int, int]
Frames = list[tuple[int, int, int, int]]
"""Offset, end, page, sum."""


@dataclass
class Here:
    """What the source has: its image as it is now, and copies of indexes."""

    model: DiskModel
    cache: IndexCache
    expected: list[tuple[int, int, int]] = field(default_factory=list)
    turns: int = 0
    meanwhile: Callable[[], Awaitable[None]] | None = None

    async def ends(self, name: str) -> list[bytes]:
        return self.cache.copies(name)

    async def pages(self, wanted: Mapping[int, set[int]]) -> dict[tuple[int, int], bytes]:
        found = {}
        for page, sums in wanted.items():
            if self.sum(page) in sums:
                found[page, self.sum(page)] = self.model.page(page)
        return found

    def sum(self, page: int) -> int:
        return int(native.pages_sum(self.model.page(page))[0])

    async def slots(self) -> list[tuple[int, int, int]]:
        return self.expected

    async def take(self, size: int) -> None:
        assert size > 0
        if self.meanwhile is not None:
            self.turns += 1
            await self.meanwhile()


@dataclass
class Site:
    """A disk with a history: ``points`` are all that can be read."""

    bench: Bench
    here: Here
    points: list[Point]
    whole: dict[str, tuple[bytes, dict[str, str], str]]
    frames: dict[str, Frames]
    read_whole: dict[str, tuple[bytes, dict[str, str], str]] = field(
        default_factory=lambda: {"": (b"-", {}, "")}
    )

    def vault(self) -> Vault:
        """Return the vault as somebody sees it who knows nothing yet."""
        return newcomer(self.bench.vault)

    async def log(self) -> DiskLog:
        return self.vault().log(await self.vault().disk(self.bench.record.id))

    async def hurt(self) -> set[int]:
        """Return the points that cannot be read whole: the truth, by reading them all."""
        if all(self.bench.store.objects.get(name, (b"",))[0] == data
               for name, (data, _, _) in self.read_whole.items()):  # fmt: skip
            return set()  # these very bytes were read before
        found = set()
        log: DiskLog | None = None
        for point in self.points:
            try:
                log = log or await self.log()
                async with await log.open(point) as reader:
                    assert await content(reader) == self.bench.model.states[point.epoch]
            except (DamagedError, NotFoundError):
                found.add(point.epoch)
        if not found:
            self.read_whole = dict(self.bench.store.objects)
        return found

    async def checked(self) -> CheckReport:
        return await check(self.vault(), read_data=True)

    async def repaired(self, *, dry_run: bool = False) -> RepairReport:
        return await repair(self.vault(), sources=lambda _: self.here, dry_run=dry_run)

    def restore(self) -> None:
        """Let the vault be whole again."""
        self.bench.store.objects = dict(self.whole)
        if isinstance(self.bench.vault.store, SealedStore):
            self.bench.vault.store.seen.forget()  # a ledger that was healed is younger

    def names(self, kind: str) -> list[str]:
        """Return the names of all slots, leaves, joined deltas or segments."""
        return sorted(name for name in self.whole if kind_of(name) == kind)

    def damage(self, name: str, rng: random.Random, kind: str = "") -> tuple[str, Span]:
        """Flip a bit, cut, or lose an object; return how, and which bytes of it are gone."""
        store, (data, metadata, _) = self.bench.store, self.whole[name]
        kind = kind or rng.choice(["flip", "flip", "cut", "lost"])
        at = rng.randrange(len(data))
        if kind == "lost":
            del store.objects[name]
            return kind, (0, len(data))
        changed = bytearray(data[:at])
        if kind == "flip":
            changed = bytearray(data)
            changed[at] ^= 1 << rng.randrange(8)
        store.put(name, bytes(changed), metadata)
        if is_encrypted():
            at, end = at // STORED_BLOCK * BLOCK, (at // STORED_BLOCK + 1) * BLOCK
            return kind, (at, len(data) if kind == "cut" else end)
        return kind, (at, at + 1 if kind == "flip" else len(data))

    def has(self, name: str, span: Span) -> bool:
        """Say whether what is hurt is known here: the image has all pages whose frames are."""
        return kind_of(name) not in ("record", "name") and all(
            self.here.sum(page) == one
            for start, end, page, one in self.frames.get(name, [])
            if start < span[1] and span[0] < end
        )


def kind_of(name: str) -> str:
    """Return what an object is."""
    if name.startswith("segments/"):
        return "segment"
    if ".ledger/" in name:
        return "ledger"
    if name.endswith("/disk.json") or name.startswith("names/"):
        return "record" if name.endswith("/disk.json") else "name"
    if not name.startswith("disks/") or name.endswith(".json"):
        return "document"
    return "slot" if not is_joined(name) else "leaf" if ".9/" in name else "joined"


@asynccontextmanager
async def site(directory: Path, *, seed: int = 1) -> AsyncIterator[Site]:
    """Give a disk whose older points were thinned: leaves, then slots, joined deltas, segments."""
    rng = random.Random(seed)
    async with bench() as test, _without_syncs():
        cache = IndexCache(directory / "indexes")
        test.log = test.vault.log(test.record, cache=cache)
        test.model.writer_options = {"inline_limit": 24_000, "segment_limit": 48_000}
        test.model.write(0, rng.randbytes(160_000))
        for epoch in range(274):
            if epoch % 4 == 0 or epoch > 250:
                test.model.churn(rng, writes=2, pages=64)
            await test.publish()
            await test.log.publish_joins()
        await thin(test, directory)
        points = await test.log.points()
        frames = await frames_of(test)
        yield Site(test, Here(test.model, cache), points, dict(test.store.objects), frames)


@asynccontextmanager
async def _without_syncs() -> AsyncIterator[None]:
    """Nobody cuts the power of this host: syncs cost time and prove nothing here."""
    with mock.patch.object(os, "fsync"), mock.patch.object(os, "fdatasync"):
        yield


async def thin(test: Bench, directory: Path, later_s: int = 0) -> None:
    """Thin the disk, and delete what nothing needs any more."""
    now_ns = T0 + (test.model.epoch + later_s) * NS
    thinner = Thinner(test.vault, test.log, writer_id="cc" * 16, scratch=directory / "thin")
    await thinner.run(LADDER, now_ns)
    await test.log.line.load()
    assert test.log.line.ledger is not None
    await collect(test.vault.store, test.log.line.ledger, now_ns + (GRACE_S + 1) * NS)


async def frames_of(test: Bench) -> dict[str, Frames]:
    """Return the frames in each object, as all indexes of the whole vault say."""
    found: dict[str, Frames] = {}
    for name in test.store.objects:
        if kind_of(name) not in ("slot", "leaf"):
            continue
        data, _ = await test.vault.store.read(name)

        def read(_: int, at: int, length: int, data: bytes = data) -> bytes:
            return data[at : at + length]

        delta = open_local(read, len(data), where=name)
        table = delta.objects()
        for entries in delta.entries():
            pageno, owner = entries.pages()
            for page, row, one in zip(pageno.tolist(), owner.tolist(), entries.sums.tolist(),
                                      strict=True):  # fmt: skip
                number = int(entries.object[row])
                held = table.ref(number - 1).name(test.record.id) if number else name
                start = int(entries.offset[row])
                end = start + int(entries.length[row])
                found.setdefault(held, []).append((start, end, page, one))
    return found
