"""Frames that are damaged: what of them is still good, and the same pages as a frame again.

A frame made again has the length and the check that the index says, so that nothing that refers
to it changes. It need not be the same bytes: an encoder of another version may need fewer, and
then bytes follow that the decoder passes over, of which the last four make the check right; it
is there to notice damage. The sums of the pages say that they are the right ones. No I/O.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vdiskfs import native
from vdiskfs.delta.entries import Entries
from vdiskfs.delta.frames import FrameEncoder, FrameError, PageBatch, decode_frames
from vdiskfs.units import PAGE_SIZE, PAGES_PER_CHUNK

_LEVELS = (1, 3, 2, 4, 5, 6, 7, 8, 9, 12, 15, 19, 22)
# A frame that zstd's decoders skip: magic number, then a length of 32 bits.
_SKIPPED = b"\x50\x2a\x4d\x18"


@dataclass(slots=True)
class Frame:
    """A frame as indexes describe it; ``sums`` are those of the pages that any of them uses."""

    offset: int
    length: int
    packed: bool
    chunkno: int
    mask: int
    check: int | None = None
    """The CRC-32 of its stored bytes, where an index says it."""
    sums: dict[int, int] = field(default_factory=dict)

    @property
    def pages(self) -> list[int]:
        """Return the pages in it, in order."""
        first = self.chunkno * PAGES_PER_CHUNK
        return [first + bit for bit in range(PAGES_PER_CHUNK) if self.mask >> bit & 1]

    @property
    def raw_length(self) -> int:
        """Return how many bytes its pages are."""
        return self.mask.bit_count() * PAGE_SIZE

    @property
    def is_told(self) -> bool:
        """Return whether the sums of all its pages are known."""
        return len(self.sums) == self.mask.bit_count()

    @property
    def end(self) -> int:
        """Return where it ends in its object."""
        return self.offset + self.length


def add_frames(known: dict[int, Frame], entries: Entries) -> None:
    """Add what entries of one object say of its frames, by offset."""
    starts = entries.sum_starts().tolist()
    pageno = entries.pages()[0].tolist()
    sums = entries.sums.tolist()
    for row in range(len(entries)):
        offset = int(entries.offset[row])
        frame = known.get(offset)
        if frame is None:
            frame = known[offset] = Frame(
                offset, int(entries.length[row]), bool(entries.packed[row]),
                int(entries.chunkno[row]), int(entries.frame_mask[row]),
            )  # fmt: skip
        if entries.checked[row]:
            frame.check = int(entries.check[row])
        low, high = starts[row], starts[row + 1]
        frame.sums.update(zip(pageno[low:high], sums[low:high], strict=True))


def good_pages(frame: Frame, pages: Mapping[int, bytes]) -> dict[int, bytes]:
    """Return the pages of a frame, of those with a sum, that are what was stored."""
    return {
        page: data for page, data in pages.items()
        if frame.sums.get(page) == int(native.pages_sum(data)[0])
    }  # fmt: skip


def stored_pages(frame: Frame, stored: bytes | memoryview) -> dict[int, bytes]:
    """Return the pages of a frame as they are stored, right or wrong; none: it has none now."""
    pages = _decoded(frame, stored)
    if pages is None:
        return {}
    return {
        page: bytes(pages[at * PAGE_SIZE : (at + 1) * PAGE_SIZE])
        for at, page in enumerate(frame.pages)
    }


def is_whole(frame: Frame, stored: bytes | memoryview) -> bool:
    """Say whether a frame has its check, and all pages with a sum are what was stored."""
    if frame.check is not None and zlib.crc32(stored) != frame.check:
        return False
    pages = _decoded(frame, stored)
    if pages is None:
        return False
    sums = native.pages_sum(pages).tolist()
    return all(frame.sums.get(page, sums[at]) == sums[at] for at, page in enumerate(frame.pages))


def remade(
    frame: Frame, pages: Mapping[int, bytes], stored: Mapping[int, bytes], *, may_lose: bool
) -> bytes | None:
    """Return a frame of these pages, with its check; None: there is none of its length.

    Args:
        frame: what indexes say of it.
        pages: those of its pages that are known to be right.
        stored: its pages as they are stored: those without a sum stay what they are.
        may_lose: those without a sum mean nothing, if there is no frame with them.

    Pages that are lost are what is stored, or zeros, or like others.
    """
    kept = {page: data for page, data in stored.items() if page not in frame.sums}
    made = _filled(frame, {**kept, **pages}, stored)
    if made is None and kept and may_lose:
        made = _filled(frame, pages, stored)
    return made


def _filled(frame: Frame, pages: Mapping[int, bytes], stored: Mapping[int, bytes]) -> bytes | None:
    """Return a frame of pages, and of whatever fits for those that are not given."""
    free = [at for at, page in enumerate(frame.pages) if page not in pages]
    own = [lambda page, _: stored[page]] if stored else []
    for filler in (*own, _zeros, _nearest, _run_on, _run_up):
        data = b"".join(pages.get(page) or filler(page, pages) for page in frame.pages)
        made = _of_length(frame, data) if frame.packed else _raw(frame, data, free)
        if made is not None or not free:
            return made
    return None


def _raw(frame: Frame, data: bytes, free: list[int]) -> bytes | None:
    """Return pages as a frame that is not compressed."""
    if len(data) != frame.length:
        return None
    if free:
        data = _checked(frame, data, free[0] * PAGE_SIZE)
    return data if frame.check in (None, zlib.crc32(data)) else None


def _checked(frame: Frame, data: bytes, at: int) -> bytes:
    """Let bytes have the frame's check, by 4 of them that mean nothing."""
    if frame.check is None:
        return data
    return data[:at] + crc_filler(data[:at], data[at + 4 :], frame.check) + data[at + 4 :]


