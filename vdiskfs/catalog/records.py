"""What the vault's control objects say: disks and sites."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vdiskfs.catalog.documents import FORMAT, decode_document, encode_document, take
from vdiskfs.delta.layout import is_id
from vdiskfs.errors import FormatError

_SAFE = re.compile(r"[a-z0-9_-]")


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """A protected disk: disks/<id>/disk.json, changed by compare-and-swap.

    ``generation`` is the one that may grow; ``parents`` has for each generation where it
    began: None (with the empty disk) or a generation and its epoch. ``retired`` is when
    the image went away, or None.
    """

    id: str
    name: str
    created: str
    site: str
    file: str
    size: int
    generation: int = 1
    parents: Mapping[int, tuple[int, int] | None] = field(default_factory=lambda: {1: None})
    retired: str | None = None

    def lineage(self, generation: int) -> list[tuple[int, int]]:
        """Return (generation, last epoch that counts) of all ancestors, oldest first."""
        found: list[tuple[int, int]] = []
        parent = self.parents.get(generation)
        while parent is not None:
            found.append(parent)
            parent = self.parents.get(parent[0])
        return found[::-1]

    def base(self, generation: int) -> int:
        """Return the epoch that a generation starts from."""
        parent = self.parents.get(generation)
        return parent[1] if parent else 0


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """A site's heartbeat: sites/<site>.json."""

    site: str
    host: str
    time: str
    version: str
    disks: tuple[str, ...]
    pid: int
    started: str


def encode_disk(record: DiskRecord) -> bytes:
    """Return the document of a disk."""
    parents = {
        str(generation): {"generation": parent[0], "epoch": parent[1]} if parent else None
        for generation, parent in sorted(record.parents.items())
    }
    return encode_document({
        "format": FORMAT, "id": record.id, "name": record.name, "created": record.created,
        "generation": record.generation, "parents": parents, "site": record.site,
        "image": {"file": record.file, "size": record.size}, "retired": record.retired,
    })  # fmt: skip


def decode_disk(data: bytes, disk_id: str, *, where: str) -> DiskRecord:
    """Return what a disk's document says.

    Raises:
        FormatError: it contradicts itself, or is another disk's.
    """
    values = decode_document(data, where=where)
    image = take(values, "image", dict, where=where)
    retired = values.get("retired")
    record = DiskRecord(
        id=take(values, "id", str, where=where),
        name=take(values, "name", str, where=where),
        created=take(values, "created", str, where=where),
        site=take(values, "site", str, where=where),
        file=take(image, "file", str, where=where),
        size=take(image, "size", int, where=where),
        generation=take(values, "generation", int, where=where),
        parents=_parents(take(values, "parents", dict, where=where), where),
        retired=retired if isinstance(retired, str) else None,
    )
    if record.id != disk_id or record.generation not in record.parents:
        raise FormatError("the document of another disk, or it contradicts itself", where=where)
    return record


def _parents(values: dict[str, Any], where: str) -> dict[int, tuple[int, int] | None]:
    parents: dict[int, tuple[int, int] | None] = {}
    for key, value in values.items():
        if not key.isascii() or not key.isdigit() or not 0 < int(key[:11]) < 1 << 32:
            raise FormatError("a generation is no number", where=where)
        generation = int(key)
        parents[generation] = None
        if value is not None:
            if not isinstance(value, dict):
                raise FormatError("a parent has another type", where=where)
            parent = take(value, "generation", int, where=where)
            # Invariant: parents are older, so that a lineage ends.
            if not 0 < parent < generation:
                raise FormatError("a generation is not younger than its parent", where=where)
            parents[generation] = (parent, take(value, "epoch", int, where=where))
    return parents


def encode_site(record: SiteRecord) -> bytes:
    """Return the document of a site."""
    return encode_document({
        "format": FORMAT, "site": record.site, "host": record.host, "time": record.time,
        "version": record.version, "disks": list(record.disks), "pid": record.pid,
        "started": record.started,
    })  # fmt: skip


def decode_site(data: bytes, *, where: str) -> SiteRecord:
    """Return what a site's document says."""
    values = decode_document(data, where=where)
    disks = take(values, "disks", list, where=where)
    if not all(isinstance(disk, str) and is_id(disk) for disk in disks):
        raise FormatError("a disk is no id", where=where)
    return SiteRecord(
        site=take(values, "site", str, where=where),
        host=take(values, "host", str, where=where),
        time=take(values, "time", str, where=where),
        version=take(values, "version", str, where=where),
        disks=tuple(disks),
        pid=take(values, "pid", int, where=where),
        started=take(values, "started", str, where=where),
    )


def safe_name(name: str) -> str:
    """Return a user's name as part of an object's name: [a-z0-9._-], all else in %hex."""
    raw = name.encode()
    return "".join(
        chr(byte) if _SAFE.fullmatch(chr(byte)) or (byte == 0x2E and index) else f"%{byte:02x}"
        for index, byte in enumerate(raw)
    )
