"""Looking at one delta for damage: its blocks, the objects it needs, the frames in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import trio

from vdiskfs.catalog.damage import Change, Problem
from vdiskfs.catalog.records import DiskRecord
from vdiskfs.delta.blocks import DATA
from vdiskfs.delta.digest import ContentHasher
from vdiskfs.delta.entries import U64, Bools, Entries, unite_extents
from vdiskfs.delta.layout import LIMIT, Kind
from vdiskfs.errors import FormatError
from vdiskfs.point import BlockCache, Piece, PieceInfo, open_piece
from vdiskfs.point.fetch import find_bad_frames, locate
from vdiskfs.store import Store
from vdiskfs.units import pages_of

READS_AT_ONCE = 4

# progress(disk, done, total): deltas of a disk looked at so far.
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class CheckReport:
    """What was looked at, and what is wrong."""

    disks: int = 0
    points: int = 0
    deltas: int = 0
    joined: int = 0
    segments: int = 0
    read_bytes: int = 0
    unused_segments: int = 0
    unused_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Return whether nothing is damaged."""
        return not self.problems

    @property
    def hurt(self) -> list[tuple[str, int, int]]:
        """Return the points that cannot be read whole: disk, generation, epoch."""
        found = {
            (problem.disk, generation, epoch)
            for problem in self.problems
            for generation, epochs in problem.points.items()
            for epoch in epochs
        }
        return sorted(found)


@dataclass(slots=True)
class Inspection:
    """The check of one disk: what is known of its objects so far."""

    store: Store
    vault_id: str
    record: DiskRecord
    report: CheckReport
    read_data: bool
    progress: Progress | None
    sizes: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    total: int = 0
    _done: int = 0
    _problems: dict[str, int] = field(default_factory=dict)
    _bad_frames: dict[str, set[int]] = field(default_factory=dict)
    _blocks: BlockCache = field(default_factory=lambda: BlockCache(8 << 20))
    _limiter: trio.CapacityLimiter = field(
        default_factory=lambda: trio.CapacityLimiter(READS_AT_ONCE)
    )

    def problem(self, name: str, message: str) -> int:
        """Report an object, once; return the problem's number."""
        if name not in self._problems:
            self._problems[name] = len(self.report.problems)
            self.report.problems.append(Problem(name, message, self.record.name))
        return self._problems[name]

    def step(self) -> None:
        """Count a delta as looked at."""
        self._done += 1
        if self.progress is not None:
            self.progress(self.record.name, self._done, max(self._done, self.total))

    async def open(self, info: PieceInfo) -> Piece:
        """Open a delta."""
        return await open_piece(
            self.store, self._blocks, info, vault_id=self.vault_id, disk_id=self.record.id
        )

    async def look(self, piece: Piece, hurt: U64, *, frames: bool = True) -> Change:
        """Read the whole index of a delta; return what it does to the pages that are hurt.

        Raises:
            FormatError: the index is damaged, or is not what its digest says.
        """
        zeros = unite_extents(await piece.zeros(0, LIMIT - 1))
        hasher = ContentHasher()
        replaced = [hurt[zeros.contains(hurt)]]
        bad: dict[int, list[U64]] = {}
        torn = piece.head.torn_page
        torn_found = torn is None or bool(zeros.contains(np.array([torn], np.uint64))[0])
        for row in await piece.rows(DATA, 0, LIMIT - 1):
            entries = await piece.entries(row)
            pageno, owner = entries.pages()
            order = np.argsort(pageno, kind="stable")
            hasher.add_pages(pageno[order], entries.sums[order])
            if zeros.contains(pageno).any():
                raise FormatError("a page is both zero and data", where=piece.name)
            torn_found = torn_found or torn in pageno
            replaced.append(hurt[np.isin(hurt, pageno)])
            for problem, rows in (await self._bad_rows(piece, entries, frames)).items():
                bad.setdefault(problem, []).append(pageno[rows[owner]])
        hasher.add_zeros(zeros)
        if hasher.digest() != piece.head.content_digest:
            raise FormatError("its content is not what its digest says", where=piece.name)
        if not torn_found:
            raise FormatError(f"page {torn}, which the cut tears, is missing", where=piece.name)
        return Change(
            np.concatenate(replaced),
            pages_of(piece.head.cut),
            {problem: np.concatenate(pages) for problem, pages in bad.items()},
        )

    async def _bad_rows(self, piece: Piece, entries: Entries, frames: bool) -> dict[int, Bools]:
        """Return for each problem the entries whose frames cannot be read because of it."""
        bad: dict[int, Bools] = {}
        for number in np.unique(entries.object).tolist():
            mine = entries.object == number
            name, said = piece.name, piece.head.object_size
            if number:
                ref = await piece.object_ref(number)
                name, said = ref.name(self.record.id), ref.size
            self.used.add(name)
            rows = mine & self._outside(name, said, entries)
            if not rows.all() and self._unread(piece, name, frames):
                rows |= await self._read(piece, entries, mine & ~rows)
            elif name in self._bad_frames:
                offsets = np.array(sorted(self._bad_frames[name]), np.uint64)
                rows |= mine & np.isin(entries.offset, offsets)
            if rows.any():
                self._bad_frames.setdefault(name, set()).update(entries.offset[rows].tolist())
                bad[self.problem(name, self._message(name, said))] = rows
        return bad

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

    def _unread(self, piece: Piece, name: str, frames: bool) -> bool:
        """Return whether frames are to be read here: those of slots, and what they could not."""
        if not self.read_data or not frames:
            return False
        return piece.head.kind is Kind.SLOT or name in self._problems

    async def _read(self, piece: Piece, entries: Entries, rows: Bools) -> Bools:
        numbers = np.flatnonzero(rows)
        part = entries.rows(numbers)
        found, read = await find_bad_frames(self.store, await locate(piece, part), self._limiter)
        self.report.read_bytes += read
        bad = np.zeros(len(entries), np.bool_)
        bad[numbers[found]] = True
        return bad
