"""Writing what a thinned line is made of: leaves, and joins over them. Uploads, never deletes.

A leaf is one delta for all that changed between two states that are kept. Its data is moved
(read, verified, compressed anew) into segments of its own while it is little, and out of objects
that have garbage in them; else it refers to where its data is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import trio

from vdiskfs.catalog import rewriting
from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.catalog.indexes import JOIN_LIMIT, keep_tail, read_indexes
from vdiskfs.catalog.ledger import JOIN_LEVEL, LEAF_LEVEL, Leaf
from vdiskfs.catalog.publish import upload_segments
from vdiskfs.catalog.remains import Remains
from vdiskfs.catalog.rewriting import Choice, Held
from vdiskfs.catalog.tables import SLOT_INDEX_LIMIT, Tables
from vdiskfs.crash import hook
from vdiskfs.delta import DeltaWriter, PageBatch, SpooledSegment, delta_metadata
from vdiskfs.delta.entries import I64, Entries
from vdiskfs.delta.joined import points_of, write_joined, write_moved
from vdiskfs.delta.layout import listed_of
from vdiskfs.delta.local import LocalDelta, open_file
from vdiskfs.delta.names import joined_name
from vdiskfs.delta.points import PointTable, concat_points
from vdiskfs.errors import AlreadyExistsError, DamagedError, NotFoundError
from vdiskfs.point import Piece, PieceInfo
from vdiskfs.point.fetch import Found, fetch_pages
from vdiskfs.units import PAGE_SIZE

_READS_AT_ONCE = 8

# take(bytes): waits until so many may be uploaded.
Take = Callable[[int], Awaitable[None]]


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
    shared: frozenset[str] = frozenset()
    """Segments that other generations need, too."""

    take: Take | None = None
    room: int = field(default_factory=lambda: rewriting.REWRITE_LIMIT)
    """Bytes that may still be moved out of objects with garbage."""

    serial: int = field(init=False)
    _tidied: bool = field(init=False, default=False)

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
        choice = await trio.to_thread.run_sync(self._choose, joined)
        moved = await self._try_move(joined, choice)
        if moved is not None:
            return moved
        names = self._names(joined)
        return Leaf(await self._store(path, joined), names, tight=choice.is_all)

    async def tidy_leaf(self, leaf: Leaf) -> Leaf:
        """Move data of a leaf out of objects with garbage, where it was left for a later run.

        One leaf of a run, as its index is read for it.

        Raises:
            DamagedError: it is damaged.
        """
        if leaf.tight or self._tidied or self.room <= 0:
            return leaf
        self._tidied = True
        _, joined = await self._join([leaf.piece], LEAF_LEVEL)
        found = await self.remains.find(self.tables, self.cache, joined)
        if found is not None:
            return found
        choice = await trio.to_thread.run_sync(self._choose, joined)
        return await self._try_move(joined, choice) or replace(leaf, tight=True)

    async def make_join(self, way: Sequence[PieceInfo]) -> PieceInfo:
        """Write one index over several deltas; it is stored on return."""
        path, joined = await self._join(way, JOIN_LEVEL)
        found = await self.remains.find(self.tables, self.cache, joined)
        if found is not None:
            return found.piece
        return await self._store(path, joined)

    async def _join(self, way: Sequence[PieceInfo], level: int) -> tuple[Path, LocalDelta]:
        indexes = await read_indexes(self.tables, self.cache, way)

        def write() -> tuple[Path, LocalDelta]:
            deltas = indexes.open(self.tables.vault_id, self.tables.disk_id)
            path, _ = write_joined(deltas, level, self.scratch, points=_last_point(deltas))
            return path, open_file(path)

        return await trio.to_thread.run_sync(write)

    def _choose(self, joined: LocalDelta) -> Choice:
        table = joined.objects()
        live = np.zeros(len(table) + 1, np.int64)
        for entries in joined.entries():
            live += np.bincount(
                entries.object, weights=_live_bytes(entries), minlength=len(live)
            ).astype(np.int64)  # fmt: skip
        refs = [table.ref(number) for number in range(len(table))]
        return rewriting.choose_moved(
            [
                Held(ref.size, int(live[number + 1]), ref.segment_id in self.shared)
                for number, ref in enumerate(refs)
            ],
            self.room,
        )

    def _names(self, joined: LocalDelta) -> tuple[str, ...]:
        table = joined.objects()
        refs = [table.ref(number) for number in range(len(table))]
        for ref in refs:
            if not ref.segment_id and ref.generation != self.generation:
                raise DamagedError(f"{joined.where}: refers to another generation")
        return tuple(ref.segment_id or f"{ref.from_epoch:016x}" for ref in refs)

    async def _try_move(self, joined: LocalDelta, choice: Choice) -> Leaf | None:
        """Move what was chosen; None: nothing was, or it stays where it is, as it is damaged."""
        if not choice.moved:
            return None
        try:
            return await self._move(joined, choice)
        except (DamagedError, NotFoundError):
            # A check tells of damage in so much data that nobody reads now; it is not to stop
            # thinning. What was stored until then is garbage: its names are here still.
            if choice.is_little:
                raise
            return None

    async def _move(self, joined: LocalDelta, choice: Choice) -> Leaf:
        """Write a leaf of which the data that lies in some objects is moved."""
        self.room -= choice.bytes
        numbers = np.array(sorted(choice.moved), np.uint32) + np.uint32(1)
        writer = DeltaWriter(
            self.scratch, vault_id=self.tables.vault_id, disk_id=self.tables.disk_id,
            writer_id=self.writer_id, level=self.compression_level, inline_limit=0,
        )  # fmt: skip
        try:
            for entries in joined.entries():
                rows = np.flatnonzero(np.isin(entries.object, numbers))
                if len(rows):
                    batch = await self._batch(joined, entries.rows(rows))
                    await trio.to_thread.run_sync(writer.add, batch)
                    await self._upload(writer.take_segments())
            part = await trio.to_thread.run_sync(writer.finish_part)
        except BaseException:
            writer.abandon()
            raise
        moved, _ = await trio.to_thread.run_sync(
            lambda: write_moved(joined, open_file(part.path), self.scratch)
        )
        written = await trio.to_thread.run_sync(open_file, moved)
        names = self._names(written)
        # Data, then delta, then what names it. Segments with the index of the part alone are
        # needed by nobody.
        await self._upload([one for one in writer.take_segments() if one.id in names])
        hook("thin.moved")
        return Leaf(await self._store(moved, written), names, tight=choice.is_all)

    async def _upload(self, segments: list[SpooledSegment]) -> None:
        """Store segments, and make room: their names stay until the ledger is committed.

        After a kill they tell which segments nobody names. Where they are lost `unclaimed` does.
        """
        segments = [replace(segment, leaf_of=self.generation) for segment in segments]
        await self._wait_turn(sum(segment.size for segment in segments))
        await upload_segments(self.tables.store, self.tables.disk_id, segments)
        for segment in segments:
            empty_file(segment.path)

    async def _wait_turn(self, size: int) -> None:
        if self.take is not None:
            await self.take(size)

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
        await self._wait_turn(head.object_size)
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
            if (
                self.cache is not None
                and head.level == LEAF_LEVEL
                and head.tail_bytes <= JOIN_LIMIT
            ):
                tail = await trio.to_thread.run_sync(_tail_of, path, head.tail_offset)
                await trio.to_thread.run_sync(self.cache.put_aside, {name: tail})
            return PieceInfo(name, self.generation, head.level, *epochs, head.object_size,
                             listed_of(head), self.serial)  # fmt: skip


def _tail_of(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read()


def empty_file(path: Path) -> None:
    """Make a file empty that was stored. Not truncated: in a folder vault it is the object."""
    empty = path.with_name("empty")
    empty.touch()
    empty.replace(path)


def _live_bytes(entries: Entries) -> I64:
    """Return the stored bytes of the pages that each entry supplies."""
    pages = np.bitwise_count(entries.mask).astype(np.int64)
    frames = np.bitwise_count(entries.frame_mask).astype(np.int64)
    return np.asarray(entries.length.astype(np.int64) * pages // np.maximum(frames, 1))


def _last_point(deltas: Sequence[LocalDelta]) -> PointTable:
    """Return the point that deltas lead to. Which points there are is the ledger's to say."""
    table = concat_points([points_of(delta) for delta in deltas[-1:]])
    return table.part(len(table) - 1, len(table))
