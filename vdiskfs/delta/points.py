"""Tables of points: what a joined delta says of every point inside it.

Rows are in the order of epochs; a point's delta starts at the epoch of the row before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vdiskfs.delta.blocks import COUNTS, POINTS, Cursor, Sealed, open_block, planes, seal_block
from vdiskfs.delta.entries import U8, U64
from vdiskfs.delta.layout import LABEL_MAX, LIMIT, DeltaHead, Flags, ListedHead
from vdiskfs.errors import FormatError

# 1,024 points are 42 KiB without labels, 162 KiB with the longest ones.
POINTS_PER_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class PointRow:
    """One point, as a table or a listing has it."""

    epoch: int
    time_ns: int
    size: int
    changed_bytes: int
    stored_bytes: int
    flags: Flags
    label: str = ""


@dataclass(slots=True)
class PointTable:
    """Columns of points, in ascending order of epochs; times never fall."""

    epoch: U64
    time_ns: U64
    size: U64
    changed_bytes: U64
    stored_bytes: U64
    flags: U8
    labels: dict[int, str]  # by epoch

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.epoch)

    def row(self, index: int) -> PointRow:
        """Return one point."""
        epoch = int(self.epoch[index])
        return PointRow(
            epoch, int(self.time_ns[index]), int(self.size[index]),
            int(self.changed_bytes[index]), int(self.stored_bytes[index]),
            Flags(int(self.flags[index])), self.labels.get(epoch, ""),
        )  # fmt: skip

    def part(self, start: int, stop: int) -> PointTable:
        """Return some of the points."""
        rows = slice(start, stop)
        epoch = self.epoch[rows]
        chosen = set(epoch.tolist()) if self.labels else set()
        return PointTable(
            epoch, self.time_ns[rows], self.size[rows], self.changed_bytes[rows],
            self.stored_bytes[rows], self.flags[rows],
            {key: text for key, text in self.labels.items() if key in chosen},
        )  # fmt: skip


def point_row(head: DeltaHead | ListedHead) -> PointRow:
    """Return the point that a slot makes."""
    return PointRow(
        head.to_epoch, head.time_ns, head.size, head.changed_bytes, head.stored_bytes,
        head.flags, head.label,
    )  # fmt: skip


def make_points(rows: Sequence[PointRow]) -> PointTable:
    """Return points as columns."""
    return PointTable(
        np.array([row.epoch for row in rows], np.uint64),
        np.array([row.time_ns for row in rows], np.uint64),
        np.array([row.size for row in rows], np.uint64),
        np.array([row.changed_bytes for row in rows], np.uint64),
        np.array([row.stored_bytes for row in rows], np.uint64),
        np.array([int(row.flags) for row in rows], np.uint8),
        {row.epoch: row.label for row in rows if row.label},
    )


def concat_points(tables: Sequence[PointTable]) -> PointTable:
    """Return the points of all tables, which follow each other."""
    labels: dict[int, str] = {}
    for table in tables:
        labels.update(table.labels)
    return PointTable(
        np.concatenate([table.epoch for table in tables] or [np.empty(0, np.uint64)]),
        np.concatenate([table.time_ns for table in tables] or [np.empty(0, np.uint64)]),
        np.concatenate([table.size for table in tables] or [np.empty(0, np.uint64)]),
        np.concatenate([table.changed_bytes for table in tables] or [np.empty(0, np.uint64)]),
        np.concatenate([table.stored_bytes for table in tables] or [np.empty(0, np.uint64)]),
        np.concatenate([table.flags for table in tables] or [np.empty(0, np.uint8)]),
        labels,
    )


def seal_points(table: PointTable) -> Sealed:
    """Make the block of some points (not none)."""
    epochs = table.epoch.tolist()
    labels = [table.labels.get(epoch, "").encode() for epoch in epochs]
    blob = b"".join(labels)
    raw = b"".join((
        COUNTS.pack(len(table), len(blob)),
        planes(_steps(table.epoch)), planes(_steps(table.time_ns)), planes(table.size),
        planes(table.changed_bytes), planes(table.stored_bytes), table.flags.tobytes(),
        bytes(len(label) for label in labels), blob,
    ))  # fmt: skip
    return seal_block(POINTS, epochs[0], epochs[-1], len(table), raw)


def decode_points(row: np.void, stored: bytes, *, where: str) -> PointTable:
    """Return the points of a block: epochs rise, times never fall.

    Raises:
        FormatError: the block is damaged or contradicts itself.
    """
    cursor = Cursor(open_block(row, stored, where=where), where)
    count, blob_length = cursor.counts()
    if count != int(row["count"]) or not 0 < count <= POINTS_PER_BLOCK:
        raise FormatError("a table of points has another count", where=where)
    steps, times = cursor.u64(count), cursor.u64(count)
    size, changed, stored_bytes = cursor.u64(count), cursor.u64(count), cursor.u64(count)
    flags, lengths = cursor.u8(count), cursor.u8(count)
    blob = cursor.take(blob_length)
    cursor.end()
    epoch, time_ns = _sums(steps, where), _sums(times, where)
    limit = np.uint64(LIMIT)
    if (size >= limit).any() or (changed >= limit).any() or (stored_bytes >= limit).any():
        raise FormatError("a number in a table of points is too large", where=where)
    if (steps[1:] == 0).any() or (flags > 0xF).any() or (lengths > LABEL_MAX).any():
        raise FormatError("a table of points has impossible values", where=where)
    if int(epoch[0]) != int(row["first"]) or int(epoch[-1]) != int(row["last"]):
        raise FormatError("a table covers other points than said", where=where)
    if int(lengths.sum(dtype=np.int64)) != blob_length:
        raise FormatError("labels have other lengths than said", where=where)
    labels = _labels(epoch, lengths, blob, where)
    return PointTable(epoch, time_ns, size, changed, stored_bytes, flags, labels)


def _labels(epoch: U64, lengths: U8, blob: bytes, where: str) -> dict[int, str]:
    ends = np.cumsum(lengths, dtype=np.int64)
    labels = {}
    for index in np.flatnonzero(lengths).tolist():
        end = int(ends[index])
        try:
            labels[int(epoch[index])] = blob[end - int(lengths[index]) : end].decode()
        except UnicodeDecodeError:
            raise FormatError("a label is not UTF-8", where=where) from None
    return labels


def _steps(column: U64) -> U64:
    steps = column.copy()
    steps[1:] -= column[:-1]
    return steps


def _sums(steps: U64, where: str) -> U64:
    column = np.cumsum(steps, dtype=np.uint64)
    # Each number below 2**63 and none below the one before it: the sum never wrapped.
    if (column >= np.uint64(LIMIT)).any() or (column[1:] < column[:-1]).any():
        raise FormatError("a column is not in order", where=where)
    return column
