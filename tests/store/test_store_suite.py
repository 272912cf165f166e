"""What every store does: a folder, Azure Blob Storage (Azurite) and the one in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.azurite import AzureVault
from tests.store.memory import MemoryStore
from vdiskfs.crypto import new_data_key
from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    DamagedError,
    LocalError,
    NotFoundError,
)
from vdiskfs.sealed import SealedStore
from vdiskfs.store import ObjectInfo, Store, open_store
from vdiskfs.store.retry import RetryingStore
from vdiskfs.store.split import SplitStore

KINDS = [
    "local",
    "memory",
    "retrying",
    "sealed",
    "sealed-local",
    "split",
    pytest.param("azure", marks=pytest.mark.azurite),
]
KEY = new_data_key("5" * 32)
NAME = "disks/0a/g00000001/0000000000000000"


@pytest.fixture(params=KINDS)
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Give what opens one and the same store, as often as it is called."""
    memory = MemoryStore()
    memory.exists = False
    if request.param == "memory":
        return lambda: memory
    if request.param == "retrying":
        return lambda: RetryingStore(memory)
    if request.param == "sealed":
        return lambda: SealedStore(memory, KEY)
    if request.param == "sealed-local":
        return lambda: SealedStore(open_store(f"file://{tmp_path}/vault"), KEY)
    if request.param == "split":
        return lambda: SplitStore(
            open_store(f"file://{tmp_path}/vault"), open_store(f"file://{tmp_path}/control")
        )
    if request.param == "local":
        return lambda: open_store(f"file://{tmp_path}/vault")
    vault: AzureVault = request.getfixturevalue("azure_vault")
    return lambda: open_store(vault.url, environ=vault.environ)


@pytest.fixture
async def store(make_store: Callable[[], Store]) -> AsyncIterator[Store]:
    store = make_store()
    await store.prepare()
    yield store
    await store.aclose()


async def names(store: Store, prefix: str) -> list[str]:
    return [info.name async for info in store.list(prefix)]


async def test_what_was_created_is_read_back(store: Store) -> None:
    etag = await store.create(NAME, b"bytes", metadata={"time": "17", "flags": "a b=c,d"})
    data, info = await store.read(NAME)
    assert data == b"bytes"
    assert (info.name, info.size, info.etag) == (NAME, 5, etag)
    assert info.metadata == {"time": "17", "flags": "a b=c,d"}
    assert await store.stat(NAME) == info
    assert [item async for item in store.list("disks/")] == [info]


async def test_any_buffer_can_be_stored(store: Store) -> None:
    whole = bytearray(range(256)) * 300
    await store.create("a/array", whole)
    await store.create("a/view", memoryview(whole)[100:70000])
    assert (await store.read("a/array"))[0] == whole
    assert (await store.read("a/view"))[0] == whole[100:70000]


async def test_an_object_may_be_empty(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    await store.create("a/one", b"")
    await store.create_from_file("a/two", tmp_path / "empty")
    for name in ("a/one", "a/two"):
        data, info = await store.read(name)
        assert (data, info.size) == (b"", 0)
        with pytest.raises(DamagedError):
            await store.read_range(name, 0, 1)


async def test_a_name_is_created_once(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"third")
    etag = await store.create(NAME, b"first")
    with pytest.raises(AlreadyExistsError):
        await store.create(NAME, b"second")
    with pytest.raises(AlreadyExistsError):
        await store.create_from_file(NAME, tmp_path / "file")
    data, info = await store.read(NAME)
    assert (data, info.etag) == (b"first", etag)


async def test_a_file_is_stored_as_its_bytes(store: Store, tmp_path: Path) -> None:
    content = bytes(range(256)) * 12_345
    (tmp_path / "file").write_bytes(content)
    etag = await store.create_from_file("segments/x", tmp_path / "file", metadata={"kind": "s"})
    data, info = await store.read("segments/x")
    assert data == content
    assert (info.etag, info.metadata) == (etag, {"kind": "s"})


async def test_a_file_that_cannot_be_read_is_a_local_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="absent"):
        await store.create_from_file("a/b", tmp_path / "absent")
    assert await names(store, "") == []


async def test_replace_needs_the_current_etag(store: Store) -> None:
    first = await store.create("vault.json", b"1")
    second = await store.replace("vault.json", b"22", etag=first, metadata={"k": "v"})
    with pytest.raises(ConflictError):
        await store.replace("vault.json", b"333", etag=first)
    data, info = await store.read("vault.json")
    assert (data, info.etag, info.metadata) == (b"22", second, {"k": "v"})


async def test_replace_without_an_etag_creates(store: Store) -> None:
    etag = await store.replace("a/b", b"1", etag=None)
    assert (await store.stat("a/b")).etag == etag
    with pytest.raises(ConflictError):
        await store.replace("a/b", b"2", etag=None)


