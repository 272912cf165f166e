"""What runs of thinning that came to nothing have left in the vault: taken up by the next run.

So a line that cannot be thinned, because one of its deltas is damaged, say, does not fill the
vault by being tried again. What is not taken up is doomed by the run that comes to its end:
deltas are found by listing, segments by what the run has left in its directory. Once a day they
are listed, too, for runs whose directory is gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import trio

from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.catalog.indexes import read_indexes
from vdiskfs.catalog.ledger import LEAF_LEVEL, Leaf, Ledger
from vdiskfs.catalog.tables import Tables
from vdiskfs.delta.layout import HASH_SIZE, DeltaHead, listed_of
from vdiskfs.delta.local import LocalDelta
from vdiskfs.delta.names import parse_joined, parse_segment, segment_prefix
from vdiskfs.delta.refs import ObjectRef
from vdiskfs.delta.segments import LEAF_OF
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.point import PieceInfo
from vdiskfs.store import Store
from vdiskfs.units import NS

OLD_S = 7 * 86400
"""How old a segment is that nothing names before it is collected."""


class Remains:
    """What was listed of a line's leaves and joins, but for those of its ledger.

    Invariant: a name that any ledger has doomed is not taken up, nor a delta that needs one:
    somebody may delete it at any moment. Revisions above the ledger's serial were never
    doomed; should another ledger have come since, the commit is refused.
    """

    def __init__(self, listed: Iterable[PieceInfo], old: Ledger | None) -> None:
        """Take what a listing gave, and the ledger that is the truth."""
        self._doomed = frozenset(old.doomed) if old is not None else frozenset()
        self.serial = 0 if old is None else old.serial
        self._found: dict[tuple[int, int, int], list[PieceInfo]] = {}
        for piece in listed:
            if piece.revision > (0 if old is None else old.serial):
                self._found.setdefault((piece.level, piece.from_epoch, piece.to_epoch), []).append(
                    piece
                )
            self.serial = max(self.serial, piece.revision)

    async def find(
        self, tables: Tables, cache: IndexCache | None, wanted: LocalDelta
    ) -> Leaf | None:
        """Return what says the same as a joined delta that was just written here, or None."""
        head = wanted.head
        for piece in self._found.get((head.level, head.from_epoch, head.to_epoch), ()):
            try:
                found = await self._leaf(tables, cache, piece, wanted)
            except (DamagedError, NotFoundError):
                continue  # it is doomed with the others
            if found is not None:
                return found
        return None

    async def _leaf(
        self, tables: Tables, cache: IndexCache | None, piece: PieceInfo, wanted: LocalDelta
    ) -> Leaf | None:
        indexes = await read_indexes(tables, cache, [piece])

        def read() -> tuple[DeltaHead, list[ObjectRef], set[ObjectRef]]:
            [delta] = indexes.open(tables.vault_id, tables.disk_id)
            return delta.head, _refs(delta), set(_refs(wanted))

        head, refs, known = await trio.to_thread.run_sync(read)
        if _said(head) != _said(wanted.head):
            return None
        fresh = [ref for ref in refs if ref not in known]
        if fresh and (head.level != LEAF_LEVEL or not all(ref.segment_id for ref in fresh)):
            return None  # it needs what this run does not
        for ref in fresh:
            # Its data was stored before it; but is it there still?
            name = ref.name(tables.disk_id)
            if name in self._doomed or (await tables.store.stat(name)).size != ref.size:
                return None
        if cache is not None and head.level == LEAF_LEVEL and piece.name in indexes.tails:
            await trio.to_thread.run_sync(cache.put_aside, indexes.tails)
        names = tuple(ref.segment_id or f"{ref.from_epoch:016x}" for ref in refs)
        return Leaf(replace(piece, listed=listed_of(head)), names, tight=len(fresh) == len(refs))


async def unclaimed(
    store: Store, disk_id: str, ledger: Ledger | None, generation: int, now_ns: int
) -> set[str]:
    """List the segments of leaves of a generation that its ledger neither names nor has doomed.

    Returns the ids of those that are older than a week, or from the future: written by a clock
    that was set back since. That bounds what is done for nothing: a run under way may have
    stored them. It is safe all the same, whatever the clocks say: only a run of thinning names
    such a segment, in a ledger of this generation, and once another ledger has doomed it the
    commit of that run is refused.
    """
    known = set() if ledger is None else ledger.live(disk_id) | ledger.doomed.keys()
    return {
        segment_id async for info in store.list(segment_prefix(disk_id))
        if info.metadata.get(LEAF_OF) == str(generation) and info.name not in known
        and abs(now_ns - info.modified_ns) > OLD_S * NS
        and (segment_id := parse_segment(info.name)) is not None
    }  # fmt: skip


def revisions(names: Iterable[str]) -> list[int]:
    """Return the revisions of those names that are joined deltas'."""
    return [parts[4] for name in names if (parts := parse_joined(name)) is not None]


def _refs(delta: LocalDelta) -> list[ObjectRef]:
    table = delta.objects()
    return [table.ref(number) for number in range(len(table))]


def _said(head: DeltaHead) -> DeltaHead:
    """Return a head without how it is stored."""
    return replace(
        head, stored_bytes=0, object_size=0, tail_offset=0, root_offset=0, root_length=0,
        root_raw=0, root_hash=bytes(HASH_SIZE), version=0,
    )  # fmt: skip
