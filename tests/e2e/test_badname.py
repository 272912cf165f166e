"""A file whose name no vault can hold is served, not protected, and no other disk's trouble."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.gauges import write_at
from tests.e2e.mounted import CommandError, MountedSite

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.timeout(300)]

MIB = 1 << 20


def test_a_name_that_is_not_utf_8_ends_nobody_s_replication(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options="epoch_interval_s = 0.1\n") as site:
        site.add_image("web01", MIB, os.urandom(MIB))
        old = site.source / os.fsdecode(b"old\xfe.img")
        old.write_bytes(bytes(4096))
        site.init()
        with pytest.raises(CommandError, match=r"exit 2\n.*its name is not UTF-8.*rename it"):
            site.mount()
        old.unlink()
        site.mount().wait_shipped("web01")
        pid, log = site.json("status")["pid"], site.state / "daemon.log"
        odd = site.mountpoint / "disks" / os.fsdecode(b"new\xff.img")
        odd.write_bytes(b"served all the same")
        site.wait("it was told", lambda: "its name is not UTF-8" in log.read_text())
        write_at(site.image("web01"), 0, b"replicated on")
        site.wait_shipped("web01")
        assert site.point("web01").read_bytes() == site.image("web01").read_bytes()
        status = site.json("status")
        assert (status["pid"], [one["name"] for one in status["disks"]]) == (pid, ["web01"])
        assert odd.read_bytes() == b"served all the same"


def test_a_file_whose_enrolment_was_cut_off_is_one_disk(tmp_path: Path) -> None:
    """The vault had heard of it, and this host did not live to note that."""
    with MountedSite(tmp_path) as site:
        site.add_image("web01", MIB, os.urandom(MIB))
        site.init()
        for _ in range(2):
            site.environ["VDISKFS_CRASH"] = "enrolment.told:1"
            with pytest.raises(CommandError):
                site.mount()
            site.run("umount", site.mountpoint)
        del site.environ["VDISKFS_CRASH"]
        site.mount().wait_shipped("web01")
        listed = [row["name"] for row in site.json("disk", "list")["disks"]]
        assert listed == ["web01"]
        assert not list(site.state.glob("enrolling-*"))
        assert site.point("web01").read_bytes() == site.image("web01").read_bytes()
