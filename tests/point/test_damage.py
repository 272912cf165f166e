"""Damage gives the right bytes or an error that names it: never other bytes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import zstandard

from tests.catalog.harness import Bench, bench, content_at, is_joined, is_slot
from tests.vaults import PLAIN
from vdiskfs.errors import DamagedError, NotFoundError

FILLER = bytes(512)


async def small(test: Bench, epochs: int = 18) -> list[str]:
    """Fill a vault with a few small deltas and one join; return the names of all objects."""
    rng = random.Random(11)
    for epoch in range(epochs):
        page = rng.randrange(8)
        test.model.write(page * 4096, bytes([epoch + 1]) * 4096)
        if epoch % 5 == 2:
            test.model.discard(rng.randrange(8) * 4096, 4096)
        if epoch % 7 == 3:
            test.model.truncate(rng.randrange(3, 8) * 4096 + 100)
            test.model.write(5 * 4096, b"grown")
        await test.publish()
        await test.log.publish_joins()
    return sorted(name for name in test.store.objects if is_slot(name) or is_joined(name))


async def right_or_damaged(test: Bench, epochs: list[int], name: str) -> int:
    """Read points; return how many were damaged. An error names the object."""
    damaged = 0
    for epoch in epochs:
        try:
            found = await content_at(test.fresh_log(), epoch)
        except (DamagedError, NotFoundError) as error:
            assert name.rsplit("/", 1)[0] in str(error) or "no point" in str(error), error
            damaged += 1
        else:
            assert found == test.model.states[epoch], (name, epoch)
    return damaged


@pytest.mark.parametrize("kind", ["slot", "joined"])
async def test_every_flipped_byte_gives_right_bytes_or_an_error(kind: str) -> None:
    """Each byte of a slot, and of a joined delta, with metadata and without it."""
    async with bench() as test:
        for half in (1, 2):
            for page in range(8):
                test.model.write(page * 4096, bytes([half, page]) * 2048)
            test.model.discard(half * 4096, 4096)
            # Two deltas of eight epochs each make a block: few objects, so that this is fast.
            await test.publish(span=8)
        assert await test.log.publish_joins() == 1
        test.model.write(0, b"after")
        await test.publish()
        names = sorted(test.store.objects)
        name = [n for n in names if (is_joined(n) if kind == "joined" else is_slot(n))][-1]
        data, metadata, _ = test.store.objects[name]
        fired = 0
        for index in range(len(data)):
            flipped = bytearray(data)
            flipped[index] ^= 1 << index % 8
            test.store.put(name, bytes(flipped), metadata if index % 2 else {})
            fired += await right_or_damaged(test, [17], name)
        test.store.put(name, data, metadata)
        assert await right_or_damaged(test, [8, 16, 17], name) == 0
        # A joined delta is gone round; a slot is not, and every byte of it counts.
        # (A bit or two of a compressed frame mean nothing.)
        assert fired == 0 if kind == "joined" else len(data) - 4 <= fired <= len(data)


async def test_every_truncation_gives_right_bytes_or_an_error() -> None:
    async with bench() as test:
        names = await small(test)
        for name in (names[0], names[-1], names[-3]):
            data, metadata, _ = test.store.objects[name]
            for length in [*range(0, len(data), 7), len(data) - 1]:
                test.store.put(name, data[:length], metadata if length % 2 else {})
                await right_or_damaged(test, [2, 16, 18], name)
            for extra in (b"\0", FILLER):
                test.store.put(name, data + extra, metadata)
                await right_or_damaged(test, [2, 16, 18], name)
            test.store.put(name, data, metadata)


async def test_every_object_missing_or_swapped_gives_right_bytes_or_an_error() -> None:
    """Each object deleted, and each put in each other's place, metadata and all."""
    async with bench() as test:
        names = await small(test)
        objects = dict(test.store.objects)
        for name in names:
            del test.store.objects[name]
            await right_or_damaged(test, [1, 7, 16, 17, 18], name)
            for other in names:
                if other != name:
                    test.store.objects[name] = objects[other]
                    await right_or_damaged(test, [7, 18], name)
            test.store.objects[name] = objects[name]


