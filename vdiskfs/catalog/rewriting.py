"""What of the objects that a leaf refers to is moved, so that little in them is garbage.

Pure functions of sizes. Objects with the most garbage go first: what is written there later is
garbage for the longest by then, and the least has to be moved to be rid of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vdiskfs.delta.segments import SEGMENT_HEAD_SIZE

MOVE_LIMIT = 8 << 20
"""A leaf with less data than this has it in segments of its own, whatever is garbage."""

REWRITE_LIMIT = 1 << 30
"""Bytes that one run moves out of objects with garbage; or a 64th of a leaf, if that is more."""

# Parts of the live bytes: with more garbage than the first a leaf's data is moved until it is
# the second. Moved are then 6 bytes for each that became garbage, where all pages of a disk
# are as likely to change: the oldest objects have twice the garbage of all.
_GARBAGE_MOST = 0.08
_GARBAGE_LEFT = 0.06
# Objects smaller than this are made one, where there are more of them than this.
_SMALL = 1 << 20
_SMALL_MOST = 64
_PART = 64


@dataclass(frozen=True, slots=True)
class Held:
    """An object that a leaf refers to: its bytes, and how many of them are the leaf's.

    One that is shared stays, whatever is moved: another generation needs it.
    """

    size: int
    live: int
    is_shared: bool = False

    @property
    def garbage(self) -> int:
        """Return the bytes that moving the rest would free."""
        return 0 if self.is_shared else max(0, self.size - SEGMENT_HEAD_SIZE - self.live)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which objects (by place in the list) data is moved out of, the bytes, whether it is all.

    ``is_little``: it is the whole of a small leaf.
    """

    moved: frozenset[int]
    bytes: int
    is_all: bool
    is_little: bool = False


def choose_moved(objects: Sequence[Held], room: int) -> Choice:
    """Return what to move of a leaf's data, about ``room`` bytes at most unless it is little."""
    live = sum(held.live for held in objects)
    if live < MOVE_LIMIT:
        return Choice(frozenset(range(len(objects))), live, is_all=True, is_little=True)
    garbage = sum(held.garbage for held in objects)
    small = [number for number, held in enumerate(objects)
             if held.size < _SMALL and not held.is_shared]  # fmt: skip
    wanted = small if len(small) > _SMALL_MOST else []
    if garbage > live * _GARBAGE_MOST:
        rest = [number for number in range(len(objects)) if number not in set(wanted)]
        rest = [number for number in rest if objects[number].garbage]
        rest.sort(key=lambda number: -objects[number].garbage / objects[number].size)
        left = garbage - sum(objects[number].garbage for number in wanted)
        for number in rest:
            if left <= live * _GARBAGE_LEFT:
                break
            wanted.append(number)
            left -= objects[number].garbage
    moved: list[int] = []
    taken = 0
    most = max(room, live // _PART) if room > 0 else 0
    for number in wanted:
        if not most or (moved and taken + objects[number].live > most):
            break
        moved.append(number)
        taken += objects[number].live
    return Choice(frozenset(moved), taken, is_all=len(moved) == len(wanted))
