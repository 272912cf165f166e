"""The index of a damaged delta: found again part by part, each by the hash that names it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
import trio

from vdiskfs.catalog.draft import Draft
from vdiskfs.catalog.reframe import Frame, add_frames
from vdiskfs.delta.blocks import DATA, PAGE, ZEROS, Rows
from vdiskfs.delta.digest import ContentHasher
from vdiskfs.delta.entries import Extents, unite_extents
from vdiskfs.delta.index import decode_page, decode_root
from vdiskfs.delta.layout import HEAD_SIZE, DeltaHead, decode_head
from vdiskfs.delta.local import LocalDelta
from vdiskfs.delta.refs import ObjectTable
from vdiskfs.errors import FormatError
from vdiskfs.point import PieceInfo
from vdiskfs.point.piece import check_identity

# fetch(name, offset, length): bytes of another object, or None.
Fetch = Callable[[str, int, int], Awaitable[bytes | None]]


@dataclass(slots=True)
class Index:
    """What a delta's index says, once it is whole: the frames in the delta itself."""

    head: DeltaHead
    frames: dict[int, Frame] = field(default_factory=dict)


def choose_head(
    heads: list[bytes], info: PieceInfo, *, vault_id: str, disk_id: str
) -> tuple[DeltaHead, bytes] | None:
    """Return the first of some heads that is the one of a delta of this name, and its bytes."""
    for stored in heads:
        try:
            head = decode_head(stored, where=info.name)
            found = PieceInfo(
                info.name, info.generation, info.level, info.from_epoch, info.to_epoch,
                head.object_size, None, info.revision,
            )  # fmt: skip
            check_identity(head, found, vault_id=vault_id, disk_id=disk_id)
        except FormatError:
            continue
        return head, stored
    return None


async def settle_index(draft: Draft, head: DeltaHead, stored: bytes, fetch: Fetch) -> Index | None:
    """Let both heads and the index of a delta be what they were; None: a part is lost.

    What is lost is said in the draft; the parts that were found are in it all the same.
    """
    for offset in (0, draft.size - HEAD_SIZE):
        draft.put(offset, stored)
    if not draft.settle_hashed(head.root_offset, head.root_length, head.root_hash):
        draft.lost.append("the root of its index")
        return None
    try:
        root = decode_root(head, draft.part(head.root_offset, head.root_length), where=draft.name)
        rows = _settle_pages(draft, head, root)
        if rows is None or not _settle_blocks(draft, rows):
            return None
        delta = LocalDelta(head, root, _reader(draft, head.disk_id), draft.name)
        delta.read = _reader(draft, head.disk_id, delta.objects(), fetch)
        return await trio.to_thread.run_sync(_read_index, draft, delta)
    except FormatError as error:
        draft.lost.append(error.message.removeprefix(f"{draft.name}: "))
        return None


def _settle_pages(draft: Draft, head: DeltaHead, root: Rows) -> Rows | None:
    """Return all rows; None: a page of them is lost."""
    parts = [root[:0]]
    for row in root:
        if not int(row["kind"]) & PAGE:
            parts.append(row.reshape(1))
            continue
        if not _settle_row(draft, row):
            return None
        stored = draft.part(int(row["offset"]), int(row["length"]))
        parts.append(decode_page(row, stored, head, where=draft.name))
    return np.concatenate(parts)


def _settle_blocks(draft: Draft, rows: Rows) -> bool:
    """Say whether all blocks in the delta itself are what they were."""
    whole = [_settle_row(draft, row) for row in rows[rows["object"] == 0]]
    return all(whole)


def _settle_row(draft: Draft, row: np.void) -> bool:
    found = draft.settle_hashed(int(row["offset"]), int(row["length"]), row["hash"].tobytes())
    if not found and "a block of its index" not in draft.lost:
        draft.lost.append("a block of its index")
    return found


def _reader(
    draft: Draft, disk_id: str, table: ObjectTable | None = None, fetch: Fetch | None = None
) -> Callable[[int, int, int], bytes]:
    """Return what reads blocks, those in segments one by one; in a thread of trio's, with those."""

    def read(number: int, offset: int, length: int) -> bytes:
        part: bytes | None
        if not number:
            part = draft.part(offset, length)
            if len(part) != length:
                raise FormatError("a block lies outside the delta", where=draft.name)
            return part
        if table is None or fetch is None or number > len(table):
            raise FormatError("an entry refers to no object", where=draft.name)
        name = table.ref(number - 1).name(disk_id)
        part = trio.from_thread.run(fetch, name, offset, length)
        if part is None:
            raise FormatError("a block of its index that lies in a segment", where=draft.name)
        return part

    return read


def _read_index(draft: Draft, delta: LocalDelta) -> Index:
    """Read all of the index.

    Raises:
        FormatError: it is not what the digest in the head says.
    """
    index, hasher = Index(delta.head), ContentHasher()
    table = delta.objects()
    runs: list[Extents] = [delta.zero_block(row) for row in delta.rows(ZEROS)]
    for row in delta.rows(DATA):
        entries = delta.block(row, table)
        pageno, _ = entries.pages()
        order = np.argsort(pageno, kind="stable")
        hasher.add_pages(pageno[order], entries.sums[order])
        own = np.flatnonzero(entries.object == 0)
        if len(own):
            add_frames(index.frames, entries.rows(own))
    hasher.add_zeros(unite_extents(runs))
    if hasher.digest() != delta.head.content_digest:
        raise FormatError("its content is not what its digest says", where=draft.name)
    return index