def _zeros(_: int, __: Mapping[int, bytes]) -> bytes:
    return bytes(PAGE_SIZE)


def _nearest(page: int, pages: Mapping[int, bytes]) -> bytes:
    """Return the page beside it."""
    return pages[min(pages, key=lambda other: abs(other - page))] if pages else bytes(PAGE_SIZE)


def _run_on(page: int, pages: Mapping[int, bytes]) -> bytes:
    """Return the last byte of the page before it, again and again."""
    before = [other for other in pages if other < page]
    return pages[max(before)][-1:] * PAGE_SIZE if before else _run_up(page, pages)


def _run_up(page: int, pages: Mapping[int, bytes]) -> bytes:
    """Return the first byte of the page behind it, again and again."""
    behind = [other for other in pages if other > page]
    return pages[min(behind)][:1] * PAGE_SIZE if behind else _nearest(page, pages)


def _of_length(frame: Frame, data: bytes) -> bytes | None:
    """Return pages compressed to the length that the index says; None: there is no such frame."""
    shorter: bytes | None = None
    for level in _LEVELS:
        packed = _packed(data, level)
        if packed is None:
            continue
        rest = frame.length - len(packed)
        if not rest and frame.check in (None, zlib.crc32(packed)):
            return packed
        if rest >= (1 if frame.check is None else 4):
            shorter = packed if shorter is None else shorter
            if level > 9:
                break
    if shorter is None:
        return None
    padded = shorter + _padding(frame.length - len(shorter))
    padded = _checked(frame, padded, len(padded) - 4)
    decoded = _decoded(frame, padded)
    return padded if decoded is not None and bytes(decoded) == data else None


def _packed(data: bytes, level: int) -> bytes | None:
    """Compress pages as a writer does; None: a writer would not have."""
    count = len(data) // PAGE_SIZE
    batch = PageBatch(
        np.arange(count, dtype=np.uint64), np.zeros(count, np.uint64), np.zeros(count, np.bool_),
        data,
    )  # fmt: skip
    frames = FrameEncoder(level).encode(batch)
    if frames is None or not frames.flags[0]:
        return None
    return bytes(frames.parts[0])


def _padding(length: int) -> bytes:
    if length < 12:
        return bytes(length)
    return _SKIPPED + (length - 8).to_bytes(4, "little") + bytes(length - 8)


def crc_filler(before: bytes, after: bytes, wanted: int) -> bytes:
    """Return 4 bytes that give what is before and after them a CRC-32 (that of zlib)."""
    table = _crc_table()
    by_top = {entry >> 24: number for number, entry in enumerate(table)}
    # Back from the end: the state before each byte follows from the state behind it.
    state = wanted ^ 0xFFFFFFFF
    for byte in reversed(after):
        number = by_top[state >> 24]
        state = ((state ^ table[number]) << 8 & 0xFFFFFFFF) | (number ^ byte)
    # Of 4 bytes more each sets one byte of the state, whatever it was.
    for _ in range(4):
        number = by_top[state >> 24]
        state = ((state ^ table[number]) << 8 & 0xFFFFFFFF) | number
    return (state ^ zlib.crc32(before) ^ 0xFFFFFFFF).to_bytes(4, "little")


def _crc_table() -> list[int]:
    table = []
    for number in range(256):
        entry = number
        for _ in range(8):
            entry = entry >> 1 ^ (0xEDB88320 if entry & 1 else 0)
        table.append(entry)
    return table


def _decoded(frame: Frame, stored: bytes | memoryview) -> bytearray | None:
    out = bytearray(frame.raw_length)
    try:
        decode_frames([stored], [len(out)], [frame.packed], [None], memoryview(out))
    except FrameError:
        return None
    return out
