"""A vault that is bad: throttling, cut connections, lost answers, wrong ETags; another vault.

Through the fault proxy in front of Azurite, one disk without a mount. Every test proves
that each of its faults has fired, by count, and that nothing unreadable is left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.azurite import AzureVault
from tests.replicate.rig import Rig, page_of
from tests.store.proxy import Fault, FaultProxy, Kind
from vdiskfs.catalog import SiteRecord, Vault
from vdiskfs.errors import DamagedError, NotFoundError, WrongVaultError
from vdiskfs.health import Level
from vdiskfs.store import Store, open_store
from vdiskfs.store.account import Account
from vdiskfs.store.azure import AzureStore, Timeouts
from vdiskfs.store.retry import RetryingStore, RetryPolicy
from vdiskfs.stride import Pace
from vdiskfs.units import PAGE_SIZE

SIZE = 2 << 20
PACE = Pace(0.05, 64 << 20, 1)

# Every type of object that is written: what its URL looks like.
WRITTEN = {
    "the vault": r"vault\.json",
    "a name": "/names/",
    "a disk's record": r"/disk\.json",
    "a site's record": "/sites/",
    "a segment": "/segments/",
    "a slot": r"/g00000001/[0-9a-f]{16}",
    "a joined delta": r"/g00000001\.[1-9]/",
}


@contextlib.asynccontextmanager
async def behind(
    vault: AzureVault, proxy: FaultProxy, timeouts: Timeouts = Timeouts(5.0, 1.0, 10.0)
) -> AsyncIterator[Store]:
    """Open the vault's store through the proxy; short waits, the real ones are tested apart."""
    account = Account.from_environ(vault.azurite.environ(proxy.port))
    inner = AzureStore(account, vault.container, vault.prefix, timeouts=timeouts)
    try:
        yield RetryingStore(inner, RetryPolicy(first_s=0.01, limit_s=0.1))
    finally:
        proxy.hang_up()
        while inner._threads.borrowed_tokens:  # noqa: ASYNC110 (threads set no event)
            await trio.sleep(0.01)
        await inner.aclose()


async def beat(vault: Vault, number: int) -> None:
    await vault.write_site(SiteRecord("here", "host", f"beat {number}", "1", (), 1, ""))


async def renamed(vault: Vault, rig: Rig) -> None:
    disk_id = rig.replicator.points.record.id
    await vault.update_disk(disk_id, lambda record: replace(record, file="other.img"))


@pytest.mark.azurite
@pytest.mark.parametrize("kind", ["answer", "reset", "half-upload", "drop-reply", "etag"])
async def test_each_kind_of_write_survives_each_fault(
    azure_vault: AzureVault, tmp_path: Path, kind: Kind, tell: Callable[[str], None]
) -> None:
    """A success whose answer was lost is recognised, whatever was written."""
    with FaultProxy(azure_vault.azurite.port) as proxy:
        faults = {}
        for number, (what, path) in enumerate(WRITTEN.items()):
            status, headers = ((503, {"Retry-After": "0"}), (429, {}))[number % 2]
            fault = Fault(kind, "PUT", path, count=2, status=status, headers=headers)
            faults[what] = proxy.add(fault)
        with trio.fail_after(100):
            async with behind(azure_vault, proxy) as store:
                rig = Rig(tmp_path, SIZE, store=store, pace=PACE)
                rig.image_bytes(0, b"".join(page_of(n) for n in range(64)))
                async with rig, rig.running():
                    vault = rig.vault
                    assert vault is not None
                    await renamed(vault, rig)
                    await rig.wait(lambda: rig.is_settled, 0.05)
                    for number in range(18):
                        rig.write(number * PAGE_SIZE, page_of(1000 + number))
                        await rig.wait(lambda: rig.is_settled, 0.05)
                        await beat(vault, number)
                    points = await rig.check()
        fired = {what: fault.fired for what, fault in faults.items()}
        tell(f"{kind}: fired {fired}, {points} points right")
        assert all(fired.values()), fired
        assert points >= 18


