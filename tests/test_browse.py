"""What the tree shows of recovery points: a damaged disk, and one that was just protected."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from tests.catalog.harness import bench
from tests.vaults import newcomer
from vdiskfs.browse import STALE_S, Browser
from vdiskfs.catalog import DiskLog
from vdiskfs.catalog.swap import disk_object
from vdiskfs.errors import DamagedError, NotFoundError

pytestmark = pytest.mark.usefixtures("each_vault")


async def test_a_damaged_record_hides_no_other_disk(
    autojump_clock: MockClock,
    expect_log: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expect_log("disk db01: disks/")
    async with bench() as test:
        await test.churn(2)
        other = await test.vault.create_disk("db01", file="db.img", size=0, site="here")
        data, metadata, _ = test.store.objects[disk_object(other.id)]
        images = cast("Any", SimpleNamespace())
        old, fresh = (
            Browser(newcomer(test.vault, test.store), images, dict, lambda _: None)
            for _ in range(2)
        )
        assert [one.name for one in await old.disks()] == ["db01", "web01"]
        test.store.put(disk_object(other.id), data[:-9], metadata)
        await trio.sleep(STALE_S)
        assert {one.name for one in await old.disks()} == {"db01", "web01"}, "as it was"
        assert [one.name for one in await fresh.disks()] == ["web01"]
        assert len(await (await fresh.log("web01")).points()) == 2
        with pytest.raises(DamagedError, match=other.id):
            await fresh.log("db01")
        with pytest.raises(NotFoundError):
            await fresh.log("absent")
        await trio.sleep(STALE_S)
        await fresh.disks()
        told = [one.message for one in caplog.records]
        assert sum(other.id in one for one in told) == 2, "once each"


async def test_a_disk_that_is_protected_now_is_shown_at_once(autojump_clock: MockClock) -> None:
    """Although the vault's disks were listed a moment before."""
    async with bench() as test:
        own: dict[str, DiskLog] = {}
        images = cast("Any", SimpleNamespace())
        browser = Browser(test.vault, images, lambda: own, lambda _: None)
        assert [one.name for one in await browser.disks()] == ["web01"]
        asked = browser.requests
        record = await test.vault.create_disk("db01", file="db.img", size=0, site="here")
        own["db01"] = test.vault.log(record)
        assert {one.name for one in await browser.disks()} == {"db01", "web01"}
        assert await browser.log("db01") is own["db01"]
        assert browser.requests == asked + 2, "what create_disk asked"
