"""After a loss of the host's power: points whole, nothing missed, only the log's regions read."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import pytest

from tests.e2e.power import DISK, MIB, PoweredSite, found_of, power_loss_round
from vdiskfs.native import INTENT_REGION
from vdiskfs.units import PAGE_SIZE

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.slow]
GIB = 1024 * MIB


@pytest.mark.parametrize(("seed", "kind"), [(1, "ext4"), (2, "ext4"), (4, "ext4"), (2, "xfs")])
@pytest.mark.timeout(300)
def test_points_are_prefixes_and_the_next_one_is_the_live_image(
    tmp_path: Path, seed: int, kind: str
) -> None:
    """One loss at a random instant under load: see tests/e2e/power.py."""
    loss = power_loss_round(tmp_path, seed, kind)
    print(loss)
    assert loss.points > 0
    assert loss.regions > 0


@pytest.mark.timeout(300)
def test_of_a_large_disk_only_the_working_set_is_read(tmp_path: Path) -> None:
    """64 GiB sparse, 1 GiB of it written to: at most the active regions are compared."""
    powered = PoweredSite(tmp_path, "ext4")
    site = powered.site
    choice = random.Random(64)
    with site:
        powered.make(GIB)
        with powered.powered():
            site.source.mkdir()
            site.add_image(DISK, 64 * GIB)
            with (site.source / f"{DISK}.img").open("r+b") as file:
                file.write(choice.randbytes(128 * MIB))  # allocated, and not written to again
            site.init().mount().wait_shipped(DISK)
            image = os.open(site.image(DISK), os.O_RDWR)
            try:
                for _ in range(1000):
                    offset = 32 * GIB + choice.randrange(GIB // PAGE_SIZE) * PAGE_SIZE
                    os.pwrite(image, choice.randbytes(PAGE_SIZE), offset)
                powered.lose_power()
            finally:
                with contextlib.suppress(OSError):  # the mount is gone
                    os.close(image)
        with powered.powered():
            powered.note_reboot()
            (site.state / "daemon.log").unlink(missing_ok=True)
            site.mount().wait_shipped(DISK)
            regions, compared, _, _ = found_of(site.state / "daemon.log")
            assert 0 < regions <= GIB // INTENT_REGION
            assert compared <= regions * INTENT_REGION // PAGE_SIZE
            with site.image(DISK).open("rb") as live, site.point(DISK).open("rb") as point:
                for start, length in ((0, 128 * MIB), (32 * GIB, GIB)):
                    live.seek(start)
                    point.seek(start)
                    for _ in range(length // MIB):
                        assert live.read(MIB) == point.read(MIB)
            site.umount()
