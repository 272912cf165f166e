"""The rounds that a soak is made of: each a function (directory, seed) -> counts.

A round does one seed's worth of faults and checks all that must hold after them; it raises
AssertionError, naming everything that does not. Its counts are numbers, and lists of durations
in seconds (``pauses_s``); those of ``ViolationError`` are counted too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

Counts = Mapping[str, int | list[float]]
Round = Callable[[Path, int], Counts]


class Scenario(NamedTuple):
    """Where a round is found, and how often it is drawn beside the others."""

    module: str
    function: str
    weight: int

    def load(self) -> Round:
        """Import it."""
        found: Round = getattr(importlib.import_module(self.module), self.function)
        return found


SCENARIOS = {
    "kill": Scenario("tests.e2e.kills", "kill_round", 6),
    "kill-guest": Scenario("tests.e2e.kills", "kill_guest_round", 1),
    "guest-log": Scenario("tests.e2e.guest_log", "guest_log_round", 1),
}
