"""After a loss of the host's power: points whole, nothing missed, only the log's regions read."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.gauges import read_bytes
from tests.e2e.power import DEVICE, DISK, MIB, OPTIONS, found_of, power_loss_round
from tests.e2e.poweredsite import PoweredSite
from vdiskfs.native import INTENT_REGION
from vdiskfs.units import PAGE_SIZE

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.slow]
GIB = 1024 * MIB
WRITTEN = 1000  # pages
START = 32 * MIB  # a daemon reads 10 of them to start


@pytest.mark.parametrize(
    ("seed", "kind", "how", "slots"),
    [(8, "ext4", "copy", 4), (2, "xfs", "copy", 0), (4, "ext4", "shutdown", 0)],
)
@pytest.mark.timeout(300)
def test_points_are_prefixes_and_the_next_one_is_the_live_image(
    tmp_path: Path, seed: int, kind: str, how: str, slots: int, *, tell: Callable[[str], None]
) -> None:
    """One loss at a random instant under load: see tests/e2e/power.py.

    With few slots regions leave the intent log all the time, as those of a large disk do.
    """
    loss = power_loss_round(tmp_path, seed, kind, how, slots=slots)
    tell(f"a loss of power on {kind}: {loss}")
    assert loss.points > 0
    assert loss.regions > 0
    assert (loss.left > 0) == (slots > 0)
    assert loss.generations == 0


@pytest.mark.timeout(300)
def test_a_vault_ahead_of_the_disk_keeps_its_points_and_gets_a_new_generation(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """A disk that lies about its cache: nothing here is known to be what the vault has."""
    kind = "ext4"
    loss = power_loss_round(tmp_path, 5, kind, "ahead")
    tell(f"a loss of power on {kind}: {loss}")
    assert loss.points > 0
    assert loss.generations == 1


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_copy_has_what_was_synced_and_not_what_the_page_cache_had(
    tmp_path: Path, kind: str
) -> None:
    """Of the harness: else no round could find anything."""
    powered = PoweredSite(tmp_path, kind, OPTIONS)
    wanted, loose, later = (powered.root / name for name in ("wanted", "loose", "later"))
    with powered.host(DEVICE):
        with powered.powered():
            with wanted.open("wb") as file:
                file.write(b"synced")
                file.flush()
                os.fsync(file.fileno())
            loose.write_bytes(b"not synced")
            powered.copy()
            with later.open("wb") as file:
                os.fsync(file.fileno())
        powered.use_copy(vault=True)
        with powered.powered():
            assert wanted.read_bytes() == b"synced"
            assert not loose.exists() or loose.read_bytes() == b""
            assert not later.exists()


@pytest.mark.timeout(300)
def test_of_a_large_disk_only_the_working_set_is_read(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """64 GiB sparse, 1 GiB of it written to: at most the active regions are compared."""
    powered = PoweredSite(tmp_path, "ext4", OPTIONS)
    site = powered.site
    choice = random.Random(64)
    with powered.host(GIB), site:
        with powered.powered():
            site.source.mkdir()
            site.add_image(DISK, 64 * GIB)
            with (site.source / f"{DISK}.img").open("r+b") as file:
                file.write(choice.randbytes(128 * MIB))  # allocated, and not written to again
            site.init().mount().wait_shipped(DISK)
            image = os.open(site.image(DISK), os.O_RDWR)
            try:
                for _ in range(WRITTEN):
                    offset = 32 * GIB + choice.randrange(GIB // PAGE_SIZE) * PAGE_SIZE
                    os.pwrite(image, choice.randbytes(PAGE_SIZE), offset)
                powered.copy()
                powered.end_daemon()
            finally:
                with contextlib.suppress(OSError):  # the mount is gone
                    os.close(image)
        powered.use_copy(vault=True)
        with powered.powered():
            powered.note_reboot()
            (site.state / "daemon.log").unlink(missing_ok=True)
            site.mount().wait_shipped(DISK)
            read = read_bytes(site.pid)
            regions, compared, _, _ = found_of(site.state / "daemon.log")
            tell(f"recovery: {regions} regions, {read / MIB:.1f} MiB read with the start")
            # The kernel's word beside the daemon's own: holes cost nothing, and nobody read more.
            assert WRITTEN * PAGE_SIZE // 2 < read < WRITTEN * PAGE_SIZE + START
            assert 0 < regions <= GIB // INTENT_REGION
            assert compared <= regions * INTENT_REGION // PAGE_SIZE
            with site.image(DISK).open("rb") as live, site.point(DISK).open("rb") as point:
                for start, length in ((0, 128 * MIB), (32 * GIB, GIB)):
                    live.seek(start)
                    point.seek(start)
                    for _ in range(length // MIB):
                        assert live.read(MIB) == point.read(MIB)
            site.umount()
