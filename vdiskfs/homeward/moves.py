"""The words of a move: where, and how far."""

from __future__ import annotations

from dataclasses import dataclass

Place = tuple[int, int]
"""A point of the disk: its generation and its epoch."""


@dataclass(slots=True)
class MoveProgress:
    """How far a move is; counted anew by each.

    ``total_bytes`` are those of the pages that are to be dealt with, zeros included, once
    ``counted``; ``done_bytes`` of them are. ``fetched_bytes`` were read from the vault, as they
    are stored. ``waiting`` says why nothing comes from the vault now, or is empty.
    """

    done_bytes: int = 0
    total_bytes: int = 0
    counted: bool = False
    fetched_bytes: int = 0
    waiting: str = ""
