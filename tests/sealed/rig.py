"""An encrypted vault in memory with objects of all kinds, for tests that attack it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from tests import vaults
from tests.catalog.harness import Bench, bench
from tests.catalog.memory import MemoryStore
from vdiskfs.catalog import DiskRecord, Owner, SiteRecord, Vault
from vdiskfs.catalog.groups import Group, GroupDisk, create_group
from vdiskfs.crypto import Secrets
from vdiskfs.failover.bootblocks import write_boot
from vdiskfs.sealed import SealedStore, Seen

LABEL = "before-the-secret-upgrade"
NAMES = ("web01", "db01", "secretgroup", "hiddensite", "hiddenhost")
PAGE_TEXT = b"a page that nobody else may read "
KEY = Secrets(file_key=vaults.FILE_KEY)


@dataclass
class Target:
    """A vault that is attacked through ``raw``, and looked at by fresh eyes."""

    bench: Bench
    raw: MemoryStore
    other: DiskRecord

    @property
    def disk(self) -> str:
        return self.bench.record.id

    @property
    def sealed(self) -> SealedStore:
        assert isinstance(self.bench.vault.store, SealedStore)
        return self.bench.vault.store

    async def fresh(self, seen: Seen | None = None) -> Vault:
        """Open it as somebody who knows nothing but the key, or what was ``seen``."""
        given = (lambda _: seen) if seen is not None else None
        return await Vault.open(self.raw, KEY, seen=given)

    def named(self, part: str) -> list[str]:
        """Return the names in the store that have a part, sorted."""
        return sorted(name for name in self.raw.objects if part in name)


@asynccontextmanager
async def target(epochs: int = 34) -> AsyncIterator[Target]:
    """Make slots, joined deltas, segments, documents of all kinds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(vaults.VARIABLE, "encrypted")
        async with bench() as test:
            test.model.write(0, PAGE_TEXT * 3000)
            await test.publish()
            rng = random.Random(7)
            test.model.writer_options = {"inline_limit": 40_000, "segment_limit": 100_000}
            test.model.write(0, rng.randbytes(400_000))
            test.model.write(500_000, PAGE_TEXT * 3000)
            await test.publish(label=LABEL)
            await test.churn(epochs - 2, pages=60)
            vault = test.vault
            other = await vault.create_disk(
                "db01", file="db01.img", size=1 << 20, site="hiddensite",
                owner=Owner("hiddensite", "c" * 32, "d" * 32, "now"),
            )  # fmt: skip
            disks = (GroupDisk(test.record.id, "web01"), GroupDisk(other.id, "db01"))
            await create_group(vault.store, Group("secretgroup", "e" * 32, "now", disks))
            await vault.write_site(
                SiteRecord("hiddensite", "hiddenhost", "now", "1", (other.id,), 1, "now", "c" * 32)
            )
            await write_boot(vault.store, other.id, [(0, 5), (9, 1)])
            yield Target(test, test.store, other)
