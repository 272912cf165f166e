"""A state directory without inodes, or at its quota: the guest writes on, and all converges."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.loopdev import attached, file_system, make_image, mounted, run_tool
from tests.e2e.mounted import MountedSite
from tests.e2e.test_full_disk import site_in, wait_same, write_random

pytestmark = [pytest.mark.e2e, pytest.mark.root]

MIB = 1 << 20
SIZE = 8 * MIB


class Room:
    """A directory that can be starved, and fed again."""

    def __init__(self, path: Path, starve: Callable[[], object], feed: Callable[[], object]):
        self.path = path
        self.starve = starve
        self.feed = feed


@contextlib.contextmanager
def few_inodes(directory: Path) -> Iterator[Room]:
    """A file system that has room for bytes, and for 512 files."""
    with attached(make_image(directory / "room.fs", 96 * MIB)) as device:
        run_tool(["mkfs.ext4", "-q", "-N", "512", device])
        with mounted(device, directory / "room", kind="ext4") as root:
            ballast = root / "ballast"
            ballast.mkdir()

            def starve() -> None:
                with contextlib.suppress(OSError):
                    for number in range(1000):
                        (ballast / str(number)).touch()

            def feed() -> None:
                for path in ballast.iterdir():
                    path.unlink()

            yield Room(root, starve, feed)


@contextlib.contextmanager
def quota(directory: Path) -> Iterator[Room]:
    """A subvolume that may hold no more than it has; this binds root, too."""
    image = make_image(directory / "room.fs", 300 * MIB)
    with file_system("btrfs", image, directory / "room") as root:
        place = root / "limited"
        run_tool(["btrfs", "subvolume", "create", place])
        run_tool(["btrfs", "quota", "enable", root])

        (place / "ballast").write_bytes(os.urandom(2 * MIB))

        def starve() -> None:
            run_tool(["btrfs", "qgroup", "limit", "1M", place])
            run_tool(["btrfs", "filesystem", "sync", root])
            assert is_over(place / "probe")

        def feed() -> None:
            run_tool(["btrfs", "quota", "disable", root])

        yield Room(place, starve, feed)


def is_over(path: Path) -> bool:
    try:
        path.write_bytes(b"x")
    except OSError as error:
        return error.errno == errno.EDQUOT
    return False


def write_all(site: MountedSite) -> None:
    """Write every page, twice, and beyond what the bitmaps can reach."""
    for seed in (1, 2):
        write_random(site.image("web01"), 0, SIZE, seed)
    write_random(site.image("web01"), 300 * MIB, MIB, seed=3)


def converges(site: MountedSite) -> None:
    """Wait until the newest point is the live image, and all is well."""
    far = site.image("web01").stat().st_size
    site.wait("it is in a point", lambda: site.points("web01")[-1]["size"] == far)
    wait_same(site)
    site.wait("the health is good again", lambda: site.disk("web01")["health"] == "Normal")


def test_a_state_directory_without_inodes_costs_points_and_the_guest_nothing(
    tmp_path: Path,
) -> None:
    with few_inodes(tmp_path) as room, site_in(tmp_path, room.path / "state", SIZE) as site:
        room.starve()
        write_random(site.image("web01"), 0, SIZE, seed=0)
        full = "No space left on device"
        site.wait("it says so", lambda: full in (site.disk("web01")["last_error"] or ""))
        assert site.disk("web01")["health"] != "Normal"
        write_all(site)
        room.feed()
        converges(site)
        assert site.json("status")["pid"] == site.pid


def test_a_state_directory_at_its_quota_costs_points_and_the_guest_nothing(tmp_path: Path) -> None:
    """On btrfs, where a store into a bitmap needs room though the bitmap has its own."""
    with quota(tmp_path) as room, site_in(tmp_path, room.path / "state", SIZE) as site:
        room.starve()
        write_random(site.image("web01"), 0, SIZE, seed=0)
        words = "cannot hold the bitmaps any more"
        site.wait("it says so", lambda: words in (site.disk("web01")["last_error"] or ""))
        assert site.disk("web01")["health"] != "Normal"
        last = site.points("web01")[-1]["epoch"]
        write_all(site)
        room.feed()
        # What was marked in memory alone is not believed: there is no point until all is compared.
        assert site.points("web01")[-1]["epoch"] == last
        assert site.json("status")["pid"] == site.pid
        site.umount()
        site.mount()
        converges(site)
