"""The disk below the image, or below the state directory, does not give back what it has.

A btrfs whose bytes are changed beneath it: what it reads there fails its checksum, and is EIO.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.loopdev import file_system, make_image
from tests.e2e.mounted import MountedSite
from tests.e2e.test_full_disk import wait_same, write_random

pytestmark = [pytest.mark.e2e, pytest.mark.root]

MIB = 1 << 20
PAGE = 4096
SIZE = 8 * MIB
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"


class Platter:
    """A file system whose sectors can be made bad, and good again."""

    def __init__(self, backing: Path, root: Path) -> None:
        self._backing = backing
        self.root = root
        self._good: dict[int, bytes] = {}

    def spoil(self, path: Path, offset: int, length: int = PAGE) -> None:
        """Make a range of a file unreadable, and each older copy of it."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
            content = os.pread(file.fileno(), length, offset)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert any(content), "zeros are everywhere"
        data = self._backing.read_bytes()
        place = data.index(content)
        while place >= 0:
            self._good[place] = content
            self._write(place, bytes(byte ^ 255 for byte in content))
            place = data.find(content, place + 1)
        with path.open("rb") as file, pytest.raises(OSError, match="Input/output error"):
            os.pread(file.fileno(), length, offset)

    def mend(self) -> None:
        """Have all be readable again."""
        while self._good:
            self._write(*self._good.popitem())

    def _write(self, place: int, content: bytes) -> None:
        with self._backing.open("r+b") as backing:
            os.pwrite(backing.fileno(), content, place)
            os.fsync(backing.fileno())


@pytest.fixture
def platter(tmp_path: Path) -> Iterator[Platter]:
    backing = make_image(tmp_path / "room.fs", 160 * MIB)
    with file_system("btrfs", backing, tmp_path / "room") as root:
        yield Platter(backing, root)


def read_at(image: Path, offset: int, length: int = PAGE) -> bytes | int:
    """Read from an image; or the error's number."""
    with image.open("rb", buffering=0) as file:
        try:
            return os.pread(file.fileno(), length, offset)
        except OSError as error:
            return error.errno or 0


def says(site: MountedSite, words: str) -> bool:
    return words in (site.disk("web01")["last_error"] or "")


def told(site: MountedSite) -> set[str]:
    """The codes of what has been told so far."""
    return {event["code"] for event in site.json("event", "list")["events"]}


def test_no_point_claims_what_its_image_could_not_be_read_for(
    tmp_path: Path, platter: Platter
) -> None:
    """Neither the first one, nor a later one; the machine, and other disks, go on."""
    with MountedSite(tmp_path, options=FAST) as site:
        site.source.rmdir()
        site.source = platter.root / "source"
        site.source.mkdir()
        content = os.urandom(SIZE)
        source = site.add_image("web01", SIZE, content)
        site.add_image("web02", MIB, os.urandom(MIB))
        bad = 3 * MIB + 5 * PAGE
        platter.spoil(source, bad)
        site.init().mount().wait_shipped("web02")
        why = "the image cannot be read at byte {}: Input/output error; "
        site.wait("it says so", lambda: says(site, why.format(bad)))
        assert site.disk("web01")["health"] == "Critical"
        site.wait("it is told", lambda: "image.unreadable" in told(site))
        image = site.image("web01")
        # What the local disk does not give is an error, all else is there.
        assert read_at(image, bad) == errno.EIO
        assert read_at(image, bad - PAGE) == content[bad - PAGE : bad]
        assert read_at(image, bad + PAGE) == content[bad + PAGE :][:PAGE]
        write_random(image, MIB, MIB, seed=1)
        assert site.points("web01") == []
        platter.mend()
        wait_same(site)
        site.wait("it is over", lambda: site.disk("web01")["health"] == "Normal")
        # A page that is marked, and cannot be read when it is to be captured.
        last = site.points("web01")[-1]["epoch"]
        site.run("disk", "pause", "web01", "-m", site.mountpoint)
        write_random(image, 4 * MIB, MIB, seed=2)
        bad = 4 * MIB + 300 * 512 // PAGE * PAGE
        platter.spoil(source, bad)
        site.run("disk", "resume", "web01", "-m", site.mountpoint)
        site.wait("it says so", lambda: says(site, why.format(bad)))
        assert site.disk("web01")["health"] == "Critical"
        write_random(image, 5 * MIB, MIB, seed=3)
        site.wait_shipped("web02")
        assert site.points("web01")[-1]["epoch"] == last
        # What is written to a bad sector is stored elsewhere: nothing is left that is unreadable.
        write_random(image, bad, PAGE, seed=4)
        wait_same(site)
        site.wait("it is over", lambda: site.disk("web01")["health"] == "Normal")
        assert "Traceback" not in (site.state / "daemon.log").read_text()


