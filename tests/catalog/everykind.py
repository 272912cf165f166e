"""A vault with an object of every kind that there is, plain or encrypted, for tests that flip bits.

The kinds are those of vdiskfs-format(5), "Objects": what is new there is missing here until it is
made. That the page has what the code writes is looked at, too.
"""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import vdiskfs
from tests.catalog.harness import Bench, bench
from tests.catalog.memory import MemoryStore
from tests.catalog.test_thinning import Site
from vdiskfs.catalog import SiteRecord
from vdiskfs.catalog.garbage import CLOCK, CLOCK_DOCUMENT
from vdiskfs.catalog.groups import Group, GroupDisk, create_group
from vdiskfs.catalog.leases import Lease
from vdiskfs.catalog.ledger import JOIN_LEVEL, LEAF_LEVEL
from vdiskfs.catalog.policy import changed_policy, set_policy
from vdiskfs.catalog.proofs import Proof, write_proof
from vdiskfs.failover.bootblocks import write_boot
from vdiskfs.machines import Machine, MachineDisk, write_machine
from vdiskfs.store import Store

_CODE = Path(vdiskfs.__file__).parent
_PAGE = _CODE.parent / "man/vdiskfs-format.5"
_JOINED = "disks/DISK/gGENERATION.LEVEL/FROM-TO.REVISION"
# Nothing is in them that is read again, or (data/) they are sealed nowhere: tests/catalog/test_split.py.
_WITHOUT = {"data/vault.json", "probes/ID", "probe-ID"}
# What begins like the name of an object and is none: a directory of the mount, a program's name.
_NO_OBJECTS = {"failovers", "vdiskfs"}


def _documented() -> dict[str, re.Pattern[str]]:
    """Return what matches the names of each kind that the page has."""
    page = _PAGE.read_text()
    text = page[page.index(".SH OBJECTS") : page.index(".PP", page.index(".SH OBJECTS"))]
    found = {}
    for line in re.findall(r"^\.TP\n\.IR? (.+)$", text, re.MULTILINE):
        for shape in re.sub(r'[",]', " ", line).replace("\\-", "-").split():
            parts = re.split(r"([A-Z]+)", shape)
            found[shape] = re.compile(
                "".join("[^/.]+" if part.isupper() else re.escape(part) for part in parts)
            )
    return found


_SHAPES = _documented()
KINDS = (set(_SHAPES) - _WITHOUT - {_JOINED}) | {
    "joined slots", "joined leaves", "leaf",
}  # fmt: skip
"""What there is, by the shapes of names; of joined deltas there are three."""

BULK = (
    "disks/DISK/gGENERATION/FROM",
    "joined slots",
    "joined leaves",
    "leaf",
    "segments/DISK/SEGMENT",
)


def kind_of(name: str) -> str:
    """Return what kind of object has a name."""
    (shape,) = (shape for shape, pattern in _SHAPES.items() if pattern.fullmatch(name))
    if shape != _JOINED:
        return shape
    level = int(name.split("/")[2].partition(".")[2])
    return {JOIN_LEVEL: "joined leaves", LEAF_LEVEL: "leaf"}.get(level, "joined slots")


def unknown_prefixes() -> set[str]:
    """Return what names begin with in the code, and none does on the page."""
    code = "\n".join(path.read_text() for path in _CODE.rglob("*.py"))
    found = set(re.findall(r"[\"']([a-z]+)/(?:[\"']|\{)", code))
    return found - {shape.partition("/")[0] for shape in _SHAPES} - _NO_OBJECTS


@dataclass
class Filled:
    """The vault: ``raw`` has the objects as they lie there, ``left`` are the points."""

    bench: Bench
    raw: MemoryStore
    left: list[int]

    @property
    def store(self) -> Store:
        """Return the store that has the objects under their own names."""
        return self.bench.vault.store

    async def kinds(self) -> dict[str, list[str]]:
        """Return the names of all objects, by kind."""
        found: dict[str, list[str]] = {}
        for name in sorted([info.name async for info in self.store.list("")]):
            found.setdefault(kind_of(name), []).append(name)
        return found


@asynccontextmanager
async def every_kind(directory: Path) -> AsyncIterator[Filled]:
    """Make a line that was thinned and collected and has grown since, and all documents."""
    async with bench() as test:
        vault, disk, store = test.vault, test.record, test.vault.store
        # Of the line below the horizon there are leaves and a join over them, and a segment.
        test.model.writer_options = {"inline_limit": 40_000}
        site = Site(replace(test, store=store), directory, random.Random(7))  # type: ignore[arg-type]
        await site.publish(290)
        await site.thin()
        assert await site.collect() > 0
        test.model.write(0, random.Random(8).randbytes(90_000))
        await site.publish(17)
        other = await vault.create_disk("db01", file="db01.img", size=1 << 20, site="here")
        disks = (GroupDisk(disk.id, "web01"), GroupDisk(other.id, "db01"))
        await create_group(store, Group("shop", "e" * 32, "now", disks))
        await vault.write_site(SiteRecord("here", "h", "now", "1", (disk.id,), 1, "now", "c" * 32))
        await write_boot(store, disk.id, [(0, 5), (9, 1)])
        await set_policy(store, "gold", lambda one: changed_policy(one, {"retention": "1m for 1h"}))
        await write_machine(store, Machine("web01", 1 << 30, (MachineDisk("web01"),)), etag=None)
        proof = Proof("hashed", "pass", "Größe", "2026-11-22T04:00:00Z", 1.5, "here")
        await write_proof(store, disk.id, (1, test.model.epoch), proof)
        lease = Lease(((disk.id, 1, test.model.epoch),), "restore", "h", 1, "now")
        await store.create(f"leases/{'f' * 32}.json", lease.encode())
        await store.create(CLOCK, CLOCK_DOCUMENT)
        yield Filled(test, test.store, await site.check())
