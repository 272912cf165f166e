"""The disk of an image fails at a sync: no sync of it succeeds any more, until a new mount."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path

import pytest

from tests.e2e.gauges import assert_same
from tests.e2e.mounted import MountedSite
from tests.e2e.test_state_faults import thin_state_disk

pytestmark = [pytest.mark.e2e, pytest.mark.root]

MIB = 1 << 20
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"


def synced(image: int) -> int:
    """Sync it; 0, or the error's number."""
    try:
        os.fsync(image)
    except OSError as error:
        return error.errno or 0
    return 0


def test_an_image_that_could_not_be_synced_is_not_said_to_be(tmp_path: Path) -> None:
    """The kernel says so once, and takes what it could not write for written from then on."""
    with thin_state_disk(tmp_path) as (room, ballast), MountedSite(tmp_path, options=FAST) as site:
        site.source.rmdir()
        site.source = room / "source"
        site.source.mkdir()
        source = site.add_image("web01", 64 * MIB, os.urandom(MIB))
        site.add_image("db01", MIB, os.urandom(MIB))
        os.sync()
        site.init().mount().wait_shipped("web01")
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        wanted, log = os.urandom(8 * MIB), site.state / "daemon.log"
        with contextlib.ExitStack() as opened:
            first, second = (
                opened.enter_context(site.image("web01").open("r+b", buffering=0)).fileno()
                for _ in range(2)
            )
            assert os.pwrite(first, wanted, 32 * MIB) == len(wanted)
            failed = synced(first)
            assert failed in (errno.EIO, errno.ENOSPC)  # as the loop device has it
            ballast.unlink()
            # There is room now, and the host's own sync succeeds; what was written may be gone.
            with source.open("rb") as file:
                synced(file.fileno())
                assert synced(file.fileno()) == 0
            assert [synced(one) for one in (first, second, first)] == [failed] * 3
            assert os.pwrite(second, wanted, 32 * MIB) == len(wanted)
            assert synced(second) == failed
        codes = {event["code"] for event in site.json("event", "list")["events"]}
        assert "image.sync-failed" in codes
        # It ends in order but for this disk, of which the next mount believes nothing.
        site.umount()
        seen = len(log.read_text())
        site.mount().wait_shipped("web01")
        said = log.read_text()
        assert "Traceback" not in said
        assert re.findall(r"disk (\S+): pages compared", said[seen:]) == ["web01"]
        with site.image("web01").open("r+b", buffering=0) as image:
            assert os.pwrite(image.fileno(), wanted, 32 * MIB) == len(wanted)
            assert synced(image.fileno()) == 0
        site.json("point", "create", "web01", "--wait")
        assert_same(site.point("web01"), source)
        with source.open("rb") as file:
            assert os.pread(file.fileno(), len(wanted), 32 * MIB) == wanted
        site.umount()
