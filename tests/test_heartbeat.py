"""The heartbeat sees each container of a vault, and that the vault is not an older state of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.model.onedisk import OneDisk, opened
from tests.replicate.rig import page_of
from tests.store.memory import MemoryStore
from vdiskfs.catalog import Vault
from vdiskfs.config import MountSettings
from vdiskfs.health import Health, Level
from vdiskfs.heartbeat import Heartbeat
from vdiskfs.store.split import SplitStore
from vdiskfs.units import PAGE_SIZE

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


async def test_an_idle_disk_is_critical_once_its_vault_is_an_older_state_of_it(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("the vault does not answer: .* gone back in time: it lacks epoch")
    expect_log("disk web01: .* gone back in time: it lacks epoch")
    vault, old, aside = (tmp_path / name for name in ("vault", "old", "aside"))
    await OneDisk(tmp_path).init(16 * PAGE_SIZE)
    async with opened(tmp_path) as one:
        settings = MountSettings(None, "/mnt/vd", f"file://{vault}", "site", "/state")
        site: Any = SimpleNamespace(vault=one.vault, state=one.state)
        heartbeat = Heartbeat(settings, site, lambda: [one.disk], trio.lowlevel.checkpoint)
        for number in range(2):
            one.image.write(0, page_of(number))
            await one.ship()
            await heartbeat.beat()
            if number == 0:
                shutil.copytree(vault, old)
        assert heartbeat.vault_error is None
        # From here on nobody writes: nothing is shipped that could miss what is gone.
        vault.rename(aside)
        old.rename(vault)
        kept = {path: path.read_bytes() for path in vault.rglob("*") if path.is_file()}
        await heartbeat.beat()
        assert "gone back in time" in str(heartbeat.vault_error)
        assert one.disk.health.level is Level.CRITICAL
        assert {path: path.read_bytes() for path in vault.rglob("*") if path.is_file()} == kept
        shutil.rmtree(vault)
        aside.rename(vault)
        await heartbeat.beat()
        assert heartbeat.vault_error is None
        assert one.disk.health.level is not Level.CRITICAL
