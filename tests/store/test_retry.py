"""Trying again: how long, how often, and what a lost answer means. The clock is trio's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from tests.store.memory import MemoryStore
from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    DamagedError,
    NotFoundError,
    RefusedError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.store import Store
from vdiskfs.store.retry import NONCE, RetryingStore, RetryPolicy


async def no_wait(_: float) -> None:
    """Waits are counted by the policy, whether they are waited or not."""
    await trio.lowlevel.checkpoint()


def retrying(inner: Store) -> RetryingStore:
    return RetryingStore(inner, RetryPolicy(sleep=no_wait))


Write = Callable[[Store, str, Path], Any]
WRITES: dict[str, Write] = {
    "create": lambda store, etag, path: store.create("a/new", b"ours", metadata={"k": "v"}),
    "create_from_file": lambda store, etag, path: store.create_from_file(
        "a/new", path, metadata={"k": "v"}
    ),
    "replace": lambda store, etag, path: store.replace(
        "a/old", b"ours", etag=etag, metadata={"k": "v"}
    ),
}


@pytest.fixture(params=list(WRITES))
async def write(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[MemoryStore, str, Any]:
    """Give a store, what the write is called there, and the write of its object."""
    inner = MemoryStore()
    etag = await inner.create("a/old", b"before")
    path = tmp_path / "file"
    path.write_bytes(b"ours")
    # The memory store stores a file by create.
    method = "replace" if request.param == "replace" else "create"
    return inner, method, lambda store: WRITES[request.param](store, etag, path)


def target(method: str) -> str:
    return "a/old" if method == "replace" else "a/new"


async def test_a_blip_is_not_noticed(write: tuple[MemoryStore, str, Any]) -> None:
    inner, method, call = write
    fault = inner.fail(method, count=3)
    etag = await call(retrying(inner))
    assert fault.fired == 3
    assert inner.objects[target(method)][0] == b"ours"
    assert inner.objects[target(method)][1].etag == etag


async def test_a_write_whose_answer_was_lost_is_recognised(
    write: tuple[MemoryStore, str, Any],
) -> None:
    inner, method, call = write
    fault = inner.fail(method, after=True)
    etag = await call(retrying(inner))
    assert fault.fired == 1
    data, info = inner.objects[target(method)]
    assert (data, info.etag) == (b"ours", etag)
    assert [name for name, _ in inner.calls][-3:] == [method, method, "stat"]


async def test_it_is_recognised_through_more_trouble(write: tuple[MemoryStore, str, Any]) -> None:
    """The answer is lost, then the look at what is there fails, too."""
    inner, method, call = write
    faults = [inner.fail(method, after=True), inner.fail("stat", count=2)]
    assert await call(retrying(inner)) == inner.objects[target(method)][1].etag
    assert [fault.fired for fault in faults] == [1, 2]


async def test_another_writer_of_the_same_bytes_is_not_us(
    write: tuple[MemoryStore, str, Any],
) -> None:
    inner, method, call = write
    fault = inner.fail(method)

    async def meanwhile(_: float) -> None:
        await call(retrying(inner))

    with pytest.raises((AlreadyExistsError, ConflictError)):
        await call(RetryingStore(inner, RetryPolicy(sleep=meanwhile)))
    assert fault.fired == 1


async def test_a_conflict_at_the_first_try_costs_no_look(
    write: tuple[MemoryStore, str, Any],
) -> None:
    inner, method, call = write
    await call(inner)
    with pytest.raises((AlreadyExistsError, ConflictError)):
        await call(retrying(inner))
    assert ("stat", target(method)) not in inner.calls


async def test_an_object_that_is_gone_at_the_look_was_not_ours() -> None:
    inner = MemoryStore()
    await inner.create("a/b", b"other")
    faults = [inner.fail("create"), inner.fail("stat", NotFoundError("gone"))]
    with pytest.raises(AlreadyExistsError):
        await retrying(inner).create("a/b", b"ours")
    assert [fault.fired for fault in faults] == [1, 1]


async def test_a_deletion_whose_answer_was_lost_is_done() -> None:
    inner = MemoryStore()
    store = retrying(inner)
    await store.create("a/b", b"")
    fault = inner.fail("delete", after=True)
    await store.delete("a/b")
    assert fault.fired == 1
    with pytest.raises(NotFoundError):
        await store.delete("a/b")


async def test_reading_is_tried_again() -> None:
    inner = MemoryStore()
    store = retrying(inner)
    await store.create("a/b", b"bytes")
    faults = [inner.fail(name, count=2) for name in ("read", "read_range", "stat", "prepare")]
    assert (await store.read("a/b"))[0] == b"bytes"
    assert await store.read_range("a/b", 1, 2) == b"yt"
    assert (await store.stat("a/b")).size == 5
    await store.prepare()
    assert [fault.fired for fault in faults] == [2, 2, 2, 2]


async def test_a_listing_goes_on_where_it_failed() -> None:
    inner = MemoryStore()
    store = retrying(inner)
    expected = [f"a/{index:04}" for index in range(250)]
    for name in expected:
        await store.create(name, b"")
    found: list[str] = []
    faults = [inner.fail("list")]
    async for info in store.list("a/"):
        if len(found) in (50, 150):
            faults.append(inner.fail("list"))
        found.append(info.name)
    assert found == expected
    assert [fault.fired for fault in faults] == [1, 1, 1]
    assert [name for name, _ in inner.calls].count("list") == 3 + 3


async def test_the_nonce_is_never_seen() -> None:
    inner = MemoryStore()
    store = retrying(inner)
    await store.create("a/b", b"", metadata={"k": "v"})
    assert NONCE in inner.objects["a/b"][1].metadata
    assert (await store.stat("a/b")).metadata == {"k": "v"}
    assert (await store.read("a/b"))[1].metadata == {"k": "v"}
    assert [info.metadata async for info in store.list("")] == [{"k": "v"}]
    with pytest.raises(ValueError, match="taken"):
        await store.create("a/c", b"", metadata={NONCE: "x"})


@pytest.mark.parametrize(
    "error", [RefusedError("no"), DamagedError("bad"), NotFoundError("none"), ConflictError("late")]
)
async def test_other_errors_are_not_tried_again(error: VdiskfsError) -> None:
    inner = MemoryStore()
    fault = inner.fail("read", error, count=9)
    with pytest.raises(type(error)):
        await retrying(inner).read("a/b")
    assert fault.fired == 1


async def test_it_gives_up_within_the_budget(autojump_clock: trio.testing.MockClock) -> None:
    inner = MemoryStore()
    inner.away = True
    started = trio.current_time()
    with pytest.raises(VaultUnreachableError, match="away"):
        await RetryingStore(inner).read("a/b")
    assert 8 < trio.current_time() - started <= 15
    assert 6 <= inner.requests <= 12


async def test_a_wait_that_passes_the_budget_is_not_begun(
    autojump_clock: trio.testing.MockClock,
) -> None:
    inner = MemoryStore()
    fault = inner.fail("read", VaultUnreachableError("busy", retry_after_s=60.0), count=9)
    started = trio.current_time()
    with pytest.raises(VaultUnreachableError) as raised:
        await RetryingStore(inner).read("a/b")
    assert raised.value.retry_after_s == 60
    assert (trio.current_time(), fault.fired) == (started, 1)


async def test_tries_that_take_long_use_the_budget_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    tries = 0

    async def slow(_: int) -> None:
        nonlocal tries
        tries += 1
        await trio.sleep(20)
        raise VaultUnreachableError("slow")

    with pytest.raises(VaultUnreachableError):
        await RetryPolicy().run(slow)
    assert tries == 1


@given(st.integers(1, 60), st.floats(0, 1), st.one_of(st.none(), st.floats(0, 100)))
def test_delays_grow_to_a_limit_and_honour_what_was_asked(
    tries: int, chance: float, asked: float | None
) -> None:
    delay = RetryPolicy(jitter=lambda: chance).delay_s(tries, asked)
    step = min(4.0, 0.1 * 2.0 ** (tries - 1))
    assert delay >= step / 2
    assert delay <= max(step, (asked or 0) + step / 4)
    assert asked is None or delay >= asked


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["create", "replace", "delete"]),
        st.sampled_from(["a", "b", "c"]),
        st.lists(st.booleans(), max_size=4),
    ),
    max_size=12,
)


@given(STEPS)
async def test_one_writer_never_meets_itself(steps: list[tuple[str, str, list[bool]]]) -> None:
    """Whatever answers are lost, before or after: each call ends as if none had been."""
    inner = MemoryStore()
    store = retrying(inner)
    model: dict[str, tuple[bytes, str]] = {}
    for index, (method, name, losses) in enumerate(steps):
        data = b"%d" % index
        if (method == "create") == (name in model):
            continue
        faults = [inner.fail(method, after=after) for after in losses]
        if method == "create":
            model[name] = (data, await store.create(name, data))
        elif method == "replace":
            model[name] = (data, await store.replace(name, data, etag=model[name][1]))
        else:
            await store.delete(name)
            del model[name]
        for fault in faults:
            fault.count = 0
    assert {n: (data, info.etag) for n, (data, info) in inner.objects.items()} == model
