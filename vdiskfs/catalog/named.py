"""Problems that mean nothing any more: what they name was thinned away while a check went on.

A check of a year takes a while, and a disk that is written is thinned meanwhile: its lines have
other ledgers then, and what only the old ones named is collected. Nothing is looked at again for
that; what no ledger names, and no line lists, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vdiskfs.catalog.inspection import Inspection, bare
from vdiskfs.catalog.ledger import Ledger, ledger_name, ledger_prefix, read_ledger
from vdiskfs.catalog.report import Problem
from vdiskfs.catalog.vault import Vault
from vdiskfs.delta.names import parse_joined, parse_segment, parse_slot
from vdiskfs.errors import DamagedError, NotFoundError

_TRIES = 20


async def still_named(vault: Vault, work: Inspection, problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems whose objects points still need, without points that have gone.

    Args:
        vault: which.
        work: what found them, by the ledgers of its record.
        problems: of this disk.
    """
    for _ in range(_TRIES):
        try:
            record = await vault.disk(work.record.id)
        except (DamagedError, NotFoundError):
            return list(problems)  # which is a problem of its own
        changed: dict[int, Ledger] = {}
        for number, ref in record.ledgers.items():
            if work.record.ledgers.get(number) == ref:
                continue
            base = record.base(number)
            try:
                changed[number] = await read_ledger(vault.store, record.id, number, ref.id, base)
            except NotFoundError:
                break  # another one is named by now, or it is lost
            except DamagedError as error:
                name = ledger_name(record.id, number, ref.id)
                return [*problems, Problem(name, bare(error, name), record.name)]
        else:
            named = _Named(
                work, changed, {number: ref.id for number, ref in record.ledgers.items()}
            )
            return [one for one in problems if named.keeps(one)] if changed else list(problems)
    return list(problems)


class _Named:
    """What the ledgers that are new name."""

    def __init__(
        self, work: Inspection, changed: Mapping[int, Ledger], ids: Mapping[int, str]
    ) -> None:
        self._work = work
        self._changed = changed
        self._disk = disk_id = work.record.id
        self._ids = ids
        self._live = {number: ledger.live(disk_id) for number, ledger in changed.items()}

    def keeps(self, problem: Problem) -> bool:
        """Say whether an object is needed; its problem keeps the points that there still are."""
        if not self._is_needed(problem.object):
            return False
        for number, ledger in self._changed.items():
            if number in problem.points:
                points = set(ledger.points.epoch.tolist())
                problem.points[number] = left = [
                    epoch for epoch in problem.points[number]
                    if epoch > ledger.horizon or epoch in points
                ]  # fmt: skip
                if not left:
                    del problem.points[number]
        return True

    def _is_needed(self, name: str) -> bool:
        place = parse_slot(name)
        joined = parse_joined(name)
        if joined is not None:
            place = joined[0], joined[2]
        if place is not None:
            return not self._is_below(*place) or name in self._live[place[0]]
        if parse_segment(name) is not None:
            return any(name in live for live in self._live.values()) or any(
                name in users and not self._is_below(number, users[name])
                for number, users in self._work.used.items()
            )
        for number in self._changed:
            if name.startswith(ledger_prefix(self._disk, number)):
                return name == ledger_name(self._disk, number, self._ids[number])
        return True

    def _is_below(self, generation: int, start: int) -> bool:
        """Say whether only a ledger that is new can name what begins at an epoch."""
        ledger = self._changed.get(generation)
        return ledger is not None and start < ledger.horizon
