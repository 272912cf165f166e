"""Application-consistent points of file systems that are mounted on this host from a disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.mounted import MountedSite
from tests.e2e.resting import (
    SIZES,
    Writers,
    on_disk,
    unclean,
)

pytestmark = [pytest.mark.e2e, pytest.mark.root]
OPTIONS = """
epoch_interval_s = 0.2
[quiesce.web01]
filesystem = true
"""


def create(site: MountedSite, *more: str, code: int = 0) -> str:
    """Ask for an application-consistent point; return what was said on standard error."""
    words = ("point", "create", "web01", "--consistency", "application", "--wait", *more)
    return site.run("-m", site.mountpoint, *words, code=code).stderr


def named(site: MountedSite, label: str) -> Path:
    """The image of the point with a label."""
    [point] = [one for one in site.points("web01") if one["label"] == label]
    return site.point("web01", "@" + point["time"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_mounted_file_system_is_clean_in_an_application_point(tmp_path: Path, kind: str) -> None:
    """Two writers go on all the time; points by the interval in between do need the log."""
    wanted = 20 if kind == "ext4" else 6
    with MountedSite(tmp_path, options=OPTIONS) as site:
        site.add_image("web01", SIZES[kind])
        site.init().mount()
        site.wait_shipped("web01")
        with on_disk(site, kind, tmp_path / "fs") as root, Writers(root) as writers:
            for number in range(wanted):
                writers.wait_more(5)
                create(site, "--label", f"a{number}")
            writers.wait_more(5)
        site.wait_shipped("web01")
        points = site.points("web01")
        rested = [one for one in points if one["consistency"] == "application"]
        assert [one["label"] for one in rested] == [f"a{number}" for number in range(wanted)]
        for one in rested:
            assert unclean(kind, named(site, one["label"]), tmp_path) == "", one
        plain = [one for one in points
                 if one["consistency"] == "crash" and rested[0]["epoch"] < one["epoch"]]  # fmt: skip
        found = [unclean(kind, site.point("web01", "@" + one["time"]), tmp_path)
                 for one in plain[:4]]  # fmt: skip
        assert any(found), "points in between show nothing"
        newest = site.json("point", "show", "web01@latest-application-consistent")
        assert newest["epoch"] == rested[-1]["epoch"]
        assert list((site.state / "quiesce").iterdir()) == []
        print(f"{kind}: {len(rested)} points, slowest write {writers.longest_s:.2f} s")
