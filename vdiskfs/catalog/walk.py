"""Walking a generation's line for ``check``: slot by slot, with what joins lead past."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vdiskfs.catalog.damage import Hurt, Tracker, pages_hurt
from vdiskfs.catalog.inspection import Inspection, bare
from vdiskfs.catalog.look import look
from vdiskfs.catalog.tables import check_table
from vdiskfs.delta.blocks import POINTS
from vdiskfs.delta.digest import epoch_digest
from vdiskfs.delta.layout import LIMIT, DeltaHead, Flags, Kind, head_from_metadata
from vdiskfs.delta.names import slot_name
from vdiskfs.delta.points import PointRow, PointTable, concat_points, point_row
from vdiskfs.errors import DamagedError, FormatError, NotFoundError, VdiskfsError
from vdiskfs.point import Piece, PieceInfo
from vdiskfs.store import ObjectInfo


@dataclass(slots=True)
class Listing:
    """All objects of a generation's line."""

    generation: int
    slots: dict[int, ObjectInfo] = field(default_factory=dict)
    joined: list[PieceInfo] = field(default_factory=list)
    leaves: dict[int, PieceInfo] = field(default_factory=dict)
    """Below the horizon of a thinned line: what leads from state to state there."""
    hidden: set[int] = field(default_factory=set)
    """Where one of these ends, and no point is."""
    lost: int = 0
    """The horizon of a line whose ledger cannot be read; ``lost_by``: the problem's number."""
    lost_by: int = 0
    lost_points: list[int] = field(default_factory=list)
    """Its points up to there."""


@dataclass(frozen=True, slots=True)
class LineState:
    """Digest and size at an epoch (None: not known, for damage), and what hurts it."""

    digest: bytes | None
    size: int | None
    hurt: Mapping[int, Hurt]


