"""What the intent log costs a write of 4 KiB: ``./run bench intent [--rounds 5]``.

Without a mount, through the core's own call. *hit*: the region is active; *void*: the log is not
kept, so that nothing is looked up; *miss*: each write needs a region that is not active, and room
for it has to be made. Medians; hit and void take turns.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from vdiskfs import native

GIB = 1 << 30
PAGE = bytes(4096)


def opened(core: native.Core, root: Path, name: str, size: int) -> native.Image:
    """Return a tracked image, its log void."""
    path, track = root / f"{name}.img", root / name
    track.mkdir()
    path.touch()
    os.truncate(path, size)
    fd = os.open(path, os.O_RDWR)
    image = native.Image(core, fd, native.ImageFlags.NONE, 1)
    os.close(fd)
    image.set_track(native.Track(track, size, new=True))
    return image


def kept(image: native.Image) -> native.Image:
    """Let the log be kept, and wait until it is."""
    native.begin_intent(image)
    while native.intent_counts(image).is_void:
        time.sleep(0.01)
    return image


def median_us(image: native.Image, offsets: list[int]) -> float:
    """Write at each offset; return the median in microseconds."""
    times = []
    for offset in offsets:
        begin = time.perf_counter_ns()
        image.write(offset, PAGE)
        times.append(time.perf_counter_ns() - begin)
    return statistics.median(times) / 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench intent")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    choice = random.Random(1)
    with tempfile.TemporaryDirectory() as directory, native.Core() as core:
        root = Path(directory)
        hit, void = kept(opened(core, root, "hit", GIB)), opened(core, root, "void", GIB)
        near = [choice.randrange(65536) * 4096 for _ in range(40_000)]
        rounds = [(median_us(hit, near), median_us(void, near)) for _ in range(arguments.rounds)]
        for name, at in (("hit", 0), ("void", 1)):
            print(f"{name}: {statistics.median(one[at] for one in rounds[1:] or rounds):.2f} us")
        miss = kept(opened(core, root, "miss", 1024 * GIB))
        far = [choice.randrange(262_144) << 22 for _ in range(2000)]
        print(f"miss: {median_us(miss, far):.0f} us; {native.intent_counts(miss)}")
        for image in (hit, void, miss):
            track = image.track
            image.set_track(None)
            if track is not None:
                track.close()
            image.close()


if __name__ == "__main__":
    main()
