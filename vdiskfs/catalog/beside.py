"""The deltas beside a damaged one, opened when they are asked for.

What is kept is what the listing says, and where each delta begins.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from vdiskfs.catalog.inspection import Inspection
from vdiskfs.catalog.ledger import LEAF_LEVEL
from vdiskfs.catalog.walk import Listing, is_damage
from vdiskfs.delta.layout import DeltaHead, head_from_metadata, listed_of
from vdiskfs.errors import VdiskfsError
from vdiskfs.point import Piece, PieceInfo

Link = tuple[bytes, int]
"""Digest and size that a delta begins with, or ends at."""


def is_first(info: PieceInfo) -> bool:
    """Say whether a delta is not made of others, which tell what it tells."""
    return info.level in (0, LEAF_LEVEL)


class Beside:
    """The deltas of a disk by where they begin and end."""

    def __init__(self, work: Inspection, listings: Sequence[Listing]) -> None:
        """Look at what was listed; nothing is opened yet."""
        self._work = work
        self._listings = {listing.generation: listing for listing in listings}
        self._starts = {
            number: sorted([*listing.leaves, *listing.slots])
            for number, listing in self._listings.items()
        }
        self._made: list[DeltaHead] = []

    def add(self, head: DeltaHead) -> None:
        """Note a delta that was put back since."""
        self._made.append(head)

    def deltas(self) -> Iterator[PieceInfo]:
        """Yield all deltas that points may be read through: of a line leaves, slots, joined."""
        for number, listing in self._listings.items():
            yield from (self._first(number, start) for start in self._starts[number])
            yield from listing.joined

    async def ends(self, generation: int, epoch: int) -> set[Link]:
        """Return what the deltas that lead to an epoch say of it."""
        starts = self._starts.get(generation, [])
        at = bisect.bisect_left(starts, epoch) - 1
        near = [self._first(generation, starts[at])] if at >= 0 else []
        near += [one for one in self._joined(generation) if one.to_epoch == epoch]
        heads = await self._heads(near, generation)
        return {(head.to_digest, head.size) for head in heads if head.to_epoch == epoch}

    async def starts(self, generation: int, epoch: int) -> set[Link]:
        """Return what the deltas that lead on from an epoch say of it."""
        near = [one for one in self._joined(generation) if one.from_epoch == epoch]
        listing = self._listings.get(generation)
        if listing is not None and (epoch in listing.leaves or epoch in listing.slots):
            near.append(self._first(generation, epoch))
        heads = await self._heads(near, generation)
        return {(head.from_digest, head.from_size) for head in heads if head.from_epoch == epoch}

    async def parts(self, whole: PieceInfo, doubtful: Collection[str]) -> list[PieceInfo]:
        """Return the deltas that lie inside another one, as far as they can be opened.

        Args:
            whole: says from where to where.
            doubtful: names of those that may be damaged; the others were looked at.
        """
        starts = self._starts.get(whole.generation, [])
        low = bisect.bisect_left(starts, whole.from_epoch)
        high = bisect.bisect_left(starts, whole.to_epoch)
        inside = [self._first(whole.generation, start) for start in starts[low:high]]
        inside += [
            one for one in self._joined(whole.generation)
            if whole.from_epoch <= one.from_epoch and one.to_epoch <= whole.to_epoch
        ]  # fmt: skip
        found = []
        for info in inside:
            listed = info.listed
            if listed is None or info.name in doubtful:
                piece = await self.opened(info)
                listed = listed_of(piece.head) if piece is not None else None
            if listed is not None and listed.to_epoch <= whole.to_epoch:
                found.append(replace(info, to_epoch=listed.to_epoch, listed=listed))
        return found

    async def opened(self, info: PieceInfo) -> Piece | None:
        """Open a delta; None: it is damaged, or gone."""
        try:
            return await self._work.open(info)
        except VdiskfsError as error:
            if not is_damage(error):
                raise
            return None

    async def _heads(self, infos: Sequence[PieceInfo], generation: int) -> list[DeltaHead]:
        pieces = [await self.opened(info) for info in infos]
        made = [head for head in self._made if head.generation == generation]
        return [*made, *(piece.head for piece in pieces if piece is not None)]

    def _joined(self, generation: int) -> list[PieceInfo]:
        listing = self._listings.get(generation)
        return listing.joined if listing is not None else []

    def _first(self, generation: int, start: int) -> PieceInfo:
        """Return the leaf or the slot that begins at an epoch."""
        listing = self._listings[generation]
        leaf = listing.leaves.get(start)
        if leaf is not None:
            return leaf
        info = listing.slots[start]
        listed = head_from_metadata(dict(info.metadata))
        return PieceInfo(info.name, generation, 0, start, 0, info.size, listed)
