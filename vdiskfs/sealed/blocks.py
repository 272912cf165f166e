"""Objects as sealed blocks: 32 KiB of the object in each, the last one shorter.

Each block can be found and opened without any other: it begins with the object's size, its
revision and its salt, and is authenticated with these, its number, the vault and the name.
So a range is read in one request, and any block that is swapped, moved, cut or of another
version does not open. Synchronous; no I/O but files.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vdiskfs.crypto import TAG_SIZE, DataKey, ObjectCipher
from vdiskfs.errors import FormatError, LocalError

BLOCK = 32 * 1024
MAGIC = b"VDFSEAL1"
SALT_SIZE = 32
_HEAD = struct.Struct("<8sQQ32s")
OVERHEAD = _HEAD.size + TAG_SIZE
STORED_BLOCK = BLOCK + OVERHEAD
SIZE_MAX = 1 << 62
_NAME_LENGTH = struct.Struct("<H")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is sealed: all its blocks say the same. ``stored`` is its name in the store."""

    vault_id: str
    stored: str

    def about(self, head: bytes | memoryview, number: int) -> bytes:
        """Return what a block is authenticated with."""
        return bytes(head) + number.to_bytes(8, "little") + self._who()

    def about_metadata(self) -> bytes:
        """Return what the metadata is authenticated with."""
        return b"metadata" + self._who()

    def _who(self) -> bytes:
        return bytes.fromhex(self.vault_id) + self.stored.encode()


class Opener:
    """Opens blocks of objects; keeps the cipher of the object it has opened last."""

    def __init__(self, key: DataKey, subject: Subject) -> None:
        self._key = key
        self._subject = subject
        self._salt = b""
        self._cipher: ObjectCipher | None = None
        self.where = subject.stored
        self.size = -1
        self.revision = 0

    def open(self, number: int, stored: memoryview) -> bytes:
        """Return a block's bytes.

        Raises:
            FormatError: they are not what was sealed here, or of another version than the last.
        """
        where = self.where
        if len(stored) < OVERHEAD:
            raise FormatError("the object is cut short", where=where)
        head = stored[: _HEAD.size]
        magic, size, revision, salt = _HEAD.unpack(head)
        if magic != MAGIC or size > SIZE_MAX:
            raise FormatError("not a sealed object", where=where)
        if self._cipher is None:
            self._cipher = self._key.cipher(salt)
            self._salt, self.size, self.revision = salt, size, revision
        elif (salt, size, revision) != (self._salt, self.size, self.revision):
            raise FormatError("the object is put together of several versions", where=where)
        if len(stored) != block_length(size, number) + OVERHEAD:
            raise FormatError("a block of the object has another length", where=where)
        opened = self._cipher.open(number, stored[_HEAD.size :], self._subject.about(head, number))
        if opened is None:
            raise FormatError(
                "does not authenticate: it is damaged, or was swapped or forged", where=where
            )
        return opened


def stored_size(size: int) -> int:
    """Return how many bytes an object of ``size`` takes sealed."""
    return size + block_count(size) * OVERHEAD


