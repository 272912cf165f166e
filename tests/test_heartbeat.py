"""The heartbeat of a vault in two containers sees each of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.store.memory import MemoryStore
from vdiskfs.catalog import Vault
from vdiskfs.config import MountSettings
from vdiskfs.health import Health
from vdiskfs.heartbeat import Heartbeat
from vdiskfs.store.split import SplitStore

AWAY_S = 1000


class Scene:
    """A disk that waits to ship again, and the heartbeat of its mount."""

    def __init__(self, vault: Vault, url: str) -> None:
        self.health = Health("web01", lambda: 0.5)
        self.disk: Any = SimpleNamespace(disk_id="a" * 32, health=self.health)
        settings = MountSettings(None, "/mnt/vd", url, "here", "/state")
        site: Any = SimpleNamespace(vault=vault, state=SimpleNamespace(writer_id="b" * 32))
        self.heartbeat = Heartbeat(settings, site, lambda: [self.disk], trio.lowlevel.checkpoint)


async def test_the_data_container_coming_back_alone_ends_the_wait(
    autojump_clock: MockClock, nursery: trio.Nursery, expect_log: Callable[[str], None]
) -> None:
    expect_log("the vault does not answer")
    expect_log("web01")
    data, control = MemoryStore(), MemoryStore()
    vault = await Vault.init(SplitStore(data, control))
    scene = Scene(vault, "azure://data?control=ctl")
    nursery.start_soon(scene.heartbeat.run)
    data.away = True

    shipped = trio.Event()

    async def run() -> None:
        await scene.health.until_done("shipping", lambda: data.create("segments/x", b""))
        shipped.set()

    nursery.start_soon(run)
    await trio.sleep(AWAY_S)
    assert scene.heartbeat.vault_error is not None
    assert any(name.startswith("sites/") for name in control.objects)  # alive all the same
    left_s = scene.health.next_retry_s
    assert left_s is not None
    data.away = False
    with trio.fail_after(left_s / 2):
        await shipped.wait()
    assert scene.heartbeat.vault_error is None


async def test_a_data_container_that_hangs_holds_no_sign_of_life_up(
    autojump_clock: MockClock, expect_log: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_log("no answer where the data lies")
    data, control = MemoryStore(), MemoryStore()
    scene = Scene(await Vault.init(SplitStore(data, control)), "azure://data?control=ctl")

    async def hang(_: str) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(data, "stat", hang)
    with trio.fail_after(60):
        await scene.heartbeat.beat()
    assert scene.heartbeat.vault_error is not None


async def test_a_vault_in_one_store_is_asked_for_nothing_more() -> None:
    store = MemoryStore()
    scene = Scene(await Vault.init(store), "azure://data")
    await scene.heartbeat.beat()
    asked = store.requests
    await scene.heartbeat.beat()
    assert store.requests == asked + 1
