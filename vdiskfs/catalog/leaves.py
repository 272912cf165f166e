"""Writing what a thinned line is made of: leaves, and joins over them. Uploads, never deletes.

A leaf is one delta for all that changed between two states that are kept. Its data is moved
(read, verified, compressed anew) into segments of its own while it is little, or where what
it would refer to is mostly garbage; else it refers to where its data is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import trio

from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.catalog.joins import JOIN_LIMIT, keep_tail, read_tail
from vdiskfs.catalog.ledger import JOIN_LEVEL, LEAF_LEVEL, Leaf
from vdiskfs.catalog.publish import upload_segments
from vdiskfs.catalog.remains import Remains
from vdiskfs.catalog.tables import SLOT_INDEX_LIMIT, Tables, tail_bytes
from vdiskfs.crash import hook
from vdiskfs.delta import DeltaWriter, PageBatch, delta_metadata
from vdiskfs.delta.entries import Entries
from vdiskfs.delta.joined import points_of, write_joined, write_moved
from vdiskfs.delta.layout import listed_of
from vdiskfs.delta.local import LocalDelta, open_file, open_tail
from vdiskfs.delta.names import joined_name
from vdiskfs.delta.points import PointTable, concat_points
from vdiskfs.errors import AlreadyExistsError, DamagedError
from vdiskfs.point import Piece, PieceInfo
from vdiskfs.point.fetch import Found, fetch_pages
from vdiskfs.point.piece import check_identity
from vdiskfs.units import PAGE_SIZE

MOVE_LIMIT = 8 << 20
"""Below so many bytes data is moved; above it is referred to where it is."""

REWRITE_LIMIT = 1 << 30
"""Above so many bytes it is never rewritten at once: there may not be room for it here."""

_READS_AT_ONCE = 8


@dataclass(slots=True)
class LeafWriter:
    """Writes deltas of one line, with revisions from ``serial`` on, by way of ``scratch``.

    What ``remains`` of other runs is taken up where it says the same.
    """

    tables: Tables
    generation: int
    writer_id: str
    compression_level: int
    scratch: Path
    remains: Remains
    cache: IndexCache | None = None
    serial: int = field(init=False)

    def __post_init__(self) -> None:
        """Begin above all revisions there are."""
        self.serial = self.remains.serial + 1

    async def make_leaf(self, way: Sequence[PieceInfo]) -> Leaf:
        """Write one delta for all of several that follow each other; it is stored on return.

        Raises:
            DamagedError: one of them, or what it refers to, is damaged.
        """
        path, joined = await self._join(way, LEAF_LEVEL)
        found = await self.remains.find(self.tables, self.cache, joined)
        if found is not None:
            return found
        table = joined.objects()
        refs = [table.ref(number) for number in range(len(table))]
        live = sum(_live_bytes(entries) for entries in joined.entries())
        garbage = sum(ref.size for ref in refs) - live
        if live and (live < MOVE_LIMIT or (garbage > live and live < REWRITE_LIMIT)):
            return await self._move(joined)
        for ref in refs:
            if not ref.segment_id and ref.generation != self.generation:
                raise DamagedError(f"{way[0].name}: refers to another generation")
        piece = await self._store(path, joined)
        names = tuple(ref.segment_id or f"{ref.from_epoch:016x}" for ref in refs)
        return Leaf(piece, names, tight=not names)

    async def make_join(self, way: Sequence[PieceInfo]) -> PieceInfo | None:
        """Write one index over several deltas; None: it would be too large."""
        if sum(tail_bytes(piece) for piece in way) > JOIN_LIMIT:
            return None
        path, joined = await self._join(way, JOIN_LEVEL)
        found = await self.remains.find(self.tables, self.cache, joined)
        if found is not None:
            return found.piece
        return await self._store(path, joined)

    async def _join(self, way: Sequence[PieceInfo], level: int) -> tuple[Path, LocalDelta]:
        tails = [await read_tail(self.tables, self.cache, piece) for piece in way]

        def write() -> tuple[Path, LocalDelta]:
            deltas = []
            for piece, tail in zip(way, tails, strict=True):
                delta = open_tail(tail, where=piece.name)
                check_identity(
                    delta.head, piece, vault_id=self.tables.vault_id, disk_id=self.tables.disk_id
                )
                deltas.append(delta)
            path, _ = write_joined(deltas, level, self.scratch, points=_last_point(deltas))
            return path, open_file(path)

        return await trio.to_thread.run_sync(write)

    async def _move(self, joined: LocalDelta) -> Leaf:
        writer = DeltaWriter(
            self.scratch, vault_id=self.tables.vault_id, disk_id=self.tables.disk_id,
            writer_id=self.writer_id, level=self.compression_level, inline_limit=0,
        )  # fmt: skip
        try:
            for entries in joined.entries():
                batch = await self._batch(joined, entries)
                await trio.to_thread.run_sync(writer.add, batch)
            zeros = joined.zeros()
            for start, end in zip(zeros.start.tolist(), zeros.end.tolist(), strict=True):
                writer.add_zeros(start, end - start)
            part = await trio.to_thread.run_sync(writer.finish_part)
        except BaseException:
            writer.abandon()
            raise
        moved = await trio.to_thread.run_sync(
            lambda: write_moved(joined, open_file(part.path), self.scratch)
        )
        # Data, then delta, then what names it. The files stay until the ledger is committed:
        # after a kill they tell which segments nobody names. Where they are lost `unclaimed` does.
        segments = [replace(segment, leaf_of=self.generation) for segment in part.segments]
        await upload_segments(self.tables.store, self.tables.disk_id, segments)
        hook("thin.moved")
        piece = await self._store(moved[0], open_file(moved[0]))
        return Leaf(piece, tuple(segment.id for segment in part.segments), tight=True)

    async def _batch(self, joined: LocalDelta, entries: Entries) -> PageBatch:
        """Read the pages of some entries, verified."""
        table = joined.objects()
        names = {
            number + 1: table.ref(number).name(self.tables.disk_id) for number in range(len(table))
        }
        info = PieceInfo(joined.where, self.generation, LEAF_LEVEL, 0, 1, joined.head.object_size)
        piece = Piece(self.tables.store, self.tables.blocks, info, joined.head, b"")
        pageno, _ = entries.pages()
        order = np.argsort(pageno, kind="stable")
        pages = pageno[order]
        out = bytearray(len(pages) * PAGE_SIZE)
        limiter = trio.CapacityLimiter(_READS_AT_ONCE)
        found = Found(piece, entries, names)
        await fetch_pages(self.tables.store, [found], pages, out, limiter)
        return PageBatch(pages, entries.sums[order], np.zeros(len(pages), np.bool_), out)

    async def _store(self, path: Path, joined: LocalDelta) -> PieceInfo:
        head = joined.head
        epochs = (head.from_epoch, head.to_epoch)
        while True:
            name = joined_name(head.disk_id, self.generation, head.level, epochs, self.serial)
            try:
                await self.tables.store.create_from_file(name, path, metadata=delta_metadata(head))
            except AlreadyExistsError:
                # Of a run that is under way, or whose answer was lost: whatever it holds, it is
                # garbage from now on. A revision is never used for two.
                self.serial += 1
                continue
            if self.cache is not None and head.tail_bytes <= SLOT_INDEX_LIMIT:
                await trio.to_thread.run_sync(keep_tail, self.cache, name, path, head)
            hook("thin.stored")
            if self.cache is not None and head.level == LEAF_LEVEL:
                tail = await trio.to_thread.run_sync(_tail_of, path, head.tail_offset)
                await trio.to_thread.run_sync(self.cache.put_aside, {name: tail})
            return PieceInfo(name, self.generation, head.level, *epochs, head.object_size,
                             listed_of(head), self.serial)  # fmt: skip


def _tail_of(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read()


def _live_bytes(entries: Entries) -> int:
    """Return the stored bytes of the pages that entries supply."""
    pages = np.bitwise_count(entries.mask).astype(np.int64)
    frames = np.bitwise_count(entries.frame_mask).astype(np.int64)
    return int((entries.length.astype(np.int64) * pages // np.maximum(frames, 1)).sum())


def _last_point(deltas: Sequence[LocalDelta]) -> PointTable:
    """Return the point that deltas lead to. Which points there are is the ledger's to say."""
    table = concat_points([points_of(delta) for delta in deltas[-1:]])
    return table.part(len(table) - 1, len(table))
