"""A disk that was released, and is not taken after all, goes on where it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from tests.e2e.gauges import write_at
from tests.e2e.test_relocation import DISK, Sites, refused, refuses_writes, vault_record
from tests.vaults import given
from vdiskfs.catalog import Vault
from vdiskfs.catalog.moves import ask_for, withdraw
from vdiskfs.catalog.records import Handover
from vdiskfs.store import open_store

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.timeout(300)]

REQUEST = Handover("c" * 32, "third", "d" * 32, "2026-01-01T00:00:00Z")


def at_third(sites: Sites, act: Callable[[Vault], Awaitable[Any]]) -> None:
    """Do something in the vault, as a third site."""

    async def run() -> None:
        root = sites.home.state.parent.parent
        store = open_store(f"file://{root}/vault")
        await act(await Vault.open(store, given()))

    trio.run(run)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_copy_that_was_released_and_not_taken_is_not_tidied_up(
    sites: Sites, restarted: bool
) -> None:
    away = sites.away
    name = sites.start()["name"]
    away.json("failover", "commit", name)
    away.json("reprotect", DISK)
    disk_id = vault_record(sites)["id"]

    def shown() -> str:
        return str(away.json("failover", "show", name)["state"])

    def is_brought() -> bool:
        (copy,) = away.json("failover", "show", name)["disks"]
        return bool(copy["hydration"] and copy["hydration"]["done"])

    at_third(sites, lambda vault: ask_for(vault, disk_id, REQUEST))
    away.wait("it is released", lambda: vault_record(sites)["handover"]["step"] == "released")
    assert shown() == "HandedOver"
    assert refuses_writes(sites.copy)
    if restarted:
        away.kill_daemon()
    at_third(sites, lambda vault: withdraw(vault, disk_id, REQUEST.id))
    away.wait("it goes on", lambda: shown() == "FailbackReady")
    assert not refuses_writes(sites.copy)
    write_at(sites.copy, 4096, os.urandom(4096))
    away.wait_shipped(DISK)
    away.wait("the rest of it is brought", is_brought)
    assert "cleanup is not possible in state FailbackReady" in refused(
        away, "failover", "cleanup", name
    )
    assert away.point(DISK).read_bytes() == sites.copy.read_bytes()


def test_a_disk_that_was_handed_over_takes_no_writes_behind_a_restart_without_the_vault(
    sites: Sites,
) -> None:
    home, live = sites.home, sites.home.image(DISK)
    sites.start()
    home.wait("home knows", lambda: home.disk(DISK)["state"] == "HandedOver")
    vault = home.state.parent.parent / "vault"
    away = vault.with_name("away-for-now")
    vault.rename(away)
    os.kill(home.pid, signal.SIGKILL)
    assert refuses_writes(live)  # its successor answers
    away.rename(vault)
    home.wait("home knows again", lambda: home.disk(DISK)["state"] == "HandedOver")
    assert refuses_writes(live)
