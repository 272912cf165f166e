"""The retry table, against a real vault: Azurite behind the fault proxy, and a folder.

The clock is the test's own and stands still unless the test moves it; requests take real time.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
from azure.storage.blob import BlobServiceClient, ContainerClient
from trio.testing import MockClock

from tests.azurite import AzureVault
from tests.e2e.loopdev import file_system, make_image
from tests.replicate.rig import Rig, page_of
from tests.store.proxy import Fault, FaultProxy
from vdiskfs.health import Level
from vdiskfs.store import Store, open_store
from vdiskfs.store.account import Account
from vdiskfs.store.azure import AzureStore
from vdiskfs.store.retry import RetryingStore, RetryPolicy
from vdiskfs.stride import Pace

SIZE = 1 << 20
PACE = Pace(1.0, 64 << 20, 1)
MINUTES = (1, 2, 4, 8, 10, 30, 30)
"""What the issue says, as it says it."""

EVER = 1 << 30
AWAY = (
    Fault("answer", "*", count=EVER, status=503),
    Fault("answer", "*", count=EVER, status=429),
    Fault("answer", "*", count=EVER, status=500),
    Fault("answer", "*", count=EVER, status=408),
    Fault("reset", "*", count=EVER),
)


def refusal(status: int, code: str) -> Fault:
    return Fault("answer", "*", count=EVER, status=status, headers={"x-ms-error-code": code})


REFUSED = (
    refusal(403, "AuthenticationFailed"),  # the wrong key
    refusal(403, "AuthorizationPermissionMismatch"),
    refusal(401, "InvalidAuthenticationInfo"),
    refusal(404, "ContainerNotFound"),
)


BROKEN = {"container": "vault.gone", "tip": "vault.wrong", "slot": "chain.damaged"}


async def at_once(_: float) -> None:
    await trio.lowlevel.checkpoint()


@contextlib.asynccontextmanager
async def behind(vault: AzureVault, proxy: FaultProxy) -> AsyncIterator[Store]:
    """Open the vault's store through the proxy; blips are tried again without a wait."""
    account = Account.from_environ(vault.azurite.environ(proxy.port))
    inner = AzureStore(account, vault.container, vault.prefix)
    try:
        yield RetryingStore(inner, RetryPolicy(sleep=at_once))
    finally:
        proxy.hang_up()
        await inner.aclose()


class Scene:
    """A running disk, and the hands of its clock."""

    def __init__(self, rig: Rig, clock: MockClock) -> None:
        self.rig = rig
        self.health = rig.health
        self.health._chance = lambda: 0.5  # the middle: no jitter
        self.clock = clock
        self._page = 0

    async def really(self, is_true: Callable[[], object], *, step_s: float = 0.0) -> None:
        """Wait in real time, while the clock goes on by so much each time."""
        end = time.monotonic() + 60
        while not is_true():
            assert time.monotonic() < end, (self.health.level, self.health.last_error)
            await trio.to_thread.run_sync(time.sleep, 0.005)
            if not is_true():
                self.clock.jump(step_s)

    async def settled(self) -> None:
        await self.really(lambda: self.rig.is_settled, step_s=0.5)

    def write(self) -> None:
        self._page += 1
        self.rig.write(self._page * 4096, page_of(self._page))

    async def fails(self) -> None:
        """Write, and wait until that failed."""
        self.write()
        await self.really(lambda: self.health._troubles, step_s=0.5)

    async def waits(self) -> float:
        """Wait until the next try is counted down; return the seconds."""
        await self.really(lambda: self.health.next_retry_s)
        assert self.health.next_retry_s is not None
        return self.health.next_retry_s


@contextlib.asynccontextmanager
async def scene_on(tmp_path: Path, clock: MockClock, store: Store) -> AsyncIterator[Scene]:
    """Give a disk whose first point is in the vault."""
    async with Rig(tmp_path, SIZE, store=store, pace=PACE) as rig, rig.running():
        scene = Scene(rig, clock)
        scene.write()
        await scene.settled()
        # A vault that took a delta a moment ago is not looked at.
        clock.jump(2)
        yield scene


