"""A clock that jumps changes no data and no order of points, and makes no owner look dead."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest

from tests.e2e.mounted import MountedSite
from tests.e2e.test_full_disk import wait_same, write_random

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.slow]

MIB = 1 << 20
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
MINUTE = 60
YEAR = 365 * 24 * 3600


class Clock:
    """The wall clock of programs that run in `environ`: off by what `jump` said last."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "clock"
        self._file.write_bytes(struct.pack("q", 0))
        shim = directory / "clockshim.so"
        source = Path(__file__).with_name("clockshim.c")
        subprocess.run(
            [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-o", shim, source], check=True
        )
        self.environ = {"LD_PRELOAD": str(shim), "VDISKFS_TEST_CLOCK": str(self._file)}

    def jump(self, offset_s: int) -> None:
        """From now on it is off by so many seconds."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("q", offset_s))


def test_points_keep_their_order_and_their_bytes_whatever_the_clock_does(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    with MountedSite(tmp_path, environ=clock.environ, options=FAST) as site:
        source = site.add_image("web01", MIB, os.urandom(MIB))
        site.init().mount().wait_shipped("web01")
        held: dict[int, bytes] = {}
        jumps = [0, 10 * MINUTE, -10 * MINUTE, 5 * YEAR, -5 * YEAR, 0]
        for seed, offset_s in enumerate(jumps):
            clock.jump(offset_s)
            write_random(site.image("web01"), seed * 4096, 4096, seed)
            wait_same(site)
            held[site.disk("web01")["epoch"]] = source.read_bytes()
            if seed == 3:
                pid = site.pid
                site.kill_daemon()
                assert site.pid != pid
        points = site.points("web01")
        epochs = [point["epoch"] for point in points]
        times = [point["time"] for point in points]
        assert epochs == sorted(epochs)
        assert times == sorted(times), "never before its predecessor's"
        assert int(times[-1][:4]) >= int(times[0][:4]) + 4, "the clock did jump"
        assert set(held) <= set(epochs)
        # Each lies in the directory of its day, under a name of its own, in the order of epochs.
        images = site.point_images("web01")
        assert len(images) == len(points)
        by_epoch = dict(zip(epochs, images, strict=True))
        for epoch, data in held.items():
            assert by_epoch[epoch].read_bytes() == data
        for point in points:
            found = site.point("web01", f"@{point['time']}")
            last = max(p["epoch"] for p in points if p["time"] == point["time"])
            assert found.read_bytes() == by_epoch[last].read_bytes()
        assert site.point("web01").read_bytes() == source.read_bytes()
        for row in (site.disk("web01"),):
            assert row["health"] == "Normal"
            assert row["shipped_lag_s"] >= 0
        site.umount()
        site.mount().wait_shipped("web01")
        assert site.points("web01") == points
        assert "Traceback" not in (site.state / "daemon.log").read_text()
