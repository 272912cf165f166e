"""An object of the vault put together anew: its bytes, of which each part is verified.

It begins with what can be read of the object. A part that is not what its hash says is looked
for in other copies of the object's end, which lie on this host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vdiskfs.catalog.reframe import Frame, is_whole
from vdiskfs.delta.layout import (
    HEAD_SIZE,
    ListedHead,
    decode_head,
    hash_bytes,
    head_from_metadata,
)
from vdiskfs.errors import DamagedError, FormatError, NotFoundError
from vdiskfs.sealed import expect_size
from vdiskfs.store import Store

SIZE_LIMIT = 1 << 30
"""A larger object is not put together: it would not fit in memory."""

_STEP = 4 << 20
_BLOCK = 32 << 10  # what an encrypted vault loses for one wrong byte


@dataclass(slots=True)
class Draft:
    """One object's bytes. ``etag`` is that of what was read; None: it is missing."""

    name: str
    data: bytearray
    etag: str | None
    metadata: dict[str, str]
    there: int = -1
    """How large the object is now."""
    others: list[bytes] = field(default_factory=list)
    mended: int = 0
    """Parts that were damaged, and are right now."""
    right: int = 0
    """Parts of which something is right: blocks of an index, frames."""
    lost: list[str] = field(default_factory=list)
    """What cannot be made again, for people."""

    @property
    def size(self) -> int:
        """Return how large the object is to be."""
        return len(self.data)

    @property
    def is_size_right(self) -> bool:
        """Say whether there is an object of this size."""
        return self.there == self.size or not self.size

    def part(self, offset: int, length: int) -> bytes:
        """Return some of the bytes."""
        return bytes(self.data[offset : offset + length])

    def put(self, offset: int, part: bytes) -> None:
        """Replace a part that is damaged by one that is right."""
        if self.part(offset, len(part)) != part:
            self.data[offset : offset + len(part)] = part
            self.mended += 1

    def settle(self, offset: int, length: int, is_right: Callable[[bytes], bool]) -> bool:
        """Let a part be what it was; say whether it is now."""
        if not 0 <= offset <= offset + length <= self.size:
            return False
        if is_right(self.part(offset, length)):
            self.right += 1
            return True
        for other in self.others:
            at = offset - (self.size - len(other))
            part = other[at : at + length] if at >= 0 else b""
            if len(part) == length and is_right(part):
                self.put(offset, part)
                self.right += 1
                return True
        return False

    def settle_hashed(self, offset: int, length: int, wanted: bytes) -> bool:
        """Let a part be what its hash says."""
        return self.settle(offset, length, lambda part: hash_bytes(part) == wanted)

    def settle_frame(self, frame: Frame) -> bool:
        """Let a frame hold the pages that it held."""
        return self.settle(frame.offset, frame.length, lambda part: is_whole(frame, part))


async def load_draft(store: Store, name: str, size: int, others: Sequence[bytes]) -> Draft:
    """Read what can be read of an object that is to have ``size`` bytes.

    Raises:
        DamagedError: it is too large for that.
    """
    if size > SIZE_LIMIT:
        raise DamagedError(f"{name}: {size} bytes are too many to be put together anew")
    draft = Draft(name, bytearray(size), None, {}, others=list(others))
    try:
        info = await store.stat(name)
    except NotFoundError:
        return draft
    draft.etag, draft.metadata, draft.there = info.etag, dict(info.metadata), info.size
    for start in range(0, size, _STEP):
        await _read(store, draft, start, min(_STEP, size - start))
    return draft


async def _read(store: Store, draft: Draft, start: int, length: int) -> None:
    """Read a stretch; where that fails its halves, down to what fails by itself."""
    found = await read_part(store, draft.name, draft.size, start, length)
    if found is None and length > _BLOCK:
        half = max(_BLOCK, length // 2 // _BLOCK * _BLOCK)
        await _read(store, draft, start, half)
        await _read(store, draft, start + half, length - half)
        return
    if found is None and start < draft.there < start + length:
        found = await read_part(store, draft.name, draft.size, start, draft.there - start)
    if found is not None:
        draft.data[start : start + len(found)] = found


async def read_part(store: Store, name: str, size: int, offset: int, length: int) -> bytes | None:
    """Read some bytes of an object that is to have ``size``; None: they are gone."""
    # What an encrypted vault reckons with may be the size of what is left of it.
    expect_size(store, name, size)
    try:
        return await store.read_range(name, offset, length)
    except (DamagedError, NotFoundError):
        return None


async def read_heads(
    store: Store, name: str, said: int | None, ends: Sequence[bytes]
) -> list[bytes]:
    """Return what may be the head of a delta, from wherever it may be: the vault's own first.

    A copy is of this host; it may be of another delta than the one that was stored.

    Args:
        store: the vault's.
        name: of the delta.
        said: the size that others say it has, if any does.
        ends: other copies of its end.
    """
    copies = [end[-HEAD_SIZE:] for end in ends]
    try:
        info = await store.stat(name)
    except NotFoundError:
        return copies
    heads: list[bytes] = []
    # An encrypted object that was cut is of no size; then its first block says what it can.
    for guess in dict.fromkeys([said, info.size, _BLOCK]):
        if guess is not None and guess >= 2 * HEAD_SIZE:
            for offset in (0, guess - HEAD_SIZE):
                found = await read_part(store, name, guess, offset, HEAD_SIZE)
                heads += [] if found is None else [found]
    listed = head_from_metadata(dict(info.metadata))
    return heads + [copy for copy in copies if listed is None or _is_listed(copy, listed)]


def _is_listed(copy: bytes, listed: ListedHead) -> bool:
    """Say whether a head is the one that the store's listing tells of."""
    try:
        head = decode_head(copy)
    except FormatError:
        return False
    return (head.to_epoch, head.to_digest) == (listed.to_epoch, listed.to_digest)
