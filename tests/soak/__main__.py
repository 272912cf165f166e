"""Runs rounds of faults, drawn by a seed, until the time is over; prints what was counted.

    ./run soak --minutes 60 --seed 7
    ./run soak --scenario kill --seed 12345     exactly that round, as a failure says

Each round has a directory of its own, removed when all held and kept when not.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.soak.scenarios import SCENARIOS, Counts
from tests.vaults import VARIABLE, is_encrypted


class Tally:
    """The sum of the counts of all rounds, by scenario."""

    def __init__(self) -> None:
        self.rounds: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.numbers: dict[str, Counter[str]] = {}
        self.durations: dict[str, dict[str, list[float]]] = {}

    def add(self, name: str, counts: Counts) -> None:
        """Add one round."""
        numbers = self.numbers.setdefault(name, Counter())
        durations = self.durations.setdefault(name, {})
        for key, value in counts.items():
            if isinstance(value, list):
                durations.setdefault(key, []).extend(value)
            else:
                numbers[key] += value

    def print(self) -> None:
        """Print a line for each scenario, and for each of its durations."""
        for name in sorted(self.rounds):
            words = [f"{self.rounds[name]} rounds", f"{self.failed[name]} failed"]
            numbers = self.numbers.get(name, Counter())
            words += [f"{key} {value:,}" for key, value in numbers.items()]
            print(f"{name}: {', '.join(words)}")
            for key, values in self.durations.get(name, {}).items():
                if values:
                    median, worst = statistics.median(values), max(values)
                    what = key.removesuffix("_s")
                    print(f"  {what}: {len(values)}, median {median:.2f} s, worst {worst:.2f} s")


def run_round(name: str, seed: int, tally: Tally) -> bool:
    """Run one round and say whether all held."""
    directory = Path(tempfile.mkdtemp(prefix=f"vdiskfs-soak-{name}-{seed}-"))
    print(f"-- {name} --seed {seed}", flush=True)
    tally.rounds[name] += 1
    begin_s = time.monotonic()
    try:
        counts = SCENARIOS[name].run(directory, seed)
    except Exception as error:  # noqa: BLE001 - one failed round does not end the soak
        tally.failed[name] += 1
        tally.add(name, getattr(error, "counts", {}))
        if isinstance(error, AssertionError):
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        print(f"FAILED, its files are in {directory}; again with:", file=sys.stderr)
        kind = "" if is_encrypted() else " --vault plain"
        print(f"    ./run soak --scenario {name} --seed {seed}{kind}", file=sys.stderr, flush=True)
        return False
    tally.add(name, counts)
    shutil.rmtree(directory)
    words = ", ".join(f"{k} {v}" for k, v in counts.items() if not isinstance(v, list))
    print(f"   {words}, {time.monotonic() - begin_s:.0f} s", flush=True)
    return True


def main() -> int:
    """Return 0 when every round held, else 1."""
    parser = argparse.ArgumentParser(prog="./run soak", description="Rounds of faults, by seed.")
    parser.add_argument("--minutes", type=float, default=30, help="start no round after that")
    parser.add_argument("--seed", type=int, help="of the whole soak; with --scenario of the round")
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), help="one round of this")
    parser.add_argument("--vault", choices=["encrypted", "plain"], default="encrypted")
    words = parser.parse_args()
    os.environ[VARIABLE] = words.vault
    seed = random.SystemRandom().randrange(2**31) if words.seed is None else words.seed
    os.nice(5)
    tally = Tally()
    if words.scenario is not None:
        run_round(words.scenario, seed, tally)
    else:
        print(f"./run soak --minutes {words.minutes:g} --seed {seed}", flush=True)
        rng = random.Random(seed)
        names = sorted(SCENARIOS)
        weights = [SCENARIOS[name].weight for name in names]
        end_s = time.monotonic() + words.minutes * 60
        while time.monotonic() < end_s:
            run_round(rng.choices(names, weights)[0], rng.randrange(2**31), tally)
    tally.print()
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
