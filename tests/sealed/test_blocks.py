"""What one object's blocks are bound to, with nothing above that could find it out instead."""

from __future__ import annotations

import pytest

from tests.catalog.memory import MemoryStore
from vdiskfs.crypto import new_data_key
from vdiskfs.errors import FormatError
from vdiskfs.sealed import SealedStore
from vdiskfs.sealed.blocks import BLOCK, STORED_BLOCK

KEY = new_data_key("5" * 32)
DISK = "a" * 32
SLOT = f"disks/{DISK}/g00000001/{5:016x}"
ELSEWHERE = {
    "another disk": f"disks/{'b' * 32}/g00000001/{5:016x}",
    "another generation": f"disks/{DISK}/g00000002/{5:016x}",
    "other epochs": f"disks/{DISK}/g00000001/{6:016x}",
    "another kind": f"disks/{DISK}/g00000001.0/{5:016x}-{6:016x}.0",
    "a segment": f"segments/{DISK}/{'c' * 32}",
    "a document": f"boot/{DISK}.json",
}


async def read_both_ways(store: SealedStore, name: str) -> None:
    """Read an object whole and in part: each is refused."""
    with pytest.raises(FormatError, match="does not authenticate"):
        await store.read(name)
    with pytest.raises(FormatError, match="does not authenticate"):
        await store.read_range(name, BLOCK + 5, 100)


@pytest.mark.parametrize("where", ELSEWHERE)
async def test_what_an_object_is_is_authenticated_with_its_bytes(where: str) -> None:
    memory = MemoryStore()
    store = SealedStore(memory, KEY)
    await store.create(SLOT, b"x" * 70_000)
    memory.objects[ELSEWHERE[where]] = memory.objects[SLOT]
    await read_both_ways(store, ELSEWHERE[where])


async def test_the_vault_is_authenticated_with_its_bytes() -> None:
    """With the same key, what was sealed for another vault is not this one's."""
    memory = MemoryStore()
    await SealedStore(memory, type(KEY)(KEY.secret, "6" * 32)).create(SLOT, b"x" * 70_000)
    await read_both_ways(SealedStore(memory, KEY), SLOT)


@pytest.mark.parametrize("blocks", [0, 1, 2])
async def test_an_object_that_ends_between_two_blocks_is_no_shorter_one(blocks: int) -> None:
    memory = MemoryStore()
    store = SealedStore(memory, KEY)
    await store.create(SLOT, b"x" * 70_000)
    memory.put(SLOT, memory.objects[SLOT][0][: blocks * STORED_BLOCK])
    with pytest.raises(FormatError, match="cut short"):
        await store.read(SLOT)
