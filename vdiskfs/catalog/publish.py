"""Publishing a delta of the spool: its segments, then its slot, which makes the point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import trio

from vdiskfs.catalog.batches import YOUNG_S, Claims
from vdiskfs.catalog.garbage import boottime_s
from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.crash import hook
from vdiskfs.delta import Spooled, SpooledSegment, delta_metadata
from vdiskfs.delta.layout import HEAD_SIZE, DeltaHead, decode_head
from vdiskfs.delta.local import open_file
from vdiskfs.delta.names import segment_name, slot_name
from vdiskfs.delta.refs import ObjectRef
from vdiskfs.delta.segments import batch_of
from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    DamagedError,
    NotFoundError,
    SegmentsGoneError,
)
from vdiskfs.point.fetch import first_error
from vdiskfs.store import Store

UPLOADS_AT_ONCE = 4
_STATS_MOST = 4
"""Segments of a batch that are asked for one by one."""

# progress(bytes): this many more bytes are stored.
Progress = Callable[[int], None]


async def upload_segments(
    store: Store, disk_id: str, segments: list[SpooledSegment], progress: Progress | None = None
) -> set[str]:
    """Store segments, several at once. One that is there already is left alone.

    Returns:
        The ids of those that were not there.

    Raises:
        DamagedError: one is there with another size.
    """
    limiter = trio.CapacityLimiter(UPLOADS_AT_ONCE)
    made: set[str] = set()

    async def one(segment: SpooledSegment) -> None:
        async with limiter:
            if await upload_segment(store, disk_id, segment):
                made.add(segment.id)
        hook("segment.stored")
        if progress is not None:
            progress(segment.size)

    try:
        async with trio.open_nursery() as nursery:
            for segment in segments:
                nursery.start_soon(one, segment)
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    return made


async def upload_segment(store: Store, disk_id: str, segment: SpooledSegment) -> bool:
    """Store one segment; False: it is there. Its id is random: one of that name is this one."""
    name = segment_name(disk_id, segment.id)
    made = True
    try:
        await store.create_from_file(name, segment.path, metadata=segment.metadata())
    except AlreadyExistsError:
        made = False
        found = await store.stat(name)
        if found.size != segment.size:
            raise DamagedError(f"{name}: {found.size} bytes where {segment.size} were") from None
    hook("segment.uploaded")
    return made


async def check_segments(store: Store, disk_id: str, refs: Collection[ObjectRef]) -> None:
    """Check that the vault has segments; many of one batch are listed.

    Raises:
        SegmentsGoneError: one is missing.
        DamagedError: one has another size.
    """
    known: dict[str, int] = {}
    for batch, count in Counter(batch_of(ref.segment_id) for ref in refs).items():
        if count > _STATS_MOST:
            async for info in store.list(segment_name(disk_id, batch)):
                known[info.name] = info.size
    for ref in refs:
        name = ref.name(disk_id)
        try:
            size = known[name] if name in known else (await store.stat(name)).size
        except NotFoundError:
            raise SegmentsGoneError(f"{name}: the segment is not there") from None
        if size != ref.size:
            raise DamagedError(f"{name}: {size} bytes where {ref.size} were stored")


async def store_delta(
    store: Store, spooled: Spooled, progress: Progress | None, offered: Callable[[], None],
    claims: Claims,
) -> None:  # fmt: skip
    """Store a delta: its segments, then its slot; in between ``offered`` is called.

    Raises:
        ConflictError: another writer's delta is in the slot: this site is displaced.
        SegmentsGoneError: a segment it refers to, and that is not here any more, was collected.
        DamagedError: one is not in the vault though the delta is, or has another size.
    """
    began, disk_id = boottime_s(), spooled.head.disk_id
    refs = await trio.to_thread.run_sync(segment_refs, spooled.path)
    made = await upload_segments(store, disk_id, spooled.segments, progress)
    if boottime_s() - began > YOUNG_S:
        made = set()
    here = {segment.id for segment in spooled.segments}
    batches = {batch_of(ref.segment_id) for ref in refs}
    stale = {batch_of(ref.segment_id) for ref in refs if ref.segment_id not in made}
    try:
        # Invariant: claimed first, looked for then: what is claimed is not collected meanwhile.
        await claims.need(stale, batches - stale)
        await check_segments(store, disk_id, [ref for ref in refs if ref.segment_id not in here])
    except SegmentsGoneError:
        if not await is_stored(store, spooled.head):
            raise
        # What it names stays, whatever was said of the rest of its batch since.
        await _check_published(store, disk_id, refs)
    looked = boottime_s()
    offered()
    await publish_slot(store, spooled)
    if boottime_s() - looked > YOUNG_S:
        # This host slept; for a month, perhaps, and what it had claimed was collected.
        left = [one for one in spooled.segments if one.path.exists()]
        await upload_segments(store, disk_id, left)
        await _check_published(store, disk_id, refs)
    claims.spend(batches)


async def _check_published(store: Store, disk_id: str, refs: Collection[ObjectRef]) -> None:
    """Check that the vault has what a delta names that is in its slot; DamagedError."""
    try:
        await check_segments(store, disk_id, refs)
    except SegmentsGoneError as error:
        raise DamagedError(error.message, hint="vdiskfs vault repair") from error


async def publish_slot(store: Store, spooled: Spooled) -> None:
    """Create the slot. On return the point exists.

    Raises:
        ConflictError: the slot holds another writer's delta: this writer is displaced.
    """
    head = spooled.head
    name = slot_name(head.disk_id, head.generation, head.from_epoch)
    try:
        await store.create_from_file(name, spooled.path, metadata=delta_metadata(head))
    except AlreadyExistsError:
        await _recognise(store, name, head)
    hook("slot.published")


def collected(head: DeltaHead) -> ConflictError:
    """Return what to raise where a delta's slot lies below the horizon of its line."""
    name = slot_name(head.disk_id, head.generation, head.from_epoch)
    return ConflictError(
        f"{name}: is below the horizon of its line",
        hint="this site was displaced: another one has gone on from there long ago",
    )


async def is_stored(store: Store, head: DeltaHead) -> bool:
    """Say whether the vault holds this delta in its slot."""
    name = slot_name(head.disk_id, head.generation, head.from_epoch)
    try:
        found = decode_head(await store.read_range(name, 0, HEAD_SIZE), where=name)
    except NotFoundError:
        return False
    return (found.to_digest, found.writer_id) == (head.to_digest, head.writer_id)


def keep_tail(cache: IndexCache, name: str, spooled: Spooled) -> None:
    """Keep the index of a delta of the spool, so that joining it reads nothing back."""
    with spooled.path.open("rb") as file:
        file.seek(spooled.head.tail_offset)
        cache.put(name, file.read())


def segment_refs(path: Path) -> list[ObjectRef]:
    """Return the segments that a delta, or a part, of the spool refers to; in a thread."""
    table = open_file(path).objects()
    return [ref for index in range(len(table)) if (ref := table.ref(index)).segment_id]


async def _recognise(store: Store, name: str, head: DeltaHead) -> None:
    """Return if the slot holds this delta: an earlier try landed, its answer was lost."""
    found = decode_head(await store.read_range(name, 0, HEAD_SIZE), where=name)
    if (found.to_digest, found.writer_id) != (head.to_digest, head.writer_id):
        what = "a fence" if found.is_fence else "another writer's delta"
        raise ConflictError(
            f"{name}: holds {what}",
            hint="this site was displaced: another one has taken over the disk",
        )
