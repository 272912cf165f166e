"""A vault of each version of the format is read for ever, and bad objects stay refused.

The files of tests/golden were written once. They are never regenerated: if this fails,
the program has changed what it understands.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.catalog.harness import content
from tests.catalog.memory import MemoryStore
from vdiskfs.catalog import Vault, check
from vdiskfs.delta import open_spooled
from vdiskfs.delta.joined import write_joined
from vdiskfs.delta.layout import VERSIONS, decode_head
from vdiskfs.delta.local import open_file
from vdiskfs.delta.names import parse_joined, parse_slot
from vdiskfs.delta.rehead import rehead
from vdiskfs.errors import FormatError

GOLDEN = Path(__file__).parent.parent / "golden"
SAID = {version: json.loads((GOLDEN / f"vault-{version}.json").read_text()) for version in VERSIONS}
BAD = sorted((GOLDEN / "bad").iterdir())


def golden_store(version: int, *, metadata: bool) -> MemoryStore:
    store = MemoryStore()
    root = GOLDEN / f"vault-{version}"
    for path in sorted(root.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(root))
            beside = SAID[version]["metadata"].get(name, {}) if metadata else {}
            store.put(name, path.read_bytes(), beside)
    return store


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
async def test_the_golden_vault_is_read(version: int, metadata: bool) -> None:
    await read_golden(version, golden_store(version, metadata=metadata))


async def read_golden(version: int, store: MemoryStore) -> None:
    vault, all_said = await Vault.open(store), SAID[version]
    disk = await vault.find_disk("web01")
    assert disk.id == all_said["disk"]
    log = vault.log(disk)
    tip = await log.tip()
    assert (tip.digest.hex(), tip.epoch, tip.fenced) == (all_said["tip"], 18, True)
    points = await log.points()
    assert len(points) == len(all_said["points"]) == 18
    for point in points:
        said = all_said["points"][str(point.epoch)]
        async with await log.open(point) as reader:
            data = await content(reader)
        assert {
            "sha256": hashlib.sha256(data).hexdigest(), "size": point.size, "time": point.time,
            "label": point.label, "consistency": point.consistency,
            "changed": point.changed_bytes, "stored": point.stored_bytes,
        } == said  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
async def test_the_golden_vault_is_whole(version: int) -> None:
    report = await check(await Vault.open(golden_store(version, metadata=True)), read_data=True)
    assert report.ok
    assert (report.points, report.joined, report.segments) == (18, 1, 1)


async def test_old_deltas_are_joined_into_new_ones(tmp_path: Path) -> None:
    """Their frames have no checks, and the joined delta says so: they are read as before."""
    store = golden_store(1, metadata=False)
    names = sorted(name for name in store.objects if parse_slot(name) is not None)
    slots = [open_file(GOLDEN / "vault-1" / name) for name in names[:16]]
    assert {delta.head.version for delta in slots} == {1}
    path, head = write_joined(slots, 1, tmp_path)
    assert head.version == 2
    for entries in open_file(path).entries():
        assert not entries.checked.any()
        assert entries.packed.any()
    (joined,) = (name for name in store.objects if parse_joined(name) is not None)
    assert decode_head(store.objects[joined][0][:512]).content_digest == head.content_digest
    store.put(joined, path.read_bytes())
    await read_golden(1, store)
    assert (await check(await Vault.open(store), read_data=True)).ok


def test_an_old_delta_keeps_its_version_in_another_generation(tmp_path: Path) -> None:
    name = min((GOLDEN / "vault-1").rglob("g00000001/*"))
    moved = rehead(open_spooled(name), 2, bytes(32), tmp_path)
    delta = open_file(moved.path)
    assert (delta.head.version, delta.head.generation) == (1, 2)
    assert list(delta.entries())


def test_a_forged_delta_that_does_not_lie_is_read() -> None:
    delta = open_file(GOLDEN / "forged-whole.delta")
    assert sum(len(entries) for entries in delta.entries()) == 1
    assert delta.zeros().page_count == 5


@pytest.mark.parametrize("path", BAD, ids=[path.stem for path in BAD])
def test_every_bad_delta_is_refused(path: Path) -> None:
    with pytest.raises(FormatError):
        delta = open_file(path)
        delta.zeros(), delta.points()
        list(delta.entries())
