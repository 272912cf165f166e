"""Azure Blob Storage through faults, in front of Azurite. Each test proves that its fault fired."""

from __future__ import annotations

import base64
import gc
import logging
import time
import traceback
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.azurite import ACCOUNT, KEY, AzureVault
from tests.store.proxy import Fault, FaultProxy
from tests.store.signatures import sas, sas_environ
from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    NotFoundError,
    RefusedError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.store import Store, open_store
from vdiskfs.store.account import Account
from vdiskfs.store.azure import AzureStore, Timeouts
from vdiskfs.store.retry import RetryingStore, RetryPolicy

DATA = bytes(range(256)) * 40


@pytest.fixture
def proxy(azure_vault: AzureVault) -> Iterator[FaultProxy]:
    with FaultProxy(azure_vault.azurite.port) as running:
        yield running


@pytest.fixture
def waits() -> list[float]:
    """The waits between tries, which are not waited for."""
    return []


Make = Callable[..., RetryingStore]


@pytest.fixture
async def make_store(
    azure_vault: AzureVault, proxy: FaultProxy, waits: list[float]
) -> AsyncIterator[Make]:
    """Give what opens the vault through the proxy."""
    made: list[AzureStore] = []

    async def wait(delay: float) -> None:
        waits.append(delay)
        await trio.lowlevel.checkpoint()

    def make(
        *,
        sleep: Callable[[float], Awaitable[None]] = wait,
        environ: dict[str, str] | None = None,
        **arguments: Any,
    ) -> RetryingStore:
        account = Account.from_environ(environ or azure_vault.azurite.environ(proxy.port))
        inner = AzureStore(account, azure_vault.container, azure_vault.prefix, **arguments)
        made.append(inner)
        return RetryingStore(inner, RetryPolicy(sleep=sleep))

    yield make
    proxy.hang_up()
    for store in made:
        with trio.fail_after(10):
            # Of tasks that left: each ends by itself.
            while store._threads.borrowed_tokens:  # noqa: ASYNC110 - threads set no event
                await trio.sleep(0.01)
        await store.aclose()
    gc.collect()


@pytest.fixture
async def direct(azure_vault: AzureVault) -> AsyncIterator[Store]:
    """Give the same vault, without the proxy, prepared."""
    store = open_store(azure_vault.url, environ=azure_vault.environ)
    await store.prepare()
    yield store
    await store.aclose()


# ---- answers that say: not now -------------------------------------------------------


async def test_a_burst_of_503_is_waited_out_as_asked(
    make_store: Make, proxy: FaultProxy, direct: Store, waits: list[float]
) -> None:
    fault = proxy.add(Fault("answer", "PUT", count=3, headers={"Retry-After": "2"}))
    await make_store().create("a/b", DATA)
    assert fault.fired == 3
    assert len(waits) == 3
    assert all(2 <= wait < 3 for wait in waits)
    assert (await direct.read("a/b"))[0] == DATA


async def test_429_with_a_date_is_waited_out(
    make_store: Make, proxy: FaultProxy, direct: Store, waits: list[float]
) -> None:
    await direct.create("a/b", DATA)
    later = {"Retry-After": formatdate(time.time() + 5, usegmt=True)}
    fault = proxy.add(Fault("answer", "GET", status=429, headers=later))
    assert (await make_store().read("a/b"))[0] == DATA
    assert fault.fired == 1
    assert 3 < waits[0] < 6


async def test_a_vault_that_stays_away_is_unreachable(
    make_store: Make, proxy: FaultProxy, direct: Store, waits: list[float]
) -> None:
    fault = proxy.add(Fault("answer", "*", count=1000, headers={"Retry-After": "1"}))
    with pytest.raises(VaultUnreachableError) as raised:
        await make_store().stat("a/b")
    assert raised.value.retry_after_s == 1
    assert fault.fired == len(waits) + 1
    assert 10 < sum(waits) <= 15


async def test_nobody_listening_is_unreachable(make_store: Make, direct: Store) -> None:
    with FaultProxy(1) as gone:
        port = gone.port
    environ = {
        "AZURE_STORAGE_CONNECTION_STRING": f"AccountName={ACCOUNT};AccountKey={KEY};"
        f"BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT}"
    }
    with pytest.raises(VaultUnreachableError, match="no connection"):
        await make_store(environ=environ).read("a/b")


