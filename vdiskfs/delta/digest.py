"""Digests: of what an epoch changed, and of the chain of epochs.

A digest covers the logical content (pages, sums, zeros) and never how frames are stored,
so that it survives rewriting. BLAKE2b-256 throughout. vdiskfs-format(5), "Digests".
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from vdiskfs.delta.entries import U64, Extents
from vdiskfs.delta.layout import DIGESTED_FLAGS, HASH_SIZE, DeltaHead, Flags

_EPOCH = struct.Struct("<QQQQQQII")


def genesis_digest(vault_id: str, disk_id: str) -> bytes:
    """Return the digest of epoch 0: no chain of another disk or vault begins with it."""
    hasher = hashlib.blake2b(digest_size=HASH_SIZE, person=b"vdiskfs genesis")
    hasher.update(bytes.fromhex(vault_id) + bytes.fromhex(disk_id))
    return hasher.digest()


class ContentHasher:
    """Hashes what a delta changes, fed in ascending order of pages."""

    def __init__(self) -> None:
        """Start with nothing changed."""
        self._pages = hashlib.blake2b(digest_size=HASH_SIZE)
        self._sums = hashlib.blake2b(digest_size=HASH_SIZE)
        self._zeros = hashlib.blake2b(digest_size=HASH_SIZE)

    def add_pages(self, pageno: U64, sums: U64) -> None:
        """Add pages with data: sorted, after all that were added before."""
        self._pages.update(pageno.astype("<u8", copy=False).tobytes())
        self._sums.update(sums.astype("<u8", copy=False).tobytes())

    def add_zeros(self, zeros: Extents) -> None:
        """Add runs of zeros: after all that were added before, and not touching them."""
        pairs = np.stack([zeros.start, zeros.end], axis=1)
        self._zeros.update(pairs.astype("<u8", copy=False).tobytes())

    def digest(self) -> bytes:
        """Return the digest of the content so far."""
        hasher = hashlib.blake2b(digest_size=HASH_SIZE, person=b"vdiskfs content")
        hasher.update(self._pages.digest() + self._sums.digest() + self._zeros.digest())
        return hasher.digest()


def epoch_digest(head: DeltaHead) -> bytes:
    """Return the digest of the epoch that a slot ends at, from its head alone."""
    label = head.label.encode()
    hasher = hashlib.blake2b(digest_size=HASH_SIZE, person=b"vdiskfs epoch")
    hasher.update(head.from_digest)
    hasher.update(
        _EPOCH.pack(
            head.generation,
            head.from_epoch,
            head.to_epoch,
            head.size,
            head.cut,
            head.time_ns,
            Flags(head.flags & DIGESTED_FLAGS),
            len(label),
        )
    )
    hasher.update(label)
    hasher.update(head.content_digest)
    return hasher.digest()
