"""Every bit counts in a plain vault, too: a flipped one is named by the check, and never believed.

120 flips by default; VDISKFS_FLIPS=10000 for the long form, VDISKFS_SEED for the same ones again.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import vaults
from tests.catalog.everykind import BULK, KINDS, Filled, every_kind, kind_of, unknown_prefixes
from tests.catalog.harness import content_at
from vdiskfs.catalog import CheckReport, Vault, check
from vdiskfs.catalog.documents import decode_document, encode_document
from vdiskfs.errors import DamagedError, FormatError

FLIPS = int(os.environ.get("VDISKFS_FLIPS", "120"))


@dataclass
class Target:
    """A plain vault with objects of all kinds, and flips in them."""

    vault: Filled
    rng: random.Random

    def flip(self, name: str) -> Callable[[], None]:
        """Flip a bit somewhere; return what flips it back."""
        objects = self.vault.raw.objects
        data, metadata, etag = objects[name]
        place = self.rng.randrange(len(data) * 8)
        wrong = bytearray(data)
        wrong[place // 8] ^= 1 << place % 8
        objects[name] = (bytes(wrong), metadata, etag)

        def back() -> None:
            objects[name] = (data, metadata, etag)

        return back

    async def check(self) -> CheckReport:
        return await check(await Vault.open(self.vault.raw), read_data=True)


@asynccontextmanager
async def target(directory: Path, tell: Callable[[str], None]) -> AsyncIterator[Target]:
    """Make the vault; the flips of a seed are the same ones."""
    seed = int(os.environ.get("VDISKFS_SEED", random.randrange(1 << 30)))
    tell(f"flipped bits, VDISKFS_SEED={seed}")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(vaults.VARIABLE, raising=False)
        async with every_kind(directory) as filled:
            yield Target(filled, random.Random(seed))


def test_the_page_has_the_kinds_that_the_code_writes() -> None:
    assert not unknown_prefixes()


@pytest.mark.timeout(max(300, FLIPS))
async def test_the_check_names_the_object_of_each_flipped_bit(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    counts: Counter[str] = Counter()
    async with target(tmp_path, tell) as one:
        kinds = await one.vault.kinds()
        assert set(kinds) == KINDS
        assert (await one.check()).ok
        for _ in range(FLIPS):
            name = one.rng.choice(kinds[one.rng.choice(sorted(kinds))])
            back = one.flip(name)
            if name == "vault.json":
                with pytest.raises(FormatError):
                    await one.check()
            else:
                assert name in [problem.object for problem in (await one.check()).problems]
            back()
            counts[kind_of(name)] += 1
    assert sum(counts.values()) == FLIPS
    tell(f"{FLIPS} bits flipped and detected: {dict(sorted(counts.items()))}")


async def test_a_point_behind_a_flipped_bit_is_right_or_refused(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """And each one in a frame that a point needs is refused: a check says so, not luck."""
    refused = 0
    async with target(tmp_path, tell) as one:
        vault, kinds = one.vault, await one.vault.kinds()
        bulk = [name for kind in BULK for name in kinds[kind]]
        for _ in range(150):
            back = one.flip(one.rng.choice(bulk))
            fresh = await Vault.open(vault.raw)
            log = fresh.log(await fresh.disk(vault.bench.record.id))
            epoch = one.rng.choice(vault.left)
            try:
                assert await content_at(log, epoch) == vault.bench.model.states[epoch]
            except DamagedError:
                refused += 1
            back()
    assert 5 < refused < 150


def test_no_bit_of_a_document_can_be_flipped() -> None:
    values = {"format": 2, "name": "Größe \x1f", "list": [1.5e-7, None, True, {"a": 0}], "z": ""}
    data = encode_document(values)
    assert decode_document(data, where="x") == values
    for bit in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError, match="^x: "):
            decode_document(bytes(wrong), where="x")


@pytest.mark.parametrize("data", [b'{"format": 1, "a": 5}', b'{"a": 5}'])
def test_documents_of_version_1_had_no_check(data: bytes) -> None:
    assert decode_document(data, where="x")["a"] == 5
    with pytest.raises(FormatError, match="damaged"):
        decode_document(
            data.replace(b'"a"', b'"format": 2, "a"').replace(b'"format": 1, ', b""), where="x"
        )
