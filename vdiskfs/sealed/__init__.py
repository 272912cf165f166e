"""Encrypted vaults: a ``Store`` that seals all objects of another one.

What lies above sees names, sizes and bytes as they are; what lies below sees names that are
numbers and ids, and sealed bytes. So everything that goes into a vault is encrypted, what is
invented later included, and nothing is parsed or decompressed before it is authenticated.

store      SealedStore                 blocks   objects as sealed blocks
names      names without users' words  seen     what was seen, to notice an older state
edges      blocks that two reads share

Where the format is specified: vdiskfs-format(5), "Encryption".
"""

from vdiskfs.sealed.seen import Seen
from vdiskfs.sealed.store import SealedStore, expect_size

__all__ = ["SealedStore", "Seen", "expect_size"]
