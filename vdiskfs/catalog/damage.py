"""Whom damage hurts: following damaged pages from epoch to epoch until they are replaced.

A damaged frame hurts the points from its own on, until its pages are written again,
discarded or cut away. A damaged index hurts every later point, until a joined delta that
is whole leads past it: then only the pages that still come from damaged objects are hurt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from vdiskfs.delta.entries import U64

NO_PAGES: U64 = np.empty(0, np.uint64)
# Pages that are hurt; None: all of them, because an index cannot be read.
Hurt: TypeAlias = U64 | None


@dataclass(slots=True)
class Problem:
    """One damaged or missing object, and the points it hurts (epochs by generation)."""

    object: str
    message: str
    disk: str
    points: dict[int, list[int]] = field(default_factory=dict)

    def hurts(self, generation: int, epoch: int) -> None:
        """Note that a point cannot be read whole."""
        self.points.setdefault(generation, []).append(epoch)


@dataclass(slots=True)
class Change:
    """What a readable delta does to hurt pages.

    ``pages``: those of them that it replaces by data or zeros; ``cut_page``: it removes
    all from there on; ``bad``: what it takes from damaged frames, by problem.
    """

    pages: U64
    cut_page: int
    bad: Mapping[int, U64]


def pages_of_state(state: Mapping[int, Hurt]) -> U64:
    """Return all pages that are hurt one by one, sorted."""
    parts = [pages for pages in state.values() if pages is not None]
    return np.unique(np.concatenate(parts)) if parts else NO_PAGES


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

    def at(self, epoch: int) -> dict[int, Hurt]:
        """Return the state at an epoch that was remembered."""
        return self._past.get(epoch, {})

    def apply(self, change: Change) -> None:
        """Pass a slot that can be read."""
        self.state = advance(self.state, change)

    def lose(self, problem: int) -> None:
        """Pass a slot whose index cannot be read."""
        self.state[problem] = None

    def rescue(self, start: int, change: Change) -> None:
        """Pass a joined delta that ends here: what it leads past is not hurt by it."""
        other = advance(self.at(start), change)
        for problem in list(self.state):
            mine = self.state[problem]
            theirs = other.get(problem, NO_PAGES)
            if mine is None and theirs is not None:
                if len(theirs):
                    self.state[problem] = theirs
                else:
                    del self.state[problem]


def advance(state: Mapping[int, Hurt], change: Change) -> dict[int, Hurt]:
    """Return what hurts after a delta."""
    after: dict[int, Hurt] = {}
    for problem, pages in state.items():
        if pages is None:
            if change.cut_page:
                after[problem] = None
            continue
        left = pages[pages < np.uint64(change.cut_page)]
        left = left[~np.isin(left, change.pages)]
        if len(left):
            after[problem] = left
    for problem, pages in change.bad.items():
        before = after.get(problem, NO_PAGES)
        if len(pages) and before is not None:
            after[problem] = np.union1d(before, pages)
    return after
