"""A bounded cache of decoded blocks, shared by all readers of a process.

Objects of a vault never change, so that an entry is right for ever. Used from the trio
thread only.
"""

from __future__ import annotations

from collections import OrderedDict

from vdiskfs.delta.blocks import Rows
from vdiskfs.delta.entries import Entries, Extents
from vdiskfs.delta.points import PointTable
from vdiskfs.delta.refs import ObjectTable

Block = Entries | Extents | Rows | ObjectTable | PointTable
CACHE_LIMIT = 32 << 20


class BlockCache:
    """The blocks used last, up to a number of bytes."""

    def __init__(self, limit: int = CACHE_LIMIT) -> None:
        """Keep at most about ``limit`` bytes."""
        self.limit = limit
        self.size = 0
        self._blocks: OrderedDict[tuple[str, int], tuple[Block, int]] = OrderedDict()

    def get(self, key: tuple[str, int]) -> Block | None:
        """Return the block of an object at an offset, or None."""
        found = self._blocks.get(key)
        if found is None:
            return None
        self._blocks.move_to_end(key)
        return found[0]

    def put(self, key: tuple[str, int], block: Block, cost: int) -> None:
        """Keep a block that takes about ``cost`` bytes."""
        old = self._blocks.pop(key, None)
        if old is not None:
            self.size -= old[1]
        self._blocks[key] = (block, cost)
        self.size += cost
        while self.size > self.limit and len(self._blocks) > 1:
            _, (_, freed) = self._blocks.popitem(last=False)
            self.size -= freed
