"""What replication costs: stored bytes, requests, processor time, memory, others' latency."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.gauges import (
    added,
    assert_same,
    data_objects,
    overwrite_pages,
    processor_s,
    resident_bytes,
    total,
    vault_objects,
    write_at,
)
from tests.e2e.mounted import MountedSite
from tests.e2e.stoppable import stoppable_folder

pytestmark = [pytest.mark.e2e, pytest.mark.root]

GIB, TIB = 1 << 30, 1 << 40
COUNT = 2560
LIMIT = int(10.6 * (1 << 20))
# All writes of one round are one epoch, however slow the machine is at the moment.
ONE_EPOCH = "epoch_interval_s = 3600\nheartbeat_s = 3600\n"


def wait_for_data(site: MountedSite, vault: Path, disk: str, count: int) -> None:
    """Wait for the disk's new objects without asking the daemon, then until all is shipped."""
    where = f"disks/{site.disk(disk)['id']}/"
    site.wait(
        f"{disk} has {count} objects",
        lambda: sum(name.startswith(where) for name in data_objects(vault)) >= count,
    )
    site.wait_shipped(disk)


def overwrite(site: MountedSite, vault: Path, disk: str, seed: int) -> tuple[float, int, int]:
    """Do one round; return the daemon's processor time, the bytes and the objects stored.

    The time is that of sealing, capturing and shipping: it begins when the writes are answered.
    """
    where = f"disks/{site.disk(disk)['id']}/"
    before = data_objects(vault)
    count = sum(name.startswith(where) for name in before)
    overwrite_pages(site.image(disk), COUNT, seed)
    start_s = processor_s(site.pid)
    site.json("point", "create", disk, "--wait")
    wait_for_data(site, vault, disk, count + 1)
    spent_s = processor_s(site.pid) - start_s
    new = added(before, data_objects(vault))
    return spent_s, total(new), len(new)


def test_scattered_overwrites_cost_what_changed_whatever_the_size_of_the_disk(
    tmp_path: Path,
) -> None:
    with MountedSite(tmp_path, options=ONE_EPOCH) as site:
        vault = tmp_path / "vault"
        site.add_image("small", GIB)
        site.add_image("large", TIB)
        site.init().mount()
        for disk in ("small", "large"):
            site.wait_shipped(disk)
        rounds: dict[str, list[tuple[float, int, int]]] = {"small": [], "large": []}
        for seed in range(3):
            for disk, done in rounds.items():
                done.append(overwrite(site, vault, disk, seed))
        print(json.dumps(rounds))
        for small, large in zip(rounds["small"], rounds["large"], strict=True):
            assert max(small[1], large[1]) <= LIMIT
            assert abs(large[1] - small[1]) <= 0.01 * small[1]
            assert large[2] == small[2]
        # The cheapest round of each: what others do on the machine only ever adds.
        spent = {disk: min(one[0] for one in done) for disk, done in rounds.items()}
        # Counted in ticks of 10 ms. What follows the size is a thousand times as much.
        assert spent["large"] <= 1.5 * spent["small"] + 0.05, spent


