"""The vault's small control objects: JSON documents, read strictly and bounded."""

from __future__ import annotations

import json
from typing import Any

from vdiskfs.errors import FormatError

FORMAT = 1
DOCUMENT_LIMIT = 1 << 20


def encode_document(values: dict[str, Any]) -> bytes:
    """Return a document's bytes; keys in the order given."""
    return (json.dumps(values, indent=1, ensure_ascii=True) + "\n").encode()


def decode_document(data: bytes, *, where: str) -> dict[str, Any]:
    """Return a document's values.

    Raises:
        FormatError: it is no JSON object, has a key twice, or is of a newer format.
    """
    try:
        values = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise FormatError("not a document of a vault", where=where) from None
    if not isinstance(values, dict):
        raise FormatError("not a document of a vault", where=where)
    version = values.get("format", FORMAT)
    if type(version) is not int or version < 1:
        raise FormatError("no format version", where=where)
    if version > FORMAT:
        raise FormatError(
            f"made by a newer vdiskfs (format {version}; this program knows {FORMAT})",
            where=where,
            hint="use a newer vdiskfs",
        )
    return values


def take(values: dict[str, Any], key: str, kind: type, *, where: str) -> Any:
    """Return a value that must be there and of a type; numbers are 0 to 2**63."""
    value = values.get(key)
    if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 1 << 63):
        raise FormatError(f"{key!r} is missing or has another type", where=where)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    return values
