"""Whom damage hurts: following damaged pages from epoch to epoch until they are replaced.

A damaged frame, or block of an index, hurts the points from its own on, until its pages
are written again, discarded or cut away. A delta that cannot be opened hurts every later
point, until a joined delta that is whole leads past it: then only the pages that still
come from damaged objects are hurt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from vdiskfs.delta.entries import NO_EXTENTS, U64, Extents, unite_extents

# Pages that are hurt; None: all of them, because a delta cannot be opened.
Hurt: TypeAlias = Extents | None


@dataclass(slots=True)
class Change:
    """What a delta that can be opened does to hurt pages.

    ``pages``: those of them that it replaces by data, ``zeros``: by zeros; ``cut_page``:
    it removes all from there on; ``bad``: pages it cannot supply, by problem.
    """

    pages: U64
    zeros: Extents
    cut_page: int
    bad: Mapping[int, Extents]


def pages_hurt(state: Mapping[int, Hurt]) -> Extents:
    """Return all pages that are hurt one by one."""
    return unite_extents(pages for pages in state.values() if pages is not None)


class Tracker:
    """Which pages each problem hurts at the epoch reached; problems are numbers."""

    def __init__(self, start: Mapping[int, Hurt]) -> None:
        """Start with what hurts the epoch that the line begins at."""
        self.state: dict[int, Hurt] = dict(start)
        self._past: dict[int, dict[int, Hurt]] = {}

    def remember(self, epoch: int) -> None:
        """Keep the state at an epoch, for joined deltas that begin there."""
        if self.state:
            self._past[epoch] = dict(self.state)

    def forget(self, epoch: int) -> None:
        """Drop what was kept of an epoch: no joined delta that begins there is to come."""
        self._past.pop(epoch, None)

    def at(self, epoch: int) -> dict[int, Hurt]:
        """Return the state at an epoch that was remembered."""
        return self._past.get(epoch, {})

    def apply(self, change: Change) -> None:
        """Pass a slot that can be read."""
        self.state = advance(self.state, change)

    def lose(self, problem: int) -> None:
        """Pass a slot whose index cannot be read."""
        self.state[problem] = None

    def reroute(self, start: int, change: Change) -> None:
        """Pass a whole joined delta that ends here: later points are read through it."""
        self.state = advance(self.at(start), change)


def advance(state: Mapping[int, Hurt], change: Change) -> dict[int, Hurt]:
    """Return what hurts after a delta."""
    after: dict[int, Hurt] = {}
    for problem, pages in state.items():
        if pages is None:
            # Even where all was cut away since: the chain cannot be followed.
            after[problem] = None
            continue
        left = pages.clip(0, change.cut_page).without(change.zeros)
        left = left.without_pages(change.pages)
        if len(left):
            after[problem] = left
    for problem, pages in change.bad.items():
        before = after.get(problem, NO_EXTENTS)
        if len(pages) and before is not None:
            after[problem] = unite_extents([before, pages])
    return after
