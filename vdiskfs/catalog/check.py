"""Checking a vault: every delta's index and digest, every object it needs, all data if asked.

The report names damaged and missing objects, and for each the points that cannot be read
whole because of it. Points that a damaged joined delta could serve are served by what it
joins, so that it hurts none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from vdiskfs.catalog.documentcheck import check_documents
from vdiskfs.catalog.inspection import NOTHING, Inspection, Looked, Progress, bare
from vdiskfs.catalog.leases import leased_whole
from vdiskfs.catalog.ledger import ledger_name, read_ledger
from vdiskfs.catalog.line import MAX_LEVEL
from vdiskfs.catalog.lostpoints import all_points, thinned_points
from vdiskfs.catalog.named import still_named
from vdiskfs.catalog.records import DiskRecord, LedgerRef, named_by
from vdiskfs.catalog.report import CheckReport, Problem
from vdiskfs.catalog.swap import disk_object
from vdiskfs.catalog.vault import Vault, name_object
from vdiskfs.catalog.walk import LineState, LineWalk, Listing
from vdiskfs.delta import genesis_digest
from vdiskfs.delta.layout import head_from_metadata, is_id
from vdiskfs.delta.names import (
    joined_prefix,
    parse_joined,
    parse_slot,
    segment_prefix,
    slot_prefix,
)
from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs.point import PieceInfo

_TRIES = 20


async def check(
    vault: Vault,
    disks: Sequence[str] | None = None,
    *,
    read_data: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Check disks (names or ids; all of them) and return what is wrong.

    While all data of a disk is read nothing of it is deleted: there is a lease in the vault.

    Raises:
        NotFoundError: a disk named is not there.
        VaultUnreachableError, RefusedError: the vault cannot be asked now.
    """
    report = CheckReport()
    records = await find_records(vault, disks, report)
    for record in records:
        async with contextlib.AsyncExitStack() as stack:
            if read_data:
                await stack.enter_async_context(leased_whole(vault, record, "vault check"))
            await check_disk(vault, record, report, read_data=read_data, progress=progress)
    if disks is None:
        # They stand in the way of thinning: also where no data is read.
        for one in (await vault.read_sites())[1]:
            report.problems.append(Problem(one.object, one.why, ""))
    if read_data and disks is None:
        await check_documents(vault.store, report, disks=records)
    return report


async def check_disk(
    vault: Vault, record: DiskRecord, report: CheckReport, *, read_data: bool,
    progress: Progress | None, before: Looked = NOTHING,
) -> Inspection:  # fmt: skip
    """Add what is wrong with a disk to a report; return how it was looked at.

    What a check ``before`` read and found right is not read again.
    """
    with contextlib.suppress(DamagedError, NotFoundError):
        # The check of the disks before it took a while; if it is damaged that is said below.
        record = await vault.disk(record.id)
    work = Inspection(vault.store, vault.vault_id, record, report, read_data, progress, before)
    count = len(report.problems)
    await _check_disk(vault, work)
    report.problems[count:] = await still_named(vault, work, report.problems[count:])
    report.disks += 1
    if read_data:
        await check_documents(vault.store, report, disk=work.record)
    work.end()
    return work


async def find_records(
    vault: Vault, disks: Sequence[str] | None, report: CheckReport
) -> list[DiskRecord]:
    """Return the disks meant (all of them).

    Names that lead to none are reported, and disks to which no name leads.
    """
    if disks is not None:
        return [await vault.find_disk(name) for name in disks]
    found: dict[str, DiskRecord] = {}
    led_to: set[str] = set()
    for info in [info async for info in vault.store.list("names/")]:
        name, disk_id = info.name, info.metadata.get("disk", "")
        title = named_by(name, "names/") or name
        try:
            disk_id = await vault.named_id(name)
        except DamagedError as error:
            report.problems.append(Problem(name, bare(error, name), title))
        except NotFoundError:
            continue
        if not is_id(disk_id):
            continue
        led_to.add(disk_id)
        record = await _find_record(vault, disk_id, title, report)
        if record is not None:
            found[record.id] = record
    for record in await _nameless(vault, led_to, report):
        found[record.id] = record
    return sorted(found.values(), key=lambda record: record.name)


async def _find_record(
    vault: Vault, disk_id: str, title: str, report: CheckReport
) -> DiskRecord | None:
    """Return the record of a disk; where it cannot be read that is reported."""
    where = disk_object(disk_id)
    try:
        return await vault.disk(disk_id)
    except NotFoundError:
        # A name whose disk was never made; but not if it has points.
        points = await all_points(vault.store, disk_id)
        if points:
            message = "is missing, and its points are there"
            report.problems.append(Problem(where, message, title, points))
    except DamagedError as error:
        points = await all_points(vault.store, disk_id)
        report.problems.append(Problem(where, bare(error, where), title, points))
    return None