async def test_an_object_of_an_older_state_is_found_out() -> None:
    """A slot of another history of the same disk does not fit the chain."""
    async with bench() as test:
        names = [name for name in await small(test) if is_slot(name)]
        objects = dict(test.store.objects)
        async with bench() as other:
            other.model.ids = test.model.ids
            ids: dict[str, Any] = dict(test.model.ids)
            other.model.digest = type(test.model)(test.model.spool, **ids).digest
            for epoch in range(18):
                other.model.write(0, bytes([99 - epoch]) * 4096)
                spooled = other.model.seal()
                name = names[0].rsplit("/", 1)[0] + f"/{epoch:016x}"
                assert name in objects
                test.store.put(name, spooled.path.read_bytes())
                assert await right_or_damaged(test, [18, epoch + 1], name) >= 1
                test.store.objects[name] = objects[name]


@pytest.mark.parametrize("seed", range(8))
async def test_random_damage_gives_right_bytes_or_an_error(seed: int) -> None:
    """Several objects at once: flips, cuts, losses, swaps, at random."""
    rng = random.Random(seed)
    async with bench() as test:
        test.model.writer_options = {"inline_limit": 20_000, "segment_limit": 40_000}
        await test.churn(70, seed=seed, pages=60)
        names = [name for name in test.store.objects if not name.endswith(".json")]
        objects = dict(test.store.objects)
        for _ in range(12):
            for name in rng.sample(names, rng.choice([1, 1, 2, 4])):
                data, metadata, _ = objects[name]
                kind = rng.randrange(5)
                if kind == 0:
                    del test.store.objects[name]
                elif kind == 1:
                    test.store.put(name, data[: rng.randrange(len(data))], metadata)
                elif kind == 2:
                    test.store.objects[name] = objects[rng.choice(names)]
                else:
                    flipped = bytearray(data)
                    flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                    test.store.put(name, bytes(flipped), metadata)
            for epoch in rng.sample(range(1, 71), 4):
                try:
                    found = await content_at(test.fresh_log(), epoch)
                except (DamagedError, NotFoundError):
                    continue
                assert found == test.model.states[epoch]
            test.store.objects = dict(objects)


async def test_a_joined_delta_damaged_while_a_point_is_open_is_gone_round() -> None:
    """Blocks are read when they are needed: the chain is changed under the reader then."""
    async with bench() as test:
        await test.churn(40, pages=400)
        log = test.fresh_log()
        reader = await log.open(40)
        for name in [name for name in test.store.objects if is_joined(name)]:
            del test.store.objects[name]
        for piece in reader._pieces:
            piece._tail, piece._tail_at = b"", piece.head.object_size
        got = bytes(await reader.read_pages(0, reader.pages))[: reader.size]
        assert got == test.model.states[40]
        assert reader.objects > 20


@PLAIN
async def test_a_bit_of_a_frame_that_means_nothing_is_checked_too() -> None:
    """Zstd ignores one bit of a frame's descriptor: the pages would be right, and are refused."""
    async with bench() as test:
        test.model.write(5 * 4096, b"text " * 4000)
        await test.publish()
        name = next(name for name in test.store.objects if is_slot(name))
        data, metadata, _ = test.store.objects[name]
        wrong = bytearray(data)
        wrong[512 + 4] ^= 0x10
        frame = zstandard.ZstdDecompressor().decompress(bytes(wrong[512:]), allow_extra_data=True)
        assert frame[: 5 * 4096] == test.model.states[1][5 * 4096 :].ljust(5 * 4096, b"\0")
        test.store.put(name, bytes(wrong), metadata)
        with pytest.raises(DamagedError, match=f"{name}: page 5 is damaged"):
            await content_at(test.fresh_log(), 1)
