"""What a group seal costs the writers of its disks: latency, with one every second and without.

``./run bench groups [--disks 8] [--size 64MiB] [--rounds 3] [--seconds 10] [--rate 200]``

Each disk has one writer of 4 KiB at random, direct, one request at a time; the percentiles are
those of all writes of a round. The candidates take turns (A B A B), each on a mount of its own
whose images lie in the host's page cache; the figures are medians over rounds, after one that
does not count. ``no seals`` has an epoch interval of an hour, ``alone`` seals each disk by itself.
Once the writers go as fast as they can, once each at so many writes a second: there it ends with
exit status 1 if the 99th percentile of a group is more than twice that without seals.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.io import NO_SEALS, SEALS, Result, in_turn, make_image, median
from tests.bench.rig import VDISKFS, Mount, call, show_host, table, vdiskfs
from vdiskfs.units import parse_size

CANDIDATES = (("group", SEALS), ("alone", SEALS), ("no seals", NO_SEALS))


AT_MOST = 2.0
"""What the 99th percentile of a write may be with a group seal every second, of that without."""


def fio(mount: Mount, disks: list[str], seconds: float, rate: int) -> Result:
    """Write to all disks at once, each by its own writer; ``rate`` a second each, 0: no limit."""
    words = ["fio", "--rw=randwrite", "--bs=4k", "--ioengine=psync", "--direct=1", "--thread"]
    words += ["--time_based", f"--runtime={seconds}", "--norandommap", "--randrepeat=0"]
    words += ["--allow_file_create=0", "--invalidate=0", "--fadvise_hint=0", "--fallocate=none"]
    words += ["--clocksource=clock_gettime", "--percentile_list=50:99:99.9", "--eta=never"]
    words += ["--output-format=json", "--group_reporting"]
    if rate:
        words += [f"--rate_iops={rate}", "--rate_process=poisson"]
    for disk in disks:
        words += [f"--name={disk}", f"--filename={mount.mountpoint / 'disks' / disk}.img"]
    report: dict[str, Any] = json.loads(call(*words))
    job = report["jobs"][0]["write"]
    times, found = job["clat_ns"], job["clat_ns"]["percentile"]
    return Result(
        p50=found["50.000000"] / 1000,
        p99=found["99.000000"] / 1000,
        p999=found["99.900000"] / 1000,
        worst=times["max"] / 1000,
        throughput=job["bw_bytes"] / (1 << 20),
        operations=job["iops"],
    )


def mounted(root: Path, stack: ExitStack, name: str, settings: str, args: Any) -> Mount:
    """Mount a set of disks, replicated once."""
    source = root / f"source-{name}"
    source.mkdir()
    for disk in names(args.disks):
        make_image(source / f"{disk}.img", parse_size(args.size))
    mount = stack.enter_context(vdiskfs(root / name, source, settings))
    for disk in names(args.disks):
        mount.wait_first_point(disk)
    if name == "group":
        call(VDISKFS, "--quiet", "-m", mount.mountpoint, "group", "create", "g", *names(args.disks))
    return mount


def names(count: int) -> list[str]:
    """Return the names of the disks."""
    return [f"disk{number}" for number in range(count)]


def group_points(mount: Mount) -> int:
    """Return how many points the group has in the vault."""
    return len(mount.ask("disks", "g", "points")["points"])


def bench(mounts: dict[str, Mount], args: Any, rate: int) -> float:
    """One table: all candidates in turn; return what a group's 99th percentile is of that without."""
    disks = names(args.disks)
    before = group_points(mounts["group"])
    results = in_turn(
        args.rounds,
        {key: partial(fio, mount, disks, args.seconds, rate) for key, mount in mounts.items()},
    )
    fields = ("p50", "p99", "p999", "worst", "operations")
    rows = [[key, *(f"{median(found, field):.0f}" for field in fields)]
            for key, found in results.items()]  # fmt: skip
    columns = [f"{args.disks} disks", "p50 us", "p99 us", "p99.9 us", "worst us", "writes/s"]
    pace = f"{rate} writes a second each" if rate else "as fast as they can"
    table(f"{pace}, median of {args.rounds} rounds of {args.seconds} s", columns, rows)
    ratios = {
        key: median(results[key], "p99") / median(results["no seals"], "p99")
        for key in ("group", "alone")
    }
    for key, ratio in ratios.items():
        print(f"p99, {key} / no seals: {ratio:.2f}")
    seconds = (args.rounds + 1) * args.seconds
    print(f"group points made in {seconds:.0f} s of writing: "
          f"{group_points(mounts['group']) - before}")  # fmt: skip
    return ratios["group"]


def main() -> int:
    """Read the options, set up, measure, clean up; 1: a group costs more than is promised."""
    parser = argparse.ArgumentParser(prog="./run bench groups", description=__doc__)
    parser.add_argument("--disks", type=int, default=8)
    parser.add_argument("--size", default="64MiB", help="of each image; all must fit into memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one run")
    parser.add_argument("--rate", type=int, default=200, help="writes a second of each writer")
    parser.add_argument("--directory", default="/var/tmp", help="where the images lie")
    args = parser.parse_args()
    show_host()
    root = Path(tempfile.mkdtemp(prefix="vdiskfs-bench-", dir=args.directory))
    try:
        with ExitStack() as stack:
            mounts = {
                name: mounted(root, stack, name.replace(" ", "-"), settings, args)
                for name, settings in CANDIDATES
            }
            paced = bench(mounts, args, args.rate)
            bench(mounts, args, 0)
    finally:
        shutil.rmtree(root)
    return 1 if paced > AT_MOST else 0


if __name__ == "__main__":
    sys.exit(main())
