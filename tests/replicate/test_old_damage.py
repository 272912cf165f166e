"""What was stored long ago is damaged: that is said, and what is new is shipped all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio.testing

from tests.replicate.rig import Rig
from vdiskfs.delta.names import parse_slot
from vdiskfs.health import Level
from vdiskfs.stride import Pace


async def test_a_damaged_delta_that_is_to_be_joined_holds_up_no_upload(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, expect_log: Callable[[str], None]
) -> None:
    expect_log("damaged")
    async with Rig(tmp_path, 1 << 20, pace=Pace(1.0, 64 << 20, 1)) as rig, rig.running():

        async def epochs(count: int) -> None:
            for number in range(count):
                rig.write(number % 200 * 4096, b"%d" % number)
                with trio.move_on_after(600) as waited:
                    end = rig.replicator.stored.epoch
                    await rig.wait(lambda: rig.replicator.stored.epoch > end, 0.25)
                assert not waited.cancelled_caught, rig.health.last_error

        await epochs(6)
        slots = {parse_slot(name): name for name in rig.memory.objects if parse_slot(name)}
        name = slots[1, 3]
        data, info = rig.memory.objects[name]
        rig.memory.objects[name] = (data[:-300] + b"rotten" + data[-294:], info)
        await epochs(60)
        assert rig.health.level is Level.CRITICAL
        assert "chain.damaged" in rig.health.conditions()
        assert rig.replicator.stored.epoch > 60
        joined = [one for one in rig.memory.objects if "g00000001.1/" in one]
        assert len(joined) >= 2, "what is whole is joined"
        # Healed, it is joined; and the disk is well again.
        rig.memory.objects[name] = (data, info)
        await trio.sleep(120)
        await epochs(1)
        assert str(rig.health.level) == "Normal"
        assert len([one for one in rig.memory.objects if "g00000001.1/" in one]) > len(joined)
