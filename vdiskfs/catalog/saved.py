"""What a log has learned, as a local file: so that its owner lists nothing after a restart.

A copy that may be lost: a file that is damaged, or another disk's, is left aside, and a
point that is opened is checked against the vault as always.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from vdiskfs.catalog.line import Line
from vdiskfs.delta.layout import HASH_SIZE, Flags, ListedHead, hash_bytes
from vdiskfs.delta.points import PointTable
from vdiskfs.errors import LocalError
from vdiskfs.point import PieceInfo

_VERSION = 1
_LIMIT = 256 << 20
_COLUMNS = ("epoch", "time_ns", "size", "changed_bytes", "stored_bytes")


def write_saved(
    path: Path, identity: Sequence[str], lines: Sequence[Line], tables: dict[str, PointTable]
) -> None:
    """Write the file, whole or not at all. It is not synced: it is a copy.

    Raises:
        LocalError: it cannot be written.
    """
    body = msgpack.packb({
        "version": _VERSION,
        "identity": list(identity),
        "lines": [_pack_line(line, tables) for line in lines],
    })  # fmt: skip
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(hash_bytes(body) + body)
        temporary.replace(path)
    except OSError as error:
        raise LocalError(f"{os.fspath(path)}: {error.strerror}") from error


def read_saved(
    path: Path, identity: Sequence[str], lines: Sequence[Line]
) -> dict[str, PointTable] | None:
    """Fill the lines from the file and return the tables; None: it is of no use."""
    try:
        if path.stat().st_size > _LIMIT:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    if hash_bytes(data[HASH_SIZE:]) != data[:HASH_SIZE]:
        return None
    values = msgpack.unpackb(data[HASH_SIZE:])
    if values["version"] != _VERSION or values["identity"] != list(identity):
        return None
    packed = {item["generation"]: item for item in values["lines"]}
    tables: dict[str, PointTable] = {}
    for line in lines:
        item = packed.get(line.generation)
        if item is not None and item["base"] == line.base and line.ref is None:
            line.cover = [_unpack_piece(piece) for piece in item["cover"]]
            line.loaded = bool(line.cover)
            for name, table in item["tables"].items():
                tables[name] = _unpack_table(table)
    return tables


def _pack_line(line: Line, tables: dict[str, PointTable]) -> dict[str, Any]:
    # A line that has ended, has holes or was thinned is surveyed again.
    usable = (
        line.loaded
        and line.ref is None
        and line.fence is None
        and not line.holes
        and line.gap is None
    )
    cover = line.cover if usable else []
    return {
        "generation": line.generation,
        "base": line.base,
        "cover": [_pack_piece(piece) for piece in cover],
        "tables": {
            piece.name: _pack_table(tables[piece.name])
            for piece in cover
            if piece.level and piece.name in tables
        },
    }


def _pack_piece(piece: PieceInfo) -> list[Any]:
    listed = piece.listed
    said = None if listed is None else [
        listed.to_epoch, listed.time_ns, listed.first_time_ns, listed.size, int(listed.flags),
        listed.changed_bytes, listed.stored_bytes, listed.tail_bytes, listed.to_digest,
        listed.label,
    ]  # fmt: skip
    return [piece.name, piece.generation, piece.level, piece.from_epoch, piece.to_epoch,
            piece.size, piece.revision, said]  # fmt: skip


def _unpack_piece(values: list[Any]) -> PieceInfo:
    name, generation, level, low, high, size, revision, said = values
    listed = None
    if said is not None:
        to, time_ns, first_ns, disk_size, flags, changed, stored, tail, digest, label = said
        listed = ListedHead(
            to, time_ns, first_ns, disk_size, Flags(flags), changed, stored, tail, digest, label
        )
    return PieceInfo(name, generation, level, low, high, size, listed, revision)


def _pack_table(table: PointTable) -> dict[str, Any]:
    columns: dict[str, Any] = {name: getattr(table, name).tobytes() for name in _COLUMNS}
    labels = {str(epoch): label for epoch, label in table.labels.items()}
    return {**columns, "flags": table.flags.tobytes(), "labels": labels}


def _unpack_table(values: dict[str, Any]) -> PointTable:
    epoch, time_ns, size, changed, stored = (
        np.frombuffer(values[name], np.uint64) for name in _COLUMNS
    )
    flags = np.frombuffer(values["flags"], np.uint8)
    labels = {int(key): label for key, label in values["labels"].items()}
    return PointTable(epoch, time_ns, size, changed, stored, flags, labels)