async def test_a_name_that_is_not_known_says_so(make_store: Make) -> None:
    environ = {"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_KEY": KEY}
    environ["AZURE_STORAGE_BLOB_ENDPOINT"] = "https://acc.blob.invalid"
    with pytest.raises(VaultUnreachableError, match="check the account's name"):
        await make_store(environ=environ).read("a/b")


# ---- connections that end ------------------------------------------------------------

Call = Callable[[RetryingStore, str, Path], Awaitable[Any]]
CALLS: dict[str, tuple[str, Call]] = {
    "create": ("PUT", lambda store, etag, path: store.create("a/new", DATA, metadata={"k": "v"})),
    "create_from_file": ("PUT", lambda store, etag, path: store.create_from_file("a/new", path)),
    "replace": ("PUT", lambda store, etag, path: store.replace("a/old", DATA, etag=etag)),
    "delete": ("DELETE", lambda store, etag, path: store.delete("a/old")),
    "read": ("GET", lambda store, etag, path: store.read("a/old")),
    "read_range": ("GET", lambda store, etag, path: store.read_range("a/old", 10, 100)),
    "stat": ("HEAD", lambda store, etag, path: store.stat("a/old")),
    "list": ("GET", lambda store, etag, path: anext(store.list("a/"))),
}


@pytest.mark.parametrize("kind", ["reset", "drop-reply", "half-upload"])
@pytest.mark.parametrize("name", list(CALLS))
async def test_a_lost_connection_is_not_noticed(
    make_store: Make, proxy: FaultProxy, direct: Store, tmp_path: Path, *, name: str, kind: Any
) -> None:
    """Before it was applied, after it was, or with half of it sent."""
    (tmp_path / "file").write_bytes(DATA)
    etag = await direct.create("a/old", b"before" * 50)
    method, call = CALLS[name]
    fault = proxy.add(Fault(kind, method))
    result = await call(make_store(), etag, tmp_path / "file")
    assert fault.fired == 1
    target = {"create": "a/new", "create_from_file": "a/new", "replace": "a/old"}.get(name)
    if target:
        data, info = await direct.read(target)
        assert (data, info.etag) == (DATA, result)
    if name == "delete":
        with pytest.raises(NotFoundError):
            await direct.stat("a/old")
    if name == "read_range":
        assert result == (b"before" * 50)[10:110]


async def test_our_lost_try_is_not_taken_for_another_writer_s_success(
    make_store: Make, proxy: FaultProxy, direct: Store
) -> None:
    """Our first try never arrived; somebody else created the name before our second."""
    fault = proxy.add(Fault("reset", "PUT"))

    async def meanwhile(_: float) -> None:
        await direct.create("a/new", DATA)

    with pytest.raises(AlreadyExistsError):
        await make_store(sleep=meanwhile).create("a/new", DATA)
    assert fault.fired == 1


async def test_our_lost_swap_is_not_taken_for_another_writer_s(
    make_store: Make, proxy: FaultProxy, direct: Store
) -> None:
    etag = await direct.create("a/old", b"1")
    fault = proxy.add(Fault("reset", "PUT"))

    async def meanwhile(_: float) -> None:
        await direct.replace("a/old", DATA, etag=etag)

    with pytest.raises(ConflictError):
        await make_store(sleep=meanwhile).replace("a/old", DATA, etag=etag)
    assert fault.fired == 1


async def test_a_truncated_answer_is_asked_for_again(
    make_store: Make, proxy: FaultProxy, direct: Store
) -> None:
    await direct.create("a/b", DATA)
    fault = proxy.add(Fault("truncate", "GET", count=2))
    assert (await make_store().read("a/b"))[0] == DATA
    assert fault.fired == 2


