"""What encryption costs: storing and reading segments in a folder vault, plain and encrypted.

``./run bench encrypted [--size 256MiB] [--rounds 3]``

The kinds take turns (A B A B); every figure is the median over rounds. Time is that of a clock,
processor time that of this process with all its threads. Segments of 16 MiB of random bytes are
uploaded as the daemon does it, synced, and read back in requests of 1 MiB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import trio

from tests.bench.rig import show_host, table
from vdiskfs.catalog import Vault
from vdiskfs.crypto import Secrets
from vdiskfs.store import open_store
from vdiskfs.units import parse_size

SEGMENT = 16 << 20
REQUEST = 1 << 20
KINDS = {"plain": None, "encrypted": Secrets(file_key=bytes(32))}


async def one_round(root: Path, kind: str, count: int) -> tuple[float, float, float, float]:
    """Return MB/s and processor ms per MB of writing, then of reading."""
    store = open_store(f"file://{root}/vault")
    vault = await Vault.init(store, KINDS[kind])
    files = []
    for number in range(count):
        path = root / f"{number}.segment"
        path.write_bytes(os.urandom(SEGMENT))
        files.append(path)
    os.sync()
    total = count * SEGMENT / 1e6
    names = [f"segments/{'a' * 32}/{number:032x}" for number in range(count)]
    began, used = time.perf_counter(), time.process_time()
    for name, path in zip(names, files, strict=True):
        await vault.store.create_from_file(name, path)
    wrote, wrote_cpu = time.perf_counter() - began, time.process_time() - used
    began, used = time.perf_counter(), time.process_time()
    for name in names:
        for offset in range(0, SEGMENT, REQUEST):
            await vault.store.read_range(name, offset, REQUEST)
    read, read_cpu = time.perf_counter() - began, time.process_time() - used
    await vault.store.aclose()
    return total / wrote, 1e3 * wrote_cpu / total, total / read, 1e3 * read_cpu / total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, default=256 << 20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    show_host()
    found: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind in KINDS:
            with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
                rounds = trio.run(one_round, Path(name), kind, arguments.size // SEGMENT)
                found[kind].append(rounds)
    rows = [
        [kind, *(f"{statistics.median(column):.2f}" for column in zip(*rounds, strict=True))]
        for kind, rounds in found.items()
    ]
    heading = ["vault", "write MB/s", "write ms/MB", "read MB/s", "read ms/MB"]
    table("segments of 16 MiB in a folder vault", heading, rows)


if __name__ == "__main__":
    main()
