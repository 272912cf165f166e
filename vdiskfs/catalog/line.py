"""One generation's line of deltas as the vault lists it.

Slots are named by the epoch they start at, joined deltas by level and epochs, all in
hexadecimal: a prefix names an aligned block of epochs, so that what covers the line is
found in a number of listings that grows with the logarithm of its length.
vdiskfs-format(5), "Listing".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from vdiskfs.catalog.ledger import Ledger, ledger_name, read_ledger, shortest
from vdiskfs.catalog.records import LedgerRef
from vdiskfs.delta.layout import HEAD_SIZE, ListedHead, decode_head, head_from_metadata, listed_of
from vdiskfs.delta.names import (
    joined_prefix,
    parse_joined,
    parse_slot,
    slot_name,
    slot_prefix,
)
from vdiskfs.errors import DamagedError, FormatError, NotFoundError
from vdiskfs.point import PieceInfo
from vdiskfs.store import ObjectInfo, Store

# 16**5 epochs are 12 days of one a second; a level more costs a request more to list.
MAX_LEVEL = 5
DIGITS = 16
END = 1 << 63
# With this many slots at its end, a line is surveyed again: joins have been made.
STALE_SLOTS = 48
REPAIR = "see `vdiskfs vault repair`"
"""What to do about a document without which points cannot be read."""

Span = tuple[int, int]


@dataclass(slots=True)
class Line:
    """What covers a generation from ``base`` to its tip: the coarsest deltas there are.

    Points after ``end`` are not of the lineage: a younger generation forks off there.
    ``cover`` is in order, without overlap. ``fence`` is the slot that ended the line.
    ``holes`` and ``gap`` are where slots are missing: inside the cover, and at its end,
    with later slots listed. ``bad`` are joined deltas found damaged: they are not used.
    Of a line that was thinned ``ref`` names the ledger, which is read when it is needed.

    Tasks may use it at once: what one learns is there for the others in one step.
    """

    store: Store
    disk_id: str
    generation: int
    base: int
    end: int = END
    cover: list[PieceInfo] = field(default_factory=list)
    fence: PieceInfo | None = None
    loaded: bool = False
    holes: list[Span] = field(default_factory=list)
    gap: Span | None = None
    bad: set[str] = field(default_factory=set)
    ref: LedgerRef | None = None
    ledger: Ledger | None = None
    _learning: trio.Lock = field(default_factory=trio.Lock, repr=False, compare=False)

    @property
    def tip(self) -> int:
        """Return the newest epoch known."""
        return self.cover[-1].to_epoch if self.cover else self.floor

    @property
    def floor(self) -> int:
        """Return the epoch from which on slots count: the horizon, or the base."""
        return self.base if self.ref is None else self.ref.horizon

    async def refresh(self) -> None:
        """Learn what was added: everything the first time, then what follows the tip."""
        async with self._learning:
            slots = self._trailing_slots()
            if not self.loaded:
                await self._load()
            elif len(slots) >= STALE_SLOTS:
                await self._survey(slots[0].from_epoch)
            else:
                await self._learn_slots(self.tip)

    async def load(self) -> None:
        """Learn everything, if nothing is known yet."""
        async with self._learning:
            if not self.loaded:
                await self._load()

    async def _load(self) -> None:
        kept: list[PieceInfo] = []
        if self.ref is not None:
            self.ledger = await self._read_ledger(self.ref)
            kept = shortest(self.ledger.pieces, self.base, self.ref.horizon) or []
        await self._survey(self.floor)
        self.cover = [*kept, *self.cover]
        self.loaded = True

    async def _read_ledger(self, ref: LedgerRef) -> Ledger:
        try:
            return await read_ledger(self.store, self.disk_id, self.generation, ref.id, self.base)
        except NotFoundError:
            name = ledger_name(self.disk_id, self.generation, ref.id)
            raise FormatError("the ledger is missing", where=name, hint=REPAIR) from None
        except DamagedError as error:
            error.hint = error.hint or REPAIR
            raise

    def append(self, info: PieceInfo) -> None:
        """Add the slot that starts at the tip; others are known already, or come later."""
        if info.from_epoch == self.tip:
            self.cover.append(info)

    def replace(self, info: PieceInfo) -> None:
        """Let a joined delta take the place of what it joins."""
        inside = [
            index
            for index, piece in enumerate(self.cover)
            if info.from_epoch <= piece.from_epoch and piece.to_epoch <= info.to_epoch
        ]
        if inside and (
            self.cover[inside[0]].from_epoch == info.from_epoch
            and self.cover[inside[-1]].to_epoch == info.to_epoch
        ):
            self.cover[inside[0] : inside[-1] + 1] = [info]

    async def dissolve(self, info: PieceInfo) -> None:
        """Do without a joined delta that is damaged: put what it joins in its place."""
        self.bad.add(info.name)
        pieces, missing = await self._lead((info.from_epoch, info.to_epoch), frozenset())
        self.holes += missing
        if info in self.cover:
            index = self.cover.index(info)
            self.cover[index : index + 1] = pieces

    async def chain(
        self, epoch: int, without: frozenset[str] = frozenset(), *, after: int | None = None
    ) -> list[PieceInfo]:
        """Return the longest deltas that together lead from the base, or ``after``, to an epoch.

        Raises:
            FormatError: a slot is missing.
        """
        pieces, missing = await self._lead((self.base if after is None else after, epoch), without)
        if missing:
            name = slot_name(self.disk_id, self.generation, missing[0][0])
            raise FormatError("the delta is missing", where=name)
        return pieces

    async def _lead(
        self, wanted: Span, without: frozenset[str]
    ) -> tuple[list[PieceInfo], list[Span]]:
        """Return the longest deltas from one epoch to another, in order, and what is missing."""
        without |= self.bad
        found: list[PieceInfo] = []
        if self.ledger is not None and wanted[0] < self.floor:
            # Below the horizon nothing is looked for: the ledger has all there is.
            end = min(wanted[1], self.floor)
            way = shortest(self.ledger.pieces, wanted[0], end, without)
            if way is None:
                return [], [wanted]
            found, wanted = way, (end, wanted[1])
        spans = [wanted] if wanted[0] < wanted[1] else []
        for level in range(MAX_LEVEL, -1, -1):
            rest: list[Span] = []
            for span in spans:
                pieces = await self._pieces_within(level, span, without)
                found += pieces
                rest += uncovered(span, pieces)
            spans = rest
        return sorted(found, key=lambda piece: piece.from_epoch), spans

    async def described(self, name: str) -> PieceInfo | None:
        """Return what the vault says of one delta."""
        return await self._piece(await self.store.stat(name))

    async def listed(self, level: int, span: Span) -> list[PieceInfo]:
        """List the deltas of a level that lie inside a finite span, without overlap."""
        found: list[PieceInfo] = []
        for prefix in _prefixes(span):
            found += await self._list(level, prefix)
        return choose(found, span)

    async def listed_all(self, level: int, span: Span) -> list[PieceInfo]:
        """List all deltas of a level that lie inside a finite span, whatever they overlap."""
        found = [piece for prefix in _prefixes(span) for piece in await self._list(level, prefix)]
        return [one for one in found if span[0] <= one.from_epoch and one.to_epoch <= span[1]]

    async def _pieces_within(
        self, level: int, span: Span, without: frozenset[str]
    ) -> list[PieceInfo]:
        low, high = span
        # A block of the level has to end inside, or the listing can hold nothing of use.
        if level and (high >> 4 * level) == (low >> 4 * level):
            return []
        known = choose([piece for piece in self.cover if piece.level == level], span)
        known = [piece for piece in known if piece.name not in without]
        missing = uncovered(span, known)
        for gap in missing:
            if level == 0 or (gap[1] >> 4 * level) != (gap[0] >> 4 * level):
                listed = await self.listed(level, gap)
                known += [piece for piece in listed if piece.name not in without]
        return known

    async def _survey(self, start: int) -> None:
        """Find what covers [start, tip), coarsest first."""
        spans: list[Span] = [(start, END)]
        found: list[PieceInfo] = []
        for level in range(MAX_LEVEL, 0, -1):
            rest: list[Span] = []
            for span in spans:
                if span[1] == END:
                    pieces = await self._list_onward(level, span[0])
                elif (span[1] >> 4 * level) != (span[0] >> 4 * level):
                    pieces = await self.listed(level, span)
                else:
                    pieces = []
                found += pieces
                rest += uncovered(span, pieces)
            spans = rest
        holes: list[Span] = []
        for span in spans[:-1]:
            slots = await self.listed(0, span)
            found += slots
            holes += uncovered(span, slots)
        slots, fence, gap = await self._slots_from(spans[-1][0])
        # In one step, so that nobody sees a line half surveyed. What was published meanwhile
        # may have come after its block was listed.
        known = self.cover
        kept = [piece for piece in known if piece.to_epoch <= start]
        self.cover = sorted([*kept, *found, *slots], key=lambda piece: piece.from_epoch)
        self.holes = holes
        self._end_with(known, fence, gap)

    async def _learn_slots(self, start: int) -> None:
        """Add the slots from an epoch to the tip."""
        self._end_with(*await self._slots_from(start))

    def _end_with(
        self, slots: Iterable[PieceInfo], fence: PieceInfo | None, gap: Span | None
    ) -> None:
        for piece in slots:
            self.append(piece)
        self.fence = fence or self.fence
        self.gap = gap

    async def _slots_from(
        self, start: int
    ) -> tuple[list[PieceInfo], PieceInfo | None, Span | None]:
        """Follow the slots from an epoch to the tip: these, the fence, the gap behind them."""
        found: list[PieceInfo] = []
        position, width = start, 1
        while True:
            block = position >> 4 * width
            slots = {
                piece.from_epoch: piece for piece in await self._list(0, (block, width))
            }  # fmt: skip
            while (piece := slots.get(position)) is not None:
                if piece.to_epoch == piece.from_epoch:
                    return found, piece, None
                found.append(piece)
                position = piece.to_epoch
            if position >> 4 * width == block:
                later = [epoch for epoch in slots if epoch > position]
                if later and not await self._is_hole(position):
                    continue
                return found, None, (position, min(later)) if later else None
            # The block was full: the next one may be, so look at a larger one.
            width = min(width + 1, DIGITS)

    async def _list_onward(self, level: int, start: int) -> list[PieceInfo]:
        """List the deltas of a level from an epoch on: all, or as long as blocks are full."""
        if level == MAX_LEVEL:
            return choose(await self._list(level, (0, DIGITS)), (start, END))
        found: list[PieceInfo] = []
        width = level + 1
        position = start
        while width <= DIGITS:
            block = position >> 4 * width
            end = (block + 1) << 4 * width
            found += await self._list(level, (block, width))
            reached = max((piece.to_epoch for piece in found), default=0)
            if reached <= end - (1 << 4 * level):
                break
            position, width = end, width + 1
        return choose(found, (start, END))

    async def _list(self, level: int, block: tuple[int, int]) -> list[PieceInfo]:
        """List a block: epochs [number << 4*width, (number+1) << 4*width)."""
        number, width = block
        digits = f"{number:0{DIGITS - width}x}" if width < DIGITS else ""
        if level:
            prefix = joined_prefix(self.disk_id, self.generation, level) + digits
        else:
            prefix = slot_prefix(self.disk_id, self.generation) + digits
        pieces = []
        for info in [info async for info in self.store.list(prefix)]:
            piece = await self._piece(info)
            if piece is not None and piece.level == level and piece.name not in self.bad:
                pieces.append(piece)
        return pieces

    async def _piece(self, info: ObjectInfo) -> PieceInfo | None:
        listed = head_from_metadata(dict(info.metadata))
        joined = parse_joined(info.name)
        if joined is not None:
            _, level, low, high, revision = joined
            if low >= high or high >= END:
                return None
            return PieceInfo(info.name, self.generation, level, low, high, info.size, listed,
                             revision)  # fmt: skip
        slot = parse_slot(info.name)
        if slot is None:
            return None
        if listed is None:
            # The store has lost what stood beside the object: the object says it itself.
            listed = await self._read_listed(info)
        if listed is None:
            # Whoever opens it will say so; nearly every slot is of one epoch.
            return PieceInfo(info.name, self.generation, 0, slot[1], slot[1] + 1, info.size)
        if not slot[1] <= listed.to_epoch:
            raise FormatError("the delta ends before it starts", where=info.name)
        return PieceInfo(info.name, self.generation, 0, slot[1], listed.to_epoch, info.size, listed)

    async def _read_listed(self, info: ObjectInfo) -> ListedHead | None:
        try:
            data = await self.store.read_range(info.name, 0, min(HEAD_SIZE, info.size))
            return listed_of(decode_head(data, where=info.name))
        except DamagedError:
            return None

    async def _is_hole(self, position: int) -> bool:
        """Return whether a slot is missing, and was not just created while others were listed."""
        try:
            await self.store.stat(slot_name(self.disk_id, self.generation, position))
        except NotFoundError:
            return True
        return False

    def _trailing_slots(self) -> list[PieceInfo]:
        slots: list[PieceInfo] = []
        for piece in reversed(self.cover):
            if piece.level or piece.from_epoch < self.floor:
                break
            slots.append(piece)
        return slots[::-1]


class DamagedJoinError(Exception):
    """A joined delta of a line cannot be read."""

    def __init__(self, line: Line, piece: PieceInfo) -> None:
        super().__init__(piece.name)
        self.line = line
        self.piece = piece


def uncovered(span: Span, pieces: Iterable[PieceInfo]) -> list[Span]:
    """Return what pieces (inside the span, without overlap) leave open."""
    low, high = span
    rest: list[Span] = []
    for piece in sorted(pieces, key=lambda piece: piece.from_epoch):
        if low < piece.from_epoch:
            rest.append((low, piece.from_epoch))
        low = max(low, piece.to_epoch)
    if low < high:
        rest.append((low, high))
    return rest


def choose(pieces: Iterable[PieceInfo], span: Span) -> list[PieceInfo]:
    """Return pieces inside a span without overlap: the longest, then the newest revision."""
    chosen: list[PieceInfo] = []
    position = span[0]
    order = sorted(pieces, key=lambda piece: (piece.from_epoch, -piece.to_epoch, -piece.revision))
    for piece in order:
        if piece.from_epoch >= position and piece.from_epoch < piece.to_epoch <= span[1]:
            chosen.append(piece)
            position = piece.to_epoch
    return chosen


def _prefixes(span: Span) -> list[tuple[int, int]]:
    """Return at most two blocks that hold all epochs of a finite span."""
    low, high = span
    width = 0
    while high - low > 1 << 4 * width:
        width += 1
    first, last = low >> 4 * width, (high - 1) >> 4 * width
    return [(first, width)] if first == last else [(first, width), (last, width)]
