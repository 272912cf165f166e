"""Azurite stands still under a disk, or has another vault, or an older one, where its vault was."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from tests.azurite import AzureVault, run_azurite
from tests.replicate.rig import Rig, page_of
from vdiskfs.catalog import Vault
from vdiskfs.health import Level
from vdiskfs.store import Store, open_store
from vdiskfs.store.account import Account
from vdiskfs.store.azure import AzureStore, Timeouts
from vdiskfs.store.retry import RetryingStore, RetryPolicy
from vdiskfs.stride import Pace
from vdiskfs.units import PAGE_SIZE

pytestmark = pytest.mark.azurite

SIZE = 2 << 20
PACE = Pace(0.05, 64 << 20, 1)
Objects = dict[str, tuple[bytes, dict[str, str]]]


@contextlib.asynccontextmanager
async def opened(vault: AzureVault) -> AsyncIterator[Store]:
    """Open a vault's store, which gives a request up soon."""
    account = Account.from_environ(vault.environ)
    inner = AzureStore(account, vault.container, vault.prefix, timeouts=Timeouts(1.0, 0.5, 1.0))
    try:
        yield RetryingStore(inner, RetryPolicy(first_s=0.01, limit_s=0.1, budget_s=2.0))
    finally:
        while inner._threads.borrowed_tokens:  # noqa: ASYNC110 (threads set no event)
            await trio.sleep(0.01)
        await inner.aclose()


async def written(rig: Rig, pageno: int) -> None:
    rig.write(pageno * PAGE_SIZE, page_of(pageno))
    await rig.wait(lambda: rig.is_settled, 0.02)


async def objects(store: Store) -> Objects:
    """Return all that is there."""
    found = [info async for info in store.list("")]
    return {info.name: ((await store.read(info.name))[0], dict(info.metadata)) for info in found}


async def replace_all(store: Store, wanted: Objects) -> None:
    """Have these objects there, and no others."""
    for name in await objects(store):
        await store.delete(name)
    for name, (data, metadata) in wanted.items():
        await store.create(name, data, metadata=metadata)


SAID = {
    "another": ("another vault", "another vault, .*, is where vault .* was"),
    "older": ("gone back in time", "the vault has gone back in time: it lacks epoch"),
}


@pytest.mark.parametrize("which", SAID)
async def test_nothing_is_sent_to_a_vault_that_is_not_the_one_it_was(
    azure_vault: AzureVault, tmp_path: Path, expect_log: Callable[[str], None], which: str
) -> None:
    """It says so and waits; with the right one back, all goes on."""
    say, logged = SAID[which]
    expect_log(logged)
    direct = open_store(azure_vault.url, environ=azure_vault.environ)
    await direct.prepare()
    with trio.fail_after(60):
        async with (
            opened(azure_vault) as store,
            Rig(tmp_path, SIZE, store=store, pace=PACE) as rig,
            rig.running(),
        ):
            for number in range(3):
                await written(rig, number)
            older = await objects(direct)
            await written(rig, 5)
            right = await objects(direct)
            await replace_all(direct, {} if which == "another" else older)
            if which == "another":
                await Vault.init(direct)
            there = await objects(direct)
            await trio.sleep(1.1)  # a vault that took a delta a moment ago is not looked at
            rig.write(9 * PAGE_SIZE, page_of(99))
            await rig.wait(lambda: rig.health.level is Level.CRITICAL, 0.02)
            assert say in str(rig.health.last_error)
            assert await objects(direct) == there
            await replace_all(direct, right)
            rig.health.retry_now()
            await rig.wait(lambda: rig.is_settled, 0.02)
            assert await rig.check() >= 5
    await direct.aclose()


async def test_a_server_that_stands_still_is_waited_for(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    """It takes connections and answers nothing; guests write on, and nothing is sent twice."""
    expect_log("disk web01: ")
    with run_azurite() as azurite, trio.fail_after(60):
        vault = AzureVault("stopped", "vault", azurite.environ(), azurite)
        async with (
            opened(vault) as store,
            Rig(tmp_path, SIZE, store=store, pace=PACE) as rig,
            rig.running(),
        ):
            await written(rig, 0)
            os.kill(azurite.pid, signal.SIGSTOP)
            try:
                before = rig.replicator.stored.epoch
                for number in range(1, 5):
                    rig.write(number * PAGE_SIZE, page_of(number))
                    await trio.sleep(0.1)
                await rig.wait(lambda: rig.health.level is not Level.NORMAL, 0.02)
                assert rig.health.next_retry_s is not None
                assert rig.replicator.lag_s() > 0
                assert rig.replicator.stored.epoch == before
            finally:
                os.kill(azurite.pid, signal.SIGCONT)
            rig.health.retry_now()
            await rig.wait(lambda: rig.is_settled, 0.02)
            assert rig.health.level is Level.NORMAL
            assert await rig.check() >= 3
