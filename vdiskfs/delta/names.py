"""Names of objects in a vault. Made of numbers and hex ids only, never of what a user wrote.

disks/<disk>/g<generation>/<from>                       a slot
disks/<disk>/g<generation>.<level>/<from>-<to>.<rev>    a joined delta
segments/<disk>/<segment>                               frames and index blocks of large deltas
"""

from __future__ import annotations

import re

_SLOT = re.compile(r"disks/([0-9a-f]{32})/g([0-9a-f]{8})/([0-9a-f]{16})")
_SEGMENT = re.compile(r"segments/([0-9a-f]{32})/([0-9a-f]{32})")
_JOINED = re.compile(
    r"disks/([0-9a-f]{32})/g([0-9a-f]{8})\.([1-9])/([0-9a-f]{16})-([0-9a-f]{16})\.([0-9a-f]{1,8})"
)


def slot_prefix(disk_id: str, generation: int) -> str:
    """Return what the names of all slots of a generation begin with."""
    return f"disks/{disk_id}/g{generation:08x}/"


def slot_name(disk_id: str, generation: int, from_epoch: int) -> str:
    """Return the name of the delta that starts at an epoch."""
    return f"{slot_prefix(disk_id, generation)}{from_epoch:016x}"


def joined_prefix(disk_id: str, generation: int, level: int) -> str:
    """Return what the names of all joined deltas of a level begin with."""
    return f"disks/{disk_id}/g{generation:08x}.{level}/"


def joined_name(
    disk_id: str, generation: int, level: int, epochs: tuple[int, int], revision: int = 0
) -> str:
    """Return the name of a joined delta."""
    prefix = joined_prefix(disk_id, generation, level)
    return f"{prefix}{epochs[0]:016x}-{epochs[1]:016x}.{revision:x}"


def segment_prefix(disk_id: str) -> str:
    """Return what the names of all segments of a disk begin with."""
    return f"segments/{disk_id}/"


def segment_name(disk_id: str, segment_id: str) -> str:
    """Return the name of a segment."""
    return f"{segment_prefix(disk_id)}{segment_id}"


def parse_slot(name: str) -> tuple[int, int] | None:
    """Return the generation and the epoch that a slot's name says, or None."""
    match = _SLOT.fullmatch(name)
    return (int(match[2], 16), int(match[3], 16)) if match else None


def parse_segment(name: str) -> str | None:
    """Return the id that a segment's name says, or None."""
    match = _SEGMENT.fullmatch(name)
    return match[2] if match else None


def parse_joined(name: str) -> tuple[int, int, int, int, int] | None:
    """Return generation, level, from, to and revision of a joined delta's name, or None."""
    match = _JOINED.fullmatch(name)
    if match is None:
        return None
    return int(match[2], 16), int(match[3]), int(match[4], 16), int(match[5], 16), int(match[6], 16)
