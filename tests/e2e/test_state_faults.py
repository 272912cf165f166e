"""The state directory's disk fails or lies: guests go on, and nothing wrong is believed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e.gauges import assert_same, digests
from tests.e2e.loopdev import attached, make_fs, make_image, mounted, run_tool
from tests.e2e.mounted import MountedSite
from tests.e2e.oracle import Oracle
from tests.e2e.test_full_disk import wait_same, write_random
from tests.e2e.workload import Workload
from tests.vaults import VARIABLE

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.slow]

MIB = 1 << 20
PAGE = 4096
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
SHUTDOWN = 0x8004587D  # XFS_IOC_GOINGDOWN, EXT4_IOC_SHUTDOWN
NO_LOG_FLUSH = 2


def shut_down(root: Path) -> None:
    """From now on every write to the file system is EIO, as when its device is gone."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    finally:
        os.close(fd)


@contextmanager
def state_disk(kind: str, tmp_path: Path) -> Iterator[tuple[Path, ExitStack]]:
    """Give a device with a file system, mounted on ``room``, and what unmounts it early."""
    with attached(make_image(tmp_path / "room.fs", 320 * MIB)) as device, ExitStack() as mounting:
        make_fs(kind, device)
        mounting.enter_context(mounted(device, tmp_path / "room", kind=kind))
        yield device, mounting


@contextmanager
def thin_state_disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Give an ext4 whose device has EIO for blocks not written before, while a file is there.

    The loop device lies on a tmpfs: when that is full the device has no room for them. The
    journal and the inode tables are written when they are made.
    """
    thin = tmp_path / "thin"
    thin.mkdir()
    run_tool(["mount", "-t", "tmpfs", "-o", "size=96m", "thin", thin])
    try:
        with attached(make_image(thin / "room.fs", 320 * MIB), direct=False) as device:
            full = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
            run_tool(["mkfs.ext4", "-q", "-E", full, "-J", "size=4", "-N", "512", device])
            options = ["errors=continue"]
            with mounted(device, tmp_path / "room", kind="ext4", options=options) as room:
                yield room, thin / "ballast"
    finally:
        run_tool(["umount", thin])


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_state_disk_that_is_gone_costs_points_and_the_guest_nothing(
    kind: str, tmp_path: Path
) -> None:
    room = tmp_path / "room"
    with (
        state_disk(kind, tmp_path) as (device, mounting),
        MountedSite(tmp_path, options=FAST) as site,
    ):
        site.state = room / "state"
        first = os.urandom(8 * MIB)
        source = site.add_image("web01", len(first), first)
        (tmp_path / "first").write_bytes(first)
        site.init().mount().wait_shipped("web01")
        load = Workload(site.image("web01"), seed=5, writers=4)
        with load:
            load.wait_operations(100)
            before = digests(site.point_images("web01")[:4])
            shut_down(room)
            # A writer that gets an error raises it at the end of the block.
            load.wait_operations(200)

            def says(words: str) -> bool:
                error = site.disk("web01")["last_error"] or ""
                return str(site.state) in error and words in error

            # On xfs the next store into a bitmap fails, which is a SIGBUS; ext4 may take it.
            words = "cannot hold the bitmaps" if kind == "xfs" else ""
            site.wait("status says what is broken, and where", lambda: says(words))
            assert site.disk("web01")["health"] != "Normal"
            pid = site.pid
            load.wait_operations(100)
            assert site.json("status")["pid"] == pid, "the daemon lived on"
        live = hashlib.sha256(source.read_bytes()).hexdigest()
        assert hashlib.sha256(site.image("web01").read_bytes()).hexdigest() == live
        site.umount()
        mounting.close()
        mounting.enter_context(mounted(device, room, kind=kind))
        site.mount().wait_shipped("web01")
        assert_same(site.point("web01"), source)
        Oracle(load.log, tmp_path / "first").check(site.point("web01"))
        after = digests(site.point_images("web01")[:4])
        assert {name: after[name] for name in before} == before
        site.umount()
        mounting.close()


def test_marks_that_could_not_be_written_once_are_not_believed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first sync reports the error, the next ones would not: the disk is compared instead."""
    monkeypatch.setenv(VARIABLE, "plain")  # what fits is weighed to the block
    for turn in range(4):
        directory = tmp_path / str(turn)
        directory.mkdir()
        with contextlib.suppress(TurnedReadOnlyError):
            lose_marks(directory)
            return
    raise AssertionError("the file system turned read-only each time")