def plain_size(stored: int) -> int:
    """Return how many bytes a sealed object holds; -1: none is of this size."""
    count = -(-stored // STORED_BLOCK)
    size = stored - count * OVERHEAD
    return size if size >= 0 and stored_size(size) == stored else -1


def block_count(size: int) -> int:
    """Return how many blocks an object has: at least one."""
    return max(1, -(-size // BLOCK))


def block_length(size: int, number: int) -> int:
    """Return how many bytes of the object a block holds; -1: it has no such block."""
    return min(BLOCK, size - number * BLOCK) if 0 <= number < block_count(size) else -1


def stored_range(offset: int, length: int, size: int) -> tuple[int, int]:
    """Return where the blocks lie that hold a range: offset and length in the store.

    The range is not empty, and inside the object.
    """
    first, last = offset // BLOCK, (offset + length - 1) // BLOCK
    start = first * STORED_BLOCK
    return start, min((last + 1) * STORED_BLOCK, stored_size(size)) - start


class Sealer:
    """Seals one object, its blocks in order, and what stands beside it."""

    def __init__(self, key: DataKey, subject: Subject, size: int, revision: int) -> None:
        self._subject = subject
        self._salt = secrets.token_bytes(SALT_SIZE)
        self._cipher = key.cipher(self._salt)
        self._head = _HEAD.pack(MAGIC, size, revision, self._salt)
        self._revision = revision
        self._number = 0

    def seal(self, data: bytes | memoryview) -> bytes:
        """Return the next block, sealed."""
        number = self._number
        self._number += 1
        return self._head + self._cipher.seal(number, data, self._subject.about(self._head, number))

    def seal_metadata(self, metadata: Mapping[str, str], name: str) -> bytes:
        """Return metadata, sealed; ``name`` is the object's own, or empty where it is seen."""
        values = {"metadata": dict(metadata), "name": name, "revision": self._revision}
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
        about = self._subject.about_metadata()
        return self._salt + self._cipher.seal_metadata(text, about)


@dataclass(frozen=True, slots=True)
class Beside:
    """What stood beside an object."""

    metadata: dict[str, str]
    name: str
    revision: int


def open_metadata(key: DataKey, subject: Subject, stored: bytes) -> Beside | None:
    """Return metadata; None: it is not what was sealed beside this object."""
    cipher = key.cipher(stored[:SALT_SIZE].ljust(SALT_SIZE))
    text = cipher.open_metadata(stored[SALT_SIZE:], subject.about_metadata())
    if text is None:
        return None
    values = json.loads(text)
    return Beside(values["metadata"], values["name"], values["revision"])


def seal_bytes(sealer: Sealer, data: bytes | bytearray | memoryview) -> bytes:
    """Return an object's bytes, sealed."""
    view = memoryview(data).cast("B")
    count = block_count(len(view))
    return b"".join(sealer.seal(view[at * BLOCK : (at + 1) * BLOCK]) for at in range(count))


def seal_file(sealer: Sealer, source: Path, size: int, target: Path) -> None:
    """Write a file's bytes sealed into a new file. Not synced.

    Raises:
        LocalError: a file cannot be read or written, or has another size.
    """
    try:
        with source.open("rb", buffering=0) as file, target.open("xb") as out:
            buffer = bytearray(BLOCK)
            for number in range(block_count(size)):
                wanted = block_length(size, number)
                view = memoryview(buffer)[:wanted]
                if file.readinto(view) != wanted:
                    raise LocalError(f"{source}: the file has changed while it was read")
                out.write(sealer.seal(view))
    except OSError as error:
        raise LocalError(f"{source}: {os.strerror(error.errno or 0)}") from error


def open_range(opener: Opener, stored: bytes, offset: int, length: int) -> bytes:
    """Return a range of an object out of the blocks that hold it; all are opened first.

    Raises:
        FormatError: one of them is not what was sealed.
    """
    first = offset // BLOCK
    parts = [opener.open(first + index, block) for index, block in enumerate(_split(stored))]
    if opener.size < offset + length:
        raise FormatError("the object is cut short", where=opener.where)
    if len(parts) == 1:
        at = offset - first * BLOCK
        return parts[0] if (at, length) == (0, len(parts[0])) else parts[0][at : at + length]
    parts[0] = parts[0][offset - first * BLOCK :]
    excess = sum(map(len, parts)) - length
    if excess:
        parts[-1] = parts[-1][: len(parts[-1]) - excess]
    return b"".join(parts)


def open_whole(opener: Opener, stored: bytes) -> bytes:
    """Return all bytes of an object.

    Raises:
        FormatError: they are not all what was sealed.
    """
    parts = [opener.open(number, block) for number, block in enumerate(_split(stored))]
    if not parts or stored_size(opener.size) != len(stored):
        raise FormatError("the object is cut short", where=opener.where)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _split(stored: bytes) -> Iterator[memoryview]:
    view = memoryview(stored)
    for at in range(0, len(view), STORED_BLOCK):
        yield view[at : at + STORED_BLOCK]


def with_name(name: str, data: bytes | bytearray | memoryview) -> bytes:
    """Return what is sealed where the name is hidden: the name, then the bytes."""
    text = name.encode()
    return _NAME_LENGTH.pack(len(text)) + text + bytes(data)


def without_name(data: bytes, *, where: str) -> tuple[str, bytes]:
    """Return the name and the bytes.

    Raises:
        FormatError: there is no name.
    """
    if len(data) < _NAME_LENGTH.size:
        raise FormatError("an object without a name", where=where)
    start = _NAME_LENGTH.size
    end = start + int(_NAME_LENGTH.unpack_from(data)[0])
    if end > len(data):
        raise FormatError("an object without a name", where=where)
    return data[start:end].decode(errors="replace"), data[end:]


def name_size(name: str) -> int:
    """Return how many bytes `with_name` puts before an object's own."""
    return _NAME_LENGTH.size + len(name.encode())
