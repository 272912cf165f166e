"""Policies on a real mount: points go by the ladder, what stays and what is open is the same."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.mounted import MountedSite
from tests.vaults import heartbeats
from vdiskfs.units import PAGE_SIZE

pytestmark = [pytest.mark.e2e, pytest.mark.root]

# Points come when they are asked for.
FAST = "epoch_interval_s = 3600\nheartbeat_s = 1\n"
MIB = 1 << 20
VERSIONS = 10


def points(site: MountedSite) -> list[dict[str, Any]]:
    listed = site.run("-m", site.mountpoint, "point", "list", "web01", "--json").stdout
    found: list[dict[str, Any]] = json.loads(listed)["points"]
    return found


def image(site: MountedSite, point: dict[str, Any]) -> Path:
    day, _, clock = str(point["time"]).partition("T")
    name = f"{clock.removesuffix('Z').replace(':', '-')}Z"
    return Path(site.mountpoint) / "recovery-points" / "web01" / day / name / "web01.img"


def is_open(site: MountedSite, epoch: int) -> bool:
    hearts = heartbeats(Path(site.vault.removeprefix("file://")))
    return any(epoch in use for heart in hearts for use in heart.uses)


def test_a_disk_follows_its_policy_while_it_is_written(tmp_path: Path) -> None:
    rng = random.Random(5)
    with MountedSite(tmp_path, options=FAST) as site:
        site.add_image("web01", MIB)
        site.init().mount()
        site.wait_shipped("web01")
        states: dict[int, bytes] = {}
        with (site.mountpoint / "disks" / "web01.img").open("r+b", buffering=0) as live:

            def write() -> None:
                os.pwrite(live.fileno(), rng.randbytes(PAGE_SIZE), rng.randrange(256) * PAGE_SIZE)
                made = site.run(
                    "-m", site.mountpoint, "point", "create", "web01", "--wait", "--json"
                )  # fmt: skip
                epoch = json.loads(made.stdout)["points"][0]["epoch"]
                states[epoch] = os.pread(live.fileno(), MIB, 0)

            for _ in range(VERSIONS):
                write()
            before = points(site)
            opened, held = before[3], before[6]
            site.run("-m", site.mountpoint, "point", "hold", f"web01@#{held['epoch']}")
            with image(site, opened).open("rb") as reader:
                reader.read(1)
                site.wait("the lease", lambda: is_open(site, opened["epoch"]))
                site.run("-m", site.mountpoint, "policy", "set", "tight",
                         "retention=1h for 2h", "--yes")  # fmt: skip
                refused = site.run(
                    "-m", site.mountpoint, "disk", "protect", "web01", "--policy", "tight", code=4
                )
                assert "would be deleted" in refused.stderr
                assert len(points(site)) >= len(before)
                site.run("-m", site.mountpoint, "disk", "protect", "web01", "--policy", "tight",
                         "--yes")  # fmt: skip
                write()
                site.wait("points to go", lambda: len(points(site)) < VERSIONS / 2)
                site.wait("its job", lambda: any(
                    one["kind"] == "thin" and "thinned away" in one["outcome"]
                    for one in site.json("job", "list")["jobs"]
                ))  # fmt: skip
                write()
                left = points(site)
                stay = {point["epoch"] for point in left}
                assert {opened["epoch"], held["epoch"]} <= stay
                assert max(states) in stay
                assert [one["epoch"] for one in left if one["held"]] == [held["epoch"]]
                reader.seek(0)
                assert reader.read() == states[opened["epoch"]]
            for point in left:
                if point["epoch"] in states:
                    assert image(site, point).read_bytes() == states[point["epoch"]]
            gone = next(point for point in before if point["epoch"] not in stay)
            assert not image(site, gone).exists()
        checked = json.loads(
            site.run("vault", "check", "--read-data", "--json", "--vault", site.vault).stdout
        )
        assert checked["ok"]
        assert checked["points"] == len(left)
