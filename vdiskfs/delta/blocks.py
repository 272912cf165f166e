"""Blocks: columns of entries, extents, points, objects or rows, as stored bytes.

A block is found through a row, which has its place, its lengths, its range of keys and
the hash of its stored bytes; nothing is decompressed before the hash is right, and never
to more than the row says. Columns are split into byte planes, which compress well.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from vdiskfs.delta.entries import U64
from vdiskfs.delta.layout import HASH_SIZE, hash_bytes
from vdiskfs.errors import FormatError

# What the writer aims at, and what a reader accepts at most.
BLOCK_RAW = 64 * 1024
BLOCK_RAW_MAX = 256 * 1024

DATA, ZEROS, POINTS, OBJECTS = 1, 2, 3, 4
PAGE = 0x80  # of rows: the block holds rows of that kind
PACKED, CHECKS = 1, 2  # flags of rows: compressed; entries have checks of their frames

ROW = np.dtype(
    [("kind", "u1"), ("flags", "u1"), ("reserved", "<u2"), ("object", "<u4"),
     ("first", "<u8"), ("last", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("raw", "<u4"),
     ("count", "<u4"), ("reserved2", "<u4"), ("hash", f"V{HASH_SIZE}")]
)  # fmt: skip
Rows = npt.NDArray[np.void]

COUNTS = struct.Struct("<II")
_LEVEL = 3


def planes(column: npt.NDArray[Any]) -> bytes:
    """Return a column's bytes, all first bytes before all second ones."""
    return column.view(np.uint8).reshape(len(column), column.itemsize).T.tobytes()


class Cursor:
    """Takes columns off a block's bytes, in order."""

    def __init__(self, data: bytes, where: str) -> None:
        """Start at the first byte."""
        self._data = data
        self._at = 0
        self._where = where

    def take(self, length: int) -> bytes:
        """Return the next bytes."""
        end = self._at + length
        if end > len(self._data):
            raise FormatError("a block of the index ends early", where=self._where)
        part = self._data[self._at : end]
        self._at = end
        return part

    def counts(self) -> tuple[int, int]:
        """Return the two numbers that a block begins with."""
        first, second = COUNTS.unpack(self.take(8))
        return first, second

    def u64(self, count: int) -> U64:
        """Return a column of 64-bit numbers."""
        return self._column(count, 8).view("<u8").astype(np.uint64, copy=False).reshape(count)

    def u32(self, count: int) -> npt.NDArray[np.uint32]:
        """Return a column of 32-bit numbers."""
        return self._column(count, 4).view("<u4").astype(np.uint32, copy=False).reshape(count)

    def u16(self, count: int) -> npt.NDArray[np.uint16]:
        """Return a column of 16-bit numbers."""
        return self._column(count, 2).view("<u2").astype(np.uint16, copy=False).reshape(count)

    def u8(self, count: int) -> npt.NDArray[np.uint8]:
        """Return a column of bytes."""
        return np.frombuffer(self.take(count), np.uint8)

    def plain_u32(self, count: int) -> npt.NDArray[np.uint32]:
        """Return a column that is not split into planes: checks do not compress."""
        return np.frombuffer(self.take(4 * count), "<u4").astype(np.uint32, copy=False)

    def plain_u64(self, count: int) -> U64:
        """Return a column that is not split into planes: sums do not compress."""
        return np.frombuffer(self.take(8 * count), "<u8").astype(np.uint64, copy=False)

    def end(self) -> None:
        """Check that nothing is left."""
        if self._at != len(self._data):
            raise FormatError("a block of the index has bytes left over", where=self._where)

    def _column(self, count: int, width: int) -> npt.NDArray[np.uint8]:
        flat = np.frombuffer(self.take(count * width), np.uint8)
        return np.ascontiguousarray(flat.reshape(width, count).T)


@dataclass(frozen=True, slots=True)
class Sealed:
    """A block's stored bytes and its row, still without a place."""

    data: bytes
    row: Rows


def seal_block(
    kind: int, first: int, last: int, count: int, raw: bytes, *, flags: int = 0
) -> Sealed:
    """Compress a block and make its row."""
    stored = zstandard.ZstdCompressor(level=_LEVEL).compress(raw)
    if len(stored) < len(raw):
        flags |= PACKED
    else:
        stored = raw
    row = np.zeros(1, ROW)
    row["kind"], row["flags"], row["count"] = kind, flags, count
    row["first"], row["last"] = first, last
    row["length"], row["raw"] = len(stored), len(raw)
    row["hash"] = np.void(hash_bytes(stored))
    return Sealed(stored, row)


def open_block(row: np.void, stored: bytes, *, where: str) -> bytes:
    """Return a block's bytes: the hash is checked first, then it is decompressed.

    Raises:
        FormatError: the bytes are not those the row names.
    """
    raw = int(row["raw"])
    if len(stored) != int(row["length"]) or hash_bytes(stored) != row["hash"].tobytes():
        raise FormatError("a block of the index is damaged", where=where)
    return inflate(
        stored, raw, compressed=bool(int(row["flags"]) & PACKED), limit=BLOCK_RAW_MAX, where=where
    )


def inflate(stored: bytes, raw: int, *, compressed: bool, limit: int, where: str) -> bytes:
    """Return exactly ``raw`` bytes, or raise before more than that is allocated."""
    if raw > limit:
        raise FormatError("a block is larger than the format allows", where=where)
    if not compressed:
        if len(stored) != raw:
            raise FormatError("a block has another length than said", where=where)
        return stored
    try:
        # The frame says its size itself; the library would allocate whatever it says.
        if zstandard.frame_content_size(stored) != raw:
            raise FormatError("a block has another length than said", where=where)
        data = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(
            stored, max_output_size=raw
        )
    except zstandard.ZstdError:
        raise FormatError("a block cannot be decompressed", where=where) from None
    if len(data) != raw:
        raise FormatError("a block has another length than said", where=where)
    return data