async def test_what_is_absent_is_not_replaced(store: Store) -> None:
    etag = await store.create("a/b", b"1")
    with pytest.raises(ConflictError):
        await store.replace("a/c", b"1", etag=etag)
    with pytest.raises(ConflictError):
        await store.replace("other/c", b"1", etag=etag)
    assert await names(store, "") == ["a/b"]


async def test_no_two_versions_have_one_etag(store: Store) -> None:
    """Also of the same bytes, at once, and over a deletion."""
    etags = [await store.create("a/b", b"same")]
    for _ in range(10):
        etags.append(await store.replace("a/b", b"same", etag=etags[-1]))
    await store.delete("a/b")
    etags.append(await store.create("a/b", b"same"))
    assert len(set(etags)) == len(etags)
    with pytest.raises(ConflictError):
        await store.replace("a/b", b"other", etag=etags[0])


async def test_what_was_deleted_is_absent(store: Store) -> None:
    await store.create("a/b", b"1")
    await store.delete("a/b")
    for call in (store.delete, store.stat, store.read):
        with pytest.raises(NotFoundError):
            await call("a/b")
    with pytest.raises(NotFoundError):
        await store.read_range("a/b", 0, 1)
    assert await names(store, "") == []


async def test_an_object_larger_than_the_limit_is_not_read(store: Store) -> None:
    await store.create("a/b", bytes(1000))
    with pytest.raises(DamagedError, match=r"10\d\d bytes"):
        await store.read("a/b", limit=999)
    assert len((await store.read("a/b", limit=1000))[0]) == 1000


async def test_a_range_is_exact_or_an_error(store: Store) -> None:
    content = bytes(range(256)) * 1000
    await store.create("a/b", content)
    for offset, length in ((0, 1), (255, 70_000), (255_999, 1), (0, 256_000)):
        assert await store.read_range("a/b", offset, length) == content[offset : offset + length]
    for offset, length in ((255_999, 2), (256_000, 1), (1 << 40, 1), (0, 256_001)):
        with pytest.raises(DamagedError, match="ends before"):
            await store.read_range("a/b", offset, length)


async def test_a_range_of_nothing_needs_no_request(store: Store) -> None:
    before = store.requests
    assert await store.read_range("a/b", 5, 0) == b""
    assert store.requests == before


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (1 << 62, 1 << 62)])
async def test_a_range_must_be_one(store: Store, offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="range"):
        await store.read_range("a/b", offset, length)


async def test_a_listing_is_sorted_by_whole_names(store: Store) -> None:
    made = ["a-b", "a.b", "a/b", "a/b-c", "a/c/d", "a0", "a0/x-", "ab", "b", "names/%2e.json"]
    made.remove("a0")  # a folder cannot hold a0 and a0/x
    for name in reversed(made):
        await store.create(name, name.encode(), metadata={"name": name})
    assert await names(store, "") == sorted(made)
    for prefix in ("a", "a/", "a/b", "a/c/", "a0/x", "b", "c", "a/b/c", "names/%"):
        expected = sorted(name for name in made if name.startswith(prefix))
        found = [info async for info in store.list(prefix)]
        assert [info.name for info in found] == expected
        assert all(info.metadata == {"name": info.name} for info in found)


async def test_a_listing_may_be_left_early(store: Store) -> None:
    for index in range(5):
        await store.create(f"a/{index}", b"")
    async for info in store.list("a/"):
        assert info.name == "a/0"
        break


BAD_NAMES = ["", "/a", "a/", "a//b", "..", "a/../b", "a/..", ".", "a/./b", ".hidden", "a\0b"]
BAD_NAMES += ["a b", "ä", "a\\b", "a?b", "x" * 256, "a/" * 600 + "a", "a\n"]


@pytest.mark.parametrize("name", BAD_NAMES)
async def test_a_name_that_reaches_out_is_refused(store: Store, name: str) -> None:
    before = store.requests
    for call in (store.stat, store.read, store.delete):
        with pytest.raises(DamagedError):
            await call(name)
    with pytest.raises(DamagedError):
        await store.create(name, b"")
    with pytest.raises(DamagedError):
        await store.replace(name, b"", etag="x")
    with pytest.raises(DamagedError):
        await store.read_range(name, 0, 1)
    assert store.requests == before


@pytest.mark.parametrize("prefix", ["/", "../", "a/../b", "a//", "a b", "./", ".vdiskfs/"])
def test_a_prefix_that_reaches_out_is_refused(make_store: Callable[[], Store], prefix: str) -> None:
    with pytest.raises(DamagedError):
        make_store().list(prefix)


BAD_METADATA: list[Mapping[str, str]] = [
    {"Key": "v"},
    {"a_b": "v"},
    {"k": ""},
    {"k": " v"},
    {"k": "ü"},
    {"k": "a\nb"},
    {"k": "x" * 3000},
]


@pytest.mark.parametrize("metadata", BAD_METADATA)
async def test_metadata_is_plain_ascii(store: Store, metadata: Mapping[str, str]) -> None:
    with pytest.raises(ValueError, match="metadata"):
        await store.create("a/b", b"", metadata=MappingProxyType(metadata))
    assert await names(store, "") == []


