"""A delta that lies in a local file, or in memory: read whole, in order.

For merging, for the spool and for tests; the lazy reader of vaults is ``point.piece``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vdiskfs.delta.blocks import BLOCK_RAW_MAX, DATA, OBJECTS, PAGE, POINTS, ZEROS, Rows
from vdiskfs.delta.columns import decode_data, decode_objects, decode_zeros
from vdiskfs.delta.entries import NO_EXTENTS, Entries, Extents, unite_extents
from vdiskfs.delta.index import (
    check_entries,
    check_frames,
    decode_page,
    decode_root,
    find_rows,
    object_count,
)
from vdiskfs.delta.layout import HEAD_SIZE, LIMIT, DeltaHead, decode_head
from vdiskfs.delta.points import PointTable, concat_points, decode_points
from vdiskfs.delta.refs import ObjectTable, make_table
from vdiskfs.errors import FormatError, LocalError

# read(object, offset, length): object 0 is the delta itself. Exactly length bytes, or raises.
ReadAt = Callable[[int, int, int], bytes]


@dataclass(slots=True)
class LocalDelta:
    """The head and the root of a delta, and a way to read the rest."""

    head: DeltaHead
    root: Rows
    read: ReadAt
    where: str

    def rows(self, kind: int) -> Rows:
        """Return all rows of a kind."""
        parts = [self.root[:0]]
        for row in find_rows(self.root, kind, 0, LIMIT - 1):
            if int(row["kind"]) & PAGE:
                parts.append(decode_page(row, self._stored(row), self.head, where=self.where))
            else:
                parts.append(row.reshape(1))
        return np.concatenate(parts)

    def entries(self) -> Iterator[Entries]:
        """Yield the blocks of entries, in order, checked against head and objects."""
        objects = self.objects()
        for row in self.rows(DATA):
            yield self.block(row, objects)

    def block(self, row: np.void, objects: ObjectTable) -> Entries:
        """Return one block of entries."""
        entries = decode_data(row, self._stored(row), where=self.where)
        check_entries(entries, self.head, len(objects), where=self.where)
        check_frames(entries, objects, where=self.where)
        return entries

    def zero_block(self, row: np.void) -> Extents:
        """Return one block of zeros."""
        return decode_zeros(row, self._stored(row), where=self.where)

    def zeros(self) -> Extents:
        """Return all runs of zeros."""
        parts = [self.zero_block(row) for row in self.rows(ZEROS)]
        return unite_extents(parts) if parts else NO_EXTENTS

    def objects(self) -> ObjectTable:
        """Return the table of the objects referred to."""
        if not object_count(self.root):
            return make_table([])
        parts = [
            decode_objects(row, self._stored(row), where=self.where) for row in self.rows(OBJECTS)
        ]
        return ObjectTable(
            np.concatenate([part.kind for part in parts]),
            np.concatenate([part.generation for part in parts]),
            np.concatenate([part.from_epoch for part in parts]),
            np.concatenate([part.size for part in parts]),
            np.concatenate([part.segment for part in parts]),
        )

    def points(self) -> PointTable:
        """Return the table of points; empty in a slot."""
        parts = [
            decode_points(row, self._stored(row), where=self.where) for row in self.rows(POINTS)
        ]
        return concat_points(parts)

    def _stored(self, row: np.void) -> bytes:
        length = int(row["length"])
        if length > BLOCK_RAW_MAX:
            raise FormatError("a block is larger than the format allows", where=self.where)
        return self.read(int(row["object"]), int(row["offset"]), length)


def open_local(read: ReadAt, size: int, *, where: str) -> LocalDelta:
    """Open a delta of ``size`` bytes.

    Raises:
        FormatError: it is not one, or damaged.
    """
    if size < 2 * HEAD_SIZE:
        raise FormatError("too short for a delta", where=where)
    first = read(0, 0, HEAD_SIZE)
    head = decode_head(first, where=where)
    if head.object_size != size or read(0, size - HEAD_SIZE, HEAD_SIZE) != first:
        raise FormatError("the delta is cut short, or its two heads differ", where=where)
    root = decode_root(head, read(0, head.root_offset, head.root_length), where=where)
    return LocalDelta(head, root, read, where)


def open_file(path: Path) -> LocalDelta:
    """Open a delta file of the spool. Segments beside it are read by their ids.

    Raises:
        FormatError: the file is damaged.
        LocalError: it cannot be read.
    """
    where = str(path)
    try:
        size = path.stat().st_size
        delta = open_local(_file_reader([path], where), size, where=where)
    except OSError as error:
        raise LocalError(f"{where}: {error.strerror}") from error
    table = delta.objects()
    refs = [table.ref(index) for index in range(len(table))]
    paths = [path, *(path.with_name(f"{ref.segment_id}.segment") for ref in refs)]
    delta.read = _file_reader(paths, where)
    return delta


def open_tail(tail: bytes, *, where: str) -> LocalDelta:
    """Open what ``tail_bytes`` at the end of a delta hold: all but its frames.

    Index blocks in segments cannot be read through it.

    Raises:
        FormatError: it is damaged, or not whole.
    """
    if len(tail) < HEAD_SIZE:
        raise FormatError("too short for a delta", where=where)
    head = decode_head(tail[-HEAD_SIZE:], where=where)
    start = head.object_size - len(tail)

    def read(number: int, offset: int, length: int) -> bytes:
        part = tail[max(0, offset - start) : offset - start + length] if offset >= start else b""
        if number or len(part) != length:
            raise FormatError("a block lies outside what was read", where=where)
        return part

    root = decode_root(head, read(0, head.root_offset, head.root_length), where=where)
    return LocalDelta(head, root, read, where)


def _file_reader(paths: list[Path], where: str) -> ReadAt:
    def read(number: int, offset: int, length: int) -> bytes:
        if number >= len(paths):
            raise FormatError("the index refers to no object", where=where)
        descriptor = os.open(paths[number], os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
        if len(data) != length:
            raise FormatError("the file is cut short", where=where)
        return data

    return read
