"""Every bit counts in a plain vault, too: a flipped one is named by the check, and never believed.

120 flips by default; VDISKFS_FLIPS=10000 for the long form, VDISKFS_SEED for the same ones again.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import vaults
from tests.catalog.harness import Bench, bench, content_at
from tests.catalog.test_thinning import Site
from vdiskfs.catalog import CheckReport, SiteRecord, Vault, check
from vdiskfs.catalog.documents import decode_document, encode_document
from vdiskfs.catalog.garbage import CLOCK, CLOCK_DOCUMENT
from vdiskfs.catalog.groups import Group, GroupDisk, create_group
from vdiskfs.catalog.policy import changed_policy, set_policy
from vdiskfs.catalog.proofs import Proof, write_proof
from vdiskfs.errors import DamagedError, FormatError
from vdiskfs.failover.bootblocks import write_boot
from vdiskfs.machines import Machine, MachineDisk, write_machine

FLIPS = int(os.environ.get("VDISKFS_FLIPS", "120"))
KINDS = {
    "vault.json", "clock.json", "names", "sites", "boot", "groups", "policies", "machines",
    "record", "proofs", "ledger", "slot", "joined delta", "join of leaves", "leaf", "segments",
}  # fmt: skip


def kind_of(name: str) -> str:
    if found := re.fullmatch(r"disks/[^/]*/g[0-9a-f]{8}(?:\.([a-z0-9]+))?/.*", name):
        kinds = {None: "slot", "ledger": "ledger", "8": "join of leaves", "9": "leaf"}
        return kinds.get(found[1], "joined delta")
    if name.startswith("disks/"):
        return "record" if name.endswith("disk.json") else "proofs"
    return name.partition("/")[0]


@dataclass
class Target:
    """A plain vault with objects of all kinds, and flips in them."""

    bench: Bench
    left: list[int]
    rng: random.Random

    def flip(self, name: str) -> Callable[[], None]:
        """Flip a bit somewhere; return what flips it back."""
        objects = self.bench.store.objects
        data, metadata, etag = objects[name]
        place = self.rng.randrange(len(data) * 8)
        wrong = bytearray(data)
        wrong[place // 8] ^= 1 << place % 8
        objects[name] = (bytes(wrong), metadata, etag)

        def back() -> None:
            objects[name] = (data, metadata, etag)

        return back

    def kinds(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in sorted(self.bench.store.objects):
            found.setdefault(kind_of(name), []).append(name)
        return found

    async def check(self) -> CheckReport:
        return await check(await Vault.open(self.bench.store), read_data=True)


@asynccontextmanager
async def target(directory: Path, tell: Callable[[str], None]) -> AsyncIterator[Target]:
    """Make a line that was thinned and collected and has grown since, and all documents."""
    seed = int(os.environ.get("VDISKFS_SEED", random.randrange(1 << 30)))
    tell(f"flipped bits, VDISKFS_SEED={seed}")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(vaults.VARIABLE, raising=False)
        async with bench() as test:
            # Of the line below the horizon there are leaves and a join over them, and a segment.
            test.model.writer_options = {"inline_limit": 40_000}
            site = Site(test, directory, random.Random(7))
            await site.publish(290)
            await site.thin()
            assert await site.collect() > 0
            test.model.write(0, random.Random(8).randbytes(90_000))
            await site.publish(17)
            store, vault, disk = test.store, test.vault, test.record
            other = await vault.create_disk("db01", file="db01.img", size=1 << 20, site="here")
            disks = (GroupDisk(disk.id, "web01"), GroupDisk(other.id, "db01"))
            await create_group(store, Group("shop", "e" * 32, "now", disks))
            await vault.write_site(SiteRecord("here", "h", "now", "1", (disk.id,), 1, "now"))
            await write_boot(store, disk.id, [(0, 5), (9, 1)])
            await set_policy(
                store, "gold", lambda one: changed_policy(one, {"retention": "1m for 1h"})
            )
            await write_machine(
                store, Machine("web01", 1 << 30, (MachineDisk("web01"),)), etag=None
            )
            proof = Proof("hashed", "pass", "Größe", "2026-11-22T04:00:00Z", 1.5, "here")
            await write_proof(store, disk.id, (1, test.model.epoch), proof)
            store.put(CLOCK, CLOCK_DOCUMENT)
            yield Target(test, await site.check(), random.Random(seed))


async def test_the_check_names_the_object_of_each_flipped_bit(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    counts: Counter[str] = Counter()
    async with target(tmp_path, tell) as one:
        kinds = one.kinds()
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
        bulk = [name for kind in ("slot", "joined delta", "join of leaves", "leaf", "segments")
                for name in one.kinds()[kind]]  # fmt: skip
        for _ in range(150):
            back = one.flip(one.rng.choice(bulk))
            vault = await Vault.open(one.bench.store)
            log = vault.log(await vault.disk(one.bench.record.id))
            epoch = one.rng.choice(one.left)
            try:
                assert await content_at(log, epoch) == one.bench.model.states[epoch]
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
