"""Joined deltas: one index over the frames of many deltas, and the table of their points.

No frame is moved: entries refer to the slots and segments where the frames are. So a
point is opened through few indexes, whatever the length of the chain.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from vdiskfs.delta.builder import IndexBuilder
from vdiskfs.delta.layout import HEAD_SIZE, NO_ID, DeltaHead, Kind
from vdiskfs.delta.local import LocalDelta
from vdiskfs.delta.merge import (
    INVALID,
    ObjectNumbers,
    Source,
    merge_into,
    page_limits,
    source_of,
)
from vdiskfs.delta.points import PointTable, concat_points, make_points, point_row
from vdiskfs.delta.refs import ObjectRef
from vdiskfs.delta.tail import settle, write_tail
from vdiskfs.errors import FormatError


def write_joined(
    deltas: Sequence[LocalDelta], level: int, directory: Path, *, points: PointTable | None = None
) -> tuple[Path, DeltaHead]:
    """Join deltas that follow each other, oldest first; return the file and its head.

    ``points`` are those inside, where not all of the deltas' points are; then the head has the
    number of the seal that the newest delta has.

    Raises:
        FormatError: they do not follow each other, or one is damaged.
    """
    check_links([delta.head for delta in deltas])
    newest = list(reversed(deltas))
    limits = page_limits([delta.head.cut for delta in newest])
    sources = [_source(delta, limit) for delta, limit in zip(newest, limits, strict=True)]
    heads = [delta.head for delta in deltas]
    if points is None:
        points = concat_points([points_of(delta) for delta in deltas])
        heads[-1] = replace(heads[-1], group_id=NO_ID)
    return _write(sources, heads, level, points, directory)


def write_moved(
    joined: LocalDelta, part: LocalDelta, directory: Path
) -> tuple[Path, DeltaHead]:  # fmt: skip
    """Write a joined delta again, of which a part of a pass holds some pages.

    Raises:
        FormatError: the part does not hold what the delta says.
    """
    sources = [source_of(part, INVALID, 1 << 62), source_of(joined, INVALID, 1 << 62)]
    path, head = _write(sources, [joined.head], joined.head.level, joined.points(), directory)
    if head.content_digest != joined.head.content_digest:
        path.unlink()
        raise FormatError("what was moved is not what was there", where=joined.where)
    return path, head


def _write(
    sources: Sequence[Source], heads: Sequence[DeltaHead], level: int, points: PointTable,
    directory: Path,
) -> tuple[Path, DeltaHead]:  # fmt: skip
    numbers = ObjectNumbers(sources)
    builder = IndexBuilder(directory)
    path = directory / f"{uuid.uuid4().hex}.joined"
    try:
        content = merge_into(builder, sources, numbers)
        builder.add_points(points)
        builder.add_objects(numbers.table())
        head = _head(heads, level, content)
        temporary = path.with_suffix(".tmp")
        with temporary.open("xb") as out:
            head = write_tail(out, HEAD_SIZE, head, builder, rows=builder.rows())
            settle(out, temporary, path)
    finally:
        builder.close()
    return path, head


def check_links(heads: Sequence[DeltaHead]) -> None:
    """Check that deltas, oldest first, follow each other.

    Raises:
        FormatError: one does not start where the one before it ends.
    """
    for before, after in pairwise(heads):
        if (before.to_digest, before.to_epoch, before.size, before.disk_id) != (
            after.from_digest, after.from_epoch, after.from_size, after.disk_id,
        ):  # fmt: skip
            raise FormatError(f"epoch {after.from_epoch} does not follow the delta before it")


def points_of(delta: LocalDelta) -> PointTable:
    """Return the points inside a delta."""
    if delta.head.kind is Kind.SLOT:
        return make_points([point_row(delta.head)])
    return delta.points()


def _source(delta: LocalDelta, page_limit: int) -> Source:
    head = delta.head
    if head.kind is Kind.SLOT:
        own = ObjectRef(head.generation, head.from_epoch, "", head.object_size)
        return source_of(delta, own, page_limit)
    return source_of(delta, INVALID, page_limit)


def _head(heads: Sequence[DeltaHead], level: int, content: bytes) -> DeltaHead:
    first, last = heads[0], heads[-1]
    return DeltaHead(
        kind=Kind.JOINED, level=level, vault_id=last.vault_id, disk_id=last.disk_id,
        writer_id=last.writer_id, generation=last.generation, from_epoch=first.from_epoch,
        to_epoch=last.to_epoch, time_ns=last.time_ns, first_time_ns=first.first_time_ns,
        size=last.size, cut=min(head.cut for head in heads), from_size=first.from_size,
        from_digest=first.from_digest, to_digest=last.to_digest, content_digest=content,
        changed_bytes=sum(head.changed_bytes for head in heads), group_id=last.group_id,
    )  # fmt: skip