def test_overwrites_that_are_sealed_every_second_still_cost_what_changed(tmp_path: Path) -> None:
    with MountedSite(tmp_path) as site:
        vault = tmp_path / "vault"
        site.add_image("web01", GIB)
        site.init().mount()
        site.wait_shipped("web01")
        before = data_objects(vault)
        for seed in range(4):  # several epochs, and what is joined of them
            epoch = site.disk("web01")["epoch"]
            overwrite_pages(site.image("web01"), COUNT // 4, seed)
            site.wait("an epoch", lambda last=epoch: site.disk("web01")["epoch"] > last)  # type: ignore[misc]
        site.wait_shipped("web01")
        stored = total(added(before, data_objects(vault)))
        print(f"{stored} bytes in {len(site.points('web01')) - 1} points")
        assert stored <= LIMIT


def heartbeats(site: MountedSite, vault: Path, count: int) -> None:
    """Wait for that many heartbeats of the site."""
    [path] = (vault / "sites").iterdir()  # an encrypted one has another name
    seen = {path.read_bytes()}

    def enough() -> bool:
        seen.add(path.read_bytes())
        return len(seen) > count

    site.wait(f"{count} heartbeats", enough)


def test_an_idle_disk_of_a_tebibyte_costs_no_request_no_time_and_little_memory(
    tmp_path: Path,
) -> None:
    with MountedSite(tmp_path, options="heartbeat_s = 1\n") as site:
        vault = tmp_path / "vault"
        site.add_image("large", TIB)
        site.init().mount()
        site.wait_shipped("large")
        heartbeats(site, vault, 1)
        before, start_s, since = vault_objects(vault), processor_s(site.pid), time.monotonic()
        heartbeats(site, vault, 6)
        spent_s, passed_s = processor_s(site.pid) - start_s, time.monotonic() - since
        after = vault_objects(vault)
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        memory = resident_bytes(site.pid)
        print(f"{spent_s:.2f} s in {passed_s:.1f} s, {memory >> 20} MiB, changed: {changed}")
        (heartbeat,) = changed
        assert heartbeat.startswith("sites/")
        assert spent_s < 0.02 * passed_s
        assert memory < 250 << 20


# ---- a vault that does not answer ------------------------------------------------------------

READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("open", flush=True)
sys.stdin.readline()
print("reading", flush=True)
sys.stdout.write(str(os.pread(fd, 4096, int(sys.argv[2])).hex()))
"""


@contextlib.contextmanager
def readers(image: Path, offsets: list[int]) -> Iterator[list[subprocess.Popen[str]]]:
    """Start processes that have the image open and read when they are told."""
    started: list[subprocess.Popen[str]] = []
    try:
        for offset in offsets:
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", READER, image, str(offset)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            started.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def is_waiting(process: subprocess.Popen[str]) -> bool:
    """Say whether the process sits in a read of a FUSE file."""
    call = Path(f"/proc/{process.pid}/syscall").read_text().split()
    return call[0] == "17"  # pread64 on x86-64


def median_us(image: Path, count: int = 600) -> float:
    """Return the median time of 4 KiB reads and writes, one at a time."""
    times = []
    with image.open("r+b", buffering=0) as file:
        for number in range(count):
            start = time.perf_counter_ns()
            if number % 2:
                os.pread(file.fileno(), 4096, number * 4096)
            else:
                os.pwrite(file.fileno(), b"x" * 4096, number * 4096)
            times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1000


def test_sixteen_reads_of_a_point_that_wait_for_the_vault_slow_nobody(tmp_path: Path) -> None:
    with (
        stoppable_folder(tmp_path / "server") as (folder, signal_server),
        MountedSite(tmp_path, vault=f"file://{folder}/vault") as site,
    ):
        content = os.urandom(32 << 20)
        site.add_image("web01", 32 << 20, content)
        site.add_image("other", 64 << 20)
        site.init().mount()
        for disk in ("web01", "other"):
            site.wait_shipped(disk)
        other = site.image("other")
        median_us(other)
        # The best of several medians: what others do on the machine only ever adds.
        alone = min(median_us(other) for _ in range(5))
        offsets = [number * (2 << 20) for number in range(16)]
        with readers(site.point("web01"), offsets) as waiting:
            signal_server(signal.SIGSTOP)
            try:
                for process in waiting:
                    assert process.stdin is not None
                    process.stdin.write("\n")
                    process.stdin.flush()
                site.wait("all wait", lambda: all(map(is_waiting, waiting)))
                beside = min(median_us(other) for _ in range(5))
                print(f"median {alone:.1f} us alone, {beside:.1f} us beside sixteen that wait")
                assert all(map(is_waiting, waiting))
                # Without room for them among the background requests nothing would be answered at all.
                assert beside <= 3 * alone
                # The mount answers as ever, and who waits may be interrupted.
                assert site.disk("other")["state"] == "Protected"
                waiting[0].kill()
                assert waiting[0].wait(10) == -signal.SIGKILL
            finally:
                signal_server(signal.SIGCONT)
            for process, offset in zip(waiting[1:], offsets[1:], strict=True):
                said, _ = process.communicate(timeout=60)
                assert said == f"reading\n{content[offset : offset + 4096].hex()}"
        site.wait_shipped("other")
        write_at(other, 0, b"y" * 4096)
        site.run("-m", site.mountpoint, "point", "create", "other", "--wait")
        assert_same(site.point("other"), other)
