"""A disk as a bytearray that is tracked page by page and sealed into deltas."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from vdiskfs import native
from vdiskfs.delta import (
    DeltaWriter,
    EpochFacts,
    Flags,
    PageBatch,
    Spooled,
    genesis_digest,
    open_spooled,
)

PAGE = 4096
CHUNK = 16
VAULT = "aa" * 16
DISK = "bb" * 16
WRITER = "cc" * 16
T0 = 1_790_000_000_000_000_000


class DiskModel:
    """The bytes, what changed since the last seal, and every sealed state."""

    def __init__(
        self,
        spool: Path,
        *,
        vault_id: str = VAULT,
        disk_id: str = DISK,
        writer_id: str = WRITER,
        generation: int = 1,
    ) -> None:
        self.spool = spool
        self.ids = {"vault_id": vault_id, "disk_id": disk_id, "writer_id": writer_id}
        self.generation = generation
        self.data = bytearray()
        self.dirty: set[int] = set()
        self.cut = 0
        self.from_size = 0
        self.epoch = 0
        self.digest = genesis_digest(vault_id, disk_id)
        self.states: dict[int, bytes] = {0: b""}
        self.remembers = True
        self.times: dict[int, int] = {}
        self.writer_options: dict[str, int] = {}

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        if end > len(self.data):
            self.data.extend(bytes(end - len(self.data)))
        self.data[offset:end] = data
        self.dirty.update(range(offset // PAGE, -(-end // PAGE)))

    def discard(self, offset: int, length: int) -> None:
        end = min(offset + length, len(self.data))
        if offset < end:
            self.data[offset:end] = bytes(end - offset)
            self.dirty.update(range(offset // PAGE, -(-end // PAGE)))

    def truncate(self, size: int) -> None:
        if size < len(self.data):
            del self.data[size:]
            self.cut = min(self.cut, size)
            if size % PAGE:
                self.dirty.add(size // PAGE)
            self.dirty = {page for page in self.dirty if page < -(-size // PAGE)}
        else:
            self.data.extend(bytes(size - len(self.data)))

    def page(self, pageno: int) -> bytes:
        return bytes(self.data[pageno * PAGE : (pageno + 1) * PAGE]).ljust(PAGE, b"\0")

    def batches(self, pages: list[int], per_batch: int) -> list[PageBatch]:
        """Return the pages as batches that split no chunk."""
        chunks: dict[int, list[int]] = {}
        for page in sorted(pages):
            chunks.setdefault(page // CHUNK, []).append(page)
        groups = list(chunks.values())
        return [
            self.batch([page for group in groups[start : start + per_batch] for page in group])
            for start in range(0, len(groups), per_batch)
        ]

    def batch(self, pages: list[int]) -> PageBatch:
        raw = b"".join(self.page(page) for page in pages)
        zero = native.pages_zero(raw)
        data = b"".join(
            self.page(page) for page, empty in zip(pages, zero, strict=True) if not empty
        )
        return PageBatch(np.array(pages, np.uint64), native.pages_sum(raw), zero, memoryview(data))

    def facts(
        self, *, flags: Flags = Flags(0), label: str = "", time_ns: int = 0, span: int = 1
    ) -> EpochFacts:
        """Return what a seal says; of several epochs merged where ``span`` is more than 1."""
        merged = span > 1
        return EpochFacts(
            generation=self.generation,
            from_epoch=self.epoch,
            to_epoch=self.epoch + span,
            time_ns=time_ns or T0 + (self.epoch + span) * 1_000_000_000,
            size=len(self.data),
            cut=self.cut,
            from_size=self.from_size,
            from_digest=self.digest,
            flags=flags
            | (Flags.LABELLED if label else Flags(0))
            | (Flags.MERGED if merged else Flags(0)),
            label=label,
            to_digest=bytes([self.epoch % 256]) * 32 if merged else bytes(32),
        )

    def writer(self, **options: int) -> DeltaWriter:
        chosen: dict[str, Any] = {**self.ids, **self.writer_options, **options}
        return DeltaWriter(self.spool, **chosen)

    def seal(self, *, per_batch: int = 64, **facts: object) -> Spooled:
        """Seal, write the delta, remember the state."""
        writer = self.writer()
        for batch in self.batches(sorted(self.dirty), per_batch):
            writer.add(batch)
        return self.sealed(writer.finish(self.facts(**facts)))  # type: ignore[arg-type]

    def sealed(self, spooled: Spooled) -> Spooled:
        """Take a delta made of the model's own facts as the newest."""
        self.epoch = spooled.head.to_epoch
        self.digest = spooled.head.to_digest
        if self.remembers:
            self.states[self.epoch] = bytes(self.data)
        self.times[self.epoch] = spooled.head.time_ns
        self.dirty = set()
        self.cut = self.from_size = len(self.data)
        return spooled

    def churn(self, rng: random.Random, writes: int = 4, pages: int = 200) -> None:
        """Do some random writes, discards and changes of size."""
        for _ in range(writes):
            offset = rng.randrange(pages * PAGE)
            length = rng.choice([512, 4096, 10_000, 70_000])
            kind = rng.random()
            if kind < 0.7:
                self.write(offset, rng.randbytes(length) if rng.random() < 0.5 else b"x" * length)
            elif kind < 0.85:
                self.discard(offset // PAGE * PAGE, length * 4)
            else:
                self.truncate(rng.choice([offset, offset // PAGE * PAGE]))


def reopened(spooled: Spooled) -> Spooled:
    return open_spooled(spooled.path)
