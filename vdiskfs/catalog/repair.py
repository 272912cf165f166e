"""Healing a vault: what a check finds damaged is put together anew, where its bytes are known.

A check that reads all data says what is damaged; `vdiskfs.catalog.healer` heals the objects one
by one; another check says what is left. What was found healed may show more (a delta whose index
was damaged names segments), so that this is done again as long as it helps. Any number may run
at once, be killed, and run again. vdiskfs-internals(7), "Healing".
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Collection, Sequence

from vdiskfs.catalog.check import check_disk, find_records, list_line, list_lines
from vdiskfs.catalog.documentcheck import check_documents
from vdiskfs.catalog.healer import Healer, NoSources, Outcome, Sources
from vdiskfs.catalog.inspection import NOTHING, Inspection, Progress
from vdiskfs.catalog.leases import leased_whole
from vdiskfs.catalog.ledger import LEAF_LEVEL, read_ledger
from vdiskfs.catalog.lostdocuments import DocumentCopies, restore_document
from vdiskfs.catalog.lostrecords import restore_name
from vdiskfs.catalog.named import still_named
from vdiskfs.catalog.records import DiskRecord
from vdiskfs.catalog.references import gather
from vdiskfs.catalog.report import (
    CheckReport,
    Healed,
    Left,
    Problem,
    RepairReport,
    note_stopped,
)
from vdiskfs.catalog.swap import disk_object
from vdiskfs.catalog.vault import Vault, name_object
from vdiskfs.catalog.walk import Listing
from vdiskfs.delta.layout import is_id
from vdiskfs.delta.names import parse_joined, parse_slot, slot_name
from vdiskfs.errors import DamagedError, NotFoundError, RefusedError, VdiskfsError
from vdiskfs.point import PieceInfo
from vdiskfs.store import Store

log = logging.getLogger(__name__)

ROUNDS = 6
"""Each heals what the one before made visible; more than three were never needed."""


async def repair(
    vault: Vault,
    disks: Sequence[str] | None = None,
    *,
    skip: Collection[str] = (),
    sources: Callable[[DiskRecord], Sources] = lambda _: NoSources(),
    dry_run: bool = False,
    progress: Progress | None = None,
) -> RepairReport:
    """Heal disks (names or ids; all of them) and return what came of it.

    Args:
        vault: which.
        disks: which of its disks.
        skip: ids and names of disks that are left out.
        sources: what this host has of a disk.
        dry_run: find out what could be healed, and store nothing.
        progress: of the checks.

    An error that ends the repair of a disk is in the report, with what was found out so far.

    Raises:
        NotFoundError: a disk named is not there.
        VdiskfsError: nothing was found out.
    """
    report, names = RepairReport(dry_run), CheckReport()
    failed: list[tuple[DiskRecord, VdiskfsError]] = []
    records = await find_records(vault, disks, names)
    if disks is None:
        await check_documents(vault.store, names, disks=records)
    others = {
        vault.stored_name(disk_object(one) if is_id(one) else name_object(one)) for one in skip
    }
    named: dict[str, list[DiskRecord]] = {}
    for record in records:
        named.setdefault(vault.stored_name(name_object(record.name)), []).append(record)
    for problem in names.problems:
        stored = vault.stored_name(problem.object)
        if stored in others:
            continue
        if stored in named:
            await _settle_name(vault, named[stored], problem, report)
        else:
            await settle_document(vault.store, problem, report)
    for record in [one for one in records if one.id not in skip]:
        try:
            async with contextlib.AsyncExitStack() as stack:
                if not dry_run:
                    await stack.enter_async_context(leased_whole(vault, record, "vault repair"))
                await _Repair(vault, record, sources(record), report, progress).run()
        except VdiskfsError as error:
            failed.append((record, error))
        else:
            report.disks += 1
    for record, why in failed:
        note_stopped(report, record.name, disk_object(record.id), why)
    return report


async def settle_document(
    store: Store, problem: Problem, report: RepairReport, copies: DocumentCopies | None = None
) -> None:
    """Put a document that is no disk's back, or report what to do about it."""
    try:
        found = await restore_document(store, problem, copies, dry_run=report.dry_run)
    except RefusedError as error:
        report.refused = True
        found = Left(problem, error.message)
    if isinstance(found, Healed):
        report.healed.append(found)
    elif found is not None:
        report.left.append(found)


