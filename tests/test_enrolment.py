"""What a site tells the vault of a disk counts only while the disk is its own."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from tests.catalog.harness import bench
from vdiskfs.catalog import Owner
from vdiskfs.enrolment import retired, revived, tell, with_file


async def test_a_displaced_site_does_not_retire_rename_or_revive_a_disk() -> None:
    async with bench() as test:
        ours = cast("Any", SimpleNamespace(vault=test.vault,
                                           state=SimpleNamespace(writer_id="a" * 32)))  # fmt: skip
        disk = test.record.id
        await tell(ours, disk, with_file("new.img"))
        assert (await test.vault.disk(disk)).file == "new.img"
        await tell(ours, disk, retired)
        assert (await test.vault.disk(disk)).retired is not None
        await tell(ours, disk, revived)
        assert (await test.vault.disk(disk)).retired is None
        other = Owner("site-b", "b" * 32, "n", "t")
        taken = await test.vault.update_disk(disk, lambda one: replace(one, owner=other))
        for change in (with_file("ours.img"), retired):
            await tell(ours, disk, change)
            assert await test.vault.disk(disk) == taken
