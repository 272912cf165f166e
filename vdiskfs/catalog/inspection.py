"""Looking at one delta for damage: its blocks, the objects it needs, the frames in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import trio

from vdiskfs.catalog.ledger import LEAF_LEVEL
from vdiskfs.catalog.records import DiskRecord
from vdiskfs.catalog.report import CheckReport, Problem
from vdiskfs.delta.blocks import OBJECTS, POINTS
from vdiskfs.delta.entries import I64, U64, Bools, Entries, distinct
from vdiskfs.delta.layout import HEAD_SIZE, LIMIT, DeltaHead, Kind, encode_head
from vdiskfs.delta.names import parse_joined, parse_segment
from vdiskfs.delta.segments import SEGMENT_HEAD_SIZE, decode_segment_head
from vdiskfs.errors import DamagedError, FormatError, NotFoundError, VdiskfsError
from vdiskfs.point import BlockCache, Piece, PieceInfo, open_piece
from vdiskfs.point.fetch import find_bad_pages, locate
from vdiskfs.store import Store

READS_AT_ONCE = 4

# progress(disk, done, total): deltas of a disk looked at so far.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Looked:
    """What a check read: the next one reads the data again of what was damaged, or is new.

    ``whole``: deltas of which all could be read, and segments; ``hurt``: objects with problems.
    """

    whole: frozenset[str] | set[str] = frozenset()
    hurt: frozenset[str] | set[str] = frozenset()

    def knows(self, delta: str, name: str) -> bool:
        """Say whether what a delta has in an object was read, and was right."""
        return delta in self.whole and name not in self.hurt


NOTHING = Looked()
"""No check came before."""


@dataclass(slots=True)
class Inspection:
    """The check of one disk: what is known of its objects so far."""

    store: Store
    vault_id: str
    record: DiskRecord
    report: CheckReport
    read_data: bool
    progress: Progress | None
    before: Looked = NOTHING
    whole: set[str] = field(default_factory=set)
    """As in `Looked`."""
    sizes: dict[str, int] = field(default_factory=dict)
    used: dict[int, dict[str, int]] = field(default_factory=dict)
    """Objects that deltas refer to, by generation, each with where the last of these begins."""
    total: int = 0
    _needs: dict[str, set[str]] = field(default_factory=dict)  # by the delta that is looked at
    _read: set[str] = field(default_factory=set)
    """Objects of which all frames were read: those of a slot whose index is whole."""
    _gaps: list[tuple[int, int, int]] = field(default_factory=list)
    """Generation, start and end of what has an index that is not whole."""
    _nameless: set[str] = field(default_factory=set)
    """Deltas with frames of which it is not known in what object they are."""
    _done: int = 0
    _problems: dict[str, int] = field(default_factory=dict)
    _bad: dict[str, dict[int, U64]] = field(default_factory=dict)  # pages by object, offset
    _begun: set[str] = field(default_factory=set)
    _blocks: BlockCache = field(default_factory=lambda: BlockCache(8 << 20))
    _limiter: trio.CapacityLimiter = field(
        default_factory=lambda: trio.CapacityLimiter(READS_AT_ONCE)
    )

    def problem(self, name: str, message: str) -> int:
        """Report an object, once; return the problem's number."""
        if name not in self._problems:
            joined = parse_joined(name)
            if joined is not None and joined[1] != LEAF_LEVEL:
                message = f"{message} (points are read without it)"
            self._problems[name] = len(self.report.problems)
            self.report.problems.append(Problem(name, message, self.record.name))
        return self._problems[name]

    def use(self, name: str, piece: Piece) -> None:
        """Note that a delta needs an object."""
        used, start = self.used.setdefault(piece.head.generation, {}), piece.head.from_epoch
        used[name] = max(start, used.get(name, 0))
        self._needs.setdefault(piece.name, set()).add(name)

    def looked_at(self, piece: Piece, *, whole: bool) -> None:
        """Note that all was read of a delta that can be: of a ``whole`` index all frames."""
        names, head = self._needs.pop(piece.name, set()), piece.head
        if whole and piece.name not in self._nameless:
            self.whole.add(piece.name)
            if head.kind is Kind.SLOT:
                self._read |= names
        elif head.kind is Kind.SLOT or piece.info.level == LEAF_LEVEL:
            self.gap(head.generation, head.from_epoch, head.to_epoch)

    def gap(self, generation: int, start: int, end: int) -> None:
        """Note a stretch that has frames which nobody has read: where they are is not known."""
        self._gaps.append((generation, start, end))

    def is_used(self, name: str) -> bool:
        """Say whether a delta that was looked at needs an object."""
        return any(name in used for used in self.used.values())

    def forget(self, count: int) -> None:
        """Forget the problems but for the first ones."""
        del self.report.problems[count:]
        self._problems = {name: at for name, at in self._problems.items() if at < count}

    def looked(self) -> Looked:
        """Return what was read."""
        return Looked(self.whole, set(self._problems))

    def end(self) -> None:
        """Forget what only the check itself needs: it is over."""
        self._blocks = BlockCache(8 << 20)
        for known in (self.sizes, self._bad, self._begun, self._needs, self._read, self._gaps,
                      self._nameless):  # fmt: skip
            known.clear()

    def known_problem(self, name: str) -> int | None:
        """Return the number of an object's problem, or None."""
        return self._problems.get(name)

    def step(self) -> None:
        """Count a delta as looked at."""
        self._done += 1
        if self.progress is not None:
            self.progress(self.record.name, self._done, max(self._done, self.total))

    async def open(self, info: PieceInfo) -> Piece:
        """Open a delta."""
        piece = await open_piece(
            self.store, self._blocks, info, vault_id=self.vault_id, disk_id=self.record.id
        )
        if self.read_data and info.name not in self._begun:
            self._begun.add(info.name)
            if not self.before.knows(info.name, info.name):
                await self._look_at_rest(piece)
        return piece

    async def look_at_segment(self, name: str) -> None:
        """Look at the head of a segment. It hurts no point: readers do not need it."""
        parsed = parse_segment(name)
        self.whole.add(name)
        if self.before.knows(name, name):
            return
        try:
            stored = await self.store.read_range(name, 0, SEGMENT_HEAD_SIZE)
            head = decode_segment_head(stored, where=name)
            if (head.vault_id, head.disk_id, head.segment_id, head.size) != (
                self.vault_id, self.record.id, parsed, self.sizes[name],
            ):  # fmt: skip
                raise FormatError("not the object that was written under this name", where=name)
        except (DamagedError, NotFoundError) as error:
            self.problem(name, bare(error, name))

    async def _look_at_rest(self, piece: Piece) -> None:
        """Look at what no reader may need: the head at the start, objects and points."""
        try:
            if await self.store.read_range(piece.name, 0, HEAD_SIZE) != encode_head(piece.head):
                raise FormatError("its two heads differ", where=piece.name)
            for row in await piece.rows(POINTS, 0, LIMIT - 1):
                await piece.points(row)
            for row in await piece.rows(OBJECTS, 0, LIMIT - 1):
                await piece.object_ref(int(row["first"]))
        except (DamagedError, NotFoundError) as error:
            self.problem(piece.name, bare(error, piece.name))

    async def bad_pages(self, piece: Piece, entries: Entries) -> dict[int, Bools]:
        """Return for each problem which pages of the entries cannot be read because of it."""
        bad: dict[int, Bools] = {}
        owner = np.repeat(np.arange(len(entries)), np.bitwise_count(entries.mask))
        for number in distinct(entries.object).tolist():
            mine = entries.object == number
            name, said = piece.name, piece.head.object_size
            if number:
                try:
                    ref = await piece.object_ref(number)
                except (DamagedError, NotFoundError) as error:
                    bad[self.problem(piece.name, bare(error, piece.name))] = mine[owner]
                    self._nameless.add(piece.name)
                    continue
                name, said = ref.name(self.record.id), ref.size
            self.use(name, piece)
            outside = mine & self._outside(name, said, entries)
            pages = outside[owner] | await self._damaged(
                piece, entries, np.flatnonzero(mine & ~outside), owner, name
            )
            if pages.any():
                self._remember(name, entries, owner, pages)
                problem = self.problem(name, self._message(name, said))
                bad[problem] = pages | bad.get(problem, False)
        return bad

    async def _damaged(
        self, piece: Piece, entries: Entries, rows: I64, owner: I64, name: str
    ) -> Bools:
        """Return which pages of some entries of one object are bad: read, or known to be."""
        pages = np.zeros(len(entries.sums), np.bool_)
        if len(rows) and self._is_read_here(piece, name):
            part = entries.rows(rows)
            found, read = await find_bad_pages(self.store, await locate(piece, part), self._limiter)
            self.report.read_bytes += read
            pages[np.isin(owner, rows)] = found
        elif name in self._bad:
            known = self._bad[name]
            pageno, _ = entries.pages()
            for row in rows.tolist():
                wrong = known.get(int(entries.offset[row]))
                if wrong is not None:
                    mine = owner == row
                    pages[mine] = np.isin(pageno[mine], wrong)
        return pages

    def _remember(self, name: str, entries: Entries, owner: I64, pages: Bools) -> None:
        pageno, _ = entries.pages()
        known = self._bad.setdefault(name, {})
        for row in distinct(owner[pages]).tolist():
            offset = int(entries.offset[row])
            wrong = pageno[pages & (owner == row)]
            known[offset] = distinct(np.concatenate([known.get(offset, wrong), wrong]))

    def _outside(self, name: str, said: int, entries: Entries) -> Bools:
        """Return which entries end beyond what is there of their object."""
        size = min(self.sizes.get(name, 0), said)
        outside: Bools = entries.offset + entries.length > np.uint64(size)
        return outside

    def _message(self, name: str, said: int) -> str:
        size = self.sizes.get(name)
        if size is None:
            return "is missing"
        return f"{size} bytes where {said} were stored" if size != said else "frames are damaged"

    def _is_read_here(self, piece: Piece, name: str) -> bool:
        """Return whether frames are to be read: for slots and leaves, and where none could say."""
        if not self.read_data or self.before.knows(piece.name, name):
            return False
        if piece.info.level == LEAF_LEVEL:
            return True
        if piece.head.kind is Kind.SLOT or (name in self._problems and name not in self._bad):
            return True
        return name not in self._read and self._has_gap(piece.head)

    def _has_gap(self, head: DeltaHead) -> bool:
        """Say whether a joined delta leads past what could not be read."""
        return any(
            generation == head.generation and start < head.to_epoch and head.from_epoch < end
            for generation, start, end in self._gaps
        )


def bare(error: VdiskfsError, name: str) -> str:
    """Return what an error says, without the object's name in front."""
    if isinstance(error, NotFoundError):
        return "is missing" if error.message.startswith(name) else error.message
    return error.message.removeprefix(f"{name}: ")
