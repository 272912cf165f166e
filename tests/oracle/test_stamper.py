"""The writer in C and both checkers agree on what is a cut, and name what is wrong."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.e2e.guest import Disk, Guest
from tests.e2e.instants import NotACutError
from tests.e2e.loopdev import make_image
from tests.e2e.oracle import Oracle
from tests.e2e.stamps import SECTOR, base_of, content
from tests.oracle.stamper import BLOCK, Stamper, check, command, events, program, read_log

DISK = 77
BLOCKS = 8
SIZE = BLOCKS * BLOCK
MIB = 1 << 20


def python_says(image: Path, log: Path, size: int = SIZE, *, flushed: bool = False) -> str:
    """Return ``cut`` or the kind of what is wrong."""
    oracle = Oracle(read_log(log, disk=DISK, size=size))
    try:
        if flushed:
            oracle.check_flushed(image)
        else:
            oracle.check(image)
    except NotACutError as error:
        return error.kind
    return "cut"


@pytest.mark.parametrize("buffered", [False, True])
def test_what_the_writer_leaves_is_the_cut_at_the_end(tmp_path: Path, buffered: bool) -> None:
    image, log = make_image(tmp_path / "disk.img", 8 * MIB), tmp_path / "log"
    with Stamper(
        image, log, disk=DISK, size=8 * MIB, operations=300, buffered=buffered, flush_percent=20
    ) as stamper:
        assert stamper.wait() == 0
    history = read_log(log, disk=DISK, size=8 * MIB)
    assert sum(op.length > 0 for op in history.operations) == 1200
    assert history.flushes
    end = max(op.end_ns for op in history.operations if op.length)
    assert check(image, log, disk=DISK, after=end).is_cut
    Oracle(history).check(image, (end, end))
    assert check(image, log, disk=DISK, flushed=True).is_cut
    Oracle(history).check_flushed(image)
    # Another disk's image is none of this one's.
    assert check(image, log, disk=DISK + 1).kind == "torn"


def test_a_copy_made_under_load_is_refused_and_the_writer_stops_when_told(tmp_path: Path) -> None:
    """The first half of one moment and the second of a later one: no cut."""
    image, log = make_image(tmp_path / "disk.img", 4 * MIB), tmp_path / "log"
    with Stamper(image, log, disk=DISK, size=4 * MIB) as stamper:
        data = bytearray()
        for half in (0, 1):
            stamper.wait_completed(stamper.completed() + 400)
            with image.open("rb") as file:
                file.seek(half * 2 * MIB)
                data += file.read(2 * MIB)
        assert stamper.stop() == 0
    copy = tmp_path / "copy.img"
    copy.write_bytes(data)
    verdict = check(copy, log, disk=DISK)
    assert verdict.kind in ("lost", "reordered", "mixed"), verdict
    assert python_says(copy, log, 4 * MIB) in ("lost", "reordered", "mixed")
    assert check(image, log, disk=DISK).is_cut


# ---- made-up histories -------------------------------------------------------------------


class Forged:
    """A log of single-block writes, one after the other, and images of it."""

    def __init__(self, directory: Path, blocks: list[int], flush_after: int = 0) -> None:
        self.blocks = blocks
        self.log, self.image = directory / "log", directory / "disk.img"
        lines = ["@H 1"]
        for n, block in enumerate(blocks, 1):
            lines += [f"@I {n} {block} 1 {100 * n}", f"@C {n} {100 * n + 50}"]
            if n == flush_after:
                lines.append(f"@F 0 {100 * n + 60} {100 * n + 70}")
        self.log.write_text("\n".join(lines) + "\n")

    def write(self, there: set[int], torn: int = 0) -> None:
        """Lay out an image that has these writes, in order; of ``torn`` only half a sector."""
        data = bytearray(SIZE)
        for n, block in enumerate(self.blocks, 1):
            if n in there:
                data[block * BLOCK : (block + 1) * BLOCK] = content(
                    base_of(DISK), n, block * BLOCK, BLOCK
                )
            if n == torn:
                half = content(base_of(DISK), n, block * BLOCK, SECTOR // 2)
                data[block * BLOCK : block * BLOCK + SECTOR // 2] = half
        self.image.write_bytes(data)

    def verdicts(self, *, flushed: bool = False) -> tuple[str, str]:
        found = check(self.image, self.log, disk=DISK, flushed=flushed)
        return found.kind, python_says(self.image, self.log, flushed=flushed)


def test_lost_reordered_and_torn_are_named_with_their_block(tmp_path: Path) -> None:
    """Five writes to five blocks: without the third, with the last one early, with one torn."""
    forged = Forged(tmp_path, [0, 1, 2, 3, 4])
    forged.write({1, 2, 4, 5})
    assert forged.verdicts() == ("lost", "lost")
    assert "block 2 lacks operation 3" in check(forged.image, forged.log, disk=DISK).text
    forged.write({1, 2, 5})
    assert forged.verdicts() == ("reordered", "reordered")
    assert "block 4 holds operation 5" in check(forged.image, forged.log, disk=DISK).text
    forged.write({1, 2, 3}, torn=4)
    assert forged.verdicts() == ("torn", "torn")
    assert "torn: block 3 sector 0" in check(forged.image, forged.log, disk=DISK).text
    forged.write({1, 2, 3})
    assert forged.verdicts() == ("cut", "cut")
    data = bytearray(forged.image.read_bytes())
    data[7 * BLOCK] = 1
    forged.image.write_bytes(data)
    assert forged.verdicts() == ("strange", "strange")


def test_what_was_flushed_must_be_there_after_a_host_s_loss(tmp_path: Path) -> None:
    forged = Forged(tmp_path, [0, 1, 2, 3, 4], flush_after=2)
    forged.write({1, 2, 5})
    assert forged.verdicts(flushed=True) == ("cut", "cut")
    forged.write({1, 3, 4, 5})
    assert forged.verdicts(flushed=True) == ("lost", "lost")


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 25), data=st.data())
def test_both_checkers_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: int, data: st.DataObject
) -> None:
    """On cuts, and with any writes lost or early: one verdict, and for cuts the right one."""
    rng = random.Random(seed)
    forged = Forged(
        tmp_path_factory.mktemp("forged"),
        [rng.randrange(BLOCKS) for _ in range(steps)],
        rng.randrange(steps + 1),
    )
    there = set(range(1, data.draw(st.integers(0, steps)) + 1))
    is_cut = data.draw(st.booleans())
    if not is_cut:
        there ^= {rng.randrange(1, steps + 1) for _ in range(rng.randrange(1, 3))}
    forged.write(there)
    in_c, in_python = forged.verdicts()
    assert in_c == in_python
    assert in_c == "cut" or not is_cut
    assert len(set(forged.verdicts(flushed=True))) == 1


@pytest.mark.guest
def test_a_guest_writes_and_checks_with_the_same_program(tmp_path: Path) -> None:
    """The log comes over the console; in the guest and outside the disk is the cut it says."""
    image = make_image(tmp_path / "disk.img", 4 * MIB)
    words = command("/dev/vda", "-", disk=DISK, size=4 * MIB, operations=40, writers=2)
    script = f"""
    {" ".join(words)} | tee /tmp/log
    stamper check /dev/vda --disk {DISK} --log /tmp/log
    cat /dev/vda >/tmp/copy
    yes | dd of=/tmp/copy bs=100 seek=100 count=1 conv=notrunc 2>/dev/null
    stamper check /tmp/copy --disk {DISK} --log /tmp/log && exit 9
    true
    """
    with Guest([Disk(image)], script, tmp_path, programs=[program()]) as guest:
        console = guest.wait_exit()
    log = tmp_path / "console"
    log.write_text(console)
    assert sum(letter == "C" for letter, _ in events(console)) == 80
    assert re.search(r"^cut: \[", console, re.MULTILINE)
    assert re.search(r"^(torn|strange): block 2 sector 3 ", console, re.MULTILINE)
    assert check(image, log, disk=DISK).is_cut
    Oracle(read_log(log, disk=DISK, size=4 * MIB)).check(image)