async def _nameless(vault: Vault, led_to: set[str], report: CheckReport) -> list[DiskRecord]:
    """Return the disks that have objects and to which no name leads; all of them are reported.

    A name is written before anything else of its disk, and stays. This costs one listing of all
    that disks have.
    """
    listed = {info.name.split("/")[1] async for info in vault.store.list("disks/")}
    known = {vault.stored_name(one.object) for one in report.problems}
    found = []
    for disk_id in sorted(listed - led_to):
        record = await _find_record(vault, disk_id, disk_id, report) if is_id(disk_id) else None
        if record is None:
            continue
        found.append(record)
        where, message = name_object(record.name), f"is missing: only its id leads to {disk_id}"
        try:
            other = await vault.named_id(where)
        except NotFoundError:
            pass
        except DamagedError as error:
            message = bare(error, where)
        else:
            if other == disk_id:
                continue  # the disk was made since the names were listed
            message = f"is the name of another disk, {other}: only its id leads to {disk_id}"
        if vault.stored_name(where) not in known:
            report.problems.append(Problem(where, message, record.name))
    return found


async def _check_disk(vault: Vault, work: Inspection) -> None:
    """Check all generations of a disk, parents first."""
    listings = await list_lines(vault, work)
    record = work.record
    # After the slots: a writer stores the segments of a delta first.
    segments = {info.name: info.size async for info in vault.store.list(segment_prefix(record.id))}
    work.sizes.update(segments)
    work.total = sum(len(listing.slots) + len(listing.joined) for listing in listings)
    ends: dict[tuple[int, int], LineState] = {}
    for listing in listings:
        parent = record.parents[listing.generation]
        start = LineState(genesis_digest(vault.vault_id, record.id), 0, {})
        if parent is not None:
            start = ends.get(parent, LineState(None, None, {}))
        wanted = {fork[1] for fork in record.parents.values() if fork is not None
                  and fork[0] == listing.generation}  # fmt: skip
        walk = LineWalk(work, listing, record.base(listing.generation), start)
        for epoch, state in (await walk.run(wanted)).items():
            ends[listing.generation, epoch] = state
    report = work.report
    if work.read_data:
        for name in sorted(filter(work.is_used, segments)):
            await work.look_at_segment(name)
    unused = [name for name in segments if not work.is_used(name)]
    report.segments += len(segments)
    report.unused_segments += len(unused)
    report.unused_bytes += sum(work.sizes[name] for name in unused)


async def list_lines(vault: Vault, work: Inspection) -> list[Listing]:
    """List all lines of a disk, by the ledgers that its record names by now."""
    for _ in range(_TRIES):
        count = len(work.report.problems)
        listings = [await list_line(work, number) for number in sorted(work.record.parents)]
        if not any(listing.lost for listing in listings):
            break
        record = await vault.disk(work.record.id)
        if record.ledgers == work.record.ledgers:
            break
        # A ledger that is not named any more has gone, and nothing is wrong with that.
        work.forget(count)
        work.record = record
    return listings


async def list_line(work: Inspection, generation: int) -> Listing:
    """List all slots and joined deltas of a generation; below a horizon those of its ledger.

    A ledger that cannot be read is reported.
    """
    disk_id, ref = work.record.id, work.record.ledgers.get(generation)
    listing = Listing(generation)
    horizon = 0
    if ref is not None:
        horizon = await _from_ledger(work, listing, ref)
    async for info in work.store.list(slot_prefix(disk_id, generation)):
        parsed = parse_slot(info.name)
        if parsed is not None:
            work.sizes[info.name] = info.size
            if parsed[1] >= horizon:
                listing.slots[parsed[1]] = info
    for level in range(1, MAX_LEVEL + 1):
        async for info in work.store.list(joined_prefix(disk_id, generation, level)):
            parts = parse_joined(info.name)
            if parts is not None and horizon <= parts[2] < parts[3]:
                listed = head_from_metadata(dict(info.metadata))
                listing.joined.append(PieceInfo(info.name, generation, level, parts[2], parts[3],
                                                info.size, listed, parts[4]))  # fmt: skip
    return listing


async def _from_ledger(work: Inspection, listing: Listing, ref: LedgerRef) -> int:
    """Take what a ledger names; return its horizon."""
    record, generation = work.record, listing.generation
    try:
        ledger = await read_ledger(
            work.store, record.id, generation, ref.id, record.base(generation)
        )
    except (DamagedError, NotFoundError) as error:
        name = ledger_name(record.id, generation, ref.id)
        base, horizon = record.base(generation), ref.horizon
        what = f"all points of generation {generation} up to #{horizon} are read by it"
        listing.lost, listing.lost_by = horizon, work.problem(name, f"{bare(error, name)}: {what}")
        listing.lost_points = await thinned_points(work.store, record.id, generation, base, horizon)
        return ref.horizon
    listing.leaves = {leaf.piece.from_epoch: leaf.piece for leaf in ledger.leaves}
    listing.joined += ledger.joins
    points = set(ledger.points.epoch.tolist())
    listing.hidden = {one.to_epoch for one in listing.leaves.values()} - points
    return ledger.horizon