@pytest.mark.parametrize("mends", [True, False], ids=["mended", "upgraded"])
def test_a_spool_that_cannot_be_read_stops_points_and_loses_nothing(
    tmp_path: Path, platter: Platter, mends: bool
) -> None:
    """It is the local disk that is named; the next daemon has compared what it lost."""
    with MountedSite(tmp_path, options=FAST) as site:
        site.state = platter.root / "state"
        site.add_image("web01", SIZE, os.urandom(SIZE))
        site.init().mount().wait_shipped("web01")
        last = site.points("web01")[-1]["epoch"]
        (tmp_path / "vault").rename(tmp_path / "away")
        write_random(site.image("web01"), 4 * MIB, MIB, seed=1)
        site.wait("it waits", lambda: site.disk("web01")["spooled_bytes"] > MIB)
        files = (site.state / "disks").glob("*/spool/*.delta")
        [spooled] = [path for path in files if path.stat().st_size > MIB]
        platter.spoil(spooled, 16 * PAGE)
        (tmp_path / "away").rename(tmp_path / "vault")
        site.json("disk", "retry", "web01")
        why = f"{spooled}: Input/output error; if it stays so: vdiskfs upgrade"
        site.wait("it says so", lambda: says(site, why))
        assert site.disk("web01")["health"] == "Warning"
        write_random(site.image("web01"), MIB, MIB, seed=2)
        assert site.points("web01")[-1]["epoch"] == last
        if mends:
            platter.mend()
            site.json("disk", "retry", "web01")
        else:
            before = site.pid
            site.json("upgrade")
            site.wait_successor(before, {"web01"})
        wait_same(site)
        log = (site.state / "daemon.log").read_text()
        assert "Traceback" not in log
        assert ("dropped, all pages are looked at again" in log) is not mends
        site.run("vault", "check", "--read-data", "--vault", site.vault)


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "ended"])
def test_records_that_cannot_be_read_cost_a_comparison_and_the_machine_nothing(
    tmp_path: Path, platter: Platter, killed: bool
) -> None:
    """The head of the bitmaps, the intent log, and the databases, at a start."""
    with MountedSite(tmp_path, options=FAST) as site:
        site.state = platter.root / "state"
        site.add_image("web01", SIZE, os.urandom(SIZE))
        site.init().mount().wait_shipped("web01")
        if killed:
            site.kill_for_good()
        site.umount()
        [track] = (site.state / "disks").glob("*/track")
        lost = [track / "track", track / "intent", site.state / "events.db", site.state / "jobs.db"]
        os.sync()
        for path in lost:
            platter.spoil(path, 0)
        seen = len((site.state / "daemon.log").read_text())
        site.mount()
        write_random(site.image("web01"), MIB, MIB, seed=1)
        wait_same(site)
        assert site.disk("web01")["health"] == "Normal"
        said = (site.state / "daemon.log").read_text()[seen:]
        assert re.search(rf"all is compared: {track}: .*Input/output error", said)
        assert "events cannot be read" in said
        assert "jobs cannot be read" in said
        assert "Traceback" not in said
        site.umount()
