"""A vault written by version 0.1.0 is read for ever, and bad objects stay refused.

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
from vdiskfs.delta.local import open_file
from vdiskfs.errors import FormatError

GOLDEN = Path(__file__).parent.parent / "golden"
SAID = json.loads((GOLDEN / "vault-1.json").read_text())
BAD = sorted((GOLDEN / "bad").iterdir())


def golden_store(*, metadata: bool) -> MemoryStore:
    store = MemoryStore()
    root = GOLDEN / "vault-1"
    for path in sorted(root.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(root))
            store.put(name, path.read_bytes(), SAID["metadata"].get(name, {}) if metadata else {})
    return store


@pytest.mark.parametrize("metadata", [True, False])
async def test_the_golden_vault_is_read(metadata: bool) -> None:
    vault = await Vault.open(golden_store(metadata=metadata))
    disk = await vault.find_disk("web01")
    assert disk.id == SAID["disk"]
    log = vault.log(disk)
    tip = await log.tip()
    assert (tip.digest.hex(), tip.epoch, tip.fenced) == (SAID["tip"], 18, True)
    points = await log.points()
    assert len(points) == len(SAID["points"]) == 18
    for point in points:
        said = SAID["points"][str(point.epoch)]
        async with await log.open(point) as reader:
            data = await content(reader)
        assert {
            "sha256": hashlib.sha256(data).hexdigest(), "size": point.size, "time": point.time,
            "label": point.label, "consistency": point.consistency,
            "changed": point.changed_bytes, "stored": point.stored_bytes,
        } == said  # fmt: skip


async def test_the_golden_vault_is_whole() -> None:
    report = await check(await Vault.open(golden_store(metadata=True)), read_data=True)
    assert report.ok
    assert (report.points, report.joined, report.segments) == (18, 1, 1)


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
