"""A daemon short of descriptors or memory: guests write on, all converges."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.e2e.gauges import assert_same, digests
from tests.e2e.mounted import MountedSite
from tests.e2e.test_full_disk import wait_same, write_random

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.slow]

MIB = 1 << 20
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"


def descriptors(pid: int) -> int:
    """How many descriptors a process has open; the next one is at least this."""
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextmanager
def descriptor_limit(pid: int, limit: int) -> Iterator[None]:
    """Limit a process's descriptors, and give it back what it had."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_the_daemon_raises_its_limit_of_descriptors(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        with MountedSite(tmp_path) as site:
            site.init().mount()
            assert resource.prlimit(site.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_descriptors_what_needs_one_fails_and_the_guest_writes_on(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site, ExitStack() as opened:
        source = site.add_image("web01", 4 * MIB, os.urandom(4 * MIB))
        site.init().mount().wait_shipped("web01")
        for seed in range(6):
            write_random(site.image("web01"), seed * MIB // 2, 8192, seed)
            site.run("point", "create", "web01", "-m", site.mountpoint)
        points = site.point_images("web01")
        guest = opened.enter_context(site.image("web01").open("r+b", buffering=0))
        log = site.state / "daemon.log"
        with descriptor_limit(site.pid, descriptors(site.pid) + 4):
            with pytest.raises(OSError, match="Too many open files") as caught:
                for point in points:
                    opened.enter_context(point.open("rb")).read(4096)
            assert caught.value.errno == errno.EMFILE
        for point in points:
            assert point.stat().st_size == 4 * MIB
        seen = len(log.read_text())
        with descriptor_limit(site.pid, 3):  # not one more, whatever is closed
            for turn in range(20):
                os.pwrite(guest.fileno(), os.urandom(MIB), turn % 4 * MIB)
                os.fsync(guest.fileno())
            failed = "disk web01: "
            site.wait(
                "the log says it of the disk",
                lambda: any(
                    failed in line and "Too many open files" in line
                    for line in log.read_text()[seen:].splitlines()
                ),
            )
            os.pwrite(guest.fileno(), os.urandom(MIB), 0)
        wait_same(site)
        assert_same(site.point("web01"), source)
        site.wait("the health is good again", lambda: site.disk("web01")["health"] == "Normal")
        for point in points:
            point.read_bytes()
        assert "Traceback" not in log.read_text()


@contextmanager
def memory_limit(pid: int, spare: int) -> Iterator[None]:
    """Let a process allocate so many bytes more than it has, then give it back what it had."""
    [line] = re.findall(r"VmData:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    before = resource.prlimit(pid, resource.RLIMIT_DATA)
    resource.prlimit(pid, resource.RLIMIT_DATA, (int(line) * 1024 + spare, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_DATA, before)


def test_without_memory_the_guest_writes_on_and_all_converges(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    with MountedSite(tmp_path, options=FAST) as site, ExitStack() as opened:
        source = site.add_image("web01", 256 * MIB, os.urandom(MIB))
        site.init().mount().wait_shipped("web01")
        points = site.point_images("web01")
        before = digests(points)
        guest = opened.enter_context(site.image("web01").open("r+b", buffering=0))
        log = site.state / "daemon.log"
        seen = len(log.read_text())
        pid = site.pid

        def is_short() -> bool:
            said = log.read_text()[seen:]
            words = ("MemoryError", "Cannot allocate memory", "can't start new thread",
                     "a task failed")  # fmt: skip
            return any(word in said for word in words)

        with memory_limit(pid, 64 << 10):
            # What it has freed it may use; epochs far larger than any before need more.
            for turn in range(256 * 16):
                data = b"".join(os.urandom(64) + bytes(4032) for _ in range(256))
                os.pwrite(guest.fileno(), data, turn % 256 * MIB)
                if turn % 256 == 255:
                    os.fsync(guest.fileno())
                    assert len(os.pread(guest.fileno(), MIB, 0)) == MIB
                    if is_short():
                        break
            site.wait("memory was short", is_short)
            os.pwrite(guest.fileno(), os.urandom(MIB), 0)
        failed = "a task failed" in log.read_text()
        site.wait_successor(pid if failed else 0, {"web01"})
        wait_same(site)
        assert_same(site.point("web01"), source)
        site.wait("the health is good again", lambda: site.disk("web01")["health"] == "Normal")
        assert digests(points) == before
        tell(f"without memory: the daemon {'went on' if site.pid == pid else 'was replaced'}")
