"""Who writes a disk: claims, fences, generations, branches.

All of it is conditional requests to the store, in an order in which a crash at any step
leaves a vault from which the same call goes on. No clock and no lease is needed: a slot is
filled once, and ``disk.json`` is swapped. vdiskfs-format(5), "Ownership".
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from vdiskfs.catalog.log import DiskLog
from vdiskfs.catalog.points import Tip
from vdiskfs.catalog.records import RELEASED, Branch, DiskRecord, Owner
from vdiskfs.catalog.vault import Vault, now_text
from vdiskfs.crash import hook
from vdiskfs.delta import DeltaWriter, EpochFacts, Flags, Spooled, delta_metadata
from vdiskfs.delta.names import slot_name
from vdiskfs.errors import AlreadyExistsError, ConflictError

_TRIES = 50


@dataclass(frozen=True, slots=True)
class Claim:
    """A writer that starts: ``start`` is new, ``known`` are those that it may have written."""

    site: str
    writer: str
    start: str
    known: Collection[str]

    def is_of(self, owner: Owner | None) -> bool:
        """Say whether this writer is the owner, as its last start left it, or nobody is."""
        # An empty number: made by this writer, never started.
        return owner is None or (
            owner.writer == self.writer and owner.start in {"", self.start, *self.known}
        )

    def owner(self, before: Owner | None) -> Owner:
        """Return what the record is to say; an owner that stays has been it since before."""
        same = before is not None and before.writer == self.writer
        since = before.since if before is not None and same else now_text()
        return Owner(self.site, self.writer, self.start, since)


async def claim(vault: Vault, record: DiskRecord, wanted: Claim) -> DiskRecord:
    """Note that the owner has started anew; go on in its generation.

    Raises:
        ConflictError: the disk has another owner now, or another generation.
    """

    def change(found: DiskRecord) -> DiskRecord:
        if found.generation != record.generation or not wanted.is_of(found.owner):
            raise ConflictError(f"disk {found.name}: has another owner now")
        if found.owner is not None and found.owner.start == wanted.start:
            return found
        return replace(found, owner=wanted.owner(found.owner), site=wanted.site)

    claimed = await vault.update_disk(record.id, change)
    hook("owner.claimed")
    return claimed


async def fence(log: DiskLog, writer: str, scratch: Path) -> Tip:
    """End a generation: fill the slot at its tip, again if its writer was faster.

    On return the store refuses every slot that the generation's writer has yet to fill.
    ``scratch`` is a directory that is made and removed here; a kill may leave it.
    """
    for _ in range(_TRIES):
        tip = await log.tip()
        if tip.fenced:
            return tip
        try:
            spooled = await trio.to_thread.run_sync(_write_fence, log, tip, writer, scratch)
            name = slot_name(log.record.id, log.generation, tip.epoch)
            # Taken: the writer's delta, somebody's fence, or ours: the next look tells.
            with contextlib.suppress(AlreadyExistsError):
                await log.store.create_from_file(
                    name, spooled.path, metadata=delta_metadata(spooled.head)
                )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        hook("takeover.fenced")
    raise ConflictError(f"disk {log.record.name}: its writer is faster every time")


async def next_generation(vault: Vault, record: DiskRecord, tip: Tip, wanted: Claim) -> DiskRecord:
    """Start the generation after a fenced one, owned by the writer that asks.

    What another site was promised of the ended one is void, and a failover from which it is
    taken cannot be rolled back.

    Raises:
        ConflictError: somebody else has started one.
    """

    def change(found: DiskRecord) -> DiskRecord:
        if found.owner is not None and found.owner.start == wanted.start:
            return found  # an earlier try landed, its answer was lost
        if found.generation != record.generation:
            raise ConflictError(f"disk {found.name}: another site is starting a generation")
        number = found.next_generation
        other = found.owner is not None and found.owner.writer != wanted.writer
        released = found.handover is not None and found.handover.step == RELEASED
        return replace(
            found, generation=number, site=wanted.site, owner=wanted.owner(found.owner),
            parents={**found.parents, number: (tip.generation, tip.epoch)},
            handover=None if other or released else found.handover,
            moved=None if other else found.moved,
        )  # fmt: skip

    taken = await vault.update_disk(record.id, change)
    hook("takeover.generation")
    return taken


async def take_over(
    vault: Vault, record: DiskRecord, wanted: Claim, log: Callable[[DiskRecord], DiskLog],
    scratch: Path,
) -> tuple[DiskRecord, Tip]:  # fmt: skip
    """Fence the current generation and start the next; return the record and the old tip.

    ``scratch`` is as for `fence`.

    Raises:
        ConflictError: it has another owner than when that was decided, or a new generation
            all the time.
        DamagedError: the newest delta is damaged.
    """
    for _ in range(_TRIES):
        tip = await fence(log(record), wanted.writer, scratch)
        try:
            return await next_generation(vault, record, tip, wanted), tip
        except ConflictError:
            owner, record = record.owner, await vault.disk(record.id)
            if record.owner != owner:
                raise
    raise ConflictError(f"disk {record.name}: others take it over all the time")


async def add_branch(
    vault: Vault, seen: DiskRecord, parent: tuple[int, int], branch: Branch
) -> tuple[DiskRecord, int]:
    """Start a branch that forks off at a parent, or find the one of this token.

    ``seen`` is the record in which the parent was there still.

    Raises:
        ConflictError: the parent's line was thinned since: look again whether it is there.
    """

    def change(found: DiskRecord) -> DiskRecord:
        if _by_token(found, branch.token) is not None:
            return found
        # As for a fork: a branch and a horizon are each swapped against what the other says.
        if found.ledgers.get(parent[0]) != seen.ledgers.get(parent[0]):
            raise ConflictError(f"disk {found.name}: was thinned just now")
        number = found.next_generation
        named = replace(branch, name=f"{branch.name}-{number}")
        return replace(
            found, parents={**found.parents, number: parent},
            branches={**found.branches, number: named},
        )  # fmt: skip

    record = await vault.update_disk(seen.id, change)
    hook("branch.started")
    number = _by_token(record, branch.token)
    assert number is not None
    return record, number


def _by_token(record: DiskRecord, token: str) -> int | None:
    return next((number for number, one in record.branches.items() if one.token == token), None)


def _write_fence(log: DiskLog, tip: Tip, writer_id: str, directory: Path) -> Spooled:
    directory.mkdir(mode=0o700, exist_ok=True)
    writer = DeltaWriter(
        directory, vault_id=log.vault_id, disk_id=log.record.id, writer_id=writer_id
    )
    return writer.finish(
        EpochFacts(
            generation=log.generation, from_epoch=tip.epoch, to_epoch=tip.epoch,
            time_ns=max(time.time_ns(), tip.time_ns), size=tip.size, cut=tip.size,
            from_size=tip.size, from_digest=tip.digest, flags=Flags.FENCE,
        )
    )  # fmt: skip
