"""Keeper and daemon are killed beneath a machine that stops at errors: how it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.bootsector import SIZE, SectorGuest, boot_sector, newest
from tests.e2e.gauges import assert_same
from tests.e2e.mounted import CommandError, MountedSite

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.guest]

FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"


def test_a_machine_that_stopped_goes_on_with_another_block_node(tmp_path: Path) -> None:
    """As vdiskfs-internals(7) says; what was answered is there, and what was not is done then."""
    with MountedSite(tmp_path, options=FAST) as site:
        source = site.add_image("web01", SIZE, boot_sector())
        site.init().mount().wait_shipped("web01")
        with SectorGuest(site.image("web01"), tmp_path) as guest:
            guest.wait_answered(200)
            site.kill_for_good()
            guest.wait("QEMU stops the machine", guest.is_stopped_by_error)
            before = guest.answered
            assert newest(source.read_bytes()) in (before, before + 1)
            # The dead mount is in use, by a machine that gets nothing from it.
            with pytest.raises(CommandError, match="vdiskfs umount --lazy"):
                site.run("umount", site.mountpoint)
            site.run("umount", "--lazy", site.mountpoint)
            site.pid = 0
            site.mount()
            guest.ask("cont")
            guest.wait("it stops again: its file is the dead mount's", guest.is_stopped_by_error)
            node = guest.node("again", site.image("web01"))
            with pytest.raises(RuntimeError, match="Error flushing drive"):
                guest.ask("blockdev-reopen", options=[node | {"node-name": "disk"}])
            guest.ask("blockdev-add", **node)
            guest.ask("qom-set", path="/machine/peripheral/vd0", property="drive", value="again")
            guest.ask("blockdev-del", **{"node-name": "disk"})
            assert guest.answered == before
            guest.ask("cont")
            guest.wait_answered(200)
            assert set(guest.told) == set(b"."), "it has seen an error"
            guest.ask("stop")
            assert newest(source.read_bytes()) in (guest.answered, guest.answered + 1)
        site.wait_shipped("web01")
        assert_same(site.point("web01"), source)
        for point in site.point_images("web01"):
            newest(point.read_bytes())
