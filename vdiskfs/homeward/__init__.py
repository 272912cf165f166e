"""Bringing a local image from one point of its disk to another, while nobody uses it.

mover   HomeMover: the rounds, the pieces, what is resumed
target  the image file: what is written, made a hole, read back
note    what is known of the image, durably
moves   Place, Progress
"""

from vdiskfs.homeward.mover import HomeMover
from vdiskfs.homeward.moves import MoveProgress, Place
from vdiskfs.homeward.note import (
    HomeNote,
    has_home,
    move_home,
    prepare_home,
    read_home,
    remove_home,
)

__all__ = [
    "HomeMover", "HomeNote", "MoveProgress", "Place", "has_home", "move_home", "prepare_home",
    "read_home", "remove_home",
]  # fmt: skip
