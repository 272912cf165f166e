"""QEMU on a live disk: its own tools, a qcow2 that grows, a guest that writes to its disk."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.guest import Disk, Guest
from tests.e2e.loopdev import run_tool
from tests.e2e.mounted import MountedSite

pytestmark = [pytest.mark.e2e, pytest.mark.root]
SECTOR = 512
BLOCK = 4096
MIB = 1 << 20
FAST = "epoch_interval_s = 0.1\n"
CHECK_OK = (0, 3)  # qemu-img check: 0 clean, 3 leaked clusters; 1 and 2 are failure, corruption


def qemu_io(image: Path, commands: Sequence[str], image_format: str) -> None:
    """Run qemu-io's commands on an image, past the page cache, as a machine's disk is used."""
    words = ["qemu-io", "-f", image_format, "-t", "none", "-d", "unmap"]
    for command in commands:
        words += ["-c", command]
    done = subprocess.run([*words, image], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout, done.stdout


# ---- qemu-io on a raw image --------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One command of qemu-io: a range gets a byte's value, or the image a size."""

    command: str
    offset: int = 0
    length: int = 0
    value: int = 0
    size: int | None = None

    def apply(self, image: bytes) -> bytes:
        """Return the image after the step."""
        if self.size is not None:
            return image[: self.size].ljust(self.size, b"\0")
        end = self.offset + self.length
        return image[: self.offset] + bytes([self.value]) * self.length + image[end:]

    def is_part_done(self, image: bytes, before: bytes) -> bool:
        """Say whether the image is what the step made of some sectors, and left of the others."""
        after = self.apply(before)
        if self.size is not None or len(image) != len(before):
            return image in (before, after)
        end = self.offset + self.length
        if image[: self.offset] != before[: self.offset] or image[end:] != before[end:]:
            return False
        spans = [slice(at, at + SECTOR) for at in range(self.offset, end, SECTOR)]
        return all(image[span] in (before[span], after[span]) for span in spans)