async def _settle_name(
    vault: Vault, records: Sequence[DiskRecord], problem: Problem, report: RepairReport
) -> None:
    """Put the name of a disk back, whose record says it; unless those of several do."""
    found: Healed | Left | None
    if len(records) > 1:
        ids = ", ".join(one.id for one in records)
        found = Left(problem, f"several disks have it by their records; name them by id: {ids}")
    else:
        try:
            found = await restore_name(
                vault, records[0].name, records[0].id, dry_run=report.dry_run
            )
        except RefusedError as error:
            report.refused = True
            found = Left(problem, error.message)
    if isinstance(found, Healed):
        report.healed.append(found)
    elif found is not None:
        report.left.append(found)


class _Repair:
    """The repair of one disk."""

    def __init__(
        self, vault: Vault, record: DiskRecord, sources: Sources, report: RepairReport,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self._vault = vault
        self._record = record
        self._sources = sources
        self._report = report
        self._progress = progress
        self._first: dict[str, Problem] = {}
        self._done: dict[str, Outcome] = {}
        self._why: dict[str, str] = {}
        self._whole: set[str] = set()
        self._looked: Inspection | None = None
        self._created: set[str] = set()
        self._stored = False

    async def run(self) -> None:
        """Heal as long as that helps.

        Raises:
            VdiskfsError: the first check failed: nothing is known.
        """
        found, points = await self._check()
        self._report.points += points
        stopped = False
        for _ in range(ROUNDS):
            for problem in found:
                self._first.setdefault(problem.object, problem)
            try:
                if not found or not await self._heal(found) or self._report.dry_run:
                    break
                found, _ = await self._check()
            except VdiskfsError as error:
                log.warning("disk %s: its repair ended: %s", self._record.name, error)
                stopped = True
                for problem in found:
                    if problem.object not in self._done:
                        self._why[problem.object] = error.message
                break
        left = found
        if self._report.dry_run or stopped:
            left = [one for one in found if one.object not in self._done
                    or self._done[one.object].why]  # fmt: skip
        if not stopped:
            left = await self._named(left)
        still = {one.object for one in left}
        self._report.left += [Left(one, self._why.get(one.object, "")) for one in left]
        for name, outcome in self._done.items():
            if name not in still or outcome.parts:
                self._report.healed.append(Healed(
                    self._first[name], outcome.parts, outcome.pages.get("here", 0),
                    outcome.pages.get("vault", 0), in_part=name in still,
                ))  # fmt: skip

    async def _check(self) -> tuple[list[Problem], int]:
        """Return what is damaged now, and how many points there are."""
        report = CheckReport()
        before = self._looked.looked() if self._looked is not None else NOTHING
        self._looked = await check_disk(
            self._vault, self._record, report, read_data=True, progress=self._progress,
            before=before,
        )  # fmt: skip
        self._record = await self._vault.disk(self._record.id)
        self._report.read_bytes += report.read_bytes
        known = {problem.object for problem in report.problems}
        missing = [one for one in await self._unlisted(report.problems) if one.object not in known]
        return report.problems + missing, report.points

    async def _named(self, problems: Sequence[Problem]) -> list[Problem]:
        """Return the problems that were not thinned away since."""
        assert self._looked is not None
        return await still_named(self._vault, self._looked, problems)

    async def _unlisted(self, problems: Sequence[Problem]) -> list[Problem]:
        """Return slots that the vault has had, and has not now, and that no check names.

        Of the newest ones this host knows; of several side by side a check names the first, and
        joined deltas tell of the points between them.
        """
        record, found = self._record, dict[tuple[int, int], int]()
        lines: dict[int, list[tuple[int, int]]] = {}
        for number, start, end in await self._sources.slots():
            lines.setdefault(number, []).append((start, end))
        gaps = [(parse_slot(one.object), one) for one in problems]
        for slot, _ in gaps:
            if slot is not None:
                lines.setdefault(slot[0], [])
        for number in lines.keys() & record.parents.keys():
            ref = record.ledgers.get(number)
            horizon = ref.horizon if ref is not None else 0
            slots = (await list_line(self._work(), number)).slots
            there = sorted(slots)
            for slot, problem in gaps:
                if slot is None or slot[0] != number or slot[1] in slots or slot[1] < horizon:
                    continue
                after = bisect.bisect_right(there, slot[1])
                last = there[after] if after < len(there) else math.inf
                inside = [one for one in problem.points.get(number, []) if slot[1] < one <= last]
                lines[number] += itertools.pairwise(sorted(inside))
            found |= {
                (number, start): end for start, end in lines[number]
                if start >= horizon and start not in slots
            }  # fmt: skip
        return [
            Problem(slot_name(record.id, number, start), "is missing", record.name, {number: [end]})
            for (number, start), end in sorted(found.items())
        ]

    def _work(self) -> Inspection:
        vault = self._vault
        return Inspection(
            vault.store, vault.vault_id, self._record, CheckReport(), read_data=False,
            progress=None,
        )  # fmt: skip

    async def _heal(self, problems: Sequence[Problem]) -> bool:
        """Try to heal each; say whether anything was stored: then there is more to see."""
        work = self._work()
        listings = await list_lines(self._vault, work)
        record = self._record = work.record
        names = {one.object for one in await self._named(problems)}
        references = await gather(work, listings, names)
        healer = Healer(
            work, references, self._sources, dry_run=self._report.dry_run,
            horizons={number: ref.horizon for number, ref in record.ledgers.items()},
            leaves={leaf.name: leaf for one in listings for leaf in one.leaves.values()},
            joins={join.name: join for one in listings for join in _ledger_joins(one, record)},
        )  # fmt: skip
        order = sorted(names, key=_order)
        self._created, self._stored = set(), False
        # What is made of others comes when those are healed.
        for made in (False, True):
            waiting = [name for name in order if _is_made(name) == made]
            while waiting:
                waiting = [name for name in waiting if await self._try(healer, name)]
                await references.copies.search()
        await self._take_back(self._created)
        return self._stored

    async def _try(self, healer: Healer, name: str) -> bool:
        """Try to heal an object; say whether it waits for a search of the vault."""
        try:
            outcome = await healer.heal(name)
        except RefusedError as error:
            # What is missing may be created there all the same.
            self._why[name] = error.message
            self._report.refused = True
            return False
        if outcome.waits:
            return True
        self._why[name] = outcome.why
        self._stored |= outcome.stored or outcome.raced
        if outcome.whole and name not in self._whole:
            # It was stored while the check looked.
            self._whole.add(name)
            self._stored = True
        if outcome.created:
            self._created.add(name)
        if outcome.stored:
            before = self._done.get(name)
            self._done[name] = outcome if before is None else _sum(before, outcome)
        return False

    async def _take_back(self, created: set[str]) -> None:
        """Delete again what thinning doomed while it was made: nobody needs it any more."""
        if not created:
            return
        record = await self._vault.disk(self._record.id)
        for generation, ref in record.ledgers.items():
            if self._record.ledgers.get(generation) == ref:
                continue
            doomed: Collection[str] = ()
            with contextlib.suppress(DamagedError, NotFoundError):
                base = record.base(generation)
                ledger = await read_ledger(self._vault.store, record.id, generation, ref.id, base)
                doomed = ledger.doomed
            for name in created & set(doomed):
                with contextlib.suppress(NotFoundError, RefusedError):
                    await self._vault.store.delete(name)


def _order(name: str) -> tuple[int, str]:
    """Return when an object's turn is: what tells of others comes first, what is made of them last.

    Indexes say which pages of a segment's frames are needed.
    """
    joined = parse_joined(name)
    if joined is not None:
        return (2 if joined[1] == LEAF_LEVEL else 4 + joined[1], name)
    return (1 if parse_slot(name) is not None else 3 if name.startswith("segments/") else 0, name)


def _is_made(name: str) -> bool:
    """Say whether an object is a joined delta, which holds nothing that others do not."""
    joined = parse_joined(name)
    return joined is not None and joined[1] != LEAF_LEVEL


def _ledger_joins(listing: Listing, record: DiskRecord) -> list[PieceInfo]:
    ref = record.ledgers.get(listing.generation)
    if ref is None:
        return []
    return [one for one in listing.joined if one.to_epoch <= ref.horizon]


def _sum(before: Outcome, outcome: Outcome) -> Outcome:
    pages = {key: before.pages.get(key, 0) + outcome.pages.get(key, 0)
             for key in {*before.pages, *outcome.pages}}  # fmt: skip
    return Outcome(stored=True, why=outcome.why, parts=before.parts + outcome.parts, pages=pages)