async def test_a_truncated_listing_is_asked_for_again(
    make_store: Make, proxy: FaultProxy, direct: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vdiskfs.store.azure._PAGE_OBJECTS", 2)
    expected = [f"a/{index}" for index in range(7)]
    for name in expected:
        await direct.create(name, b"")
    fault = proxy.add(Fault("truncate", "GET", path="comp=list", skip=1, count=2))
    store = make_store()
    assert [info.name async for info in store.list("a/")] == expected
    assert fault.fired == 2
    assert store.requests == 4 + 2


async def test_a_flipped_bit_arrives_as_it_is(
    make_store: Make, proxy: FaultProxy, direct: Store
) -> None:
    """Why objects carry digests: the length is right, and nothing here can tell."""
    await direct.create("a/b", DATA)
    fault = proxy.add(Fault("flip", "GET"))
    data = await make_store().read_range("a/b", 0, len(DATA))
    assert fault.fired == 1
    assert sum(a != b for a, b in zip(data, DATA, strict=True)) == 1


# ---- time ----------------------------------------------------------------------------

QUICK = Timeouts(connect_s=5, read_s=0.2, total_s=0.3)


@pytest.mark.parametrize(("kind", "text"), [("stall", "in time"), ("drip", "within")])
async def test_an_answer_that_does_not_end_is_given_up(
    make_store: Make, proxy: FaultProxy, direct: Store, kind: Any, text: str
) -> None:
    await direct.create("a/b", DATA)
    fault = proxy.add(Fault(kind, "GET"))
    store = make_store(timeouts=QUICK)
    assert (await store.read("a/b", limit=20_000))[0] == DATA
    assert fault.fired == 1
    proxy.add(Fault(kind, "GET", count=100))
    # The limit of what is read allows for more time, so a small one.
    with pytest.raises(VaultUnreachableError, match=text):
        await make_store(timeouts=QUICK, sleep=no_more).read_range("a/b", 0, 100)


async def no_more(_: float) -> None:
    """Let the clock pass what is left of the budget of tries."""
    raise VaultUnreachableError("the answer did not come in time, nor within the limit")


async def test_a_task_that_is_cancelled_leaves_at_once(
    make_store: Make, proxy: FaultProxy, direct: Store
) -> None:
    await direct.create("a/b", DATA)
    fault = proxy.add(Fault("stall", "GET", count=4))
    store = make_store(concurrency=2)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(store.read, "a/b")
        while fault.fired < 2:  # noqa: ASYNC110 - counted in a thread
            await trio.sleep(0.01)
        started = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - started < 2
    # The threads that are left do not stop who comes next.
    proxy.clear()
    assert (await store.read("a/b"))[0] == DATA


# ---- connections ---------------------------------------------------------------------


async def test_a_connection_is_kept(make_store: Make, proxy: FaultProxy, direct: Store) -> None:
    store = make_store()
    for index in range(10):
        await store.create(f"a/{index}", DATA)
        await store.read(f"a/{index}")
        with pytest.raises(NotFoundError):
            await store.read("a/absent")
    assert proxy.connections == 1


async def test_connections_are_bounded(make_store: Make, proxy: FaultProxy, direct: Store) -> None:
    await direct.create("a/b", DATA)
    store = make_store(concurrency=3)
    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(store.read, "a/b")
    assert proxy.connections <= 3
    assert store.requests == 30


async def test_a_large_file_is_not_held_in_memory(direct: Store, tmp_path: Path) -> None:
    size = 24 * 1024 * 1024
    with (tmp_path / "file").open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    try:
        await direct.create_from_file("segments/x", tmp_path / "file")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (await direct.stat("segments/x")).size == size
    assert peak < 4 * 1024 * 1024


async def test_a_file_that_shrinks_while_it_is_sent_is_not_stored(
    make_store: Make, direct: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(DATA)
    monkeypatch.setattr("vdiskfs.store.azure.size_of", lambda path: len(DATA) + 1)
    with pytest.raises(VdiskfsError, match="became shorter"):
        await make_store().create_from_file("a/b", tmp_path / "file")
    with pytest.raises(NotFoundError):
        await direct.stat("a/b")


# ---- who may -------------------------------------------------------------------------


async def test_a_token_that_may_create_is_enough_to_replicate(
    make_store: Make, direct: Store, proxy: FaultProxy, azure_vault: AzureVault
) -> None:
    """And the vault refuses what would destroy: so says the service, not our code."""
    store = make_store(environ=sas_environ(azure_vault, proxy.port, sas(azure_vault, "rcl")))
    await store.prepare()
    fault = proxy.add(Fault("drop-reply", "PUT"))
    etag = await store.create("a/b", DATA)
    assert fault.fired == 1
    assert [info.etag async for info in store.list("a/")] == [etag]
    with pytest.raises(AlreadyExistsError):
        await store.create("a/b", DATA)
    for call in (store.delete("a/b"), store.replace("a/b", b"", etag=etag)):
        with pytest.raises(RefusedError, match="permission"):
            await call
    assert (await direct.read("a/b"))[0] == DATA


async def refusals(make_store: Make, proxy: FaultProxy, vault: AzureVault) -> list[VdiskfsError]:
    """Collect one error of every kind that meets a credential."""
    wrong = base64.b64encode(b"wrong key, but a key").decode()
    environs = [
        {**vault.azurite.environ(proxy.port)},
        sas_environ(vault, proxy.port, sas(vault, "r", lives_s=-60)),
        sas_environ(vault, proxy.port, sas(vault, "r")),
        sas_environ(vault, 1, sas(vault, "r")),
        {
            "AZURE_STORAGE_ACCOUNT": ACCOUNT,
            "AZURE_STORAGE_KEY": wrong,
            "AZURE_STORAGE_BLOB_ENDPOINT": f"http://127.0.0.1:{proxy.port}/{ACCOUNT}",
        },
    ]
    found: list[VdiskfsError] = []
    for environ in environs:
        store = make_store(environ=environ, timeouts=QUICK)
        for kind in ("", "answer", "reset", "truncate"):
            if kind:
                proxy.add(Fault(kind, "*", count=100))  # type: ignore[arg-type]
            for call in (
                store.create("a/b", DATA),
                store.read("a/absent"),
                anext(store.list("a/")),
                store.prepare(),
            ):
                try:
                    await call
                except VdiskfsError as error:
                    found.append(error)
                except StopAsyncIteration:
                    pass
            proxy.clear()
    return found


async def test_no_error_and_no_log_line_shows_a_secret(
    make_store: Make,
    proxy: FaultProxy,
    azure_vault: AzureVault,
    direct: Store,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    errors = await refusals(make_store, proxy, azure_vault)
    kinds = {type(error) for error in errors}
    assert kinds >= {VaultUnreachableError, RefusedError, NotFoundError}
    assert len(errors) > 40
    shown = caplog.text
    for error in errors:
        shown += str(error) + repr(error) + error.hint
        shown += "".join(traceback.format_exception(error))
        # Also what `raise ... from None` would only hide.
        assert error.__context__ is None or "sig=" not in repr(error.__context__)
    assert KEY not in shown
    assert "sig=" not in shown
    assert "wrong key" not in shown
    assert base64.b64encode(b"wrong key, but a key").decode() not in shown


async def test_a_wrong_key_is_refused_with_a_hint(
    make_store: Make, proxy: FaultProxy, direct: Store
) -> None:
    environ = {
        "AZURE_STORAGE_ACCOUNT": ACCOUNT,
        "AZURE_STORAGE_KEY": base64.b64encode(b"wrong").decode(),
        "AZURE_STORAGE_BLOB_ENDPOINT": f"http://127.0.0.1:{proxy.port}/{ACCOUNT}",
    }
    for call in ("prepare", "stat"):
        store = make_store(environ=environ)
        with pytest.raises(RefusedError, match="check AZURE_STORAGE_KEY") as raised:
            await (store.prepare() if call == "prepare" else store.stat("a/b"))
        assert raised.value.exit_code == 7


async def test_an_absent_container_says_how_to_make_it(make_store: Make) -> None:
    with pytest.raises(NotFoundError, match=r"there is no container .*vdiskfs vault init"):
        await make_store().stat("vault.json")


async def test_a_redirection_is_not_followed(
    make_store: Make, proxy: FaultProxy, direct: Store
) -> None:
    location = {"Location": "http://127.0.0.1:1/elsewhere"}
    fault = proxy.add(Fault("answer", "GET", status=302, headers=location))
    with pytest.raises(RefusedError, match="status 302"):
        await make_store().read("a/b")
    assert fault.fired == 1


async def test_a_clock_that_is_wrong_is_named(
    make_store: Make, proxy: FaultProxy, direct: Store
) -> None:
    headers = {
        "x-ms-error-code": "AuthenticationFailed",
        "Date": formatdate(time.time() - 7200, usegmt=True),
    }
    proxy.add(Fault("answer", "GET", status=403, headers=headers))
    with pytest.raises(RefusedError, match=r"clock and the vault's differ by 7[12]"):
        await make_store().read("a/b")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (409, "BlobImmutableDueToPolicy", RefusedError),
        (412, "LeaseIdMissing", RefusedError),
        (409, "ContainerBeingDeleted", VaultUnreachableError),
        (400, "InvalidHeaderValue", RefusedError),
        (500, "InternalError", VaultUnreachableError),
        (408, "OperationTimedOut", VaultUnreachableError),
    ],
)
async def test_other_answers_are_not_taken_for_a_lost_race(
    make_store: Make,
    proxy: FaultProxy,
    direct: Store,
    *,
    status: int,
    code: str,
    kind: type[VdiskfsError],
) -> None:
    fault = proxy.add(
        Fault("answer", "PUT", status=status, count=100, headers={"x-ms-error-code": code})
    )
    with pytest.raises(kind, match=code):
        await make_store().create("a/b", DATA)
    assert fault.fired >= 1
