"""Blocks of sealed objects in which a read has ended: who reads on needs the rest of each.

Without them the block between two reads of neighbouring ranges would be asked for twice: a
sixth of all that is read at a failback. They are kept as they are stored, and authenticated
with every use.
"""

from __future__ import annotations

from collections import OrderedDict

from vdiskfs.sealed.blocks import BLOCK, STORED_BLOCK

_MOST = 64


class Edges:
    """At most 64 blocks, 2 MiB; each is taken once."""

    def __init__(self) -> None:
        """Have none."""
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def take(self, stored: str, offset: int) -> bytes:
        """Return the block that holds a byte of an object, as it is stored; empty: unknown."""
        return self._blocks.pop((stored, offset // BLOCK), b"")

    def keep(self, stored: str, end: int, blocks: bytes) -> None:
        """Keep the last one of the blocks that were read, if the range ends inside it."""
        if end % BLOCK == 0:
            return
        last = (len(blocks) - 1) // STORED_BLOCK * STORED_BLOCK
        self._blocks[stored, end // BLOCK] = blocks[last:]
        if len(self._blocks) > _MOST:
            self._blocks.popitem(last=False)
