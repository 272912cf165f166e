"""The rounds that a soak is made of: each a function (directory, seed) -> counts.

A round does one seed's worth of faults and checks all that must hold after them; it raises
AssertionError, naming everything that does not. Its counts are numbers, and lists of durations
in seconds (``pauses_s``); those of ``ViolationError`` are counted too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.e2e.grouppoints import group_round
from tests.e2e.guest_log import guest_log_round
from tests.e2e.journey import there_and_back
from tests.e2e.kills import kill_guest_round, kill_round
from tests.e2e.moves_walk import moves_round
from tests.e2e.outliving import outlive
from tests.e2e.power import KINDS, power_loss_round
from tests.e2e.replays import replay_round
from tests.e2e.resting_debian import resting_round
from tests.e2e.shop_debian import DebianShop
from tests.races import race_round
from tests.replicate.outages import outage_round
from tests.splitbrain import split_round

Counts = Mapping[str, int | list[float]]
POWER = ("copy", "copy", "copy", "shutdown", "copy", "shutdown", "copy", "ahead")
CUT_S = 60.0
RACES = 50  # in one round: each takes some tenths of a second


class Scenario(NamedTuple):
    """A round, and how often it is drawn beside the others."""

    run: Callable[[Path, int], Counts]
    weight: int


def power_losses(directory: Path, seed: int) -> Counts:
    """Lose the power once, on ext4 or xfs, in one of the ways that there are."""
    how = POWER[seed // 2 % len(POWER)]
    slots = 4 if seed % 5 == 0 else 0  # few: regions leave the intent log all the time
    loss = power_loss_round(directory, seed, KINDS[seed % 2], how, slots=slots)
    return {
        "losses": 1, f"by_{how}": 1, "points": loss.points, "operations": loss.operations,
        "flushes": loss.flushes, "regions_left": loss.left,
        "pages_differing": loss.differing, "regions": loss.regions,
        "pages_compared": loss.compared, "violations": 0,
    }  # fmt: skip


def replays(directory: Path, seed: int) -> Counts:
    """Lose the power at some moments of one run, by the log of its device."""
    assert directory.is_dir()
    return {**replay_round(seed, 40), "violations": 0}


def races(directory: Path, seed: int) -> Counts:
    """Play races of two writers, in memory: the seeds from ``seed`` on."""
    assert directory.is_dir()
    total: Counter[str] = Counter()
    for one in range(seed, seed + RACES):
        total += race_round(one)
    wanted = ("rounds", "generations", "branches", "points", "shipped")
    return {("races" if key == "rounds" else key): total[key] for key in wanted} | {"violations": 0}


def split_brains(directory: Path, seed: int) -> Counts:
    """Play failovers between sites that do not see each other: the seeds from ``seed`` on."""
    assert directory.is_dir()
    total: Counter[str] = Counter()
    for one in range(seed, seed + RACES):
        total += split_round(one)
    wanted = ("generations", "branches", "points", "shipped")
    return {key: total[key] for key in wanted} | {"split-brains": RACES, "violations": 0}


def outages(directory: Path, seed: int) -> Counts:
    """Live through a day of a bad vault, by a clock that is not the host's."""
    assert directory.is_dir()
    return {**outage_round(seed), "days": 1, "violations": 0}


def journeys(directory: Path, seed: int) -> Counts:
    """Have a shop on a Debian go away and come home: as planned, or with its home lost.

    In the second way the vault is cut off for a minute, in mid-boot and twice in mid-run.
    """
    planned = seed % 2 == 0
    shop = DebianShop()
    down = there_and_back(directory, shop) if planned else outlive(directory, shop, CUT_S)
    times: dict[str, int | list[float]] = {
        f"{how.replace(' ', '_')}_s": [seconds] for how, seconds in down.items()
    }
    return {"journeys": 1, "planned": int(planned), "violations": 0} | times


SCENARIOS = {
    "kill": Scenario(kill_round, 6),
    "kill-guest": Scenario(kill_guest_round, 1),
    "guest-log": Scenario(guest_log_round, 1),
    "power": Scenario(power_losses, 4),
    "replay": Scenario(replays, 1),
    "race": Scenario(races, 1),
    "group": Scenario(group_round, 1),
    "split-brain": Scenario(split_brains, 1),
    "outage": Scenario(outages, 2),
    "journey": Scenario(journeys, 1),
    "moves": Scenario(moves_round, 1),
    "rest": Scenario(resting_round, 1),
}
