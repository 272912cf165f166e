"""Every recovery point is exactly the disk at one instant, whatever the writers did."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.azurite import AzureVault
from tests.e2e.mounted import MountedSite
from tests.e2e.oracle import Oracle
from tests.e2e.workload import Mix, Workload

pytestmark = [pytest.mark.e2e, pytest.mark.root]

MIX = Mix(max_size=12 << 20, min_size=2 << 20, truncate=0.01, extend=0.03, zero=0.08)
FAST = "epoch_interval_s = 0.1\n"


def take_points(site: MountedSite, seed: int, count: int) -> Workload:
    """Run eight writers until the disk has this many points."""
    load = Workload(site.image("web01"), seed=seed, writers=8, mix=MIX)
    with load:
        end = time.monotonic() + 120
        while len(site.points("web01")) < count and time.monotonic() < end:
            load.wait_operations(50)
    return load


def check_points(site: MountedSite, load: Workload, at_least: int) -> None:
    """Prove of each point that it is a cut of the writers' log, in the order of the points."""
    oracle = Oracle(load.log)
    images = site.point_images("web01")
    assert len(images) >= at_least
    earliest = 0
    for image in images[1:]:
        cut = oracle.check(image)
        assert cut.instants[-1][1] >= earliest
        earliest = max(earliest, cut.instants[0][0])
    print(f"{len(images) - 1} points checked, {len(load.log.operations)} operations")


@pytest.mark.usefixtures("each_vault")
@pytest.mark.parametrize("seed", [1])
def test_every_point_under_load_is_a_cut_in_a_folder_vault(tmp_path: Path, seed: int) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        site.add_image("web01", 8 << 20)
        site.init().mount()
        site.wait_shipped("web01")
        load = take_points(site, seed, 70)
        site.wait_shipped("web01")
        check_points(site, load, 70)
        Oracle(load.log).check(site.image("web01"))
        restored = tmp_path / "restored.img"
        site.run("-m", site.mountpoint, "point", "restore", "web01@latest", restored)
        assert restored.read_bytes() == site.image("web01").read_bytes()


def test_every_point_under_load_is_a_cut_in_azure_blob_storage(
    tmp_path: Path, azure_vault: AzureVault
) -> None:
    with MountedSite(
        tmp_path, vault=azure_vault.url, environ=azure_vault.environ, options=FAST
    ) as site:
        site.add_image("web01", 8 << 20)
        site.init().mount()
        site.wait_shipped("web01")
        load = take_points(site, 3, 70)
        site.wait_shipped("web01")
        check_points(site, load, 70)
        site.run("-m", site.mountpoint, "vault", "check", "--read-data")
