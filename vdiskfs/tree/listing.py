"""Listings: the names of a directory with the positions that readdir goes on from.

A position (cookie) belongs to a name, not to a place in a list: it is a hash of the
name, or a number that orders the points of a day. Names that come and go between two
readdir calls therefore neither hide nor repeat others, and a position means the same
to a daemon that was restarted in between.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from operator import attrgetter
from typing import Protocol

from vdiskfs.tree.node import Attributes, Node

# 1 and 2 are `.` and `..`.
FIRST_COOKIE = 3
_MASK = (1 << 62) - 1

Found = tuple[Node, Attributes]


@dataclass(frozen=True, slots=True)
class Entry:
    """A name. ``find`` returns the node and its attributes, or None if the name is gone."""

    cookie: int
    name: bytes
    find: Callable[[], Found | None]


class Listing(Protocol):
    """The entries of a directory in the order of their cookies."""

    def after(self, cookie: int) -> Iterable[Entry]:
        """Return the entries beyond the cookie; below FIRST_COOKIE: all."""


class NameListing:
    """Names in the order of their hashes."""

    def __init__(self, finders: Iterable[tuple[bytes, Callable[[], Found | None]]]) -> None:
        self._entries = sorted(
            (Entry(cookie_of(name), name, find) for name, find in finders),
            key=attrgetter("cookie"),
        )

    def after(self, cookie: int) -> Iterable[Entry]:
        """Return the entries beyond the cookie."""
        first = bisect_right(self._entries, cookie, key=attrgetter("cookie"))
        return islice(self._entries, first, None)


def cookie_of(name: bytes) -> int:
    """Return the cookie of a name: 62 bits of BLAKE2b (two in 10,000 names meet once in 10^11)."""
    return max(FIRST_COOKIE, int.from_bytes(blake2b(name, digest_size=8).digest(), "big") & _MASK)
