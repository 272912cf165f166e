"""What is proven of points: kept, listed, and what latest-proven means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.catalog.harness import bench
from tests.catalog.test_grouppoints import NAMES, disks_of
from tests.delta.model import T0
from vdiskfs.catalog import group_points
from vdiskfs.catalog.proofs import (
    Proof,
    Proven,
    Recovery,
    list_proven,
    proof_name,
    read_proofs,
    with_proofs,
    write_proof,
    write_recovery,
)
from vdiskfs.errors import FormatError, NotFoundError
from vdiskfs.units import NS

pytestmark = pytest.mark.usefixtures("each_vault")

GOOD = Proof("hashed", "pass", "", "2026-11-22T00:00:00Z", 1.5, "here", 4096)
BAD = replace(GOOD, level="checked", outcome="fail", reason="disk (ext4) DAMAGED: block 7")


async def test_proofs_are_kept_with_a_point_and_listed_at_once() -> None:
    async with bench() as test:
        await test.churn(5)
        disk_id = test.log.record.id
        await write_proof(test.log.store, disk_id, (1, 3), GOOD)
        await write_proof(test.log.store, disk_id, (1, 3), BAD)
        await write_proof(test.log.store, disk_id, (1, 2), replace(GOOD, outcome="inconclusive"))
        assert await read_proofs(test.log.store, disk_id, (1, 3)) == [GOOD, BAD]
        assert await read_proofs(test.log.store, disk_id, (1, 4)) == []
        listed = {(1, 2): Proven("", "", "hashed"), (1, 3): Proven("hashed", "checked")}
        assert await list_proven(test.log.store, disk_id) == listed
        # A folder that was copied has lost its metadata.
        for place in listed:
            data, _, etag = test.store.objects[proof_name(disk_id, place)]
            test.store.objects[proof_name(disk_id, place)] = (data, {}, etag)
        assert await list_proven(test.log.store, disk_id) == listed
        points = await with_proofs(test.log.store, disk_id, await test.log.points())
        proofs = [one.proof for one in points]
        assert proofs == ["stored", "stored", "checked-failed", "stored", "stored"]
        # Tried once more, it passes: the last attempt at a level counts.
        await write_proof(test.log.store, disk_id, (1, 3), replace(BAD, outcome="pass", reason=""))
        points = await with_proofs(test.log.store, disk_id, await test.log.points())
        assert points[2].proof == "checked"


async def test_a_recovery_time_is_kept_beside_the_proofs() -> None:
    async with bench() as test:
        await test.churn(3)
        disk_id = test.log.record.id
        took = Recovery(12.3456, "2026-11-22T00:00:00Z", "shop", "TCP port 80: passed after 12.3 s")
        await write_recovery(test.log.store, disk_id, (1, 2), took)
        await write_proof(test.log.store, disk_id, (1, 2), GOOD)
        await write_proof(test.log.store, disk_id, (1, 3), GOOD)
        await write_recovery(test.log.store, disk_id, (1, 3), took)
        await write_recovery(test.log.store, disk_id, (1, 3), replace(took, seconds=3.0))
        await write_recovery(test.log.store, disk_id, (1, 1), took)
        for _ in range(2):
            points = await with_proofs(test.log.store, disk_id, await test.log.points())
            assert [one.proof for one in points] == ["stored", "hashed", "hashed"]
            assert [one.recovery_s for one in points] == [12.346, 12.346, 3.0]
            for place in ((1, 1), (1, 2), (1, 3)):  # a folder that was copied
                data, _, etag = test.store.objects[proof_name(disk_id, place)]
                test.store.objects[proof_name(disk_id, place)] = (data, {}, etag)
        assert await read_proofs(test.log.store, disk_id, (1, 1)) == []


async def test_latest_proven_is_the_newest_that_passed_more_than_being_stored() -> None:
    async with bench() as test:
        await test.churn(6)
        disk_id = test.log.record.id
        with pytest.raises(NotFoundError, match="no point of it is proven"):
            await test.log.find("latest-proven")
        for epoch, proof in ((2, GOOD), (4, GOOD), (5, BAD), (6, replace(GOOD, outcome="fail"))):
            await write_proof(test.log.store, disk_id, (1, epoch), proof)
        # Of another generation, and of a point that is not there any more.
        await write_proof(test.log.store, disk_id, (7, 5), GOOD)
        await write_proof(test.log.store, disk_id, (1, 99), GOOD)
        found = await test.fresh_log().find("latest-proven")
        assert (found.epoch, found.proof) == (4, "hashed")
        # What passed first and failed when it was looked at more closely is not proven.
        await write_proof(test.log.store, disk_id, (1, 4), BAD)
        assert (await test.fresh_log().find("latest-proven")).epoch == 2


async def test_latest_proven_of_a_group_is_proven_of_each(tmp_path: Path) -> None:
    async with disks_of(tmp_path) as disks:
        for second in range(4):
            await disks.seal(NAMES, T0 + second * NS, str(second + 1))
        for name in NAMES:
            log = await disks.find(name)
            for epoch in (1, 2, 3) if name == NAMES[0] else (1, 2):
                await write_proof(log.store, log.record.id, (1, epoch), GOOD)
        found = await group_points(disks.find, NAMES, "latest-proven", 0)
        assert [one.epoch for one in found] == [2] * len(NAMES)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b'{"format": 1, "proofs": [1]}',
     b'{"format": 1, "proofs": [{"level": "hashed", "outcome": "maybe", "reason": "", "time": "",'
     b' "site": "", "read_bytes": 0}]}',
     b'{"format": 1, "proofs": [], "recovery": {"seconds": "1"}}'],
)  # fmt: skip
async def test_a_damaged_proof_says_so(data: bytes) -> None:
    async with bench() as test:
        await test.churn(1)
        name = proof_name(test.log.record.id, (1, 1))
        await test.store.replace(name, data, etag=None)
        with pytest.raises(FormatError, match="proofs/1-1"):
            await read_proofs(test.log.store, test.log.record.id, (1, 1))
