"""A guest with QEMU's blklogwrites in front of its disk: every point is a prefix of that log.

The guest, under software emulation, keeps an ext4 on the disk: one process writes files and
syncs each, telling "ACK number md5" on the console when it is durable; others write without
syncing, remove, and trim. Points are cut meanwhile by the clock and on request.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.e2e.guest import Disk, Guest
from tests.e2e.instants import NotACutError
from tests.e2e.loopdev import make_fs, run_tool
from tests.e2e.mounted import MountedSite
from tests.oracle import writelog
from tests.oracle.prefix import PrefixOracle

SIZE = 32 << 20
OPTIONS = "epoch_interval_s = 0.3\n"
SCRIPT = """
mount -t ext4 -o discard /dev/vda /mnt || exit 1
(read line </dev/console; : >/tmp/stop) &
(n=0; while [ ! -e /tmp/stop ]; do
    n=$((n + 1))
    dd if=/dev/urandom of=/mnt/free$((n % 7)) bs=4k count=$((1 + n % 40)) 2>/dev/null
    [ $((n % 5)) = 0 ] && rm -f /mnt/free$((n % 3))
    [ $((n % 11)) = 0 ] && sync
done) & free=$!
n=0
while [ ! -e /tmp/stop ] && [ $n -lt 600 ]; do
    n=$((n + 1))
    head -c $((n * 977 % 30000 + 1)) /dev/urandom >/tmp/file
    dd if=/tmp/file of=/mnt/acked$n bs=32k conv=fsync 2>/dev/null || exit 2
    sum=$(md5sum </tmp/file)
    echo "ACK $n ${sum%% *}"
