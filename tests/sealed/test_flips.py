"""Every bit counts: 10,000 random places of all kinds of objects, each flipped and read.

VDISKFS_FLIPS and VDISKFS_SEED as of the plain vault's, tests/catalog/test_flips.py.

And what is not right gives nothing: no byte of a block that failed, nor of its neighbours.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import vaults
from tests.catalog.everykind import KINDS, every_kind
from tests.catalog.harness import content_at
from tests.sealed.rig import KEY, target
from vdiskfs.catalog import Vault
from vdiskfs.errors import DamagedError, FormatError, KeyNeededError, RefusedError
from vdiskfs.sealed import SealedStore
from vdiskfs.sealed.blocks import BLOCK, STORED_BLOCK, Opener, Subject
from vdiskfs.sealed.names import is_bulk, stored_name

FLIPS = int(os.environ.get("VDISKFS_FLIPS", "10000"))


def flipped(data: bytes, place: int) -> bytes:
    out = bytearray(data)
    out[place // 8] ^= 1 << place % 8
    return bytes(out)


@pytest.mark.timeout(max(300, FLIPS // 100))
async def test_each_flipped_bit_is_detected(tmp_path: Path, tell: Callable[[str], None]) -> None:
    seed = int(os.environ.get("VDISKFS_SEED", "20261122"))
    rng, counts = random.Random(seed), Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(vaults.VARIABLE, "encrypted")
        async with every_kind(tmp_path) as one:
            kinds, objects = await one.kinds(), one.raw.objects
            assert set(kinds) == KINDS
            sealed = one.store
            assert isinstance(sealed, SealedStore)
            assert sum(map(len, kinds.values())) == len(objects)
            for _ in range(FLIPS):
                kind = rng.choice(sorted(kinds))
                name = rng.choice(kinds[kind])
                stored = stored_name(sealed.key, name)
                data, metadata, etag = objects[stored]
                objects[stored] = (flipped(data, rng.randrange(len(data) * 8)), metadata, etag)
                if name == "vault.json":
                    # Also where another slot, or another vault, is what it says now.
                    with pytest.raises((DamagedError, RefusedError, KeyNeededError)):
                        await Vault.open(one.raw, KEY)
                else:
                    with pytest.raises(FormatError):
                        await SealedStore(one.raw, sealed.key).read(name)
                objects[stored] = (data, metadata, etag)
                counts[kind] += 1
    assert sum(counts.values()) == FLIPS
    assert min(counts.values()) > FLIPS // (2 * len(KINDS))
    tell(f"{FLIPS} bits flipped and detected: {dict(sorted(counts.items()))}")


async def test_a_flipped_bit_beside_an_object_is_never_believed() -> None:
    """What a listing says is as it was, or nothing."""
    rng = random.Random(5)
    async with target(epochs=18) as one:
        key, raw = one.sealed.key, one.raw
        with_hints = [name for name, (_, beside, _) in raw.objects.items() if "sealed" in beside]
        for _ in range(1000):
            name = rng.choice(with_hints)
            data, metadata, etag = raw.objects[name]
            text = metadata["sealed"]
            at = rng.randrange(len(text))
            wrong = text[:at] + chr(ord(text[at]) ^ 1 << rng.randrange(7)) + text[at + 1 :]
            before = {i.etag: i async for i in SealedStore(raw, key).list("")}
            raw.objects[name] = (data, {"sealed": wrong}, etag)
            after = {i.etag: i async for i in SealedStore(raw, key).list("")}
            for found, info in after.items():
                assert info.name == before[found].name
                assert info.metadata in (before[found].metadata, {})
            raw.objects[name] = (data, metadata, etag)


async def test_a_point_with_a_flipped_bit_is_right_or_refused() -> None:
    """Read whole through the index, a damaged vault gives the disk as it was, or an error."""
    rng = random.Random(11)
    refused = 0
    async with target(epochs=18) as one:
        wanted = one.bench.model.states[18]
        bulk = [name for name in one.raw.objects if is_bulk(name)]
        for _ in range(150):
            name = rng.choice(bulk)
            data, metadata, etag = one.raw.objects[name]
            one.raw.objects[name] = (flipped(data, rng.randrange(len(data) * 8)), metadata, etag)
            vault = await one.fresh()
            try:
                assert await content_at(vault.log(one.bench.record), 18) == wanted
            except DamagedError:
                refused += 1
            one.raw.objects[name] = (data, metadata, etag)
    assert 20 < refused < 150


async def test_no_byte_comes_out_of_a_range_that_failed_anywhere() -> None:
    """A range over four blocks, one of them flipped: an error, and only whole blocks were opened."""
    async with target(epochs=2) as one:
        name = f"segments/{one.disk}/{'a' * 32}"
        data = random.Random(1).randbytes(4 * BLOCK)
        await one.sealed.create(name, data)
        sealed = one.raw.objects[name][0]
        for block in range(4):
            wrong = flipped(sealed, (block * STORED_BLOCK + 5000) * 8)
            one.raw.put(name, wrong)
            with pytest.raises(FormatError) as caught:
                await one.sealed.read_range(name, 100, 4 * BLOCK - 200)
            text = repr(caught.value.args)
            assert "does not authenticate" in text
            opener = Opener(one.sealed.key, Subject(one.sealed.key.vault_id, name))
            for number in range(4):
                part = memoryview(wrong)[number * STORED_BLOCK : (number + 1) * STORED_BLOCK]
                if number == block:
                    with pytest.raises(FormatError):
                        opener.open(number, part)
                else:
                    assert opener.open(number, part) == data[number * BLOCK : (number + 1) * BLOCK]
            # What does not touch the bad block is served all the same.
            good = (block + 1) % 4
            assert (
                await one.sealed.read_range(name, good * BLOCK, BLOCK)
                == data[good * BLOCK : (good + 1) * BLOCK]
            )
