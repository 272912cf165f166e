"""Digests and the names of the encryption schemes. No keys are kept here.

Every digest takes a key, so that the digests of an encrypted vault confirm nothing to
somebody who has only a file. In an unencrypted vault the key is empty and the digest is
plain BLAKE2b-256.
"""

from __future__ import annotations

import hashlib

from vdiskfs.errors import FormatError, StateError

SCHEME_NONE = "none"
SCHEME_AES_256_GCM = "aes-256-gcm"
SCHEMES = (SCHEME_NONE, SCHEME_AES_256_GCM)
"""What the format knows. This version opens vaults of SCHEME_NONE alone."""

DIGEST_SIZE = 32
DIGEST_KEY_LIMIT = hashlib.blake2b.MAX_KEY_SIZE
Digest = hashlib.blake2b


def new_digest(key: bytes = b"") -> hashlib.blake2b:
    """Return a running BLAKE2b-256, keyed unless ``key`` is empty (at most 64 bytes)."""
    return hashlib.blake2b(digest_size=DIGEST_SIZE, key=key, usedforsecurity=True)


def digest(*parts: bytes | bytearray | memoryview, key: bytes = b"") -> bytes:
    """Return the BLAKE2b-256 of the parts one after the other; their borders do not count."""
    running = new_digest(key)
    for part in parts:
        running.update(part)
    return running.digest()


def check_scheme(scheme: object, *, where: str) -> str:
    """Return the encryption scheme of a vault, if this version can open it.

    Args:
        scheme: what the vault says.
        where: which vault, for the error.

    Raises:
        StateError: the scheme is known, and this version cannot read it.
        FormatError: it is not a scheme.
    """
    if scheme == SCHEME_NONE:
        return SCHEME_NONE
    if scheme == SCHEME_AES_256_GCM:
        raise StateError(
            f"{where}: the vault is encrypted ({scheme})",
            hint="this version of vdiskfs opens vaults with encryption none only",
        )
    shown = scheme[:40] if isinstance(scheme, str) else type(scheme).__name__
    raise FormatError(
        f"unknown encryption scheme {shown!r}",
        where=where,
        hint="the vault was made by a newer version of vdiskfs, or is damaged",
    )