done
while [ ! -e /tmp/stop ]; do sleep 1; done
wait $free
umount /mnt
"""


@dataclass
class Run:
    """What the host knows of a run."""

    acked: dict[int, str]  # file number: md5
    asked: dict[int, int] = field(default_factory=dict)  # epoch: files acknowledged before


def acknowledged(console: str) -> dict[int, str]:
    """Return the files that the guest has told to be durable, by number."""
    found = re.findall(r"^ACK (\d+) ([0-9a-f]{32})$", console, re.MULTILINE)
    return {int(number): digest for number, digest in found}


def guest_log_round(
    directory: Path, seed: int, *, points: int = 50, fsck: int = 8
) -> dict[str, int | list[float]]:
    """Cut at least so many points under a guest's load, and judge each by the guest's log.

    Args:
        directory: an empty one.
        seed: of the moments at which points are asked for.
        points: as many, at least.
        fsck: of so many of them the file system is checked too, and every acknowledged file.

    Raises:
        AssertionError: a point is no prefix, an acknowledged file is not there, or the core has
            flushed less often than the guest.
    """
    rng = random.Random(seed)
    log, trace = directory / "write.log", directory / "trace"
    log.touch()
    options = ["-D", str(trace), "-msg", "timestamp=on"]
    for event in writelog.TRACE:
        options += ["-trace", f"enable={event}"]
    with MountedSite(directory, options=OPTIONS) as site:
        source = site.add_image("web01", SIZE)
        make_fs("ext4", source)
        initial = source.read_bytes()
        site.init().mount()
        site.wait_shipped("web01")
        before = syncs(site)
        disk = Disk(site.image("web01"), write_log=log)
        with Guest([disk], SCRIPT, directory, options=options) as guest:
            run = _drive(site, guest, rng, points)
            guest.wait_exit()
            run.acked = acknowledged(guest.console)
        site.wait_shipped("web01")
        entries = writelog.read_entries(log)
        timed = writelog.timed(entries, traced := writelog.read_trace(trace))
        flushes = [one.end for one in timed if one.entry.flags & writelog.FLUSH]
        # QEMU flushes again what another process wrote while it flushed.
        assert syncs(site) - before >= len(flushes), (
            f"{len(flushes)} flushes of the guest, {syncs(site) - before} of the core"
        )
        live = site.image("web01").read_bytes()
        assert live == writelog.replay(entries, initial), "the live image is not the log's"
        oracle = PrefixOracle(timed, initial)
        images = list(_points(site))
        wrong = _judge(images, oracle, flushes, traced)
        assert images[-1][0].read_bytes() == live, "the last point is not the live image"
        for image, document in rng.sample(images[1:], min(fsck, len(images) - 1)):
            known = run.asked.get(int(document["epoch"]), 0)
            wrong += check_files(image, known, run.acked, directory / "fsck")
        for epoch, known in list(run.asked.items())[-3:]:
            image = next(path for path, d in images if d["epoch"] == epoch)
            wrong += check_files(image, known, run.acked, directory / "fsck")
    assert not wrong, "\n".join(wrong)
    assert len(images) > points
    discards = sum(bool(e.flags & writelog.DISCARD) for e in entries)
    return {
        "points": len(images), "asked": len(run.asked), "writes": len(entries) - len(flushes),
        "flushes": len(flushes), "discards": discards, "files": len(run.acked), "violations": 0,
    }  # fmt: skip


def syncs(site: MountedSite) -> int:
    """Return how many flushes the core has carried out."""
    return int(site.json("status")["requests"]["syncs"])


def _drive(site: MountedSite, guest: Guest, rng: random.Random, points: int) -> Run:
    """Ask for points at odd moments until there are enough, then have the guest stop."""
    run = Run({})
    guest.wait_line(r"^ACK 1 ")
    end = time.monotonic() + 300
    while len(site.points("web01")) <= points and time.monotonic() < end:
        known = acknowledged(guest.console)
        if rng.random() < 0.3:
            point = site.json("point", "create", "web01")["points"][0]
            run.asked[point["epoch"]] = len(known)
        guest.wait_line(rf"^(ACK {len(known) + rng.randrange(1, 4)} |ACK 600 )")
    guest.send("stop")
    return run


def _points(site: MountedSite) -> Iterator[tuple[Path, dict[str, Any]]]:
    for image in site.point_images("web01"):
        yield image, json.loads((image.parent / "point.json").read_text())


def _judge(
    images: list[tuple[Path, dict[str, Any]]], oracle: PrefixOracle, flushes: list[int],
    trace: writelog.Trace,
) -> list[str]:  # fmt: skip
    """Return what is wrong: no prefix, or one without the last flush before the point's time."""
    wrong, earliest = [], 0
    for image, document in images:
        now = trace.before(time_ns(document["time"]))
        flushed = max((end for end in flushes if end <= now), default=0)
        try:
            instants = oracle.check(image, (max(flushed, earliest), 2**62))
            earliest = instants[0][0]
        except NotACutError as error:
            wrong.append(f"epoch {document['epoch']}: {error.kind}: {error}")
    return wrong


def time_ns(text: str) -> int:
    """Return the wall clock's time of a point's document, which is cut to the millisecond."""
    when = datetime.fromisoformat(text)
    return int(when.timestamp()) * 10**9 + when.microsecond * 1000


def check_files(point: Path, known: int, acked: dict[int, str], directory: Path) -> list[str]:
    """Replay a copy's journal, check it, and return which acknowledged files are not right.

    The host's kernel is not asked: e2fsck replays, debugfs takes the files out.
    """
    directory.mkdir()
    copy, files = directory / "copy.img", directory / "files"
    wrong = []
    try:
        run_tool(["cp", "--sparse=always", point, copy])
        copy.chmod(0o600)
        run_tool(["e2fsck", "-p", "-E", "journal_only", copy])
        run_tool(["e2fsck", "-f", "-n", copy])
        files.mkdir()
        run_tool(["debugfs", "-R", f"rdump / {files}", copy])
        for number in range(1, known + 1):
            path = files / f"acked{number}"
            found = hashlib.md5(path.read_bytes()).hexdigest() if path.exists() else "no file"
            if found != acked[number]:
                wrong.append(f"{point}: file {number} of {known}: {found}, not {acked[number]}")
    finally:
        run_tool(["rm", "-r", directory])
    return wrong
