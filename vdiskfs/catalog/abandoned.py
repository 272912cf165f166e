"""Collecting segments that writers have stored, and that no delta will ever name.

A pass that was given up leaves them, and a host that never comes back. Nothing else in the
vault tells them from those of a pass that takes its time, so that it takes two looks, a month
apart: the first says in the disk's record that a batch is doubted, the second that it was
given up, unless its writer has claimed it in between. What is said is swapped against all
claims that were known when the look began. A writer publishes nothing of a batch that was given
up (`vdiskfs.catalog.batches`), so that what is deleted here cannot be named afterwards. Clocks
decide when; whether it is safe only where a writer sleeps for all that month between its look
and its slot. vdiskfs-internals(7), "Thinning".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from vdiskfs.catalog.garbage import Collected, collect_names
from vdiskfs.catalog.line import REPAIR, Line, uncovered
from vdiskfs.catalog.log import DiskLog
from vdiskfs.catalog.records import CLAIMED, DOUBTED, GIVEN_UP, Batch, DiskRecord
from vdiskfs.catalog.remains import OLD_S
from vdiskfs.catalog.vault import Vault
from vdiskfs.crash import hook
from vdiskfs.delta.names import parse_segment, segment_name, segment_prefix, slot_name
from vdiskfs.delta.segments import BATCH, batch_of
from vdiskfs.errors import ConflictError, DamagedError, NotFoundError
from vdiskfs.units import NS

DOUBT_S = 30 * 86400
"""From the first doubt to the end: how long a writer may be away, with a pass half done."""

KEPT_S = 365 * 86400
"""How long it is said that a batch was given up: a writer may come back and store it again."""

_DOUBTED_MOST = 1000
"""Batches that one look begins to doubt: the record stays small."""


@dataclass(frozen=True, slots=True)
class Loose:
    """What a look has found: what is said of batches then, and segments that nothing names."""

    batches: Mapping[str, Batch]
    given_up: frozenset[str]
    waiting: int


async def sweep(vault: Vault, disk_id: str, now_ns: int, *, dry_run: bool = False) -> Collected:
    """Look for segments that nothing names; delete those whose time has come.

    Safe against writers, thinning and other sweeps, at any time and killed at any step.

    Args:
        vault: the vault.
        disk_id: whose segments.
        now_ns: the store's time.
        dry_run: only count.

    Raises:
        ConflictError: a writer has claimed something meanwhile, or a line was thinned; nothing
            was decided.
        DamagedError: what deltas name cannot be read, so that nothing is decided.
    """
    record = await vault.disk(disk_id)
    try:
        found = await _look(vault, record, now_ns)
    except (DamagedError, NotFoundError) as error:
        if (await vault.disk(disk_id)).ledgers != record.ledgers:
            raise ConflictError(f"disk {record.name}: was just thinned") from error
        raise
    if dry_run:
        return Collected(deleted=len(found.given_up), waiting=found.waiting)
    if found.batches != record.batches:

        def change(now: DiskRecord) -> DiskRecord:
            if now.claims == record.claims and now.batches == found.batches:
                return now  # an earlier try landed, its answer was lost
            if (now.claims, now.batches) != (record.claims, record.batches):
                raise ConflictError(f"disk {now.name}: its writer has just claimed segments")
            return replace(now, batches=found.batches)

        await vault.update_disk(disk_id, change)
        hook("batches.judged")
    done = await collect_names(vault.store, sorted(found.given_up))
    done.waiting = found.waiting
    return done


async def _look(vault: Vault, record: DiskRecord, now_ns: int) -> Loose:
    logs = [vault.log(record, number) for number in sorted(record.parents)]
    listed = await _below_horizons(logs)
    loose = {
        info.name: batch async for info in vault.store.list(segment_prefix(record.id))
        if info.name not in listed and (batch := _batch(info.name, info.metadata))
        and (batch in record.batches or abs(now_ns - info.modified_ns) > OLD_S * NS)
    }  # fmt: skip
    if loose or any(one.state != GIVEN_UP for one in record.batches.values()):
        listed |= await _above_horizons(logs)
    left: dict[str, list[str]] = defaultdict(list)
    for name, batch in loose.items():
        if name not in listed:
            left[batch].append(name)
    batches = _judge(record.batches, left, _batches(record, listed), now_ns)
    over = [name for batch, names in left.items() for name in names
            if batch in batches and batches[batch].state == GIVEN_UP]  # fmt: skip
    return Loose(batches, frozenset(over), sum(map(len, left.values())) - len(over))


def _judge(
    said: Mapping[str, Batch], left: Mapping[str, list[str]], named: Collection[str], now_ns: int
) -> dict[str, Batch]:
    """Return what is to be said of batches: ``left`` has what nothing names of each."""
    found = {}
    for batch, one in said.items():
        is_old = one.state == GIVEN_UP and one.since + KEPT_S * NS <= now_ns
        # Named: its delta was published, and names what there is of it.
        if batch not in left and (is_old or batch in named):
            continue
        if one.state == CLAIMED or (one.state == DOUBTED and one.since > now_ns):
            found[batch] = Batch(DOUBTED, now_ns)
        elif one.state == DOUBTED and one.since + DOUBT_S * NS <= now_ns:
            found[batch] = Batch(GIVEN_UP, now_ns)
        else:
            found[batch] = one
    fresh = [batch for batch in left if batch not in said][:_DOUBTED_MOST]
    return found | dict.fromkeys(fresh, Batch(DOUBTED, now_ns))


def _batch(name: str, metadata: Mapping[str, str]) -> str:
    """Return the batch of a segment whose writer claims what it stores; else ""."""
    segment_id = parse_segment(name)
    if segment_id is None or metadata.get(BATCH) != batch_of(segment_id):
        return ""
    return batch_of(segment_id)


def _batches(record: DiskRecord, names: Iterable[str]) -> set[str]:
    """Return those of the record's batches that these segments are of."""
    prefix = segment_prefix(record.id)
    found = {batch_of(name.removeprefix(prefix)) for name in names if name.startswith(prefix)}
    return found & record.batches.keys()


async def _below_horizons(logs: Iterable[DiskLog]) -> set[str]:
    """Return what ledgers name, or have doomed: that is deleted by them."""
    names: set[str] = set()
    for log in logs:
        line = log.line
        await line.load()
        _check_whole(line, [*line.holes, *filter(None, [line.gap])])
        if line.ledger is not None:
            names |= line.ledger.live(log.record.id) | line.ledger.doomed.keys()
    return names


async def _above_horizons(logs: Iterable[DiskLog]) -> set[str]:
    """Return the segments that slots above horizons name; DamagedError if one is missing."""
    names: set[str] = set()
    for log in logs:
        line = log.line
        if line.tip <= line.floor:
            continue
        span = (line.floor, line.tip)
        slots = await line.listed_all(0, span)
        # Thinned away meanwhile, or lost: a leaf, or a joined delta, may need its segments.
        _check_whole(line, uncovered(span, slots))
        for slot in slots:
            names |= {segment_name(log.record.id, one) for one in await log.tables.segments(slot)}
    return names


def _check_whole(line: Line, missing: Sequence[tuple[int, int]]) -> None:
    """Raise DamagedError where slots are missing: what they name is not known."""
    for start, _ in missing:
        name = slot_name(line.disk_id, line.generation, start)
        raise DamagedError(f"{name}: the delta is missing; what it names is not known", hint=REPAIR)