class TurnedReadOnlyError(Exception):
    """A write of the file system's own failed first, which is not what is tried."""


def lose_marks(tmp_path: Path) -> None:
    with thin_state_disk(tmp_path) as (room, ballast), MountedSite(tmp_path, options=FAST) as site:
        site.state = room / "state"
        source = site.add_image("web01", 288 * MIB, os.urandom(8 * MIB))
        site.init().mount().wait_shipped("web01")
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(PAGE))
        log = site.state / "daemon.log"
        compared = "writing the bitmaps had failed: all is compared"
        # In places that the bitmaps' files have no written block for yet.
        write_random(site.image("web01"), 140 * MIB, 24 * MIB, seed=1)
        site.wait("an epoch is given up", lambda: "was given up" in log.read_text())
        write_random(site.image("web01"), 260 * MIB, 4 * MIB, seed=2)
        # The note that nothing is believed is made before, and may be what does not fit.
        refusals = ("the bitmaps cannot be written", "/distrusted: No space left on device")

        def says_it() -> bool:
            if os.statvfs(room).f_flag & os.ST_RDONLY:
                raise TurnedReadOnlyError
            error = site.disk("web01")["last_error"] or ""
            return any(words in error for words in refusals)

        site.wait("status says it", says_it)
        write_random(site.image("web01"), 142 * MIB, 4 * MIB, seed=3)
        ballast.unlink()
        site.wait("all is compared", lambda: compared in log.read_text())
        wait_same(site)
        site.wait("the health is good again", lambda: site.disk("web01")["health"] == "Normal")
        # What was settled holds: the next start compares nothing.
        site.umount()
        before = log.read_text().count("pages compared so far")
        site.mount().wait_shipped("web01")
        assert log.read_text().count("pages compared so far") == before
        assert_same(site.point("web01"), source)


def flip(path: Path) -> None:
    """Change one bit in the middle of what a file holds."""
    data = bytearray(path.read_bytes())
    marked = next((place for place, byte in enumerate(data) if byte), len(data) // 2)
    data[marked] ^= 4
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    """Take the end of a file away."""
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a header cut short": ("track", cut_short),
    "changed pages with a flipped bit": ("dirty.0", flip),
    "suspect pages with a flipped bit": ("suspect", flip),
    "suspect pages that are gone": ("suspect", Path.unlink),
}


def test_bitmaps_that_rot_while_nothing_is_mounted_are_never_believed(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        source = site.add_image("web01", 4 * MIB, os.urandom(4 * MIB))
        site.init().mount().wait_shipped("web01")
        site.run("disk", "pause", "web01", "-m", site.mountpoint)
        log = site.state / "daemon.log"
        [track] = (site.state / "disks").glob("*/track")
        for seed, (what, (name, damage)) in enumerate(DAMAGES.items()):
            # Marked and not captured, so that there is something to lose.
            write_random(site.image("web01"), seed * PAGE, PAGE, seed)
            site.umount()
            damage(track / name)
            seen = len(log.read_text())
            site.mount()
            assert f"changed since the clean end: {name}" in log.read_text()[seen:] or (
                f"{track}/{name}" in log.read_text()[seen:]
            ), what
            assert site.json("disk", "show", "web01")["suspect_bytes"] == 4 * MIB, what
        site.run("disk", "resume", "web01", "-m", site.mountpoint)
        wait_same(site)
        site.umount()
        seen = len(log.read_text())
        site.mount().wait_shipped("web01")
        assert "compared" not in log.read_text()[seen:], "sound ones are believed"
        assert_same(site.point("web01"), source)
