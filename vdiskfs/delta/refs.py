"""References to objects of the same disk: slots and segments.

A reference is numbers and a random id, never a name: nothing that stands in a delta can
lead outside the disk it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vdiskfs.delta.entries import U8, U32, U64
from vdiskfs.delta.layout import NO_ID
from vdiskfs.delta.names import segment_name, slot_name


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """A slot (generation and epoch) or a segment (its id), with the size it has."""

    generation: int = 0
    from_epoch: int = 0
    segment_id: str = ""
    size: int = 0

    def name(self, disk_id: str) -> str:
        """Return the object's name in the vault."""
        if self.segment_id:
            return segment_name(disk_id, self.segment_id)
        return slot_name(disk_id, self.generation, self.from_epoch)


@dataclass(slots=True)
class ObjectTable:
    """Columns of references; ``kind`` 0 is a slot, 1 a segment."""

    kind: U8
    generation: U32
    from_epoch: U64
    size: U64
    segment: npt.NDArray[np.void]

    def __len__(self) -> int:
        """Return the number of references."""
        return len(self.kind)

    def ref(self, row: int) -> ObjectRef:
        """Return one reference."""
        if self.kind[row] == 1:
            return ObjectRef(segment_id=self.segment[row].tobytes().hex(), size=int(self.size[row]))
        return ObjectRef(int(self.generation[row]), int(self.from_epoch[row]), "",
                         int(self.size[row]))  # fmt: skip

    def part(self, start: int, stop: int) -> ObjectTable:
        """Return some of the rows."""
        rows = slice(start, stop)
        return ObjectTable(
            self.kind[rows], self.generation[rows], self.from_epoch[rows], self.size[rows],
            self.segment[rows],
        )  # fmt: skip


def make_table(refs: Sequence[ObjectRef]) -> ObjectTable:
    """Return references as columns."""
    return ObjectTable(
        np.array([1 if ref.segment_id else 0 for ref in refs], np.uint8),
        np.array([ref.generation for ref in refs], np.uint32),
        np.array([ref.from_epoch for ref in refs], np.uint64),
        np.array([ref.size for ref in refs], np.uint64),
        np.frombuffer(b"".join(bytes.fromhex(ref.segment_id or NO_ID) for ref in refs), "V16"),
    )