@pytest.mark.azurite
async def test_an_upload_that_nobody_takes_is_given_up_and_made_again(
    azure_vault: AzureVault, tmp_path: Path
) -> None:
    """The connection is open, and takes what its buffers hold: some MiB of a large object."""
    large = tmp_path / "large"
    with FaultProxy(azure_vault.azurite.port) as proxy, trio.fail_after(20):
        async with behind(azure_vault, proxy, Timeouts(0.5, 0.5, 1.0)) as store:
            await store.prepare()
            for size in (100, 12 << 20):
                with large.open("wb") as file:
                    file.truncate(size)
                deaf = proxy.add(Fault("deaf", "PUT", f"/deaf{size}"))
                await store.create_from_file(f"deaf{size}", large)
                assert deaf.fired == 1
                assert (await store.stat(f"deaf{size}")).size == size


@pytest.mark.azurite
@pytest.mark.parametrize("of", ["a file", "memory"])
async def test_an_upload_that_is_taken_a_few_bytes_at_a_time_arrives(
    azure_vault: AzureVault, tmp_path: Path, of: str
) -> None:
    """However long it takes as a whole: what is waited for is each next piece of it."""
    data = os.urandom(6 << 20)
    large = tmp_path / "large"
    large.write_bytes(data)
    with FaultProxy(azure_vault.azurite.port) as proxy, trio.fail_after(30):
        async with behind(azure_vault, proxy, Timeouts(1.0, 20.0, 20.0)) as store:
            await store.prepare()
            sip = proxy.add(Fault("sip", "PUT", "/sipped", bytes_per_s=2 << 20))
            if of == "memory":
                await store.create("sipped", data)
            else:
                await store.create_from_file("sipped", large)
            assert sip.fired == 1
            assert isinstance(store, RetryingStore)
            assert store.retries == 0
            assert (await store.read("sipped"))[0] == data


@pytest.mark.azurite
async def test_an_etag_or_a_length_that_lies_ends_nothing(
    azure_vault: AzureVault, tmp_path: Path
) -> None:
    """In answers to reading: the swap that follows is refused, and made again on what is there."""
    with FaultProxy(azure_vault.azurite.port) as proxy, trio.fail_after(60):
        async with (
            behind(azure_vault, proxy) as store,
            Rig(tmp_path, SIZE, store=store, pace=PACE) as rig,
            rig.running(),
        ):
            vault = rig.vault
            assert vault is not None
            for number in range(4):
                # Our own write, whose answer is lost and which is then looked at.
                faults = [
                    proxy.add(Fault("etag", "GET", r"/disk\.json")),
                    proxy.add(Fault("drop-reply", "PUT", r"/g00000001/[0-9a-f]{16}")),
                    proxy.add(Fault("etag", "HEAD", r"/g00000001/[0-9a-f]{16}")),
                ]
                rig.write(number * PAGE_SIZE, page_of(number))
                await rig.wait(lambda: rig.is_settled, 0.05)
                await renamed(vault, rig)
                assert [fault.fired for fault in faults] == [1, 1, 1], number
            lie = proxy.add(Fault("lie", "GET", "/g00000001/", count=2))
            with pytest.raises(DamagedError):
                await rig.contents()
            assert lie.fired > 0
            proxy.clear()
            assert await rig.check() >= 4


@pytest.mark.azurite
async def test_reading_back_survives_cut_and_slow_answers(
    azure_vault: AzureVault, tmp_path: Path
) -> None:
    """An answer that is cut off, or does not come, is asked for again; none is believed."""
    with FaultProxy(azure_vault.azurite.port) as proxy, trio.fail_after(100):
        async with (
            behind(azure_vault, proxy) as store,
            Rig(tmp_path, SIZE, store=store, pace=PACE) as rig,
            rig.running(),
        ):
            for number in range(8):
                rig.write(number * PAGE_SIZE, page_of(number))
                await rig.wait(lambda: rig.is_settled, 0.05)
            kinds: tuple[Kind, ...] = ("truncate", "stall", "reset", "answer")
            faults = [
                proxy.add(Fault(kind, "GET", "/g00000001", count=2, skip=2 * index))
                for index, kind in enumerate(kinds)
            ]
            await rig.check()
            assert [fault.fired for fault in faults] == [2, 2, 2, 2]
            flip = proxy.add(Fault("flip", "GET", r"/g00000001/[0-9a-f]{16}", count=1))
            with pytest.raises(DamagedError):
                await rig.contents()
            assert flip.fired == 1
            await rig.check()


