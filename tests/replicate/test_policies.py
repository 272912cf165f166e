"""What a policy says takes effect on a disk while it is replicated."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio
import trio.testing

from tests.replicate.rig import Rig
from vdiskfs.catalog import Policy
from vdiskfs.catalog.policy import changed_policy
from vdiskfs.maintenance import follow
from vdiskfs.window import Window

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
KIB = 1024


def disk_of(rig: Rig) -> Any:
    """Return what `follow` needs of a protected disk."""
    return SimpleNamespace(
        site=SimpleNamespace(pace=rig.replicator.pace), replicator=rig.replicator, policy=None
    )


async def test_uploads_take_as_long_as_the_bandwidth_says(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with Rig(tmp_path, 1 << 20) as rig, rig.running():
        await rig.wait(lambda: rig.is_settled)
        disk = disk_of(rig)
        rng = random.Random(1)

        async def two_uploads() -> float:
            began = trio.current_time()
            for _ in range(2):
                rig.write(0, rng.randbytes(256 * KIB))
                await rig.wait(lambda: rig.is_settled, 0.25)
            return trio.current_time() - began

        assert await two_uploads() < 30
        for where in (rig.replicator.shipper.limiter, rig.replicator.shipper.shared):
            where.limit = 4 * KIB
            # The first one is paid for afterwards: by the second.
            assert 60 <= await two_uploads() < 150
            where.limit = 0
        follow(disk, None, NOON)
        assert rig.replicator.shipper.limiter.limit == 0


async def test_a_delta_goes_between_what_thinning_sends(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with Rig(tmp_path, 1 << 20) as rig, rig.running():
        await rig.wait(lambda: rig.is_settled)
        shipper = rig.replicator.shipper
        shipper.shared.limit = 64 * KIB
        async with trio.open_nursery() as nursery:
            began = trio.current_time()
            nursery.start_soon(shipper.take_aside, 8 * 1024 * KIB)
            await trio.sleep(10)
            rig.write(0, random.Random(1).randbytes(4 * KIB))
            await rig.wait(lambda: rig.is_settled, 0.25)
            assert trio.current_time() - began < 20
        # The last piece is paid for by who comes next.
        assert 120 < trio.current_time() - began < 130


async def test_the_settings_of_a_policy_take_effect_and_are_taken_back(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with Rig(tmp_path, 1 << 20) as rig, rig.running():
        disk = disk_of(rig)
        before = rig.replicator.pace
        policy = changed_policy(Policy("shop"), {
            "epoch_interval": "30s", "compression_level": "9", "bandwidth_limit": "5MiB",
            "bandwidth_hours": "08:00-18:00", "resync_window": "22:00-06:00", "rpo_warning": "1m",
        })  # fmt: skip
        follow(disk, policy, NOON)
        replicator = rig.replicator
        assert replicator.stride.interval_s == 30
        assert replicator.pace.compression_level == 9
        assert replicator.resync.window == Window.parse("22:00-06:00")
        assert replicator.shipper.limiter.limit == 5 << 20
        assert disk.policy is policy
        follow(disk, policy, NOON.replace(hour=20))
        assert replicator.shipper.limiter.limit == 0
        follow(disk, None, NOON)
        assert replicator.pace == before
        assert replicator.stride.interval_s == before.epoch_interval_s
        assert replicator.resync.window is before.resync_window
