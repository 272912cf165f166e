"""Opening the chain of deltas that leads to a point, and checking that it holds together."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

import trio

from vdiskfs.catalog.line import Line
from vdiskfs.catalog.tables import Tables
from vdiskfs.delta import genesis_digest
from vdiskfs.errors import DamagedError, FormatError, NotFoundError, VdiskfsError
from vdiskfs.point import Piece, PieceInfo
from vdiskfs.point.fetch import first_error

OPEN_AT_ONCE = 8

Broken = tuple[PieceInfo, VdiskfsError]


class Chains:
    """Opens chains of one disk."""

    def __init__(self, tables: Tables, name: str) -> None:
        """Open deltas through ``tables``; ``name`` is the disk's, for errors."""
        self._tables = tables
        self._name = name

    async def open(
        self, lines: Sequence[Line], epoch: int, without: frozenset[str] = frozenset(),
        *, after: int | None = None,
    ) -> list[Piece]:  # fmt: skip
        """Open the deltas that lead to an epoch of the last line, and check their links.

        They begin with the empty disk, or ``after`` an epoch of the first line. A joined delta
        that is damaged is gone round; what it joins is still there.
        """
        bad = set(without)
        while True:
            infos: list[PieceInfo] = []
            for index, line in enumerate(lines):
                await line.load()
                end = epoch if index == len(lines) - 1 else line.end
                start = after if index == 0 else None
                chain = line.chain(end, frozenset(bad), after=start)
                infos += await self._wrapped(chain, epoch)
            pieces, broken = await self._open_all(infos)
            if not broken:
                broken = self._broken_links(pieces, after)
            if not broken:
                return pieces
            joined = {info.name for info, _ in broken if info.level}
            if not joined:
                error = broken[0][1]
                missing = " is missing" if isinstance(error, NotFoundError) else ""
                raise DamagedError(f"{self._name}@{epoch}: {error.message}{missing}") from error
            bad |= joined

    async def _wrapped(self, infos: Awaitable[list[PieceInfo]], epoch: int) -> list[PieceInfo]:
        try:
            return await infos
        except DamagedError as error:
            raise DamagedError(f"{self._name}@{epoch}: {error.message}") from error

    async def _open_all(self, infos: Sequence[PieceInfo]) -> tuple[list[Piece], list[Broken]]:
        """Open deltas side by side; return them in order, and those that cannot be opened."""
        opened: dict[str, Piece] = {}
        broken: list[Broken] = []
        limiter = trio.CapacityLimiter(OPEN_AT_ONCE)

        async def one(info: PieceInfo) -> None:
            async with limiter:
                try:
                    opened[info.name] = await self._tables.piece(info)
                except (DamagedError, NotFoundError) as error:
                    broken.append((info, error))

        try:
            async with trio.open_nursery() as nursery:
                for info in infos:
                    nursery.start_soon(one, info)
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        return [opened[info.name] for info in infos if info.name in opened], broken

    def _broken_links(self, pieces: Sequence[Piece], after: int | None) -> list[Broken]:
        """Return the deltas at a place where the chain of digests is broken."""
        digest = genesis_digest(self._tables.vault_id, self._tables.disk_id)
        epoch, size = 0, 0
        if after is not None and pieces:
            first = pieces[0].head
            digest, epoch, size = first.from_digest, after, first.from_size
        before: list[PieceInfo] = []
        for piece in pieces:
            head = piece.head
            if (head.from_digest, head.from_epoch, head.from_size) != (digest, epoch, size):
                error = FormatError("does not follow the delta before it", where=piece.name)
                return [(info, error) for info in [piece.info, *before]]
            digest, epoch, size = head.to_digest, head.to_epoch, head.size
            before = [piece.info]
        return []
