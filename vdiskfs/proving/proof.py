"""One point proven, level after level, and each outcome kept with it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from vdiskfs.catalog import DiskLog, Point
from vdiskfs.catalog.proofs import CHECKED, FAIL, HASHED, PASS, Proof, write_proof
from vdiskfs.errors import DamagedError
from vdiskfs.proving.reading import read_back
from vdiskfs.units import format_time

Outcome = tuple[str, str]
"""PASS, FAIL or INCONCLUSIVE, and the reason for it."""


async def prove_point(
    points: DiskLog, point: Point, *, site: str,
    progress: Callable[[int, int], None] | None = None, rest: float = 0.0,
    check: Callable[[], Awaitable[Outcome]] | None = None,
    noted: Callable[[Proof], None] = lambda _: None,
) -> Proof:  # fmt: skip
    """Read a point back, then check it; return what was kept of the last level that was tried.

    Args:
        points: of the disk.
        point: the one to prove.
        site: who proves.
        progress: is told (done, total), bytes of the disk.
        rest: seconds of rest for each second of reading.
        check: says what comes of its file systems; None: it is read back, no more.
        noted: is told of each level, once its outcome is in the vault.

    Raises:
        NotFoundError: the point was thinned away.
        VaultUnreachableError: the vault does not answer; what was not told of is not kept.
    """
    began, read, outcome = time.monotonic(), 0, (PASS, "")
    try:
        async with await points.open(point) as reader:
            read = await read_back(reader, progress, rest=rest)
    except DamagedError as error:
        outcome = FAIL, str(error)
    proof = await keep_proof(points, point, HASHED, outcome, site=site, began=began, read=read)
    noted(proof)
    if check is not None and proof.outcome == PASS:
        outcome = await check()
        proof = await keep_proof(points, point, CHECKED, outcome, site=site, began=began, read=read)
        noted(proof)
    return proof


async def keep_proof(
    points: DiskLog, point: Point, level: str, outcome: Outcome, *, site: str, began: float,
    read: int,
) -> Proof:  # fmt: skip
    """Keep an attempt at a level with its point; durable on return.

    Args:
        points: of the disk.
        point: the one that was looked at.
        level: how far.
        outcome: what came of it.
        site: who has looked.
        began: when, by the monotonic clock.
        read: bytes of the disk that were read.
    """
    seconds = round(time.monotonic() - began, 1)
    proof = Proof(level, *outcome, format_time(time.time_ns()), seconds, site, read)
    await write_proof(points.store, points.record.id, (point.generation, point.epoch), proof)
    return proof
