"""How far the vault lags behind a disk that is written to steadily, with Azurite as the vault.

``./run bench rpo [--minutes 10] [--rate 20] [--size 1GiB] [--interval 1] [--encryption none]``

One fio writes 4 KiB to 64 KiB at random, direct, of bytes that do not get smaller, at so many
MB a second. The shipped lag is asked for five times a second from the moment the lag has had
time to settle; how long the upload of an epoch took is what the daemon logs. The issue wants the
99th percentile of the lag to be at most two epochs and the upload of one: exit status 1 if it is
not. Processor time is that of the daemon, not of Azurite, which takes its share of the same
processors.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.azurite import Azurite, run_azurite
from tests.bench.rig import VDISKFS, Mount, call, cpu_seconds, show_host, table, vdiskfs
from tests.e2e.loopdev import make_image
from vdiskfs.crypto import SCHEME_NONE, SCHEMES, make_key_file
from vdiskfs.units import format_size, parse_size

_UPLOADED = re.compile(r"epoch (\d+) of \w+ was uploaded in ([\d.]+) s: (\d+) bytes")
SETTLE_S = 5.0
EVERY_S = 0.2


@dataclass
class Measured:
    """What one run showed."""

    lags: list[float] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    uploads: list[float] = field(default_factory=list)
    uploaded: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    written: int = 0
    write_p99_ms: float = 0.0


def percentile(values: Sequence[float], part: float) -> float:
    """Return the smallest value that so large a part of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else float("nan")


def fio(image: Path, rate_mb: float, seconds: float) -> subprocess.Popen[str]:
    """Begin to write."""
    words = ["fio", "--name=rpo", f"--filename={image}", "--rw=randwrite", "--bsrange=4k-64k"]
    words += ["--ioengine=psync", "--direct=1", "--thread", "--time_based", f"--runtime={seconds}"]
    words += ["--norandommap", "--refill_buffers", "--allow_file_create=0", "--invalidate=0"]
    words += ["--fadvise_hint=0", "--fallocate=none", f"--rate={int(rate_mb * 1e6)}"]
    words += ["--output-format=json", "--eta=never"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def measure(mount: Mount, seconds: float, rate_mb: float) -> Measured:
    """Write for so long, and look on."""
    found = Measured()
    before, began = cpu_seconds(mount.entry.pid), time.monotonic()
    log = Path(mount.entry.state) / "daemon.log"
    offset = log.stat().st_size
    with fio(mount.mountpoint / "disks/disk.img", rate_mb, seconds) as writer:
        while writer.poll() is None:
            row = mount.disk("disk")
            elapsed = time.monotonic() - began
            if SETTLE_S < elapsed < seconds:
                found.lags.append(row["shipped_lag_s"])
                found.waiting.append(row["points_waiting"])
            time.sleep(EVERY_S)
        assert writer.stdout is not None
        report = json.loads(writer.stdout.read())
    found.elapsed_s = time.monotonic() - began
    found.cpu_s = cpu_seconds(mount.entry.pid) - before
    job = report["jobs"][0]["write"]
    found.written = job["io_bytes"]
    found.write_p99_ms = job["clat_ns"]["percentile"]["99.000000"] / 1e6
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(offset)
        for _, took, size in _UPLOADED.findall(file.read()):
            found.uploads.append(float(took))
            found.uploaded += int(size)
    return found


def show(found: Measured, interval_s: float) -> bool:
    """Print the figures; tell whether the lag is within its bound."""
    rows = [
        [name, *(f"{percentile(values, part):.2f}" for part in (0.5, 0.99, 1.0)), len(values)]
        for name, values in (
            ("shipped lag, s", found.lags),
            ("upload of one epoch, s", found.uploads),
            ("epochs that wait", found.waiting),
        )
    ]
    table(f"{found.elapsed_s:.0f} s of writing", ["", "p50", "p99", "max", "of"], rows)
    print(
        f"written {found.written / found.elapsed_s / 1e6:.1f} MB/s "
        f"(p99 of a write {found.write_p99_ms:.1f} ms), "
        f"uploaded {format_size(found.uploaded)} in {len(found.uploads)} epochs, "
        f"daemon {found.cpu_s / found.elapsed_s:.2f} processors"
    )
    lag, upload = percentile(found.lags, 0.99), percentile(found.uploads, 0.99)
    bound = 2 * interval_s + upload
    holds = lag <= bound
    print(f"p99 of the lag {lag:.2f} s, two epochs and the upload of one {bound:.2f} s: "
          f"{'within' if holds else 'BEYOND'}")  # fmt: skip
    return holds


def run(root: Path, azurite: Azurite, args: argparse.Namespace) -> Measured:
    """Mount one disk of random writes on it, replicated once, and measure."""
    source = root / "source"
    source.mkdir()
    make_image(source / "disk.img", parse_size(args.size))
    environ, url = azurite.environ(), "azure://bench/rpo"
    if args.encryption != SCHEME_NONE:
        environ["VDISKFS_KEY_FILE"] = str(root / "vault.key")
        make_key_file(root / "vault.key")
    call(VDISKFS, "--quiet", "vault", "init", "--encryption", args.encryption, url, environ=environ)
    settings = f'epoch_interval_s = {args.interval}\nlog_level = "debug"\n'
    with vdiskfs(root / "run", source, settings, url=url, environ=environ) as mount:
        mount.wait_first_point("disk")
        return measure(mount, args.minutes * 60, args.rate)


def main() -> None:
    """Read the options, set up, measure, clean up."""
    parser = argparse.ArgumentParser(prog="./run bench rpo", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=20.0, help="MB a second that are written")
    parser.add_argument("--size", default="1GiB", help="of the disk")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds of an epoch")
    parser.add_argument("--encryption", choices=SCHEMES, default=SCHEMES[0], help="of the vault")
    parser.add_argument("--directory", default="/var/tmp", help="where image and vault lie")
    args = parser.parse_args()
    show_host()
    print(f"load before: {os.getloadavg()[0]:.1f}")
    root = Path(tempfile.mkdtemp(prefix="vdiskfs-bench-", dir=args.directory))
    try:
        # On disk: in memory it would grow by all that is written.
        (root / "azurite").mkdir()
        with run_azurite(root / "azurite") as azurite:
            found = run(root, azurite, args)
        holds = show(found, args.interval)
        print(f"load after: {os.getloadavg()[0]:.1f}")
    finally:
        shutil.rmtree(root)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
