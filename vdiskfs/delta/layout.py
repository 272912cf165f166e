"""The fixed parts of a delta: its head, its listing metadata, and the limits of the format.

Byte for byte as in vdiskfs-format(5). Nothing here reads or writes a file. What lies
between the head and the root is in ``index``; columns are in ``blocks``.
"""

from __future__ import annotations

import enum
import hashlib
import re
import struct
from dataclasses import dataclass
from urllib.parse import quote, unquote

from vdiskfs.errors import FormatError
from vdiskfs.units import PAGE_SIZE, PAGES_PER_CHUNK, pages_of

# Version 2 has a check of each frame's stored bytes in the index; version 1 is still read.
VERSION = 2
VERSIONS = (1, 2)
HEAD_SIZE = 512
HASH_SIZE = 32
LABEL_MAX = 120
# Every number in a delta stays below this, so that sums of two never leave 64 bits.
LIMIT = 1 << 63
# A delta object, and a segment, is one Put Blob: far below the service's 5000 MiB.
OBJECT_MAX = 4 << 30

NO_ID = "0" * 32
_MAGIC = b"VDFDELTA"
_HEAD = struct.Struct("<8sHBBI16s16s16s16sIBBH12QII32s32s32s32s32s120s8s")
_ID = re.compile(r"[0-9a-f]{32}")
assert _HEAD.size == HEAD_SIZE - HASH_SIZE


class Kind(enum.IntEnum):
    """What a delta object is."""

    SLOT = 1
    JOINED = 2
    PART = 3  # of a pass; lies in the spool only


class Flags(enum.IntFlag):
    """What is said of a point. The first two are in the epoch's digest."""

    APPLICATION = 1
    LABELLED = 2
    FENCE = 4
    MERGED = 8


NO_FLAGS = Flags(0)
DIGESTED_FLAGS = Flags.APPLICATION | Flags.LABELLED | Flags.FENCE
_KNOWN_FLAGS = 0xF


