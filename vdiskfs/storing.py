"""All of a disk, in the vault: what whoever ends something waits for.

An empty spool alone does not say it: the spool may have been given back, so that images have
room, or because the vault was away for too long. What it held is compared and stored then.
"""

from __future__ import annotations

from vdiskfs.replicator import Replicator


def is_stored(replicator: Replicator) -> bool:
    """Say whether the vault holds all of a disk."""
    whole = not replicator.waiting and not replicator.suspects.needed
    return whole and not replicator.live.counts().changed


async def store_all(replicator: Replicator) -> None:
    """Have all stored that was written until now; what is given back meanwhile is stored again.

    Raises:
        PassStoppedError: the pass that was due was stopped.
        OSError, LocalError: the local disk refused.
    """
    while True:
        await replicator.seal_if_changed()
        await replicator.wait_shipped()
        if replicator.ended or not replicator.suspects.needed:
            return
