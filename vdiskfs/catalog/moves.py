"""A disk goes from one site to another: it is asked for, released, taken, given back.

Each step is one compare-and-swap of ``disk.json`` and can be repeated: a crash before or after
it leaves a record from which the same call goes on. vdiskfs-format(5), "Moves".
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vdiskfs.catalog.log import DiskLog
from vdiskfs.catalog.owners import Claim, fence
from vdiskfs.catalog.points import Tip
from vdiskfs.catalog.records import (
    ASKED,
    REFUSED,
    RELEASED,
    STOPPING,
    Branch,
    DiskRecord,
    Handover,
    Moved,
)
from vdiskfs.catalog.vault import Vault, now_text
from vdiskfs.crash import hook
from vdiskfs.errors import ConflictError, NotFoundError, StateError

__all__ = [
    "ASKED", "REFUSED", "RELEASED", "STOPPING", "Fork", "answer", "ask_for", "catch_up",
    "fork_off", "give_back", "is_forked", "note_move", "withdraw",
]  # fmt: skip


_TRIES = 20


@dataclass(frozen=True, slots=True)
class Fork:
    """Where the generation of a failover begins.

    ``epoch`` is one of ``generation``, or of an ancestor of it; ``expected`` is the current
    generation of the disk as it was when the point was chosen.
    """

    generation: int
    epoch: int
    expected: int
    moved: Moved


def is_forked(record: DiskRecord, fork: Fork) -> bool:
    """Say whether the generation of a fork was started, by an earlier call perhaps."""
    return record.moved is not None and record.moved.token == fork.moved.token


async def fork_off(
    vault: Vault, record: DiskRecord, fork: Fork, wanted: Claim, *,
    log: Callable[[DiskRecord], DiskLog], scratch: Path,
) -> DiskRecord:  # fmt: skip
    """End the current generation, and start the next one from a point, owned by who asks.

    What the ended one holds beyond the point is kept as a branch. ``scratch`` is as for
    `owners.fence`.

    Raises:
        StateError: another site has taken the disk since the point was chosen.
        DamagedError: the newest delta is damaged.
    """
    if is_forked(record, fork):
        return record
    if record.generation != fork.expected:
        raise _overtaken(record)
    tip = await fence(log(record), wanted.writer, scratch)
    for _ in range(_TRIES):
        record = await vault.disk(record.id)
        # The point may be of a line that the current generation does not come from.
        await _check_kept(vault.log(record, fork.generation), fork)
        try:
            return await _fork(vault, record, fork, wanted, tip)
        except _ThinnedError:
            continue  # it is looked at anew whether the point is still there
    raise ConflictError(f"disk {record.name}: it is thinned all the time")


class _ThinnedError(Exception):
    """The line of a fork has another ledger than when its point was looked for."""


async def _check_kept(points: DiskLog, fork: Fork) -> None:
    """Check that the state a generation is to begin with is one that was not thinned away.

    Raises:
        NotFoundError: it was.
    """
    if fork.epoch and not await points.leads_to(fork.generation, fork.epoch):
        raise NotFoundError(
            f"{points.record.name}@{fork.epoch}: the point was thinned away",
            hint=f"vdiskfs point list {shlex.quote(points.record.name)}",
        )


async def _fork(
    vault: Vault, record: DiskRecord, fork: Fork, wanted: Claim, tip: Tip
) -> DiskRecord:
    checked = record.ledgers.get(fork.generation)

    def change(found: DiskRecord) -> DiskRecord:
        if is_forked(found, fork):
            return found  # an earlier try landed, its answer was lost
        if found.generation != fork.expected:
            raise _overtaken(found)
        # Invariant: a fork and a horizon are swapped in the same document, each against what
        # the other one says: whoever comes second looks again.
        if found.ledgers.get(fork.generation) != checked:
            raise _ThinnedError
        number = found.next_generation
        branches = dict(found.branches)
        owner, moved = found.owner, fork.moved
        if owner is not None and moved.generation == found.generation:
            # It may have started anew since the point was chosen: given back, it is to know it.
            moved = replace(moved, source=owner)
        place = (fork.generation, fork.epoch)
        if owner is not None and not _is_on_the_way(found, tip.epoch, place):
            name = f"{owner.site}-{found.generation}"
            branches[found.generation] = Branch(
                _branch_name(name), owner.site, owner.writer, fork.moved.token, now_text()
            )
        return replace(
            found, generation=number, site=wanted.site, owner=wanted.owner(found.owner),
            parents={**found.parents, number: (fork.generation, fork.epoch)},
            branches=branches, handover=None, moved=moved,
        )  # fmt: skip

    taken = await vault.update_disk(record.id, change)
    hook("failover.taken")
    return taken


def _is_on_the_way(record: DiskRecord, tip: int, place: tuple[int, int]) -> bool:
    """Say whether the newest epoch of the current generation is on the line to a place, too."""
    line, epoch = record.generation, tip
    while (parent := record.parents.get(line)) is not None and epoch == parent[1]:
        line = parent[0]  # nothing was added since it began
    ends = dict([*record.lineage(place[0]), place])
    return epoch <= ends.get(line, 0)


async def give_back(
    vault: Vault, disk_id: str, failover_id: str, log: Callable[[DiskRecord, int], DiskLog]
) -> DiskRecord:
    """Make the owner from whom a failover took the disk its owner again.

    Its line goes on where it was: in the branch that it has begun, if it has.
    """
    record = await vault.disk(disk_id)
    if record.moved is None or record.moved.id != failover_id:
        return record
    line = record.moved.generation
    end = (await log(record, line).tip()).epoch

    def change(found: DiskRecord) -> DiskRecord:
        moved = found.moved
        if moved is None or moved.id != failover_id:
            return found
        own = [
            number
            for number, one in found.branches.items()
            if one.writer == moved.source.writer and (line, end) in found.lineage(number)
        ]
        number = max(own, default=found.next_generation)
        parents = {**found.parents}
        parents.setdefault(number, (line, end))
        branches = {key: one for key, one in found.branches.items() if key not in (number, line)}
        return replace(
            found, generation=number, site=moved.source.site, owner=moved.source,
            parents=parents, branches=branches, handover=None, moved=None,
        )  # fmt: skip

    given = await vault.update_disk(disk_id, change)
    hook("failover.returned")
    return given


async def catch_up(vault: Vault, record: DiskRecord, number: int, tip: int) -> DiskRecord:
    """Make a branch of the owner that goes on from the tip of the main line the main line.

    Raises:
        ConflictError: it does not, or the disk has moved on.
    """

    def change(found: DiskRecord) -> DiskRecord:
        if found.generation == number:
            return found  # an earlier try landed, its answer was lost
        parent = found.parents.get(number)
        ours = number in found.branches and found.owner == record.owner
        if not ours or found.generation != record.generation or parent is None:
            raise ConflictError(f"disk {found.name}: has moved on meanwhile")
        if not _is_on_the_way(found, tip, parent):
            raise ConflictError(f"disk {found.name}: branch {number} is not from its tip")
        branches = {key: one for key, one in found.branches.items() if key != number}
        return replace(found, generation=number, branches=branches)

    caught = await vault.update_disk(record.id, change)
    hook("handover.returned")
    return caught


async def note_move(vault: Vault, disk_id: str, failover_id: str, state: str | None) -> None:
    """Tell all sites how far a failover is; None: it is over, the disk is where it is at home.

    Raises:
        StateError: another failover has the disk.
    """

    def change(found: DiskRecord) -> DiskRecord:
        if found.moved is None and state is None:
            return found
        if found.moved is None or found.moved.id != failover_id:
            raise _overtaken(found)
        return replace(found, moved=None if state is None else replace(found.moved, state=state))

    await vault.update_disk(disk_id, change)
    hook("failover.told")


# ---- handing over -----------------------------------------------------------------------


async def ask_for(vault: Vault, disk_id: str, request: Handover) -> DiskRecord:
    """Ask the owner of a disk to let it go; an earlier call of the same id counts.

    Raises:
        StateError: it is asked for by somebody else, or belongs to who asks.
    """

    def change(found: DiskRecord) -> DiskRecord:
        before = found.handover
        if before is not None and before.id == request.id and before.step != REFUSED:
            return found
        if found.owner is None or found.owner.writer == request.writer:
            raise StateError(f"disk {found.name}: no other site has it", hint="vdiskfs disk list")
        if before is not None and before.id != request.id and before.step != REFUSED:
            raise StateError(
                f"disk {found.name}: is being handed over to site {before.site} since "
                f"{before.asked}",
                hint="finish that first, or roll it back there",
            )
        return replace(found, handover=request)

    record = await vault.update_disk(disk_id, change)
    hook("handover.asked")
    if record.owner is not None:
        await vault.touch_site(record.owner.site, record.owner.writer)
    return record


async def answer(vault: Vault, disk_id: str, request_id: str, step: str, said: str = "") -> None:
    """Say, as the owner, how far a handover is.

    Raises:
        ConflictError: it was withdrawn.
    """

    def change(found: DiskRecord) -> DiskRecord:
        if found.handover is None or found.handover.id != request_id:
            raise ConflictError(f"disk {found.name}: the handover was withdrawn")
        return replace(found, handover=replace(found.handover, step=step, said=said[:400]))

    await vault.update_disk(disk_id, change)
    hook(f"handover.{step}")


async def withdraw(vault: Vault, disk_id: str, request_id: str) -> None:
    """Let the owner keep the disk after all; nothing is done where nothing was asked."""

    def change(found: DiskRecord) -> DiskRecord:
        if found.handover is None or found.handover.id != request_id:
            return found
        return replace(found, handover=None)

    try:
        record = await vault.update_disk(disk_id, change)
    except NotFoundError:
        return
    hook("handover.withdrawn")
    if record.owner is not None:
        await vault.touch_site(record.owner.site, record.owner.writer)


def _overtaken(record: DiskRecord) -> StateError:
    owner = record.owner
    by = f"site {owner.site} since {owner.since}" if owner is not None else "nobody"
    return StateError(
        f"disk {record.name}: has moved on meanwhile: generation {record.generation}, of {by}",
        hint="vdiskfs disk list",
    )


def _branch_name(name: str) -> str:
    kept = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-"
                   for char in name.lower())  # fmt: skip
    return kept.lstrip("._-")[:80] or "branch"
