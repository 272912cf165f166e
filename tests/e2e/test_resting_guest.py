"""Application-consistent points of a real guest, by the real agent in it."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

import pytest

from tests.e2e.guest_agent import agent_guest
from tests.e2e.loopdev import make_fs
from tests.e2e.mounted import MountedSite
from tests.e2e.resting import unclean

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.guest]
COMMAND = ("point", "create", "web01", "--consistency", "application", "--wait")
POINTS = 4


@pytest.mark.slow
def test_the_file_system_of_a_guest_is_clean_in_its_application_points(tmp_path: Path) -> None:
    """The guest writes on all the time; of the points in between some need the journal."""
    with tempfile.TemporaryDirectory(prefix="agent-") as short:
        socket = Path(short, "ga.sock")
        conf = f'epoch_interval_s = 0.2\nfreeze_limit_s = 60\n[quiesce.web01]\nagent = "{socket}"\n'
        with MountedSite(tmp_path, options=conf) as site:
            make_fs("ext4", site.add_image("web01", 64 << 20))
            site.init().mount()
            site.wait_shipped("web01")
            (tmp_path / "guest").mkdir()
            with agent_guest(site.image("web01"), tmp_path / "guest", socket) as guest:
                guest.wait_line(r"^WROTE 5$")
                site.wait("the agent answers", lambda: site.run_any(
                    "-m", site.mountpoint, *COMMAND, "--label", "a0") == 0, 120)  # fmt: skip
                took = []
                for number in range(1, POINTS):
                    done = int(re.findall(r"WROTE (\d+)", guest.console)[-1])
                    guest.wait_line(rf"^WROTE {done + 5}$")
                    began = time.monotonic()
                    site.run("-m", site.mountpoint, *COMMAND, "--label", f"a{number}")
                    took.append(time.monotonic() - began)
                done = int(re.findall(r"WROTE (\d+)", guest.console)[-1])
                guest.wait_line(rf"^WROTE {done + 5}$")
                guest.send("stop")
                guest.wait_exit()
            site.wait_shipped("web01")
            points = site.points("web01")
            rested = [one for one in points if one["consistency"] == "application"]
            assert [one["label"] for one in rested] == [f"a{number}" for number in range(POINTS)]
            for one in rested:
                assert (
                    unclean("ext4", site.point("web01", "@" + one["time"]), tmp_path, trusted=False)
                    == ""
                )
            between = [one for one in points if one["consistency"] == "crash"
                       and rested[0]["epoch"] < one["epoch"] < rested[-1]["epoch"]]  # fmt: skip
            found = [unclean("ext4", site.point("web01", "@" + one["time"]), tmp_path, trusted=False)
                     for one in between[:3]]  # fmt: skip
            assert any(found), "points in between show nothing"
            print(f"guest: {len(rested)} points, the last ones in {max(took):.1f} s at most")
