"""Joining: when a block of 16 is complete, its deltas get one index.

Level k covers an aligned block of 16**k epochs. A slot with an index above 4 MiB, or one that
lies in segments, is left out at every level and read by itself, and the runs on both sides of it
are joined; as long as few deltas lead to the tip. Joined deltas are additions: what they join
stays, and a crash leaves nothing half made.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import trio

from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.catalog.indexes import (
    INDEX_LIMIT,
    JOIN_LIMIT,
    Indexes,
    index_bound,
    keep_tail,
    read_indexes,
)
from vdiskfs.catalog.line import MAX_LEVEL, Line
from vdiskfs.catalog.tables import Tables, tail_bytes
from vdiskfs.delta import delta_metadata
from vdiskfs.delta.joined import points_of, write_joined
from vdiskfs.delta.layout import DeltaHead, listed_of
from vdiskfs.delta.names import joined_name
from vdiskfs.delta.points import PointTable, concat_points
from vdiskfs.errors import AlreadyExistsError, DamagedError, NotFoundError, VdiskfsError
from vdiskfs.point import PieceInfo

# With more deltas than this above the horizon large ones are joined, too.
_WAY_LIMIT = 24


async def make_joins(line: Line, tables: Tables, cache: IndexCache | None) -> int:
    """Make the joined deltas that are due on a line; return how many.

    Raises:
        DamagedError, NotFoundError: a delta to join is damaged. Nothing was made of it; what
            is whole was joined.
    """
    made = 0
    damage: VdiskfsError | None = None
    apart = await tables.apart(one for one in line.cover if one.from_epoch >= line.floor)
    for wide in (False, True):
        for level in range(1, MAX_LEVEL + 1):
            for run in list(due_runs(line, level, apart, wide=wide)):
                if wide and _way_length(line) <= _WAY_LIMIT:
                    break
                try:
                    await _join(line, tables, cache, level=level, run=run)
                except (DamagedError, NotFoundError) as error:
                    damage = damage or error
                else:
                    made += 1
    if damage is not None:
        raise damage
    return made


def due_runs(
    line: Line, level: int, apart: set[str], *, wide: bool = False
) -> Iterator[list[PieceInfo]]:
    """Yield the runs of deltas that make up a complete block of a level and are not joined.

    ``apart`` are the slots that are read by themselves; with ``wide`` none is, and what was
    joined beside them at this level is part of a run.
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
            and (
                piece.level <= level
                if wide
                else piece.level < level
                and piece.name not in apart
                and tail_bytes(piece) <= JOIN_LIMIT
            )
        )
        if run and (not fits or run[-1].from_epoch >> shift != block):
            yield from _useful(run, wide=wide)
            run = []
        if fits:
            run.append(piece)
    yield from _useful(run, wide=wide)


def _useful(run: list[PieceInfo], *, wide: bool) -> Iterator[list[PieceInfo]]:
    if len(run) > 1 and (
        index_bound(run) <= INDEX_LIMIT
        if wide
        else sum(tail_bytes(piece) for piece in run) <= JOIN_LIMIT
    ):
        yield run


def _way_length(line: Line) -> int:
    return sum(piece.from_epoch >= line.floor for piece in line.cover)


async def _join(
    line: Line, tables: Tables, cache: IndexCache | None, *, level: int, run: list[PieceInfo]
) -> None:
    indexes = await read_indexes(tables, cache, run)
    with _workplace(cache) as directory:
        path, head, table = await trio.to_thread.run_sync(_write, tables, indexes, level, directory)
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
        await trio.to_thread.run_sync(_put_aside, cache, run, indexes.tails)
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
    tables: Tables, indexes: Indexes, level: int, directory: Path
) -> tuple[Path, DeltaHead, PointTable]:
    deltas = indexes.open(tables.vault_id, tables.disk_id)
    path, head = write_joined(deltas, level, directory)
    return path, head, concat_points([points_of(delta) for delta in deltas])


def _put_aside(cache: IndexCache, run: list[PieceInfo], tails: dict[str, bytes]) -> None:
    """Nobody joins them again; but only slots cannot be made again from others."""
    slots = {piece.name for piece in run if piece.level == 0}
    cache.put_aside({name: tail for name, tail in tails.items() if name in slots})
    cache.drop([piece.name for piece in run])
