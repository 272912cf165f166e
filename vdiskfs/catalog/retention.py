"""Which points stay: a ladder of rungs, applied to points. Pure functions, no I/O.

A rung ``1m for 1d`` keeps, of all points not older than a day, the newest of each minute.
Minutes are those of the calendar (multiples of the step since 1970), so that it does not
matter when a ladder is applied, nor how often: what is the newest of its minute stays that,
and a rung keeps it from the first second on, for the coarser rungs to find it later.

    kept(kept(P, t1), t2) == kept(P, t2)   for t1 <= t2
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from vdiskfs.delta.entries import U64, Bools
from vdiskfs.errors import UsageError
from vdiskfs.units import NS, parse_span

_MAX_RUNGS = 16
_STEP_MIN = NS // 10
_SPANS = (("y", 365 * 86400), ("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


@dataclass(frozen=True, slots=True)
class Rung:
    """One point in each ``step_ns``, for points up to ``span_ns`` old."""

    step_ns: int
    span_ns: int


Ladder = tuple[Rung, ...]


def parse_ladder(text: str) -> Ladder:
    """Return what ``1s for 1h, 1m for 1d`` means; ``all`` (no rung) keeps every point.

    Raises:
        UsageError: it is none, or its rungs do not get coarser and longer.
    """
    if text.strip() == "all":
        return ()
    rungs = []
    for part in text.split(","):
        words = re.fullmatch(r"\s*(\S+)\s+for\s+(\S+)\s*", part)
        try:
            step, span = words.groups() if words is not None else ("", "")
            rungs.append(Rung(parse_span(step), parse_span(span)))
        except ValueError:
            raise UsageError(
                f"not a retention ladder: {text[:80]!r}",
                hint='use all, or rungs such as "1s for 1h, 1m for 1d, 1h for 15d, 1d for 1y"',
            ) from None
    for before, after in itertools.pairwise(rungs):
        if after.step_ns <= before.step_ns or after.span_ns <= before.span_ns:
            raise UsageError(f"retention {text[:80]!r}: each rung is coarser and longer")
    if len(rungs) > _MAX_RUNGS or any(not _STEP_MIN <= one.step_ns <= one.span_ns for one in rungs):
        raise UsageError(f"retention {text[:80]!r}: a rung has an impossible step or length")
    return tuple(rungs)


def format_ladder(ladder: Ladder) -> str:
    """Write a ladder as `parse_ladder` reads it."""
    rungs = [f"{_span(one.step_ns)} for {_span(one.span_ns)}" for one in ladder]
    return ", ".join(rungs) or "all"


def kept(
    epochs: U64, times_ns: U64, ladder: Ladder, now_ns: int, protected: Collection[int] = ()
) -> Bools:
    """Return which points stay.

    Args:
        epochs: ascending.
        times_ns: of these points; they never fall.
        ladder: its rungs; none keeps all.
        now_ns: what ages are counted from. A point that is newer is of age 0.
        protected: epochs that stay whatever the ladder says. The newest point stays, too.
    """
    count = len(epochs)
    if not ladder or not count:
        return np.ones(count, np.bool_)
    stays = np.isin(epochs, np.fromiter(protected, np.uint64, len(protected)))
    stays[-1] = True
    now = np.uint64(max(0, now_ns))
    age = now - np.minimum(times_ns, now)
    for rung in ladder:
        bucket = times_ns // np.uint64(rung.step_ns)
        last = np.searchsorted(bucket, bucket, side="right") - 1
        # Points of one time were sealed while a clock was put back: nobody knows their age.
        newest = times_ns == times_ns[last]
        stays |= newest & (age <= np.uint64(rung.span_ns))
    return stays


def next_change_ns(times_ns: U64, ladder: Ladder, now_ns: int) -> int | None:
    """Return the first time at which a point may leave a rung; None: at no time known."""
    ends = [
        int(times_ns[inside[0]]) + rung.span_ns + 1
        for rung in ladder
        if len(inside := np.flatnonzero(times_ns + np.uint64(rung.span_ns) >= np.uint64(now_ns)))
    ]
    return min(ends, default=None)


def _span(span_ns: int) -> str:
    for unit, seconds in _SPANS:
        if span_ns % (seconds * NS) == 0:
            return f"{span_ns // (seconds * NS)}{unit}"
    return f"{span_ns / NS:g}s"
