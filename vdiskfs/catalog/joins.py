"""Joining: when a block of 16 is complete, its deltas get one index.

Level k covers an aligned block of 16**k epochs. A slot with an index above 4 MiB, or one that
lies in segments, is left out at every level and read by itself; the runs on both sides of it
are joined. Joined deltas are additions: what they join stays, and a crash leaves nothing half
made.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import trio

from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.catalog.line import MAX_LEVEL, Line
from vdiskfs.catalog.tables import SLOT_INDEX_LIMIT, Tables, tail_bytes
from vdiskfs.delta import delta_metadata
from vdiskfs.delta.joined import points_of, write_joined
from vdiskfs.delta.layout import DeltaHead, listed_of
from vdiskfs.delta.local import LocalDelta, open_tail
from vdiskfs.delta.names import joined_name
from vdiskfs.delta.points import PointTable, concat_points
from vdiskfs.errors import AlreadyExistsError, DamagedError, NotFoundError, VdiskfsError
from vdiskfs.point import PieceInfo
from vdiskfs.point.piece import check_identity

# The indexes of one join are held in memory together.
JOIN_LIMIT = 128 << 20
_READ = 4 << 20


async def make_joins(line: Line, tables: Tables, cache: IndexCache | None) -> int:
    """Make the joined deltas that are due on a line; return how many.

    Raises:
        DamagedError, NotFoundError: a delta to join is damaged. Nothing was made of it; what
            is whole was joined.
    """
    made = 0
    damage: VdiskfsError | None = None
    apart = await tables.apart(one for one in line.cover if one.from_epoch >= line.floor)
    for level in range(1, MAX_LEVEL + 1):
        for run in list(due_runs(line, level, apart)):
            try:
                await _join(line, tables, cache, level=level, run=run)
            except (DamagedError, NotFoundError) as error:
                damage = damage or error
            else:
                made += 1
    if damage is not None:
        raise damage
    return made


def due_runs(line: Line, level: int, apart: set[str]) -> Iterator[list[PieceInfo]]:
    """Yield the runs of deltas that make up a complete block of a level and are not joined.

    ``apart`` are the slots that are read by themselves.
    """
    shift = 4 * level
    tip = line.tip
    run: list[PieceInfo] = []
    for piece in line.cover:
        block = piece.from_epoch >> shift
        inside = (piece.to_epoch - 1) >> shift == block and (block + 1) << shift <= tip
        fits = (
            inside
            and piece.from_epoch >= line.floor
            and piece.level < level
            and piece.name not in apart
            and tail_bytes(piece) <= JOIN_LIMIT
        )
        if run and (not fits or run[-1].from_epoch >> shift != block):
            yield from _useful(run)
            run = []
        if fits:
            run.append(piece)
    yield from _useful(run)


def _useful(run: list[PieceInfo]) -> Iterator[list[PieceInfo]]:
    if len(run) > 1 and sum(tail_bytes(piece) for piece in run) <= JOIN_LIMIT:
        yield run


async def _join(
    line: Line, tables: Tables, cache: IndexCache | None, *, level: int, run: list[PieceInfo]
) -> None:
    tails = [await read_tail(tables, cache, piece) for piece in run]
    with _workplace(cache) as directory:
        path, head, table = await trio.to_thread.run_sync(
            _write, tables, run, tails, level, directory
        )
        epochs = (head.from_epoch, head.to_epoch)
        name = joined_name(line.disk_id, line.generation, level, epochs)
        info = PieceInfo(name, line.generation, level, *epochs, head.object_size, listed_of(head))
        try:
            await tables.store.create_from_file(name, path, metadata=delta_metadata(head))
        except AlreadyExistsError:
            # Made by an earlier try, or by another site from the same deltas.
            info = await line.described(name) or info
        else:
            if cache is not None:
                await trio.to_thread.run_sync(keep_tail, cache, name, path, head)
    line.replace(info)
    if cache is not None:
        await trio.to_thread.run_sync(_put_aside, cache, run, tails)
    tables.keep(info, table, [piece.name for piece in run])


@contextlib.contextmanager
def _workplace(cache: IndexCache | None) -> Iterator[Path]:
    if cache is not None:
        with cache.workplace() as directory:
            yield directory
    else:
        with tempfile.TemporaryDirectory(prefix="vdiskfs-join-") as name:
            yield Path(name)


def _write(
    tables: Tables, run: list[PieceInfo], tails: list[bytes], level: int, directory: Path
) -> tuple[Path, DeltaHead, PointTable]:
    deltas: list[LocalDelta] = []
    for piece, tail in zip(run, tails, strict=True):
        delta = open_tail(tail, where=piece.name)
        check_identity(delta.head, piece, vault_id=tables.vault_id, disk_id=tables.disk_id)
        deltas.append(delta)
    path, head = write_joined(deltas, level, directory)
    return path, head, concat_points([points_of(delta) for delta in deltas])


async def read_tail(tables: Tables, cache: IndexCache | None, piece: PieceInfo) -> bytes:
    """Return the tail of a delta: from the cache if it is right there, else the vault's."""
    length = tail_bytes(piece)
    if cache is not None:
        found = await trio.to_thread.run_sync(cache.get, piece.name)
        if found is not None and len(found) == length and _is_whole(found, piece):
            return found
    if not 0 < length <= piece.size:
        raise DamagedError(f"{piece.name}: the listing says an impossible length")
    parts = []
    for start in range(piece.size - length, piece.size, _READ):
        size = min(_READ, piece.size - start)
        parts.append(await tables.store.read_range(piece.name, start, size))
    tail = b"".join(parts)
    if cache is not None and length <= SLOT_INDEX_LIMIT:
        # What is thinned is joined again a few times, from hour to hour.
        await trio.to_thread.run_sync(cache.put, piece.name, tail)
    return tail


def _is_whole(tail: bytes, piece: PieceInfo) -> bool:
    try:
        open_tail(tail, where=piece.name)
    except DamagedError:
        return False
    return True


def _put_aside(cache: IndexCache, run: list[PieceInfo], tails: list[bytes]) -> None:
    """Nobody joins them again; but only slots cannot be made again from others."""
    slots = zip(run, tails, strict=True)
    cache.put_aside({piece.name: tail for piece, tail in slots if piece.level == 0})
    cache.drop([piece.name for piece in run])


def keep_tail(cache: IndexCache, name: str, path: Path, head: DeltaHead) -> None:
    """Put the tail of a delta that was just written into the cache; in a thread."""
    with path.open("rb") as file:
        file.seek(head.tail_offset)
        cache.put(name, file.read())
