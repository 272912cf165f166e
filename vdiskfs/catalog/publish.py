"""Publishing a delta of the spool: its segments, then its slot, which makes the point."""

from __future__ import annotations

from collections.abc import Callable

import trio

from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.crash import hook
from vdiskfs.delta import Spooled, SpooledSegment, delta_metadata
from vdiskfs.delta.layout import HEAD_SIZE, DeltaHead, decode_head
from vdiskfs.delta.local import open_file
from vdiskfs.delta.names import segment_name, slot_name
from vdiskfs.errors import AlreadyExistsError, ConflictError, DamagedError, NotFoundError
from vdiskfs.point.fetch import first_error
from vdiskfs.store import Store

UPLOADS_AT_ONCE = 4

# progress(bytes): this many more bytes are stored.
Progress = Callable[[int], None]


async def upload_segments(
    store: Store, disk_id: str, segments: list[SpooledSegment], progress: Progress | None = None
) -> None:
    """Store segments, several at once. One that is there already is left alone.

    Raises:
        DamagedError: one is there with another size.
    """
    limiter = trio.CapacityLimiter(UPLOADS_AT_ONCE)

    async def one(segment: SpooledSegment) -> None:
        async with limiter:
            await upload_segment(store, disk_id, segment)
        hook("segment.stored")
        if progress is not None:
            progress(segment.size)

    try:
        async with trio.open_nursery() as nursery:
            for segment in segments:
                nursery.start_soon(one, segment)
    except BaseExceptionGroup as group:
        raise first_error(group) from None


async def upload_segment(store: Store, disk_id: str, segment: SpooledSegment) -> None:
    """Store one segment. Its id is random, so that one of that name is this one."""
    name = segment_name(disk_id, segment.id)
    try:
        await store.create_from_file(name, segment.path, metadata=segment.metadata())
    except AlreadyExistsError:
        found = await store.stat(name)
        if found.size != segment.size:
            raise DamagedError(f"{name}: {found.size} bytes where {segment.size} were") from None
    hook("segment.uploaded")


async def check_segments(store: Store, spooled: Spooled) -> None:
    """Check that the vault has the segments that are not in the spool any more.

    Raises:
        DamagedError: one is missing, so that the point must not be published.
    """
    delta = await trio.to_thread.run_sync(open_file, spooled.path)
    table = await trio.to_thread.run_sync(delta.objects)
    here = {segment.id for segment in spooled.segments}
    for index in range(len(table)):
        ref = table.ref(index)
        if not ref.segment_id or ref.segment_id in here:
            continue
        name = ref.name(spooled.head.disk_id)
        try:
            size = (await store.stat(name)).size
        except NotFoundError:
            raise DamagedError(f"{name}: the segment was not stored") from None
        if size != ref.size:
            raise DamagedError(f"{name}: {size} bytes where {ref.size} were stored")


async def store_delta(
    store: Store, spooled: Spooled, progress: Progress | None, offered: Callable[[], None]
) -> None:
    """Store a delta: its segments, then its slot; in between ``offered`` is called.

    Raises:
        ConflictError: another writer's delta is in the slot: this site is displaced.
        DamagedError: a segment it refers to is not in the vault.
    """
    await upload_segments(store, spooled.head.disk_id, spooled.segments, progress)
    await check_segments(store, spooled)
    offered()
    await publish_slot(store, spooled)


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


async def _recognise(store: Store, name: str, head: DeltaHead) -> None:
    """Return if the slot holds this delta: an earlier try landed, its answer was lost."""
    found = decode_head(await store.read_range(name, 0, HEAD_SIZE), where=name)
    if (found.to_digest, found.writer_id) != (head.to_digest, head.writer_id):
        what = "a fence" if found.is_fence else "another writer's delta"
        raise ConflictError(
            f"{name}: holds {what}",
            hint="this site was displaced: another one has taken over the disk",
        )
