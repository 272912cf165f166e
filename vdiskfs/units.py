"""Constants and the writing of sizes and times. No state, no I/O.

Sizes are bytes, times are nanoseconds since 1970 (``_ns``) or seconds (``_s``), UTC.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

PAGE_SIZE = 4096
CHUNK_SIZE = 65536
PAGES_PER_CHUNK = CHUNK_SIZE // PAGE_SIZE
REGION_SIZE = 16 * 1024 * 1024
PAGES_PER_REGION = REGION_SIZE // PAGE_SIZE
MAX_DISK_SIZE = 64 * 1024**4

NS = 1_000_000_000

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
          "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w|y)")
_SPAN_NS = {"ms": 10**6, "s": NS, "m": 60 * NS, "h": 3600 * NS, "d": 86400 * NS,
            "w": 7 * 86400 * NS, "y": 365 * 86400 * NS}  # fmt: skip

MAX_SPAN_NS = 500 * _SPAN_NS["y"]
"""The longest span: 64 bits hold it, and a time plus it."""


def pages_of(size: int) -> int:
    """Return how many pages hold ``size`` bytes."""
    return -(-size // PAGE_SIZE)


def parse_size(text: str) -> int:
    """Return the bytes that a size such as ``512``, ``10GiB`` or ``1.5T`` means.

    Raises:
        ValueError: it is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    size = math.inf
    if match is not None and match[2].upper() in _UNITS:
        size = float(match[1]) * _UNITS[match[2].upper()]
    if size == math.inf:
        raise ValueError(f"not a size: {text[:40]!r} (use KiB, MiB, GiB or TiB)")
    return int(size)


def format_size(size: float) -> str:
    """Write bytes for people: ``10.0 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def parse_span(text: str) -> int:
    """Return the nanoseconds that a span such as ``15m``, ``2h`` or ``1.5s`` means.

    Raises:
        ValueError: it is not a span.
    """
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a span of time: {text[:40]!r} (use s, m, h, d)")
    span_ns = float(match[1]) * _SPAN_NS[match[2]]
    if span_ns > MAX_SPAN_NS:
        raise ValueError(f"not a span of time: {text[:40]!r} (500y at most)")
    return int(span_ns)


def format_time(time_ns: int) -> str:
    """Write a time in ISO 8601, UTC, milliseconds: ``2026-11-21T01:40:05.000Z``."""
    moment = datetime.fromtimestamp(time_ns // NS, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{time_ns % NS // 10**6:03d}Z"


def parse_time(text: str, now_ns: int) -> int:
    """Return the time that ISO 8601 text, or a span before now (``-15m``), means.

    A time without a zone is UTC. A time means the end of what its digits name: ``05Z`` finds
    a point of 05.300, and ``05.123Z`` one of 05.123456, which is listed as ``05.123Z``.

    Raises:
        ValueError: it is not a time.
    """
    text = text.strip()
    if text.startswith("-"):
        return now_ns - parse_span(text[1:])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"not a time: {text!r} (use 2026-11-21T01:40:05Z, or -15m for 15 minutes ago)"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    whole = int(moment.replace(microsecond=0).timestamp()) * NS
    digits = re.search(r"[.,](\d{1,6})", text)
    if digits is None:
        return whole + NS - 1
    named_ns: int = 10 ** (9 - len(digits[1]))
    return whole + moment.microsecond * 1000 + named_ns - 1
