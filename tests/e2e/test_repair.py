"""A vault is damaged under a real mount, and the command heals it from the image."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.e2e.mounted import CommandError, MountedSite

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

MIB = 1 << 20
FAST = "epoch_interval_s = 0.2\nheartbeat_s = 1\n"


@pytest.mark.usefixtures("each_vault")
def test_damage_is_healed_from_the_image_while_the_guest_writes(tmp_path: Path) -> None:
    rng = random.Random(1)
    with MountedSite(tmp_path, options=FAST) as site:
        site.add_image("web01", 8 * MIB, rng.randbytes(4 * MIB))
        site.init().mount().wait_shipped("web01")
        with site.image("web01").open("r+b", buffering=0) as image:
            image.seek(5 * MIB)
            image.write(rng.randbytes(MIB))
            os.fsync(image.fileno())
        site.wait_shipped("web01")
        assert site.json("vault", "check", "--read-data")["ok"]
        vault = tmp_path / "vault"
        slots = sorted(
            path for path in vault.glob("disks/*/g*/*") if path.stat().st_size > MIB // 2
        )
        print(slots)
        data = bytearray(slots[0].read_bytes())
        data[len(data) // 2] ^= 4
        slots[0].unlink()
        slots[0].write_bytes(data)
        with pytest.raises(CommandError, match="exit 6"):
            site.json("vault", "check", "--read-data")
        done = site.json("vault", "repair")
        print(done)
        assert done["ok"]
        assert len(done["healed"]) == 1
        assert site.json("vault", "check", "--read-data")["ok"]
