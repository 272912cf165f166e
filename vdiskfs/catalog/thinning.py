"""Thinning one line: fewer points, fewer objects, the same bytes. A ledger is its outcome.

What is written before the commit is garbage until the commit, and what the commit dooms was
the truth until then: whoever dies in between leaves one of both. The commit is one swap of
disk.json, which fails if a hold, a fork or another ledger came in between. The proof is in
vdiskfs-internals(7), "Thinning".
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import trio

from vdiskfs.catalog.leaves import LeafWriter, Take, empty_file
from vdiskfs.catalog.ledger import (
    JOIN_LEVEL,
    LEAF_LEVEL,
    Leaf,
    Ledger,
    ledger_prefix,
    ref_names,
    shortest,
    write_ledger,
)
from vdiskfs.catalog.line import MAX_LEVEL, choose
from vdiskfs.catalog.log import DiskLog
from vdiskfs.catalog.records import DiskRecord, LedgerRef
from vdiskfs.catalog.remains import Remains, revisions, unclaimed
from vdiskfs.catalog.retention import Ladder, kept
from vdiskfs.catalog.vault import Vault
from vdiskfs.catalog.ways import join_leaves, leaf_runs, still_right
from vdiskfs.crash import hook
from vdiskfs.delta.entries import Bools
from vdiskfs.delta.frames import DEFAULT_LEVEL
from vdiskfs.delta.layout import Flags
from vdiskfs.delta.names import segment_name, segment_prefix
from vdiskfs.delta.points import PointTable
from vdiskfs.errors import ConflictError, DamagedError
from vdiskfs.point import PieceInfo
from vdiskfs.units import NS

SPAN_LIMIT = 1 << 16
"""Epochs by which the horizon moves at most at once: what a run holds in memory."""

_ALIGN = 256  # epochs: where joined deltas of the second level end
_BEHIND_NS = 600 * NS


@dataclass(frozen=True, slots=True)
class Thinned:
    """What thinning a line does, or would do. Bytes are as stored when the points were made."""

    generation: int
    points: int
    bytes: int
    oldest_ns: int | None
    left: int
    more: bool = False
    """There are more points than one run takes: run it again."""


@dataclass(slots=True)
class _Plan:
    record: DiskRecord
    horizon: int
    stays: PointTable
    drops: PointTable
    oldest_ns: int | None
    left: int
    more: bool
    goes: PointTable
    stay_count: int
    protected: frozenset[int]


class Thinner:
    """Thins one generation of one disk; `plan` asks, `run` does it."""

    def __init__(
        self, vault: Vault, log: DiskLog, *, writer_id: str, scratch: Path,
        compression_level: int = DEFAULT_LEVEL, take: Take | None = None,
    ) -> None:  # fmt: skip
        """Use a log of the generation. ``scratch`` is this line's alone, also after a kill.

        ``take`` waits until so many bytes may be uploaded.
        """
        self._vault = vault
        self._log = log
        self._writer_id = writer_id
        self._scratch = scratch
        self._level = compression_level
        self._take = take

    async def plan(
        self, ladder: Ladder, now_ns: int, leased: Collection[tuple[int, int]] = ()
    ) -> Thinned:
        """Say what comes of a ladder: what `run` does, and what the next ones will do."""
        plan = await self._plan(ladder, now_ns, leased)
        return _outcome(self._log.generation, replace(plan, drops=plan.goes, left=plan.stay_count))

    async def run(
        self, ladder: Ladder, now_ns: int, *, thin_ns: int | None = None,
        leased: Collection[tuple[int, int]] = (), gone: Collection[str] = (), sweep: bool = False,
    ) -> Thinned:  # fmt: skip
        """Thin the line: on return what is to go is doomed, and is in no list.

        Args:
            ladder: which points stay; holds, forks and the newest stay whatever it says.
            now_ns: the store's time.
            thin_ns: the time that ages are counted from, if it is not that.
            leased: points that are open somewhere: they stay.
            gone: doomed names that were deleted.
            sweep: look for segments, too, of runs that have left nothing else.

        Raises:
            ConflictError: the disk was changed meanwhile; nothing was decided.
            DamagedError: a delta that is to be rewritten is damaged; nothing was decided.
        """
        thin_ns = now_ns if thin_ns is None else thin_ns
        # Behind a clock that jumped: how far it was followed is noted, whatever comes of it.
        behind = thin_ns + _BEHIND_NS < now_ns
        plan = await self._plan(ladder, thin_ns, leased, whole=behind)
        line, record = self._log.line, plan.record
        old = line.ledger
        leftovers = self._leftovers()
        if sweep:
            leftovers |= await unclaimed(self._log.store, record.id, old, line.generation, now_ns)
        caught_up = old is None or old.now_ns >= thin_ns - _BEHIND_NS
        tidy = old is None or all(leaf.tight for leaf in old.leaves)
        if plan.horizon == line.base or (
            plan.horizon == line.floor and not len(plan.drops) and not leftovers and caught_up
            and tidy
        ):  # fmt: skip
            return _outcome(line.generation, plan)
        self._clear()
        listed = await self._listed(plan.horizon)
        ledger = await self._write(plan, thin_ns, listed)
        leftovers |= self._leftovers()
        doomed = await self._doomed(record, old, listed, leftovers) - ledger.live(record.id)
        since = dict(old.doomed) if old is not None else {}
        doomed = (doomed | set(since)) - set(gone)
        # Also of what was doomed before: a branch may have been given it since.
        segments = {name for name in doomed if name.startswith(segment_prefix(record.id))}
        doomed -= await self._needed_elsewhere(record, segments)
        # Invariant: no name that was doomed is ever given again, also not one that a run that
        # lost against another has given: whoever deletes, however late, deletes garbage.
        ledger = replace(
            ledger, serial=max([ledger.serial, *revisions(doomed)]),
            doomed={name: since.get(name, now_ns) for name in sorted(doomed)},
        )  # fmt: skip
        # Invariant: what is doomed is needed by nothing below the horizon. What lies above
        # needs only itself, and segments of its own.
        if wrong := set(ledger.doomed) & ledger.live(record.id):
            raise DamagedError(
                f"disk {record.name}: thinning would delete what it keeps",
                hint=f"report this: {min(wrong)}",
            )
        await self._commit(plan, ledger)
        if self._log.cache is not None:
            await trio.to_thread.run_sync(self._log.cache.drop, sorted(doomed))
        shutil.rmtree(self._scratch, ignore_errors=True)
        hook("thin.done")
        return _outcome(line.generation, plan)

    def _leftovers(self) -> set[str]:
        """Return the segments that this and other runs may have stored."""
        return {path.name.partition(".")[0] for path in self._scratch.glob("*.segment*")}

    def _clear(self) -> None:
        """Make room in the scratch directory, but for the names of segments of other runs.

        They may be in the vault, and nothing else tells until they are doomed: the directory
        goes away with the commit, whichever run it is that comes so far.
        """
        self._scratch.mkdir(parents=True, exist_ok=True)
        for path in list(self._scratch.iterdir()):
            if ".segment" in path.name:
                empty_file(path)
            else:
                path.unlink()

    # ---- what stays ----------------------------------------------------------------------

    async def _plan(
        self,
        ladder: Ladder,
        now_ns: int,
        leased: Collection[tuple[int, int]],
        *,
        whole: bool = False,
    ) -> _Plan:
        log = self._log
        log.adopt(await self._vault.disk(log.record.id))
        await log.tip()
        table = await log.line_points()
        record, generation = log.record, log.generation
        protected = {fork[1] for fork in record.parents.values() if fork and fork[0] == generation}
        protected |= {hold.epoch for hold in record.holds if hold.generation == generation}
        protected |= {epoch for at, epoch in leased if at == generation}
        stays = kept(table.epoch, table.time_ns, ladder, now_ns, protected)
        # Points that somebody asked for are not crowded out by those of each second.
        for flag in (Flags.APPLICATION, Flags.LABELLED):
            marked = (table.flags & int(flag)) != 0
            if marked.any():
                stays[marked] |= kept(table.epoch[marked], table.time_ns[marked], ladder, now_ns)
        horizon, more = await self._horizon(table, stays, whole=whole)
        above: Bools = table.epoch > np.uint64(horizon)
        left = stays | above
        oldest = int(table.time_ns[left][0]) if left.any() else None
        return _Plan(record, horizon, _rows(table, stays & ~above), _rows(table, ~left), oldest,
                     int(left.sum()), more, _rows(table, ~stays), int(stays.sum()),
                     frozenset(protected))  # fmt: skip

    async def _horizon(self, table: PointTable, stays: Bools, *, whole: bool) -> tuple[int, bool]:
        """Return up to which epoch the line is decided now, and whether there is more.

        The newest slot of a line is never below: its writer, and who looks for its end, need it.
        """
        line = self._log.line
        slots = await line.listed(0, (line.floor, line.tip)) if line.tip > line.floor else []
        if not slots:
            return line.floor, False
        last = slots[-1].from_epoch
        limit = min(last, line.floor + SPAN_LIMIT)
        starts = [piece.from_epoch for piece in slots if piece.from_epoch <= limit]
        horizon = starts[-1] if starts else line.floor
        aligned = min((one for one in starts if one >= horizon // _ALIGN * _ALIGN), default=horizon)
        # Joined deltas are whole on both sides of such an epoch; but nothing is kept for that
        # which the ladder would drop.
        after = (table.epoch > np.uint64(aligned)) & (table.epoch <= np.uint64(horizon))
        return (horizon if whole or (~stays[after]).any() else aligned), limit < last

    # ---- writing -------------------------------------------------------------------------

    async def _listed(self, horizon: int) -> dict[int, list[PieceInfo]]:
        """List what there is up to the new horizon, by level.

        From the base on, but for slots: a joined delta may lie across the horizon that was, and
        what runs wrote that came to nothing lies anywhere.
        """
        line = self._log.line
        found = {level: await line.listed_all(level, (line.base, horizon))
                 for level in (*range(1, MAX_LEVEL + 1), JOIN_LEVEL, LEAF_LEVEL)}  # fmt: skip
        span = (line.floor, horizon)
        return found | {0: await line.listed_all(0, span) if span[0] < span[1] else []}

    async def _write(self, plan: _Plan, thin_ns: int, listed: dict[int, list[PieceInfo]]) -> Ledger:
        line, log = self._log.line, self._log
        old = line.ledger
        remains = Remains([*listed[LEAF_LEVEL], *listed[JOIN_LEVEL]], old)
        known = {(one.piece.from_epoch, one.piece.to_epoch): one
                 for one in (old.leaves if old is not None else ())}  # fmt: skip
        pieces = list(old.pieces) if old is not None else []
        span = (line.floor, plan.horizon)
        for level in range(MAX_LEVEL + 1):
            pieces += choose(listed[level], span)
        for piece in choose(listed[0], span):
            known[piece.from_epoch, piece.to_epoch] = await self._slot_leaf(piece)
        shared = await self._shared(plan.record, known.values())
        writer = LeafWriter(
            log.tables, line.generation, self._writer_id, self._level, self._scratch, remains,
            log.cache, shared, self._take,
        )  # fmt: skip
        leaves = await self._leaves(plan, writer, known, pieces)
        joins = still_right(pieces, leaves, {one.piece.name for one in known.values()})
        apart = await log.tables.apart(one.piece for one in leaves)
        joins += await join_leaves(writer, [leaf.piece for leaf in leaves], joins, apart)
        return Ledger(line.generation, line.base, plan.horizon, writer.serial, thin_ns,
                      tuple(leaves), tuple(joins), plan.stays)  # fmt: skip

    async def _leaves(
        self, plan: _Plan, writer: LeafWriter, known: dict[tuple[int, int], Leaf],
        pieces: Sequence[PieceInfo],
    ) -> list[Leaf]:  # fmt: skip
        ends = {*plan.stays.epoch.tolist(), plan.horizon}
        # The last step is never one over several: its head has the number of the point's seal.
        by_end = {end: leaf.piece for (_, end), leaf in known.items()}
        # Forks and holds may be where a point was dropped, and its state is there still.
        ends |= plan.protected & by_end.keys()
        by_start = {start: leaf for (start, _), leaf in known.items()}
        leaves: list[Leaf] = []
        for low, high in pairwise(sorted({self._log.line.base, *ends})):
            for start, end in leaf_runs(by_start, low, high):
                same = known.get((start, end))
                if same is not None:
                    leaves.append(await writer.tidy_leaf(same))
                    continue
                last = by_end.get(end)
                way = None if last is None else shortest(pieces, start, last.from_epoch)
                if way is None or last is None:
                    raise DamagedError(
                        f"disk {plan.record.name}: no deltas lead from epoch {start} to {end}"
                    )
                leaves.append(await writer.make_leaf([*way, last]))
        return leaves

    async def _slot_leaf(self, piece: PieceInfo) -> Leaf:
        """Return a slot as a leaf, with the segments that it brought."""
        return Leaf(piece, await self._log.tables.segments(piece), tight=True)

    # ---- deciding ------------------------------------------------------------------------

    async def _doomed(
        self, record: DiskRecord, old: Ledger | None, listed: dict[int, list[PieceInfo]],
        leftovers: Iterable[str],
    ) -> set[str]:  # fmt: skip
        """Return what nothing needs once a new ledger is the truth, but for what that names."""
        store, line = self._log.store, self._log.line
        doomed = {segment_prefix(record.id) + one for one in leftovers}
        if old is not None:
            doomed |= old.live(record.id)
        doomed |= {piece.name for found in listed.values() for piece in found}
        for piece in listed[0]:
            leaf = await self._slot_leaf(piece)
            doomed |= ref_names(record.id, line.generation, leaf.refs)
        doomed |= {
            info.name async for info in store.list(ledger_prefix(record.id, line.generation))
        }
        return doomed

    async def _needed_elsewhere(self, record: DiskRecord, names: set[str]) -> set[str]:
        """Return the segments that deltas of other generations refer to.

        A delta that was moved into a branch has its segments in common with what it was.
        """
        needed: set[str] = set()
        for number in record.parents:
            if number == self._log.generation or not names:
                continue
            line = self._vault.log(record, number).line
            await line.load()
            if line.ledger is not None:
                needed |= line.ledger.live(record.id)
            if line.tip > line.floor:
                for piece in await line.listed_all(0, (line.floor, line.tip)):
                    leaf = await self._slot_leaf(piece)
                    needed |= ref_names(record.id, number, leaf.refs)
        return names & needed

    async def _shared(self, record: DiskRecord, leaves: Iterable[Leaf]) -> frozenset[str]:
        """Return the segments of leaves that other generations need, too."""
        names = {segment_name(record.id, ref)
                 for leaf in leaves for ref in leaf.refs if len(ref) == 32}  # fmt: skip
        needed = await self._needed_elsewhere(record, names)
        return frozenset(name.removeprefix(segment_prefix(record.id)) for name in needed)

    async def _commit(self, plan: _Plan, ledger: Ledger) -> None:
        generation, before = ledger.generation, plan.record
        ledger_id = await write_ledger(self._log.store, before.id, ledger, self._log.cache)
        hook("thin.written")
        mine = LedgerRef(ledger_id, ledger.horizon)

        def change(found: DiskRecord) -> DiskRecord:
            if found.ledgers.get(generation) == mine:
                return found  # an earlier try landed, its answer was lost
            if found.ledgers.get(generation) != before.ledgers.get(generation):
                raise ConflictError(f"disk {found.name}: another site has just thinned it")
            if (found.parents, found.holds, found.policy) != (
                before.parents, before.holds, before.policy,
            ):  # fmt: skip
                raise ConflictError(f"disk {found.name}: its holds, forks or policy have changed")
            return replace(found, ledgers={**found.ledgers, generation: mine})

        self._log.adopt(await self._vault.update_disk(before.id, change))
        hook("thin.committed")


def _rows(table: PointTable, chosen: Bools) -> PointTable:
    epoch = table.epoch[chosen]
    stays = set(epoch.tolist())
    return PointTable(
        epoch, table.time_ns[chosen], table.size[chosen], table.changed_bytes[chosen],
        table.stored_bytes[chosen], table.flags[chosen],
        {key: text for key, text in table.labels.items() if key in stays},
    )  # fmt: skip


def _outcome(generation: int, plan: _Plan) -> Thinned:
    lost = int(plan.drops.stored_bytes.sum(dtype=np.uint64))
    return Thinned(generation, len(plan.drops), lost, plan.oldest_ns, plan.left, plan.more)
