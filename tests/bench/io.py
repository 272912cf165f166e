"""What a guest sees: latency and throughput through the mount.

``./run bench io [--size 1GiB] [--rounds 3] [--seconds 2] [--only latency|load]``

Every figure is the median over rounds in which the candidates take turns (A B A B), on images
that lie in the host's page cache. ``qsd`` is qemu-storage-daemon's FUSE export of a raw image,
``file`` the bare file through the page cache, ``no seals`` vdiskfs with
an epoch interval of an hour. With 8 writers, p99.9 and its like are those of
all writes of a round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.rig import Mount, call, show_host, table, vdiskfs
from tests.e2e.qsd import exported
from vdiskfs.units import format_size, parse_size

NO_SEALS = "epoch_interval_s = 3600\n"
SEALS = "epoch_interval_s = 1\n"

SUSTAINED_S = 8.0
"""Seconds of a run that measures throughput."""


@dataclass(frozen=True)
class Target:
    """A file to do I/O on, and whether past the page cache of what serves it to us."""

    name: str
    path: Path
    direct: bool


@dataclass(frozen=True)
class Result:
    """One run of fio. Latencies in microseconds (completion), throughput in MiB/s."""

    p50: float
    p99: float
    p999: float
    worst: float
    throughput: float
    operations: float  # a second


def fio(target: Target, pattern: str, size: str, seconds: float, writers: int = 1) -> Result:
    """Run one pattern and return what fio measured."""
    words = ["fio", "--name=b", f"--filename={target.path}", f"--rw={pattern}", f"--bs={size}"]
    words += ["--ioengine=psync", f"--direct={int(target.direct)}", "--output-format=json"]
    words += ["--time_based", f"--runtime={seconds}", f"--numjobs={writers}", "--group_reporting"]
    words += ["--thread", "--norandommap", "--randrepeat=0", "--allow_file_create=0"]
    words += ["--clocksource=clock_gettime", "--percentile_list=50:99:99.9", "--eta=never"]
    # fio would drop the file's pages from the cache first: they are what this is about.
    words += ["--invalidate=0", "--fadvise_hint=0", "--fallocate=none"]
    report: dict[str, Any] = json.loads(call(*words))
    job = report["jobs"][0]["write" if "write" in pattern else "read"]
    times = job["clat_ns"]
    percentiles = times["percentile"]
    return Result(
        p50=percentiles["50.000000"] / 1000,
        p99=percentiles["99.000000"] / 1000,
        p999=percentiles["99.900000"] / 1000,
        worst=times["max"] / 1000,
        throughput=job["bw_bytes"] / (1 << 20),
        operations=job["iops"],
    )


def in_turn(rounds: int, runs: Mapping[str, Callable[[], Result]]) -> dict[str, list[Result]]:
    """Run each candidate once a round, in turn, after one round that does not count."""
    results: dict[str, list[Result]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            result = run()
            if number:
                results[name].append(result)
    return results


def median(results: list[Result], field: str) -> float:
    """Return the median of one figure over the rounds."""
    figures: list[float] = [getattr(result, field) for result in results]
    return statistics.median(figures)


def make_image(path: Path, size: int) -> None:
    """Fill an image with bytes that are not zeros; they stay in the page cache."""
    block = bytes(range(1, 256)) * 4113  # about a MiB
    with path.open("wb") as file:
        left = size
        while left:
            left -= file.write(block[: min(left, len(block))])


def bench_single(targets: list[Target], rounds: int, seconds: float) -> None:
    """One request at a time: 4 KiB at random, 1 MiB in sequence."""
    patterns = [
        ("randwrite", "4k", "write 4 KiB, median us", "p50"),
        ("randread", "4k", "read 4 KiB, median us", "p50"),
        ("write", "1m", "write 1 MiB in sequence, MiB/s", "throughput"),
        ("read", "1m", "read 1 MiB in sequence, MiB/s", "throughput"),
    ]
    rows = []
    for pattern, size, title, field in patterns:
        # A seal is followed by copies of what it froze, then by none: several must fall into a run.
        span = max(seconds, SUSTAINED_S) if field == "throughput" else seconds
        runs = {t.name: partial(fio, t, pattern, size, span) for t in targets}
        results = in_turn(rounds, runs)
        figures = {name: median(found, field) for name, found in results.items()}
        ratio = ""
        if {"vdiskfs", "qsd"} <= figures.keys():
            ratio = f"{figures['vdiskfs'] / figures['qsd']:.2f}"
        rows.append([title, *(f"{figures[t.name]:.1f}" for t in targets), ratio])
    columns = ["one request at a time", *(t.name for t in targets), "vdiskfs / qsd"]
    table(
        f"queue depth 1, direct, median of {rounds} rounds of {seconds} s (1 MiB: {SUSTAINED_S} s)",
        columns,
        rows,
    )


def bench_load(targets: list[Target], rounds: int, seconds: float) -> dict[str, list[Result]]:
    """Eight writers of 4 KiB at random, each with one request at a time."""
    runs = {t.name: partial(fio, t, "randwrite", "4k", seconds, writers=8) for t in targets}
    results = in_turn(rounds, runs)
    rows = [
        [name, *(f"{median(found, f):.0f}" for f in ("p50", "p99", "p999", "worst", "operations"))]
        for name, found in results.items()
    ]
    columns = ["8 writers, 4 KiB", "p50 us", "p99 us", "p99.9 us", "worst us", "writes/s"]
    table(f"under load, median of {rounds} rounds of {seconds} s", columns, rows)
    return results


def points_made(mount: Mount, name: str) -> int:
    """Return how many points the disk has."""
    return len(mount.ask("disks", name, "points")["points"])


def bench_vdiskfs(root: Path, stack: ExitStack, args: argparse.Namespace) -> None:
    """All tables, with vdiskfs."""
    size = parse_size(args.size)
    mounts = {}
    for name, settings in (("on", SEALS), ("off", NO_SEALS)):
        source = root / f"source-{name}"
        source.mkdir()
        make_image(source / "disk.img", size)
        mounts[name] = stack.enter_context(vdiskfs(root / name, source, settings))
        mounts[name].wait_first_point("disk")
    live = {name: mount.mountpoint / "disks/disk.img" for name, mount in mounts.items()}
    if args.only != "load":
        others = plain_targets(root, stack, size)
        mine = [Target("vdiskfs", live["on"], direct=True), Target("no seals", live["off"], True)]
        bench_single([*mine, *others], args.rounds, args.seconds)
    if args.only != "latency":
        before = points_made(mounts["on"], "disk")
        targets = [
            Target("seal every second", live["on"], direct=True),
            Target("no seals", live["off"], direct=True),
        ]
        results = bench_load(targets, args.rounds, max(args.seconds, 5))
        with_, without = (median(results[t.name], "p999") for t in targets)
        made = points_made(mounts["on"], "disk") - before
        print(f"p99.9 with a seal every second / without: {with_ / without:.2f}")
        print(f"points made meanwhile: {made}, of them stored: {made_stored(mounts['on'])}")


def made_stored(mount: Mount) -> str:
    """Return how the vault keeps up, from status."""
    disk = mount.disk("disk")
    return f"all but {format_size(disk['spooled_bytes'])}"


def plain_targets(root: Path, stack: ExitStack, size: int) -> list[Target]:
    """Return qemu-storage-daemon's export and the bare file, each of its own image."""
    for name in ("qsd.img", "bare.img"):
        make_image(root / name, size)
    export = stack.enter_context(exported(root / "qsd.img", root / "export"))
    return [Target("qsd", export, direct=True), Target("file", root / "bare.img", direct=False)]


def main() -> None:
    """Read the options, set up, measure, clean up."""
    parser = argparse.ArgumentParser(prog="./run bench io", description=__doc__)
    parser.add_argument("--size", default="1GiB", help="of each image; all must fit into memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one run")
    parser.add_argument("--only", choices=["latency", "load"])
    parser.add_argument("--without-vdiskfs", action="store_true", help="what it is compared with")
    parser.add_argument("--directory", default="/var/tmp", help="where the images lie")
    args = parser.parse_args()
    show_host()
    root = Path(tempfile.mkdtemp(prefix="vdiskfs-bench-", dir=args.directory))
    try:
        with ExitStack() as stack:
            if args.without_vdiskfs:
                targets = plain_targets(root, stack, parse_size(args.size))
                bench_single(targets, args.rounds, args.seconds)
                bench_load(targets, args.rounds, args.seconds)
            else:
                bench_vdiskfs(root, stack, args)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