class LineWalk:
    """The walk along one generation."""

    def __init__(self, work: Inspection, listing: Listing, base: int, start: LineState) -> None:
        """Begin at the base, with what is known there."""
        self._work = work
        self._listing = listing
        self._position = base
        self._digest = start.digest
        self._size = start.size
        self._tracker = Tracker(start.hurt)
        self._tracker.remember(base)
        self._digests: dict[int, bytes | None] = {base: start.digest}
        self._rows: dict[int, PointRow] = {}
        self._tables: dict[str, PointTable] = {}
        self._ending: dict[int, list[PieceInfo]] = {}
        self._last_use: dict[int, int] = {}
        self._lost: list[tuple[int, int]] = []
        self._wanted: set[int] = set()
        self._states: dict[int, LineState] = {}

    async def run(self, wanted: set[int]) -> dict[int, LineState]:
        """Walk to the end; return the state at the epochs wanted."""
        self._wanted = wanted
        await self._open_joined()
        order = sorted([*self._listing.leaves, *self._listing.slots])
        if self._listing.lost > self._position:
            await self._lose_ledger()
        self._note(self._position)
        for number, epoch in enumerate(order):
            after = order[number + 1] if number + 1 < len(order) else None
            if epoch < self._position:
                self._work.problem(self._name(epoch), "lies beside the chain")
                continue
            if epoch > self._position:
                await self._lose(self._position, epoch, "is missing")
                self._note(self._position)
            if not await self._slot(self._info(epoch), after):
                break
            self._note(self._position)
        return self._states

    def _note(self, epoch: int) -> None:
        if epoch in self._wanted:
            hurt = dict(self._tracker.state)
            self._states[epoch] = LineState(self._digest, self._size, hurt)

    def _info(self, epoch: int) -> PieceInfo:
        leaf = self._listing.leaves.get(epoch)
        if leaf is not None:
            return leaf
        info = self._listing.slots[epoch]
        listed = head_from_metadata(dict(info.metadata))
        return PieceInfo(info.name, self._listing.generation, 0, epoch, 0, info.size, listed)

    def _name(self, epoch: int) -> str:
        leaf = self._listing.leaves.get(epoch)
        return (
            leaf.name
            if leaf is not None
            else slot_name(self._work.record.id, self._listing.generation, epoch)
        )

    async def _slot(self, info: PieceInfo, after: int | None) -> bool:
        """Pass the slot, or the leaf, at the position; return False at a fence."""
        work, start, listed = self._work, self._position, info.listed
        work.report.deltas += 1
        work.step()
        try:
            piece = await work.open(info)
            self._check_link(piece.head)
            change = await look(work, piece, pages_hurt(self._tracker.state))
        except VdiskfsError as error:
            if not is_damage(error):
                raise
            end = listed.to_epoch if listed is not None else start + 1
            if after is not None:
                end = min(end, after)
            end = max(end, start + 1)
            await self._lose(start, end, bare(error, info.name))
            return True
        head = piece.head
        if head.is_fence:
            return False
        self._tracker.apply(change)
        self._digest, self._size = head.to_digest, head.size
        if head.kind is Kind.SLOT:
            self._rows[head.to_epoch] = point_row(head)
        await self._reach(head.to_epoch)
        return True

    def _check_link(self, head: DeltaHead) -> None:
        name = self._name(head.from_epoch)
        if self._digest is not None and head.from_digest != self._digest:
            raise FormatError("does not follow the delta before it", where=name)
        if self._size is not None and head.from_size != self._size:
            raise FormatError("starts from another size than the disk had", where=name)
        whole = head.kind is Kind.SLOT and not head.flags & Flags.MERGED
        if whole and head.to_digest != epoch_digest(head):
            raise FormatError("its digest is not that of its content", where=name)

    async def _lose(self, start: int, end: int, message: str) -> None:
        """Pass a slot that cannot be read, to the epoch where it must have ended."""
        self._tracker.lose(self._work.problem(self._name(start), message))
        self._lost.append((start, end))
        self._work.gap(self._listing.generation, start, end)
        await self._pass(start, end, self._points_between(start, end))

    async def _pass(self, start: int, end: int, points: list[int]) -> None:
        """Go on where what was lost ended; it hurts the points in it, and what forks off there."""
        self._digest = self._size = None
        for epoch in points:
            self._count(epoch)
        for epoch in self._wanted:
            if start < epoch < end:
                self._note(epoch)
        await self._reach(end)

    async def _lose_ledger(self) -> None:
        """Pass what the ledger told of: no point is read without it."""
        base, horizon = self._position, self._listing.lost
        self._tracker.lose(self._listing.lost_by)
        self._lost.append((base, horizon))
        points = [epoch for epoch in self._listing.lost_points if epoch < horizon]
        await self._pass(base, horizon, points)

    async def _reach(self, epoch: int) -> None:
        """Arrive at an epoch: joined deltas that end here may lead past damage."""
        self._position = epoch
        self._digests[epoch] = self._digest
        # The coarsest comes last: it is the one that readers take.
        for info in sorted(self._ending.get(epoch, []), key=lambda info: info.level):
            await self._joined(info)
        # Invariant: of the epochs passed those are kept that joined deltas begin at which end
        # later: each costs what is hurt there.
        for info in self._ending.pop(epoch, []):
            if self._last_use[info.from_epoch] <= epoch:
                self._tracker.forget(info.from_epoch)
        if epoch in self._last_use:
            self._tracker.remember(epoch)
        if epoch not in self._listing.hidden:
            self._count(epoch)

    def _count(self, epoch: int) -> None:
        self._work.report.points += 1
        for problem in self._tracker.state:
            self._work.report.problems[problem].hurts(self._listing.generation, epoch)

    def _points_between(self, start: int, end: int) -> list[int]:
        """Return the points inside a delta that is lost, as far as joined deltas know them."""
        found = {
            epoch
            for table in self._tables.values()
            for epoch in table.epoch[
                (table.epoch > np.uint64(start)) & (table.epoch < np.uint64(end))
            ].tolist()
        }
        return sorted(found)

    async def _open_joined(self) -> None:
        """Open all joined deltas and read their tables."""
        for info in self._listing.joined:
            self._work.report.joined += 1
            self._work.step()
            try:
                piece = await self._work.open(info)
                self._tables[info.name] = await _table(piece, info)
            except VdiskfsError as error:
                self._report_joined(info, error)
                continue
            self._ending.setdefault(info.to_epoch, []).append(info)
            last = max(info.to_epoch, self._last_use.get(info.from_epoch, 0))
            self._last_use[info.from_epoch] = last

    async def _joined(self, info: PieceInfo) -> None:
        """Look at a joined delta where it ends."""
        if any(start < info.from_epoch < end for start, end in self._lost):
            return  # it begins where nothing is known: it may be whole, and leads nobody past it
        state = self._tracker.at(info.from_epoch)
        try:
            piece = await self._work.open(info)
            self._check_joined(piece)
            change = await look(self._work, piece, pages_hurt(state))
        except VdiskfsError as error:
            self._report_joined(info, error)
            return
        if self._work.known_problem(info.name) is not None:
            # Whoever meets its damaged blocks goes round all of it.
            return
        self._tracker.reroute(info.from_epoch, change)
        if self._digest is None:
            # The chain is known again: what follows has to hang on this digest.
            self._digest, self._size = piece.head.to_digest, piece.head.size
            self._digests[info.to_epoch] = self._digest

    def _check_joined(self, piece: Piece) -> None:
        head = piece.head
        for epoch, digest in ((head.from_epoch, head.from_digest), (head.to_epoch, head.to_digest)):
            known = self._digests.get(epoch)
            if epoch not in self._digests or (known is not None and known != digest):
                raise FormatError("does not fit the chain", where=piece.name)
        table = self._tables[piece.name]
        for index in range(len(table)):
            row = table.row(index)
            if self._rows.get(row.epoch, row) != row:
                raise FormatError("its points are not those of its deltas", where=piece.name)

    def _report_joined(self, info: PieceInfo, error: VdiskfsError) -> None:
        if not is_damage(error):
            raise error
        self._work.problem(info.name, bare(error, info.name))


def is_damage(error: VdiskfsError) -> bool:
    """Return whether an error says that the vault holds other bytes than were stored."""
    return isinstance(error, (DamagedError, NotFoundError))


async def _table(piece: Piece, info: PieceInfo) -> PointTable:
    rows = await piece.rows(POINTS, 0, LIMIT - 1)
    table = concat_points([await piece.points(row) for row in rows])
    check_table(table, info)
    return table
