"""Names of objects in an encrypted vault.

Below a few directories names are made of ids and numbers alone, and stay as they are: the
order of slots is what listings are made for. Everywhere else a name may hold what a user
wrote: there it is HMAC-SHA-256 of the name, and the name itself stands, sealed, in the object.
What is not known here is hidden.
"""

from __future__ import annotations

import re

from vdiskfs.crypto import DataKey

VAULT = "vault.json"
"""Says how to open the vault; the only object that is not sealed."""

# What lies below an id there is named by vdiskfs alone (vdiskfs.delta.names).
_BELOW_ID = "(?:disks|segments|boot|points|proofs)/[0-9a-f]{32}"
_VISIBLE = re.compile(rf"{_BELOW_ID}(?:/.+|\.json)")
_VISIBLE_PREFIX = re.compile(rf"{_BELOW_ID}[/.].*")
_BULK = re.compile(r"disks/[0-9a-f]{32}/g[0-9a-f]{8}(?:\.[0-9]|\.ledger)?/.*|segments/.*")
_HIDDEN = re.compile(r"([^/]+)/([0-9a-f]{32})")
_UNREADABLE = re.compile(r"([^/]+)/unreadable-([0-9a-f]{32})\.json")
_OTHER = "other"


def is_hidden(name: str) -> bool:
    """Say whether a name, an object's own or that in the store, tells nothing in the store."""
    return name != VAULT and _VISIBLE.fullmatch(name) is None


def is_bulk(name: str) -> bool:
    """Say whether an object is one of many that are created once: deltas, ledgers, segments.

    There is no older version of it: of a name there is one, and the record that names a ledger
    has a revision.
    """
    return _BULK.fullmatch(name) is not None


def stored_name(key: DataKey, name: str) -> str:
    """Return the name under which an object lies in the store."""
    if not is_hidden(name):
        return name
    unreadable = _UNREADABLE.fullmatch(name)
    if unreadable:
        return f"{unreadable[1]}/{unreadable[2]}"
    kind, slash, _ = name.partition("/")
    return f"{kind if slash else _OTHER}/{key.name(name)}"


def unreadable_name(stored: str) -> str | None:
    """Return a name for an object that does not say its own; None: it is nobody's.

    Whoever reads it under that name learns what is wrong with it.
    """
    hidden = _HIDDEN.fullmatch(stored)
    return f"{hidden[1]}/unreadable-{hidden[2]}.json" if hidden else None


def stored_prefix(prefix: str) -> str:
    """Return the longest prefix in the store below which all names with this one lie."""
    if _VISIBLE_PREFIX.fullmatch(prefix):
        return prefix
    kind, slash, _ = prefix.partition("/")
    return f"{kind}/" if slash else ""
