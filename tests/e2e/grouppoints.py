"""Many points of one group, under a chain of writes over its disks, joins, leaves and kills."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.e2e.chain import Chain, check_instants, count_shared
from tests.e2e.mounted import MountedSite

DISKS = 8
WANTED = 1000
FAST = "epoch_interval_s = 0.05\nheartbeat_s = 1\n"


def group_round(directory: Path, seed: int, wanted: int = WANTED) -> dict[str, int]:
    """Make so many group points of eight disks, and read every one of them.

    Now and then the daemon is killed, a disk paused, or one leaves and joins again.

    Raises:
        AssertionError: in a point a disk is ahead of one that is written before it.
    """
    rng = random.Random(seed)
    counts = {"kills": 0, "pauses": 0, "leaves": 0}
    with MountedSite(directory, options=FAST) as site:
        names = [f"disk{number}" for number in range(DISKS)]
        for name in names:
            site.add_image(name, 1 << 20)
        site.init().mount()
        for name in names:
            site.wait_shipped(name)
        site.json("group", "create", "shop", *names)
        count = count_shared(site.vault, names)
        with Chain([site.image(name) for name in names]) as chain:
            while (made := count()) < wanted:
                more = min(wanted, made + wanted // 10)
                site.wait(f"{more} group points", partial(_has, count, more), 600)
                disk, what = rng.choice(names), rng.choice(list(counts))
                counts[what] += 1
                if what == "kills":
                    site.kill_daemon()
                elif what == "pauses":
                    site.json("disk", "pause", disk)
                    site.json("disk", "resume", disk)
                else:
                    site.json("group", "remove", "shop", disk)
                    site.json("group", "add", "shop", disk)
        site.umount("--drain")
        found = check_instants(site.vault, names)
        assert len(found.points) >= wanted
        assert found.steps[-1] == (chain.steps,) * DISKS, "the last point is not the end"
        for disk in names:
            check_instants(site.vault, [disk])  # each point by itself, too
    return {**counts, "group_points": len(found.points), "cut_inside": found.cut_inside,
            "steps": chain.steps, "violations": 0}  # fmt: skip


def _has(count: Callable[[], int], wanted: int) -> bool:
    return count() >= wanted
