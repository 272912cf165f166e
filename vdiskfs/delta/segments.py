"""Segments: objects that hold frames and index blocks of deltas too large for one object.

A segment has a head of 128 bytes and then what the deltas that refer to it say. Its size
stands in its head and in every reference to it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vdiskfs.crash import hook
from vdiskfs.delta.layout import HASH_SIZE, VERSION, VERSIONS, hash_bytes
from vdiskfs.errors import FormatError

SEGMENT_HEAD_SIZE = 128
SEGMENT_LIMIT = 64 << 20
_MAGIC = b"VDFSEGMT"
_HEAD = struct.Struct("<8sHHI16s16s16s16sQ8s")
assert _HEAD.size == SEGMENT_HEAD_SIZE - HASH_SIZE


LEAF_OF = "leaf"
"""The key in the metadata of a segment that thinning has written: the generation."""

BATCH = "batch"
"""The key in the metadata of one that a writer has sealed: what its id begins with."""

_BATCH_SIZE = 8


def new_batch() -> str:
    """Return a random beginning of ids: of segments that one delta will refer to, or none."""
    return secrets.token_hex(_BATCH_SIZE)


def batch_of(segment_id: str) -> str:
    """Return the batch that a segment belongs to."""
    return segment_id[: 2 * _BATCH_SIZE]


def is_batch(text: str) -> bool:
    """Say whether this is a batch."""
    return len(text) == 2 * _BATCH_SIZE and not text.strip("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class SpooledSegment:
    """A segment in the spool: its id, where it lies, how large it is.

    ``leaf_of``: the generation whose thinning has written it; of what a writer seals: None.
    """

    id: str
    path: Path
    size: int
    leaf_of: int | None = None

    def metadata(self) -> dict[str, str]:
        """Return what is stored beside the object."""
        made = {BATCH: batch_of(self.id)} if self.leaf_of is None else {LEAF_OF: str(self.leaf_of)}
        return {"segment": self.id, **made}


@dataclass(frozen=True, slots=True)
class SegmentHead:
    """The head of a segment."""

    vault_id: str
    disk_id: str
    writer_id: str
    segment_id: str
    size: int


def encode_segment_head(head: SegmentHead) -> bytes:
    """Return the 128 bytes of the head."""
    body = _HEAD.pack(
        _MAGIC, VERSION, 0, 0, bytes.fromhex(head.vault_id), bytes.fromhex(head.disk_id),
        bytes.fromhex(head.writer_id), bytes.fromhex(head.segment_id), head.size, bytes(8),
    )  # fmt: skip
    return body + hash_bytes(body)


def decode_segment_head(data: bytes, *, where: str) -> SegmentHead:
    """Return the head that 128 bytes hold.

    Raises:
        FormatError: they are no segment's head, of another version, or damaged.
    """
    if len(data) != SEGMENT_HEAD_SIZE or data[:8] != _MAGIC:
        raise FormatError("not a segment", where=where)
    body = data[: SEGMENT_HEAD_SIZE - HASH_SIZE]
    if hash_bytes(body) != data[SEGMENT_HEAD_SIZE - HASH_SIZE :]:
        raise FormatError("the head is damaged", where=where)
    _, version, _, _, vault, disk, writer, segment, size, _ = _HEAD.unpack(body)
    if version not in VERSIONS:
        raise FormatError(f"a segment of format version {version}", where=where)
    return SegmentHead(vault.hex(), disk.hex(), writer.hex(), segment.hex(), size)


class SegmentFile:
    """A segment being written."""

    def __init__(
        self, directory: Path, vault_id: str, disk_id: str, writer_id: str, batch: str
    ) -> None:
        """Create the file, of a batch; its name ends in .tmp until it is complete."""
        self.id = batch + secrets.token_hex(16 - _BATCH_SIZE)
        self.size = SEGMENT_HEAD_SIZE
        self._ids = (vault_id, disk_id, writer_id)
        self._path = directory / f"{self.id}.segment"
        self._temporary = directory / f"{self.id}.segment.tmp"
        self._file = self._temporary.open("xb")
        self._file.write(bytes(SEGMENT_HEAD_SIZE))

    def append(self, parts: Iterable[bytes | bytearray | memoryview], length: int) -> int:
        """Add bytes; return the offset they are at."""
        offset = self.size
        self._file.writelines(parts)
        self.size += length
        return offset

    def finish(self) -> SpooledSegment:
        """Write the head, sync the file and give it its name. The directory is not synced."""
        head = encode_segment_head(SegmentHead(*self._ids, self.id, self.size))
        self._file.seek(0)
        self._file.write(head)
        self._file.flush()
        os.fdatasync(self._file.fileno())
        self._file.close()
        self._temporary.rename(self._path)
        hook("segment.named")
        return SpooledSegment(self.id, self._path, self.size)

    def abandon(self) -> None:
        """Delete the file."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)