async def test_a_store_that_is_not_there_says_so(make_store: Callable[[], Store]) -> None:
    store = make_store()
    for call in (store.stat, store.read, store.delete):
        with pytest.raises(NotFoundError):
            await call("vault.json")
    with pytest.raises(NotFoundError):
        await store.create("vault.json", b"")
    with pytest.raises(NotFoundError):
        await names(store, "")
    await store.prepare()
    await store.prepare()
    await store.create("vault.json", b"")
    assert await names(store, "") == ["vault.json"]
    await store.aclose()


async def race(calls: list[Callable[[], object]]) -> list[object]:
    """Run them at once; return what each returned, or the StateError it raised."""
    results: list[object] = [None] * len(calls)

    async def run(index: int) -> None:
        try:
            results[index] = await calls[index]()  # type: ignore[misc]
        except (AlreadyExistsError, ConflictError) as error:
            results[index] = error

    async with trio.open_nursery() as nursery:
        for index in range(len(calls)):
            nursery.start_soon(run, index)
    return results


async def test_of_eight_creators_one_wins(store: Store, make_store: Callable[[], Store]) -> None:
    """Each with a store of its own, as processes have."""
    stores = [make_store() for _ in range(8)]
    for turn in range(5):
        name = f"race/{turn}"
        calls = [lambda i=i, name=name: stores[i].create(name, bytes([i]) * 2000) for i in range(8)]
        results = await race(calls)  # type: ignore[arg-type]
        winners = [i for i, result in enumerate(results) if isinstance(result, str)]
        assert len(winners) == 1
        data, info = await store.read(name)
        assert (data, info.etag) == (bytes(winners) * 2000, results[winners[0]])
    for each in stores:
        await each.aclose()


async def test_of_eight_replacers_one_wins(store: Store, make_store: Callable[[], Store]) -> None:
    stores = [make_store() for _ in range(8)]
    etag = await store.create("disk.json", b"")
    for _ in range(5):
        calls = [
            lambda i=i, etag=etag: stores[i].replace("disk.json", bytes([i]) * 2000, etag=etag)
            for i in range(8)
        ]
        results = await race(calls)  # type: ignore[arg-type]
        winners = [i for i, result in enumerate(results) if isinstance(result, str)]
        assert len(winners) == 1
        data, info = await store.read("disk.json")
        assert (data, info.etag) == (bytes(winners) * 2000, results[winners[0]])
        etag = info.etag
    for each in stores:
        await each.aclose()


async def test_counters_count(store: Store) -> None:
    requests, sent, received = store.requests, store.bytes_sent, store.bytes_received
    await store.create("a/b", bytes(1000))
    size = 1000 if not isinstance(store, SealedStore) else 1000 + 72 + 5  # a block, its name
    assert store.bytes_sent == sent + size
    await store.read("a/b")
    await store.read_range("a/b", 0, 10)
    # Of a sealed object no less than a block can be read.
    assert store.bytes_received == received + size + (10 if size == 1000 else size)
    assert store.requests > requests


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["create", "replace", "stale", "delete", "read", "list"]),
        st.sampled_from(["a", "b/c", "b/d", "b-", "x/y/z"]),
        st.binary(max_size=40),
    ),
    max_size=25,
)


@given(operations=OPERATIONS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_store_is_a_dictionary(
    make_store: Callable[[], Store], operations: list[tuple[str, str, bytes]]
) -> None:
    store = make_store()
    await store.prepare()
    model: dict[str, tuple[bytes, str]] = {}
    for operation, name, data in operations:
        await step(store, model, operation, name, data)
    found: list[ObjectInfo] = [info async for info in store.list("")]
    assert {i.name: (i.size, i.etag) for i in found} == {
        name: (len(data), etag) for name, (data, etag) in model.items()
    }
    for info in found:
        await store.delete(info.name)
    await store.aclose()


async def step(
    store: Store, model: dict[str, tuple[bytes, str]], operation: str, name: str, data: bytes
) -> None:
    """Do one thing to the store and to the dictionary."""
    held = model.get(name)
    if operation == "create" and held is None:
        model[name] = (data, await store.create(name, data))
    elif operation == "create":
        with pytest.raises(AlreadyExistsError):
            await store.create(name, data)
    elif operation == "replace":
        model[name] = (data, await store.replace(name, data, etag=held[1] if held else None))
    elif operation == "stale":
        with pytest.raises(ConflictError):
            await store.replace(name, data, etag="0x8D0" if held else "1-1")
    elif operation == "list":
        expected = sorted(other for other in model if other.startswith(name[0]))
        assert await names(store, name[0]) == expected
    elif held is None:
        with pytest.raises(NotFoundError):
            await (store.read(name) if operation == "read" else store.delete(name))
    elif operation == "read":
        found, info = await store.read(name)
        assert (found, info.etag) == held
    else:
        await store.delete(name)
        del model[name]
