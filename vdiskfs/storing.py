"""All of a disk, in the vault: what whoever ends something waits for.

An empty spool alone does not say it: the spool may have been given back, so that images have
room, or because the vault was away for too long. What it held is compared and stored then.
"""

from __future__ import annotations

from typing import Protocol


class Counted(Protocol):
    """The bitmaps of a disk, counted."""

    @property
    def changed(self) -> bool:
        """Whether there is a change that no delta has."""


class Tracked(Protocol):
    """A live image."""

    def counts(self) -> Counted:
        """Return what its bitmaps hold."""


class Suspected(Protocol):
    """The suspect pages of a disk."""

    @property
    def needed(self) -> bool:
        """Whether there are any."""


class Replicating(Protocol):
    """A replicator."""

    @property
    def live(self) -> Tracked:
        """The image."""

    @property
    def suspects(self) -> Suspected:
        """Its suspect pages."""

    @property
    def ended(self) -> bool:
        """Whether nothing is sealed any more."""

    @property
    def waiting(self) -> int:
        """Deltas that wait for the vault."""

    async def seal_if_changed(self) -> None:
        """Run the pass, if one is due, and seal what changed."""

    async def wait_shipped(self) -> None:
        """Wait until nothing waits."""


def is_stored(replicator: Replicating) -> bool:
    """Say whether the vault holds all of a disk."""
    whole = not replicator.waiting and not replicator.suspects.needed
    return whole and not replicator.live.counts().changed


async def store_all(replicator: Replicating) -> None:
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
