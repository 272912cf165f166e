"""A vault is damaged under a real mount, and the command heals it from what the mount has."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.mounted import CommandError, MountedSite

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("each_vault"), pytest.mark.timeout(120)]

MIB = 1 << 20
FAST = "epoch_interval_s = 0.2\nheartbeat_s = 1\n"


def rewritten(path: Path, data: bytes) -> None:
    """Put other bytes in an object's place: the spool may have the same file."""
    path.unlink()
    path.write_bytes(data)


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    rewritten(path, bytes(data))


@contextmanager
def writing(image: Path, offset: int) -> Iterator[None]:
    """Let a guest write on, at one place of its disk."""
    done = threading.Event()

    def write() -> None:
        with image.open("r+b", buffering=0) as file:
            while not done.wait(0.002):
                file.seek(offset)
                file.write(os.urandom(MIB // 16))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_damage_is_healed_from_what_the_mount_has_while_a_guest_writes(tmp_path: Path) -> None:
    rng = random.Random(1)
    with MountedSite(tmp_path, options=FAST) as site:
        site.add_image("web01", 8 * MIB, rng.randbytes(2 * MIB))
        site.init().mount().wait_shipped("web01")
        for number in range(4):
            with site.image("web01").open("r+b", buffering=0) as image:
                image.seek((3 + number) * MIB)
                image.write(rng.randbytes(MIB // 4))
            site.json("point", "create", "web01", "--wait")
        wanted = {epoch["epoch"]: site.point("web01", str(epoch["epoch"])).name
                  for epoch in site.points("web01")}  # fmt: skip
        assert len(wanted) >= 5
        slots = sorted((tmp_path / "vault").glob("disks/*/g*/*"))
        size = slots[1].stat().st_size
        with writing(site.image("web01"), 7 * MIB):
            flipped(slots[1], size // 2)  # its frames
            flipped(slots[2], slots[2].stat().st_size - 700)  # its index
            slots[3].unlink()
            (slots[0].parent.parent / "disk.json").unlink()
            with pytest.raises(CommandError, match="exit 6"):
                site.json("vault", "check", "--read-data")
            planned = site.json("vault", "repair", "--dry-run")
            done = site.json("vault", "repair")
        assert [one["object"] for one in planned["healed"]] == [
            f"disks/{slots[0].parts[-3]}/disk.json"
        ]
        assert done["ok"]
        names = {Path(one["object"]).name for one in done["healed"]}
        assert names >= {"disk.json", *(slot.name for slot in slots[1:4])}
        assert site.json("vault", "check", "--read-data")["ok"]
        told = site.json("event", "list", "--disk", "web01")["events"]
        assert "repair.healed" in {event["code"] for event in told}
        # Once more there is nothing to do; what is nowhere any more is said, with its points.
        assert site.json("vault", "repair")["healed"] == []
        with site.image("web01").open("r+b", buffering=0) as image:
            image.seek(3 * MIB)
            image.write(bytes(MIB // 4))
        slots[1].unlink()
        with pytest.raises(CommandError, match=r"exit 6(.|\n)*hurts \d+ point"):
            site.run("-m", site.mountpoint, "vault", "repair")


@pytest.mark.parametrize("each_vault", ["plain"], indirect=True)
def test_a_policy_is_put_back_from_the_mounts_copy_or_its_command_is_named(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        site.init().run("policy", "set", "gold", "retention=1m for 9h", "--vault", site.vault)
        site.mount(recovery=True)
        site.wait("a copy is kept", lambda: any(site.state.glob("documents.others/*")))
        document = tmp_path / "vault" / "policies" / "gold.json"
        whole = document.read_bytes()
        flipped(document, 60)
        planned = site.json("vault", "repair", "--dry-run")
        assert ([one["object"] for one in planned["healed"]], planned["left"]) == (
            ["policies/gold.json"], [],
        )  # fmt: skip
        assert document.read_bytes() != whole
        done = site.json("vault", "repair")
        assert [one["object"] for one in done["healed"]] == ["policies/gold.json"]
        assert document.read_bytes() == whole
        # Cut off, its check is gone: it may have been a newer one.
        rewritten(document, whole[:-30])
        with pytest.raises(CommandError, match=r"set gold 'retention=1m for 9h'\n"):
            site.run("-m", site.mountpoint, "vault", "repair")
        site.run("policy", "set", "gold", "retention=1m for 9h", "--vault", site.vault)
        assert document.read_bytes() == whole
