"""What a writer claims: segments that it has stored, and that no delta names yet.

Segments come before the delta that names them: by seconds where a delta is uploaded, by weeks
where a pass stores a large disk bit by bit. Who collects what nothing names must not take
them. The ids of segments that one delta will name begin alike, as a *batch*; the disk's
record says which batches are claimed, and which were given up, and both are said by
compare-and-swap: a delta is published only while its batches are claimed, and a batch that
was given up is never claimed again. Segments that were stored within this hour, by the call
that publishes their delta, need no claim, unless something is said of their batch: nothing so
young is doubted. vdiskfs-internals(7), "Thinning".
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from vdiskfs.catalog.records import CLAIMED, GIVEN_UP, Batch, DiskRecord
from vdiskfs.catalog.swap import swap_disk
from vdiskfs.crash import hook
from vdiskfs.errors import SegmentsGoneError
from vdiskfs.store import Store

YOUNG_S = 3600.0
"""For so long segments need no claim: far below the week after which one is doubted."""


class Claims:
    """A writer's batches of one disk, as the record that was read last says."""

    def __init__(self, store: Store, record: DiskRecord) -> None:
        """Begin with a record; makes no request."""
        self._store = store
        self._spent: set[str] = set()
        self.learned(record)

    def learned(self, record: DiskRecord) -> None:
        """Take the record as it was just read."""
        self._record = record

    def holds(self, batch: str) -> bool:
        """Say whether a batch was claimed when the record was read."""
        found = self._record.batches.get(batch)
        return found is not None and found.state == CLAIMED

    async def need(self, batches: Collection[str], young: Collection[str] = ()) -> None:
        """See that these are claimed: nobody gives them up for a month. Durable on return.

        Reads the record each time: what was true a minute ago may not be by another clock.

        Args:
            batches: that are to be claimed.
            young: whose segments were stored just now; they are claimed if something is said
                of them: they were stored before, and perhaps deleted.

        Raises:
            SegmentsGoneError: one was given up. It may be deleted at any moment, again, too.
        """
        if not batches and not young:
            return

        def change(found: DiskRecord) -> DiskRecord:
            wanted = {*batches, *(batch for batch in young if batch in found.batches)}
            states = {batch: found.batches.get(batch, Batch("")).state for batch in wanted}
            if GIVEN_UP in states.values():
                raise SegmentsGoneError(
                    "what was stored of a point that was not finished has been collected: this "
                    "site was away for too long"
                )
            if set(states.values()) <= {CLAIMED}:
                return found
            # Not forgotten: a copy of this directory may have parts of a batch that was given up.
            kept = {
                batch: one for batch, one in found.batches.items()
                if batch not in self._spent or one.state == GIVEN_UP
            }  # fmt: skip
            return replace(
                found, claims=found.claims + 1, batches=kept | dict.fromkeys(wanted, Batch())
            )

        self.learned(await swap_disk(self._store, self._record.id, change))
        hook("batch.claimed")

    def spend(self, batches: Collection[str]) -> None:
        """A delta that names them is published: they are claimed no more, when others are."""
        self._spent |= {batch for batch in batches if batch in self._record.batches}