@pytest.mark.azurite
@pytest.mark.parametrize("fault", AWAY, ids=lambda fault: f"{fault.kind}-{fault.status}")
async def test_what_time_may_mend_is_tried_again_at_exactly_the_times_of_the_table(
    azure_vault: AzureVault, tmp_path: Path, mock_clock: MockClock, fault: Fault,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    """1, 2, 4, 8, 10, 30, 30 minutes; the countdown is seen; then the vault is back."""
    for minutes in MINUTES:
        expect_log(rf"uploading: .*next try in {60 * minutes} s")
    with FaultProxy(azure_vault.azurite.port) as proxy:
        async with (
            behind(azure_vault, proxy) as store,
            scene_on(tmp_path, mock_clock, store) as scene,
        ):
            armed = proxy.add(Fault(**{**vars(fault), "fired": 0}))
            await scene.fails()
            waits = []
            for _ in MINUTES:
                waits.append(round(await scene.waits(), 6))
                assert scene.health.level is Level.WARNING
                assert list(scene.health.conditions()) == ["vault.away"]
                fired = armed.fired
                mock_clock.jump(waits[-1] - 1)
                await trio.testing.wait_all_tasks_blocked()
                assert scene.health.next_retry_s == pytest.approx(1)
                assert armed.fired == fired > 0
                mock_clock.jump(1)
                await scene.really(lambda: armed.fired > fired)
            assert waits == [60 * minutes for minutes in MINUTES]
            await scene.waits()
            proxy.clear()
            assert scene.health.retry_now()
            await scene.settled()
            assert scene.health.errors["vault.away"] == len(MINUTES) + 1
            assert await scene.rig.check() >= 2


@pytest.mark.azurite
@pytest.mark.parametrize("fault", REFUSED, ids=lambda fault: fault.headers["x-ms-error-code"])
async def test_what_time_does_not_mend_is_critical_at_once_and_not_tried_again(
    azure_vault: AzureVault, tmp_path: Path, mock_clock: MockClock, fault: Fault,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    """A year passes without a request; `disk retry` after mending works."""
    expect_log("will not be tried again by itself")
    with FaultProxy(azure_vault.azurite.port) as proxy:
        async with (
            behind(azure_vault, proxy) as store,
            scene_on(tmp_path, mock_clock, store) as scene,
        ):
            armed = proxy.add(Fault(**{**vars(fault), "fired": 0}))
            await scene.fails()
            code = "vault.gone" if fault.status == 404 else "vault.refused"
            assert await stands_still(scene, proxy) == code
            assert armed.fired > 0
            # Asked for in vain it stands still again.
            assert scene.health.retry_now()
            await scene.really(lambda: scene.health.errors[code] == 2)
            assert await stands_still(scene, proxy) == code
            proxy.clear()
            assert scene.health.retry_now()
            await scene.settled()
            assert await scene.rig.check() >= 2


async def stands_still(scene: Scene, proxy: FaultProxy | None = None) -> str:
    """Check that it is Critical and asks for nothing any more; return the condition's code."""
    await scene.really(lambda: scene.health.level is Level.CRITICAL)
    seen, requests = len(proxy.seen) if proxy else 0, scene.rig.store.requests
    for _ in range(12):
        scene.clock.jump(30 * 86400)
        scene.health.vault_answers()
        await trio.testing.wait_all_tasks_blocked()
    assert scene.health.next_retry_s is None
    assert scene.rig.store.requests == requests
    assert proxy is None or len(proxy.seen) == seen
    assert "vdiskfs disk retry web01" in str(scene.health.last_error)
    [code] = scene.health.conditions()
    return code


def container_of(vault: AzureVault) -> ContainerClient:
    text = vault.environ["AZURE_STORAGE_CONNECTION_STRING"]
    return BlobServiceClient.from_connection_string(text).get_container_client(vault.container)


def take_all(container: ContainerClient) -> list[tuple[str, bytes, dict[str, str]]]:
    return [
        (blob.name, container.download_blob(blob.name).readall(), dict(blob.metadata or {}))
        for blob in container.list_blobs(include=["metadata"])
    ]


@pytest.mark.azurite
@pytest.mark.parametrize("what", BROKEN)
async def test_a_container_that_is_deleted_and_a_chain_that_is_broken_wait_for_mending(
    azure_vault: AzureVault, tmp_path: Path, mock_clock: MockClock, what: str,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    """The container, the newest delta, or rubbish where the next delta belongs."""
    expect_log("will not be tried again by itself")
    with container_of(azure_vault) as container, FaultProxy(azure_vault.azurite.port) as proxy:
        async with (
            behind(azure_vault, proxy) as store,
            scene_on(tmp_path, mock_clock, store) as scene,
        ):
            kept = await trio.to_thread.run_sync(take_all, container)
            [tip] = [name for name, _, _ in kept if "/g00000001/" in name]
            following = f"{tip.rpartition('/')[0]}/{scene.rig.replicator.stored.epoch:016x}"
            if what == "container":
                container.delete_container()
            elif what == "tip":
                container.delete_blob(tip)
            else:
                container.upload_blob(following, b"rubbish")
            await scene.fails()
            assert await stands_still(scene, proxy) == BROKEN[what]
            if what == "container":
                container.create_container()
                for name, data, metadata in kept:
                    container.upload_blob(name, data, metadata=metadata)
            elif what == "tip":
                _, data, metadata = next(one for one in kept if one[0] == tip)
                container.upload_blob(tip, data, metadata=metadata)
            else:
                container.delete_blob(following)
            assert scene.health.retry_now()
            await scene.settled()
            assert await scene.rig.check() >= 2


@pytest.mark.root
@pytest.mark.parametrize("what", ["full", "read-only"])
async def test_a_folder_that_is_full_is_tried_again_and_one_that_refuses_is_not(
    tmp_path: Path, mock_clock: MockClock, what: str, expect_log: Callable[[str], None]
) -> None:
    image, folder = tmp_path / "vault.img", tmp_path / "vaults"
    make_image(image, 8 << 20)
    with file_system("ext4", image, folder):
        store = open_store(f"file://{folder}/vault")
        async with scene_on(tmp_path, mock_clock, store) as scene:
            if what == "full":
                for minutes in MINUTES:
                    expect_log(f"No space left .*next try in {60 * minutes} s")
                filler = folder / "filler"
                with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                    while file.write(bytes(1024)):
                        pass
                await scene.fails()
                for minutes in MINUTES:
                    assert await scene.waits() == pytest.approx(60 * minutes)
                    tries = scene.health.retries
                    mock_clock.jump(60 * minutes)
                    await scene.really(lambda: scene.health.retries > tries)
                assert scene.health.level is Level.WARNING
                filler.unlink()
            else:
                expect_log("will not be tried again by itself")
                subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
                await scene.fails()
                assert await stands_still(scene) == "vault.refused"
                subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
            assert scene.health.retry_now()
            await scene.settled()
            assert await scene.rig.check() >= 2
        await store.aclose()