def steps(rng: random.Random, count: int, size: int) -> Iterator[Step]:
    """Yield random steps on an image of this size."""
    for number in range(count):
        length = rng.choice([SECTOR, BLOCK, 5 * SECTOR, 64 << 10, 200 << 10])
        offset = rng.randrange(0, size - length) // SECTOR * SECTOR
        where = f"{offset} {length}"
        dice = rng.random()
        if dice < 0.05:
            size = rng.randrange(MIB // SECTOR, 3 * MIB // SECTOR) * SECTOR
            yield Step(f"truncate {size}", size=size)
        elif dice < 0.15:
            # Whole blocks: of others, what a discard leaves is QEMU's choice.
            offset, length = offset // BLOCK * BLOCK, max(BLOCK, length // BLOCK * BLOCK)
            yield Step(f"discard {offset} {length}", offset, length)
        elif dice < 0.25:
            yield Step(f"write -z {'-u ' * (number % 2)}{where}", offset, length)
        else:
            value = 1 + number % 255
            yield Step(f"write -P {value} {where}", offset, length, value)


def test_points_are_what_qemu_io_wrote(tmp_path: Path) -> None:
    """Each point is all of the commands before it, and of one in flight some sectors."""
    rng = random.Random(7)
    done = list(steps(rng, 150, 2 * MIB))
    commands = [word for step in done for word in (step.command, "sleep 15")]
    with MountedSite(tmp_path, options=FAST) as site:
        site.add_image("web01", 2 * MIB)
        site.init().mount()
        site.wait_shipped("web01")
        qemu_io(site.image("web01"), commands, "raw")
        site.wait_shipped("web01")
        states = [bytes(2 * MIB)]
        for step in done:
            states.append(step.apply(states[-1]))
        images = site.point_images("web01")
        assert len(images) >= 8
        at = 0
        for image in images:
            at = place(image.read_bytes(), done, states, at)
        assert images[-1].read_bytes() == states[-1]
        assert site.image("web01").read_bytes() == states[-1]
        print(f"{len(images)} points of {len(done)} commands")


def place(image: bytes, done: Sequence[Step], states: Sequence[bytes], start: int) -> int:
    """Return after which command, from ``start`` on, the image is a cut."""
    for number in range(start, len(states)):
        if image == states[number]:
            return number
        if number < len(done) and done[number].is_part_done(image, states[number]):
            return number
    raise AssertionError(f"the point is the image after none of the commands from {start} on")


# ---- a qcow2 that grows ------------------------------------------------------------------


def test_a_growing_qcow2_is_never_corrupt_in_a_point(tmp_path: Path) -> None:
    """A qcow2 made in the mount is a disk at its last close; its points pass qemu-img check."""
    rng = random.Random(8)
    with MountedSite(tmp_path, options="epoch_interval_s = 0.2\n") as site:
        site.init().mount()
        image = site.mountpoint / "disks" / "grow.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "256M"], check=True)

        def listed() -> bool:
            return "grow" in [row["name"] for row in site.json("disk", "list")["disks"]]

        site.wait("the qcow2 is a disk", listed)
        site.wait_shipped("grow")
        # qemu-img closes it more than once: points of before have no whole header, as the disk.
        early = len(site.point_images("grow")) - 1
        small = image.stat().st_size
        commands = []
        for number in range(300):
            length = rng.choice([SECTOR, BLOCK, 64 << 10, 300 << 10])
            offset = rng.randrange(0, 255 * MIB) // SECTOR * SECTOR
            kind = "discard" if number % 9 == 8 else f"write -P {1 + number % 255}"
            commands += [f"{kind} {offset} {length}", "sleep 12"]
            commands += ["flush"] * (number % 20 == 19)
        qemu_io(image, commands, "qcow2")
        site.wait_shipped("grow")
        assert image.stat().st_size > small + 8 * MIB
        points = [path.with_name("grow.qcow2") for path in site.point_images("grow")][early:]
        results = [qcow2_check(point) for point in points]
        assert all(code in CHECK_OK for code in results), results
        sizes = [point.stat().st_size for point in points]
        assert sum(size > small for size in sizes) >= 8, sizes
        run_tool(["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", points[-1], image])
        print(f"{len(points)} points, {results.count(3)} with leaks, sizes {sizes[0]}..{sizes[-1]}")


def qcow2_check(point: Path) -> int:
    """Return the exit code of qemu-img check."""
    words: list[str | Path] = ["qemu-img", "check", "-q", "-f", "qcow2", point]
    return subprocess.run(words, capture_output=True, timeout=60, check=False).returncode


# ---- a guest -----------------------------------------------------------------------------

SLOTS = 64
ASKED = 15
GUEST_SCRIPT = f"""
(read line </dev/console; : >/tmp/stop) &
n=0
while [ ! -e /tmp/stop ] && [ $n -lt 5000 ]; do
    n=$((n + 1))
    sum=$(echo $n | sha256sum)
    yes "block $n $sum" | head -c {BLOCK} >/tmp/block
    dd if=/tmp/block of=/dev/vda bs={BLOCK} seek=$((n % {SLOTS})) conv=notrunc,fsync 2>/dev/null \\
        || exit 1
    echo "ACK $n"
done
echo "LAST $n"
"""


def block(number: int) -> bytes:
    """Return what the guest writes as its block of this number; 0: what was there before."""
    if number == 0:
        return bytes(BLOCK)
    digest = hashlib.sha256(b"%d\n" % number).hexdigest()
    line = f"block {number} {digest}  -\n".encode()
    return (line * (BLOCK // len(line) + 1))[:BLOCK]


def newest(slot: int, last: int) -> int:
    """Return the number of the block that a slot holds once block ``last`` is written."""
    number = last - (last - slot) % SLOTS
    return max(number, 0)


def last_block(image: bytes) -> int:
    """Return up to which number all blocks are in the image, and none of later ones.

    The guest writes one block at a time: of the next one some sectors may be there.
    """
    found = [
        re.match(rb"block (\d+) ", image[at : at + BLOCK]) for at in range(0, SLOTS * BLOCK, BLOCK)
    ]
    top = max((int(match[1]) for match in found if match), default=0)
    for last in (top, top - 1):
        wrong = [slot for slot in range(SLOTS) if _slot(image, slot) != block(newest(slot, last))]
        if not wrong:
            return last
        torn = (last + 1) % SLOTS
        if wrong == [torn] and _is_torn(_slot(image, torn), last + 1):
            return last
    raise AssertionError(f"no prefix of the guest's writes: newest is {top}, wrong slots {wrong}")


def _slot(image: bytes, slot: int) -> bytes:
    return image[slot * BLOCK : (slot + 1) * BLOCK]


def _is_torn(data: bytes, number: int) -> bool:
    old, new = block(max(number - SLOTS, 0)), block(number)
    spans = [slice(at, at + SECTOR) for at in range(0, BLOCK, SECTOR)]
    return all(data[span] in (old[span], new[span]) for span in spans)


def acknowledged(guest: Guest) -> int:
    """Return the number of the last block that the guest has told to be durable."""
    numbers = re.findall(r"^ACK (\d+)$", guest.console, re.MULTILINE)
    return int(numbers[-1]) if numbers else 0


@pytest.mark.guest
def test_points_have_every_block_that_a_guest_was_told_is_durable(tmp_path: Path) -> None:
    """Points cut under a running guest hold a prefix of its writes, with all acknowledged ones."""
    with MountedSite(tmp_path, options="epoch_interval_s = 0.4\n") as site:
        site.add_image("web01", MIB)
        site.init().mount()
        site.wait_shipped("web01")
        asked: dict[int, int] = {}
        with Guest([Disk(site.image("web01"))], GUEST_SCRIPT, tmp_path) as guest:
            guest.wait_line(r"^ACK 1$")
            while len(asked) < ASKED:
                known = acknowledged(guest)
                point = site.json("point", "create", "web01")["points"][0]
                asked[point["epoch"]] = known
                guest.wait_line(rf"^ACK {acknowledged(guest) + 1}$")
            guest.send("stop")
            console = guest.wait_exit()
        found = re.search(r"^LAST (\d+)$", console, re.MULTILINE)
        assert found is not None
        site.wait_shipped("web01")
        last = int(found[1])
        images = site.point_images("web01")
        assert check_guest_points(images, asked) == last
        live = site.image("web01").read_bytes()
        assert last_block(live) == last
        assert live == images[-1].read_bytes()
        assert not any(live[SLOTS * BLOCK :])
        print(f"{len(images)} points, {len(asked)} asked for, {last} blocks")


def check_guest_points(images: Sequence[Path], asked: dict[int, int]) -> int:
    """Prove of each point that it holds what it must; return the last one's last block."""
    seen, must, held = set(), 0, 0
    for image in images:
        epoch = int(json.loads((image.parent / "point.json").read_text())["epoch"])
        seen.add(epoch)
        must = max(must, asked.get(epoch, 0))
        before, held = held, last_block(image.read_bytes())
        assert held >= must, f"epoch {epoch}: block {must} was durable, only {held} are there"
        assert held >= before, f"epoch {epoch}: goes back from block {before} to {held}"
    assert set(asked) <= seen
    return held
