"""Initial replication of an image of real files, against restic's backup of the same image.

``./run bench replicate [--size 1GiB] [--rounds 2]``

The image is ext4, filled from /usr. Both store into a new folder each round, in turn. Processor
time is that of every process that works for it: vdiskfs's mount command and its daemon, until the
first point is stored; restic's backup command. Making the empty vault or repository is counted
for neither. Stored
bytes are the lengths of all files of the vault or repository. Needs root (a loop device).
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.rig import call, cpu_seconds, make_vault, show_host, stored_bytes, table, vdiskfs
from tests.e2e.loopdev import file_system
from tests.e2e.loopdev import make_image as make_sparse
from vdiskfs.units import format_size, parse_size


@dataclass(frozen=True)
class Cost:
    """What one replication cost."""

    cpu_s: float
    elapsed_s: float
    stored: int


def fill(image: Path, size: int, directory: Path) -> int:
    """Make an ext4 image and copy files of /usr into it until it is nearly full."""
    make_sparse(image, size)
    copied = 0
    with file_system("ext4", image, directory) as root:
        for folder, folders, files in os.walk("/usr"):
            if shutil.disk_usage(root).free < size // 20 + (1 << 20):
                break
            folders.sort()
            target = root / Path(folder).relative_to("/usr")
            target.mkdir(exist_ok=True)
            for name in sorted(files):
                path = Path(folder, name)
                length = path.lstat().st_size
                room = shutil.disk_usage(root).free - size // 20
                if path.is_symlink() or not path.is_file() or length > room:
                    continue
                shutil.copyfile(path, target / name)
                copied += length
    return copied


def children_seconds() -> float:
    """Return the processor time of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_vdiskfs(root: Path, image: Path) -> Cost:
    """Mount, wait for the first stored point, look, unmount."""
    source = root / "source"
    source.mkdir()
    # A name of its own for the image and not a copy: both read the same pages.
    os.link(image, source / "disk.img")
    make_vault(root / "run")
    # The daemon is not a child that we reap: its time is read while it lives. Of the commands
    # that which makes the vault and that which mounts count, not those by which we look on.
    before, begin = children_seconds(), time.monotonic()
    with vdiskfs(root / "run", source) as mount:
        mount.wait_first_point("disk")
        cpu = cpu_seconds(mount.entry.pid) + children_seconds() - before
        elapsed = time.monotonic() - begin
        stored = stored_bytes(mount.vault)
    return Cost(cpu, elapsed, stored)


def run_restic(root: Path, image: Path) -> Cost:
    """Initialize a repository and back the image up."""
    repository = root / "repository"
    environ = {"RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": str(root / "cache")}
    call("restic", "-q", "-r", repository, "init", environ=environ)
    before, begin = children_seconds(), time.monotonic()
    call("restic", "-q", "-r", repository, "backup", image, environ=environ)
    return Cost(children_seconds() - before, time.monotonic() - begin, stored_bytes(repository))


def measure(root: Path, image: Path, rounds: int) -> dict[str, list[Cost]]:
    """Run both in turn, each time from nothing, the image in the page cache."""
    runs: dict[str, Callable[[Path, Path], Cost]] = {"vdiskfs": run_vdiskfs, "restic": run_restic}
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            subprocess.run(["cat", image], stdout=subprocess.DEVNULL, check=True)
            place = root / name
            place.mkdir()
            costs[name].append(run(place, image))
            shutil.rmtree(place)
    return costs


def show(costs: dict[str, list[Cost]], rounds: int) -> None:
    """Print the medians and their ratios."""
    fields = ("cpu_s", "elapsed_s", "stored")
    middle = {
        name: [statistics.median(getattr(cost, field) for cost in found) for field in fields]
        for name, found in costs.items()
    }
    rows = [
        [name, f"{cpu:.2f}", f"{elapsed:.1f}", format_size(stored)]
        for name, (cpu, elapsed, stored) in middle.items()
    ]
    ratios = [a / b for a, b in zip(middle["vdiskfs"], middle["restic"], strict=True)]
    rows.append(["vdiskfs / restic", *(f"{ratio:.2f}" for ratio in ratios)])
    columns = ["initial replication", "processor s", "elapsed s", "stored"]
    table(f"median of {rounds} rounds", columns, rows)


def main() -> None:
    """Read the options, make the image, measure, clean up."""
    parser = argparse.ArgumentParser(prog="./run bench replicate", description=__doc__)
    parser.add_argument("--size", default="1GiB")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--directory", default="/var/tmp")
    args = parser.parse_args()
    show_host()
    print(call("restic", "version").strip())
    root = Path(tempfile.mkdtemp(prefix="vdiskfs-bench-", dir=args.directory))
    try:
        image = root / "usr.img"
        copied = fill(image, parse_size(args.size), root / "fill")
        print(f"{args.size} of ext4 with {format_size(copied)} of files from /usr")
        show(measure(root, image, args.rounds), args.rounds)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