@dataclass(frozen=True, slots=True)
class DeltaHead:
    """The head of a delta: 512 bytes at its start, and the same bytes at its end.

    Ids are 32 hex digits. ``changed_bytes`` counts whole pages, zeros included;
    ``stored_bytes`` is this object and the segments it brought. ``first_time_ns`` is the
    time of the first point inside (of a slot: its own).
    """

    kind: Kind
    vault_id: str
    disk_id: str
    writer_id: str
    generation: int
    from_epoch: int
    to_epoch: int
    time_ns: int
    first_time_ns: int
    size: int
    cut: int
    from_size: int
    from_digest: bytes
    to_digest: bytes
    content_digest: bytes
    flags: Flags = NO_FLAGS
    label: str = ""
    group_id: str = NO_ID
    level: int = 0
    changed_bytes: int = 0
    stored_bytes: int = 0
    object_size: int = 0
    tail_offset: int = 0
    root_offset: int = 0
    root_length: int = 0
    root_raw: int = 0
    root_hash: bytes = bytes(HASH_SIZE)
    version: int = VERSION

    @property
    def pages(self) -> int:
        """Return the number of pages of the disk at ``to_epoch``."""
        return pages_of(self.size)

    @property
    def chunks(self) -> int:
        """Return the number of chunks of the disk at ``to_epoch``."""
        return -(-self.pages // PAGES_PER_CHUNK)

    @property
    def tail_bytes(self) -> int:
        """Return how many bytes at the object's end hold all but the frames."""
        return self.object_size - self.tail_offset

    @property
    def is_fence(self) -> bool:
        """Return whether this ends its generation."""
        return bool(self.flags & Flags.FENCE)

    @property
    def torn_page(self) -> int | None:
        """Return the page that ``cut`` lies inside of, if the delta has to hold it."""
        if self.cut % PAGE_SIZE and self.cut < self.from_size:
            return self.cut // PAGE_SIZE
        return None


def hash_bytes(data: bytes | bytearray | memoryview) -> bytes:
    """Return the BLAKE2b-256 of the bytes."""
    return hashlib.blake2b(data, digest_size=HASH_SIZE).digest()


def is_id(text: str) -> bool:
    """Return whether the text is 32 hex digits in small letters."""
    return _ID.fullmatch(text) is not None


def encode_head(head: DeltaHead) -> bytes:
    """Return the 512 bytes of the head."""
    label = head.label.encode()
    body = _HEAD.pack(
        _MAGIC, head.version, head.kind, head.level, head.flags,
        bytes.fromhex(head.vault_id), bytes.fromhex(head.disk_id),
        bytes.fromhex(head.writer_id), bytes.fromhex(head.group_id),
        head.generation, len(label), 0, 0,
        head.from_epoch, head.to_epoch, head.time_ns, head.first_time_ns,
        head.size, head.cut, head.from_size, head.changed_bytes, head.stored_bytes,
        head.object_size, head.tail_offset, head.root_offset,
        head.root_length, head.root_raw,
        head.from_digest, head.to_digest, head.content_digest, head.root_hash,
        bytes(32), label, bytes(8),
    )  # fmt: skip
    return body + hash_bytes(body)


def decode_head(data: bytes, *, where: str = "") -> DeltaHead:
    """Return the head that 512 bytes hold.

    Raises:
        FormatError: they are no head, of another version, or damaged.
    """
    if len(data) != HEAD_SIZE or data[:8] != _MAGIC:
        raise FormatError("not a delta", where=where)
    body = data[: HEAD_SIZE - HASH_SIZE]
    if hash_bytes(body) != data[HEAD_SIZE - HASH_SIZE :]:
        raise FormatError("the head is damaged", where=where)
    fields = _HEAD.unpack(body)
    version, kind, level, flags = fields[1:5]
    label_length, scheme, reserved = fields[10:13]
    if version not in VERSIONS:
        raise FormatError(
            f"a delta of format version {version}; this program reads those up to {VERSION}",
            where=where,
            hint="use a newer vdiskfs",
        )
    if scheme or any(fields[31]):
        # Encryption is outside (vdiskfs.sealed): here it is reserved, and zero.
        raise FormatError("the head has unknown values", where=where)
    if (
        kind not in (1, 2, 3)
        or flags & ~_KNOWN_FLAGS
        or label_length > LABEL_MAX
        or reserved
        or any(fields[33])
        or any(fields[32][label_length:])
    ):
        raise FormatError("the head has unknown values", where=where)
    try:
        label = fields[32][:label_length].decode()
    except UnicodeDecodeError:
        raise FormatError("the label is not UTF-8", where=where) from None
    numbers = fields[13:27]
    head = DeltaHead(
        kind=Kind(kind), level=level, flags=Flags(flags),
        vault_id=fields[5].hex(), disk_id=fields[6].hex(), writer_id=fields[7].hex(),
        group_id=fields[8].hex(), generation=fields[9],
        from_epoch=numbers[0], to_epoch=numbers[1], time_ns=numbers[2], first_time_ns=numbers[3],
        size=numbers[4], cut=numbers[5], from_size=numbers[6],
        changed_bytes=numbers[7], stored_bytes=numbers[8], object_size=numbers[9],
        tail_offset=numbers[10], root_offset=numbers[11],
        root_length=numbers[12], root_raw=numbers[13],
        from_digest=fields[27], to_digest=fields[28], content_digest=fields[29],
        root_hash=fields[30], label=label, version=version,
    )  # fmt: skip
    problem = head_problem(head)
    if problem:
        raise FormatError(problem, where=where)
    return head


def head_problem(head: DeltaHead) -> str:  # noqa: PLR0911  one line for each rule
    """Return what contradicts itself in a head, or nothing."""
    numbers = (head.from_epoch, head.to_epoch, head.time_ns, head.first_time_ns, head.size,
               head.cut, head.from_size, head.changed_bytes, head.stored_bytes)  # fmt: skip
    if any(number >= LIMIT or number < 0 for number in numbers):
        return "a number in the head is too large"
    if head.object_size > OBJECT_MAX:
        return "the object is larger than the format allows"
    if head.cut > min(head.size, head.from_size):
        return "the cut is beyond the disk"
    if head.kind is not Kind.PART:
        fence = head.to_epoch == head.from_epoch
        if head.to_epoch < head.from_epoch or fence != head.is_fence:
            return "the epochs are not in order"
        # An epoch that was given up leaves a gap in the numbers: a slot may span several.
        merged = bool(head.flags & Flags.MERGED)
        if head.kind is Kind.SLOT and merged and head.to_epoch <= head.from_epoch + 1:
            return "the epochs do not fit the kind"
    if (head.kind is Kind.JOINED) != (head.level > 0):
        return "the level does not fit the kind"
    if head.first_time_ns > head.time_ns or bool(head.label) != bool(head.flags & Flags.LABELLED):
        return "the time or the label contradicts itself"
    end = head.root_offset + head.root_length + HEAD_SIZE
    if not HEAD_SIZE <= head.tail_offset <= head.root_offset or end != head.object_size:
        return "the lengths do not add up"
    return ""


def delta_metadata(head: DeltaHead) -> dict[str, str]:
    """Return what is stored beside the object, for listings: hints, checked against the head."""
    metadata = {
        "to": str(head.to_epoch),
        "time": str(head.time_ns),
        "first": str(head.first_time_ns),
        "size": str(head.size),
        "flags": str(int(head.flags)),
        "changed": str(head.changed_bytes),
        "stored": str(head.stored_bytes),
        "tail": str(head.tail_bytes),
        "digest": head.to_digest.hex(),
    }
    if head.label:
        metadata["label"] = quote(head.label, safe="")
    return metadata


@dataclass(frozen=True, slots=True)
class ListedHead:
    """What a listing says of a delta; never trusted for content."""

    to_epoch: int
    time_ns: int
    first_time_ns: int
    size: int
    flags: Flags
    changed_bytes: int
    stored_bytes: int
    tail_bytes: int
    to_digest: bytes
    label: str


def head_from_metadata(metadata: dict[str, str]) -> ListedHead | None:
    """Return what the metadata of a listing says, or None: read the head itself."""
    try:
        listed = ListedHead(
            to_epoch=_number(metadata["to"]),
            time_ns=_number(metadata["time"]),
            first_time_ns=_number(metadata["first"]),
            size=_number(metadata["size"]),
            flags=Flags(_number(metadata["flags"]) & _KNOWN_FLAGS),
            changed_bytes=_number(metadata["changed"]),
            stored_bytes=_number(metadata["stored"]),
            tail_bytes=_number(metadata["tail"]),
            to_digest=bytes.fromhex(metadata["digest"]),
            label=unquote(metadata.get("label", ""), errors="strict")[:LABEL_MAX],
        )
    except (KeyError, ValueError):
        return None
    return listed if len(listed.to_digest) == HASH_SIZE else None


def listed_of(head: DeltaHead) -> ListedHead:
    """Return what a listing would say of this head."""
    return ListedHead(
        head.to_epoch, head.time_ns, head.first_time_ns, head.size, head.flags,
        head.changed_bytes, head.stored_bytes, head.tail_bytes, head.to_digest, head.label,
    )  # fmt: skip


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise ValueError(f"not a number: {text[:40]!r}")
    number = int(text)
    if number >= LIMIT:
        raise ValueError("too large")
    return number
