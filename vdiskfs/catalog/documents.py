"""The vault's small control objects: JSON documents, read strictly and bounded.

Each ends with a check of its own bytes, so that a flipped bit is an error, not another
value. What is signed or sealed has more than that: see vdiskfs-format(5).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from vdiskfs.errors import FormatError

# Version 1 had no check, and a disk's document no ledgers, holds and policy: a program that
# does not know those would take a thinned line for a broken one.
FORMAT = 2
DOCUMENT_LIMIT = 1 << 20

_CHECK_SIZE = 8
_BEFORE, _AFTER = b',\n "check": "', b'"\n}\n'
_END = len(_BEFORE) + 2 * _CHECK_SIZE + len(_AFTER)


def encode_document(values: dict[str, Any]) -> bytes:
    """Return a document's bytes; keys in the order given (one at least), the check last."""
    # A line for each key. With indent= the library would do without its C encoder: ten times as
    # long for a ledger.
    rows = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    return _with_check(("{\n" + ",\n".join(rows)).encode())


def decode_document(data: bytes, *, where: str) -> dict[str, Any]:
    """Return a document's values, without the check.

    Raises:
        FormatError: it is no JSON object, has a key twice, is not what was written, or is of
            a newer format.
    """
    try:
        values = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise FormatError("not a document of a vault", where=where) from None
    if not isinstance(values, dict):
        raise FormatError("not a document of a vault", where=where)
    version = values.get("format", 1)
    if type(version) is not int or version < 1:
        raise FormatError("no format version", where=where)
    if version > FORMAT:
        raise FormatError(
            f"made by a newer vdiskfs (format {version}; this program knows {FORMAT})",
            where=where,
            hint="use a newer vdiskfs",
        )
    # What is not whole is no document of version 1 either: no single bit makes it one.
    if (version > 1 or "check" in values) and _with_check(data[:-_END]) != data:
        raise FormatError("damaged: its check is not that of its bytes", where=where)
    values.pop("check", None)
    return values


def is_same_document(whole: bytes, damaged: bytes) -> bool:
    """Say whether what is left of a damaged document proves that it was a whole one.

    That is where its check, or all before it, are still those of the whole one.
    """
    if _with_check(whole[:-_END]) != whole:
        return False  # format version 1 had no check
    return damaged[:-_END] == whole[:-_END] or damaged[-_END:] == whole[-_END:]


def take(values: dict[str, Any], key: str, kind: type, *, where: str) -> Any:
    """Return a value that must be there and of a type; numbers are 0 to 2**63."""
    value = values.get(key)
    if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 1 << 63):
        raise FormatError(f"{key!r} is missing or has another type", where=where)
    return value


def _with_check(text: bytes) -> bytes:
    check = hashlib.blake2b(text, digest_size=_CHECK_SIZE, person=b"vdiskfs document")
    return text + _BEFORE + check.hexdigest().encode() + _AFTER


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    return values
