"""A full local disk: the guest writes on as long as its own image has room, all converges."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.gauges import assert_same
from tests.e2e.loopdev import file_system, make_image, run_tool
from tests.e2e.mounted import MountedSite
from vdiskfs.shipping import CHECK_S

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.slow]

MIB = 1 << 20
PAGE = 4096
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    with file_system("ext4", make_image(tmp_path / "room.fs", 48 * MIB), tmp_path / "room") as root:
        yield root


@contextlib.contextmanager
def site_in(root: Path, state: Path, size: int) -> Iterator[MountedSite]:
    """Give a site with a disk of random bytes, its state directory elsewhere; it is shipped."""
    with started(MountedSite(root, options=FAST), state, size) as site:
        yield site


@contextlib.contextmanager
def started(site: MountedSite, state: Path, size: int) -> Iterator[MountedSite]:
    """Start the site; at the end the vault is looked at, and the log."""
    with site:
        site.state = state
        site.add_image("web01", size, os.urandom(size))
        site.init().mount().wait_shipped("web01")
        yield site
        assert "Traceback" not in (site.state / "daemon.log").read_text()
        site.run("vault", "check", "--read-data", "--vault", site.vault)


def fill(path: Path) -> None:
    """Take all the room of a file system with one file."""
    with path.open("wb", buffering=0) as file:
        for length in (MIB, PAGE, 512, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(length))
                    os.fsync(file.fileno())


def write_random(image: Path, offset: int, length: int, seed: int) -> None:
    """Write random bytes to an image of a mount, as a guest does, and flush them."""
    with image.open("r+b", buffering=0) as file:
        data = memoryview(random.Random(seed).randbytes(length))
        while data:
            done = os.pwrite(file.fileno(), data[:MIB], offset)
            offset, data = offset + done, data[done:]
        os.fsync(file.fileno())


def wait_same(site: MountedSite, disk: str = "web01") -> None:
    """Wait until all is shipped, and compare the newest point with the live image."""
    site.wait_shipped(disk)
    assert_same(site.point(disk), site.image(disk))


def test_a_full_state_directory_costs_points_and_the_guest_nothing(
    tmp_path: Path, room: Path
) -> None:
    size = 16 * MIB
    with site_in(tmp_path, room / "state", size) as site:
        [track] = (site.state / "disks").glob("*/track")
        for name in ("dirty.0", "dirty.1", "preserved", "suspect", "track"):
            status = (track / name).stat()
            # No store into these maps needs room, so that none can be a SIGBUS.
            assert status.st_blocks * 512 >= status.st_size
        ballast = room / "ballast"
        fill(ballast)
        last = site.disk("web01")["epoch"]
        write_random(site.image("web01"), 0, size, seed=1)
        full = "No space left on device"
        site.wait("it says so", lambda: full in (site.disk("web01")["last_error"] or ""))
        row = site.disk("web01")
        assert row["epoch"] >= last
        assert row["health"] != "Normal"
        # Every page again, and growth beyond what the bitmaps can reach: the guest writes on.
        write_random(site.image("web01"), 0, size, seed=2)
        write_random(site.image("web01"), 300 * MIB, 3 * PAGE, seed=3)
        ballast.unlink()
        far = site.image("web01").stat().st_size
        site.wait("it is in a point", lambda: site.points("web01")[-1]["size"] == far)
        wait_same(site)
        site.wait("the health is good again", lambda: site.disk("web01")["health"] == "Normal")


def test_a_spool_that_fills_its_disk_while_the_vault_is_full_gives_way(
    tmp_path: Path, room: Path
) -> None:
    size = 16 * MIB
    place = tmp_path / "vault-room"
    with file_system("ext4", make_image(tmp_path / "vault.fs", 200 * MIB), place) as vault_room:
        site = MountedSite(tmp_path, options=FAST, vault=f"file://{vault_room}/vault")
        with started(site, room / "state", size):
            ballast = vault_room / "ballast"
            fill(ballast)
            # Three times what the state directory holds, all of it acknowledged.
            for turn in range(9):
                write_random(site.image("web01"), 0, size, seed=turn)
            site.wait("it is known", lambda: site.disk("web01")["health"] != "Normal")
            ballast.unlink()
            wait_same(site)


def test_a_disk_larger_than_its_state_directory_is_replicated_and_read(
    tmp_path: Path, room: Path
) -> None:
    size = 96 * MIB
    with site_in(tmp_path, room / "state", size) as site:
        # Read whole, through a cache that has no room for it.
        assert_same(site.point("web01"), site.image("web01"))
        write_random(site.image("web01"), 40 * MIB, 4 * MIB, seed=5)
        wait_same(site)


def test_an_image_without_room_gives_its_guest_enospc_and_nobody_else(tmp_path: Path) -> None:
    """A thin image on a full file system: its own writes fail, the full one beside it goes on."""
    place = tmp_path / "images"
    with (
        file_system("ext4", make_image(tmp_path / "images.fs", 48 * MIB), place) as source,
        MountedSite(tmp_path, options=FAST) as site,
    ):
        site.source.rmdir()
        site.source = source
        site.add_image("thin01", 64 * MIB)
        site.add_image("thick01", 4 * MIB, os.urandom(4 * MIB))
        site.init().mount()
        for disk in ("thin01", "thick01"):
            site.wait_shipped(disk)
        with pytest.raises(OSError, match="No space left") as caught:
            write_random(site.image("thin01"), 0, 64 * MIB, seed=1)
        assert caught.value.errno == errno.ENOSPC
        # What has its room goes on; so does what the thin image has got already.
        write_random(site.image("thick01"), 0, 4 * MIB, seed=2)
        write_random(site.image("thin01"), 0, MIB, seed=3)
        for disk in ("thin01", "thick01"):
            wait_same(site, disk)
        run_tool(["fallocate", "--punch-hole", "-l", str(32 * MIB), site.image("thin01")])
        write_random(site.image("thin01"), 50 * MIB, 8 * MIB, seed=4)
        for disk in ("thin01", "thick01"):
            wait_same(site, disk)
        assert "Traceback" not in (site.state / "daemon.log").read_text()


def waits(site: MountedSite) -> int:
    return int(site.disk("web01")["spooled_bytes"])


@contextlib.contextmanager
def cramped(root: Path) -> Iterator[MountedSite]:
    """A disk of 100 MiB whose spool shares 128 MiB with it, cut off from its vault.

    In the end the vault is back, and holds what the disk does.
    """
    size, vault = 100 * MIB, root / "vault"
    with (
        file_system("ext4", make_image(root / "images.fs", 128 * MIB), root / "images") as room,
        MountedSite(root, options=FAST, vault=f"file://{vault}") as site,
    ):
        site.source.rmdir()
        site.source, site.state = room / "source", room / "state"
        site.source.mkdir()
        site.add_image("web01", size)
        site.init().mount().wait_shipped("web01")
        vault.rename(root / "away")
        # A vault that took a delta just now is not asked whether it is there: a slot is.
        time.sleep(CHECK_S)
        yield site
        assert site.disk("web01")["state"] in ("ResyncRequired", "Resyncing")
        (root / "away").rename(vault)
        site.json("disk", "retry", "web01")
        wait_same(site)
        site.run("vault", "check", "--read-data", "--vault", site.vault)


def test_what_waits_for_the_vault_gives_way_to_an_image_on_the_same_file_system(
    tmp_path: Path,
) -> None:
    """The image and the spool do not fit beside each other: the guest gets its room."""
    with cramped(tmp_path) as site:
        # What is offered to the vault stays, it may be there already; so let it be small.
        for start, end in ((0, 1), (1, 17), (17, 20)):
            write_random(site.image("web01"), start * MIB, (end - start) * MIB, seed=end)
            site.wait("it waits", lambda end=end: waits(site) >= end * MIB)  # type: ignore[misc]
        write_random(site.image("web01"), 20 * MIB, 80 * MIB, seed=3)
        assert waits(site) < 2 * MIB


def test_all_that_waits_gives_way_where_no_slot_was_asked_for(tmp_path: Path) -> None:
    """One large epoch waits: the vault was known to be away, so it was not offered."""
    with cramped(tmp_path) as site:
        site.json("disk", "pause", "web01")
        write_random(site.image("web01"), 0, 30 * MIB, seed=1)
        site.json("disk", "resume", "web01")
        site.wait("it waits", lambda: waits(site) >= 30 * MIB)
        assert len(list(site.state.rglob("spool/*.delta"))) == 1
        lag_s = site.disk("web01")["shipped_lag_s"]
        write_random(site.image("web01"), 30 * MIB, 70 * MIB, seed=3)
        assert waits(site) == 0
        assert site.disk("web01")["shipped_lag_s"] > lag_s
