"""Sites in network namespaces of their own: cut off, failed over, and what comes in by wire."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.azurite import AzureVault
from tests.e2e.extents import extents
from tests.e2e.gauges import write_at
from tests.e2e.netns import Namespace, SiteIn, namespace

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


class FarSites:
    """Two sites, each in a network namespace of its own, and a vault that both reach."""

    def __init__(self, root: Path, vault: AzureVault, home: Namespace, away: Namespace) -> None:
        self.home = self._site(root, vault, "home", home)
        self.away = self._site(root, vault, "away", away)

    def _site(self, root: Path, vault: AzureVault, name: str, net: Namespace) -> SiteIn:
        near = net.forward(vault.azurite.port)
        through = {
            key: text.replace(f":{vault.azurite.port}/", f":{near}/")
            for key, text in vault.environ.items()
        }
        site = SiteIn(root, vault=vault.url, name=name, environ=through, options=FAST)
        site.namespace = net
        return site

    def begin(self, size: int, content: bytes) -> Path:
        """Protect a disk at home; return its image in the mount."""
        self.home.add_image(DISK, size, content)
        self.home.init().mount().wait_shipped(DISK)
        self.away.mount(recovery=True)
        return self.home.image(DISK)


@pytest.fixture
def sites(tmp_path: Path, azure_vault: AzureVault) -> Iterator[FarSites]:
    with namespace() as near, namespace() as far:
        two = FarSites(tmp_path, azure_vault, near, far)
        with two.home, two.away:
            yield two


def test_a_site_that_is_cut_off_writes_on_and_learns_that_it_was_failed_over(
    sites: FarSites,
) -> None:
    home, away, net = sites.home, sites.away, sites.home.namespace
    live = sites.begin(SIZE, os.urandom(SIZE))
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


def held(image: Path) -> dict[int, bytes]:
    """Return what an image holds, by MiB; what is zero is left out, written or not."""
    found: dict[int, bytes] = {}
    with image.open("rb", buffering=0) as file:
        for begin, end in extents(image):
            for number in range(begin // MIB, -(-end // MIB)):
                data = os.pread(file.fileno(), MIB, number * MIB)
                if any(data):
                    found[number] = hashlib.blake2b(data).digest()
    return found


def test_a_way_home_costs_on_the_wire_what_was_changed_elsewhere(sites: FarSites) -> None:
    """8 GiB, of which 100 MiB are changed: at most 110 MiB, and at the end only the last delta."""
    home, away, net = sites.home, sites.away, sites.home.namespace
    chance, data = random.Random(8), 128 * MIB
    live = sites.begin(data, np.random.default_rng(8).bytes(data))
    os.truncate(live, 8 << 30)
    home.wait_shipped(DISK)
    name = away.json("failover", "start", DISK)["name"]
    [one] = away.json("failover", "list")["failovers"]
    copy = Path(one["disks"][0]["path"])
    # Whole files, some beyond what home ever had, and pages here and there.
    files = [at * MIB for at in (*chance.sample(range(128), 48), *range(1000, 8000, 200))]
    pages = sorted(chance.sample(range(data // 4096), 25 * MIB // 4096))
    with copy.open("r+b", buffering=0) as file:
        for at in files:
            os.pwrite(file.fileno(), chance.randbytes(MIB), at)
        for page in pages:
            os.pwrite(file.fileno(), chance.randbytes(4096), page * 4096)
        os.fsync(file.fileno())
    away.json("failover", "commit", name)
    away.json("reprotect", DISK)
    before = net.bytes_in
    home.json("failback", "start", DISK)
    moved = net.bytes_in - before
    print(f"failback start: {moved / MIB:.1f} MiB came in")
    assert 95 * MIB < moved <= 110 * MIB
    write_at(copy, 17 * MIB, chance.randbytes(MIB))
    before = net.bytes_in
    home.json("failback", "complete", DISK)
    last = net.bytes_in - before
    print(f"failback complete: {last / MIB:.1f} MiB came in")
    assert MIB <= last < 3 * MIB
    assert held(live) == held(copy)
    home.json("failback", "commit", DISK)
    away.json("failover", "cleanup", name)