# ---- another vault, or an older state of it ---------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vault"


@contextlib.asynccontextmanager
async def shipped(tmp_path: Path, folder: Path) -> AsyncIterator[Rig]:
    """Give a running disk with four points in a folder vault."""
    store = open_store(f"file://{folder}")
    try:
        async with Rig(tmp_path, SIZE, store=store, pace=PACE) as rig, rig.running():
            for number in range(4):
                rig.write(number * PAGE_SIZE, page_of(number))
                await rig.wait(lambda: rig.is_settled, 0.02)
            yield rig
    finally:
        await store.aclose()


def objects(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and ".vdiskfs" not in path.parts}


async def is_critical(rig: Rig, folder: Path, say: str) -> None:
    """The next write is not sent, and the reason is clear."""
    # A vault that took a delta a moment ago is not looked at.
    await trio.sleep(1.1)
    before = objects(folder)
    rig.write(9 * PAGE_SIZE, page_of(99))
    with trio.fail_after(20):
        await rig.wait(lambda: rig.health.level is Level.CRITICAL, 0.02)
    assert say in str(rig.health.last_error)
    assert "vdiskfs disk retry web01" in str(rig.health.last_error)
    assert rig.health.next_retry_s is None
    assert objects(folder) == before


async def given_back(rig: Rig, aside: Path, folder: Path) -> None:
    """Put the right vault back: once the user says so, all goes on."""
    shutil.rmtree(folder)
    aside.rename(folder)
    rig.health.retry_now()
    await rig.wait(lambda: rig.is_settled, 0.02)
    await rig.check()


async def test_nothing_is_sent_to_another_vault_of_the_same_name(
    tmp_path: Path, folder: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("another vault, .*, is where vault .* was")
    async with shipped(tmp_path, folder) as rig:
        folder.rename(tmp_path / "aside")
        other = open_store(f"file://{folder}")
        await Vault.init(other)
        await other.aclose()
        await is_critical(rig, folder, "another vault")
        with pytest.raises(WrongVaultError):
            assert rig.vault is not None
            await rig.vault.check_identity()
        await given_back(rig, tmp_path / "aside", folder)


async def test_nothing_is_sent_to_a_vault_that_was_rolled_back(
    tmp_path: Path, folder: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("the vault has gone back in time: it lacks epoch")
    async with shipped(tmp_path, folder) as rig:
        old = tmp_path / "old"
        shutil.copytree(folder, old)
        rig.write(5 * PAGE_SIZE, page_of(5))
        await rig.wait(lambda: rig.is_settled, 0.02)
        folder.rename(tmp_path / "aside")
        old.rename(folder)
        await is_critical(rig, folder, "gone back in time")
        await given_back(rig, tmp_path / "aside", folder)


async def test_a_vault_that_is_gone_is_not_made_anew(
    tmp_path: Path, folder: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("will not be tried again by itself")
    async with shipped(tmp_path, folder) as rig:
        folder.rename(tmp_path / "aside")
        folder.mkdir()
        await is_critical(rig, folder, "the vault is gone")
        folder.rmdir()
        (tmp_path / "aside").rename(folder)
        rig.health.retry_now()
        await rig.wait(lambda: rig.is_settled, 0.02)
        await rig.check()


async def test_the_heartbeat_leaves_another_vault_alone(tmp_path: Path, folder: Path) -> None:
    async with shipped(tmp_path, folder) as rig:
        vault = rig.vault
        assert vault is not None
        await beat(vault, 1)
        folder.rename(tmp_path / "aside")
        other = open_store(f"file://{folder}")
        await Vault.init(other)
        await other.aclose()

        async def look() -> None:
            await vault.check_identity()

        record = SiteRecord("here", "host", "now", "1", (), 1, "")
        with pytest.raises(WrongVaultError):
            await vault.write_site(record, look)
        assert not (folder / "sites").exists()
        shutil.rmtree(folder)
        with pytest.raises(NotFoundError):
            await vault.write_site(record, look)
