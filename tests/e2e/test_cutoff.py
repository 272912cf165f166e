"""A site that is cut off, in a network namespace of its own: it writes on, and is failed over."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.azurite import AzureVault
from tests.e2e.gauges import write_at
from tests.e2e.mounted import MountedSite
from tests.e2e.netns import SiteIn, namespace

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.azurite, pytest.mark.timeout(300)]

MIB = 1 << 20
SIZE = 4 * MIB
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
DISK = "web01"


class Writer(threading.Thread):
    """Writes page after page, and remembers the first error."""

    def __init__(self, image: Path) -> None:
        super().__init__()
        self._image = image
        self._ended = threading.Event()
        self.written = 0
        self.error: OSError | None = None

    def run(self) -> None:
        """Write until stopped."""
        with self._image.open("r+b", buffering=0) as file:
            while not self._ended.wait(0.01):
                try:
                    os.pwrite(file.fileno(), os.urandom(4096), self.written % 1024 * 4096)
                    os.fsync(file.fileno())
                except OSError as error:
                    self.error = error
                    return
                self.written += 1

    def stop(self) -> None:
        """End it."""
        self._ended.set()
        self.join()


def test_a_site_that_is_cut_off_writes_on_and_learns_that_it_was_failed_over(
    tmp_path: Path, azure_vault: AzureVault
) -> None:
    with namespace() as net:
        port = net.forward(azure_vault.azurite.port)
        through = {
            key: text.replace(f":{azure_vault.azurite.port}/", f":{port}/")
            for key, text in azure_vault.environ.items()
        }
        home = SiteIn(tmp_path, vault=azure_vault.url, name="home", environ=through, options=FAST)
        home.namespace = net
        away = MountedSite(
            tmp_path, vault=azure_vault.url, name="away", environ=azure_vault.environ, options=FAST
        )
        with home, away:
            home.add_image(DISK, SIZE, os.urandom(SIZE))
            home.init().mount().wait_shipped(DISK)
            away.mount(recovery=True)
            live = home.image(DISK)
            writer = Writer(live)
            writer.start()
            try:
                net.cut()
                before = writer.written
                home.wait("it sees that the vault is away",
                          lambda: home.disk(DISK)["last_error"] is not None)  # fmt: skip
                found = away.json("failover", "start", DISK, "--unplanned")
                write_at(Path(found["disks"][0]["path"]), 0, b"away")
                home.wait("the guest writes on", lambda: writer.written > before + 50)
                assert writer.error is None
            finally:
                writer.stop()
            kept = live.read_bytes()
            net.join()
            home.wait("home is displaced", lambda: home.disk(DISK)["state"] == "Displaced")
            home.wait("what it wrote is shipped",
                      lambda: home.disk(DISK)["spooled_bytes"] == 0
                      and home.disk(DISK)["dirty_bytes"] == 0)  # fmt: skip
            [branch] = home.json("disk", "branches", DISK)["branches"]
            point = home.mountpoint / "recovery-points" / f"{DISK}@{branch['name']}" / "latest"
            assert (point / f"{DISK}.img").read_bytes() == kept
            away.json("failover", "commit", found["name"])
            away.json("reprotect", DISK)
            home.json("failback", "start", DISK)
            home.json("failback", "complete", DISK)
            home.json("failback", "commit", DISK)
            assert live.read_bytes()[:4] == b"away"
            away.json("failover", "cleanup", found["name"])
