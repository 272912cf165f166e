"""A mount on a container that keeps what is in it, and one for what changes.

Azurite ignores policies, so a proxy in front of it enforces one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import trio

from tests.azurite import AzureVault
from tests.e2e.mounted import MountedSite
from tests.store.proxy import FaultProxy, Worm
from tests.vaults import given
from vdiskfs.catalog import Vault
from vdiskfs.catalog.garbage import GRACE_S, Collected, collect
from vdiskfs.store import open_store
from vdiskfs.units import NS, PAGE_SIZE

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.azurite, pytest.mark.timeout(180)]

MIB = 1 << 20
FAST = "epoch_interval_s = 3600\nheartbeat_s = 1\n"


def test_a_mount_replicates_thins_and_fails_over_where_data_is_kept(
    tmp_path: Path, azure_vault: AzureVault
) -> None:
    worm = Worm(azure_vault.container)
    with FaultProxy(azure_vault.azurite.port, worm) as proxy:
        environ = azure_vault.azurite.environ(proxy.port)
        control = f"{azure_vault.container}-control"
        url = f"{azure_vault.url}?control={control}"
        with MountedSite(tmp_path, vault=url, environ=environ, options=FAST) as site:
            site.add_image("web01", MIB, os.urandom(MIB))
            site.init().mount().wait_shipped("web01")
            states = {}
            with (site.mountpoint / "disks" / "web01.img").open("r+b", buffering=0) as live:
                for number in range(3):
                    os.pwrite(live.fileno(), os.urandom(PAGE_SIZE), number * PAGE_SIZE)
                    made = site.json("point", "create", "web01", "--wait")
                    states[made["points"][0]["epoch"]] = os.pread(live.fileno(), MIB, 0)
            found = site.json("vault", "info", "--probe")["data"]
            assert {*found.values()} == {"refused by a policy", "allowed"}
            assert found["documents"] == "allowed"
            # It is thinned by its policy, and the points that stay are whole.
            site.run(
                "-m", site.mountpoint, "policy", "set", "tight", "retention=1h for 2h", "--yes"
            )
            site.run(
                "-m", site.mountpoint, "disk", "protect", "web01", "--policy", "tight", "--yes"
            )
            site.wait("points to go", lambda: len(site.points("web01")) < 3)
            newest = max(states)
            assert site.points("web01")[-1]["epoch"] == newest
            site.run(
                "-m", site.mountpoint, "failover", "test", "web01", "--name", "try", "--vm", "none"
            )
            copy = site.mountpoint / "failovers" / "try" / "web01.img"
            assert copy.read_bytes() == states[newest]
            site.run("-m", site.mountpoint, "failover", "cleanup", "try")
            # What is due is refused, counted, and deleted once that is over.
            before = len(worm.refused)
            kept = trio.run(_collect, url, environ)
            assert (kept.deleted, kept.refused > 0) == (0, True)
            assert len(worm.refused) > before
            worm.ended = True
            gone = trio.run(_collect, url, environ)
            assert (gone.deleted, gone.refused) == (kept.refused, 0)
            worm.ended = False
            row = site.disk("web01")
            assert (row["state"], row["health"]) == ("Protected", "Normal")
        # The objects that change are where they may.
        assert not [path for path in worm.made if "/disks/" in path and path.endswith(".json")]


async def _collect(url: str, environ: dict[str, str]) -> Collected:
    """Collect what the disk's ledger has doomed, as if the grace period were over."""
    store = open_store(url, environ=environ)
    try:
        vault = await Vault.open(store, given())
        log = await vault.find_log("web01")
        await log.refresh()
        assert log.line.ledger is not None
        return await collect(vault.store, log.line.ledger, time.time_ns() + 2 * GRACE_S * NS)
    finally:
        await store.aclose()
