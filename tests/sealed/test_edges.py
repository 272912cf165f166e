"""The block between two reads of neighbouring ranges is asked for once, and opened each time."""

from __future__ import annotations

import os

import pytest

from tests.catalog.memory import MemoryStore
from vdiskfs.crypto import new_data_key
from vdiskfs.errors import FormatError
from vdiskfs.sealed import SealedStore
from vdiskfs.sealed.blocks import BLOCK, OVERHEAD, STORED_BLOCK

KEY = new_data_key("5" * 32)
SEGMENT = f"segments/{'a' * 32}/{'c' * 32}"
DOCUMENT = f"boot/{'a' * 32}.json"
DATA = os.urandom(6 * BLOCK + 777)


class Counting(MemoryStore):
    """Counts the bytes of ranges that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.read_bytes = 0

    async def read_range(self, name: str, offset: int, length: int) -> bytes:
        self.read_bytes += length
        return await super().read_range(name, offset, length)


async def sealed(name: str = SEGMENT) -> tuple[SealedStore, Counting]:
    memory = Counting()
    store = SealedStore(memory, KEY)
    await store.create(name, DATA)
    return store, memory


@pytest.mark.parametrize("step", [1000, BLOCK - 1, BLOCK, BLOCK + 5, 3 * BLOCK + 70])
async def test_what_is_read_from_end_to_end_is_asked_for_once(step: int) -> None:
    store, memory = await sealed()
    found = b"".join([
        await store.read_range(SEGMENT, at, min(step, len(DATA) - at))
        for at in range(0, len(DATA), step)
    ])  # fmt: skip
    assert found == DATA
    assert memory.read_bytes == len(DATA) + 7 * OVERHEAD


async def test_a_block_that_was_kept_is_authenticated_with_the_next_read() -> None:
    store, memory = await sealed()
    await store.read_range(SEGMENT, 0, 100)
    [key] = store._edges._blocks
    store._edges._blocks[key] = bytes(STORED_BLOCK)
    # It is asked for again, and right; and where it is wrong, that is said.
    assert await store.read_range(SEGMENT, 100, 100) == DATA[100:200]
    data = memory.objects[SEGMENT][0]
    memory.put(SEGMENT, data[:40] + bytes([data[40] ^ 1]) + data[41:])
    store._edges._blocks.clear()
    with pytest.raises(FormatError, match="does not authenticate"):
        await store.read_range(SEGMENT, 200, 100)


async def test_an_object_that_was_healed_between_two_reads_is_read() -> None:
    store, memory = await sealed()
    await store.read_range(SEGMENT, 0, BLOCK + 5)
    other = MemoryStore()
    await SealedStore(other, KEY).create(SEGMENT, DATA)
    memory.objects[SEGMENT] = other.objects[SEGMENT]  # the same bytes, sealed anew
    assert await store.read_range(SEGMENT, BLOCK + 5, 2 * BLOCK) == DATA[BLOCK + 5 : 3 * BLOCK + 5]


async def test_of_a_document_nothing_is_kept() -> None:
    store, memory = await sealed(DOCUMENT)
    await store.read_range(DOCUMENT, 0, 100)
    await store.read_range(DOCUMENT, 100, 100)
    assert memory.read_bytes == 2 * STORED_BLOCK
