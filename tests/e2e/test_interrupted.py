"""Commands that ask a daemon, interrupted while each of their requests is under way.

The daemon goes on with what it was asked; the same command, given again, finds that it is done,
or does it. Commands that work on a vault themselves are in tests/tools/test_interrupted.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.e2e.asking import ask
from tests.e2e.gauges import assert_same, write_at
from tests.e2e.mounted import MountedSite
from tests.e2e.test_relocation import DISK, Sites, refuses_writes, vault_record

pytestmark = [pytest.mark.e2e, pytest.mark.root]

SOON_S = 0.005
"""As long as an answer takes that is there already; what is asked for takes longer, or not."""


@contextmanager
def interruption(number: int) -> Iterator[None]:
    """Send SIGINT while the request of this number, from 1 on, waits for its answer."""
    seen = 0
    plain = httpx.HTTPTransport.handle_request

    def handle(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        nonlocal seen
        seen += 1
        if seen != number:
            return plain(transport, request)
        timer = threading.Timer(SOON_S, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            plain(transport, request).read()
            threading.Event().wait(10)  # an answer that came sooner is not heard
            raise AssertionError("no interruption")
        finally:
            timer.join()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx.HTTPTransport, "handle_request", handle)
        yield


class Walk:
    """Gives commands to sites, interrupted at each of their requests."""

    def __init__(self) -> None:
        self.moments: dict[str, int] = {}

    def __call__(
        self, site: MountedSite, *line: str, is_done: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Interrupt it at each request, and return how it ended when it was not.

        ``is_done``: what it says, with exit 3 or 4, where an earlier one has done it.
        """
        what = " ".join(line[:2])
        for number in range(1, 100):
            with interruption(number):
                result = ask(["-m", str(site.mountpoint), *line], site.environ)
            if result.returncode != 130:
                break
            self.moments[what] = self.moments.get(what, 0) + 1
            assert result.stderr.lstrip("\n") == "vdiskfs: interrupted\n", line
        if result.returncode in (3, 4) and is_done:
            assert is_done in result.stderr
        else:
            assert result.returncode == 0, (line, result)
        return result


def test_protection_and_tests_of_failovers(sites: Sites, tell: Callable[[str], None]) -> None:
    home, away, walk = sites.home, sites.away, Walk()
    walk(home, "disk", "unprotect", DISK, is_done=f"no disk {DISK} is protected here")
    assert [row["here"] for row in home.json("disk", "list")["disks"]] == [False]
    walk(home, "disk", "protect", DISK, is_done=f"{DISK}.img: is protected already")
    home.wait_shipped(DISK)
    walk(home, "point", "create", DISK, "--wait")
    walk(away, "failover", "test", DISK, "--name", "drill", is_done="is a failover drill already")
    write_at(sites.copy, 0, os.urandom(8192))
    walk(away, "failover", "cleanup", "drill", is_done="no failover drill here")
    assert away.json("failover", "list")["failovers"] == []
    assert_same(home.point(DISK), home.image(DISK))
    home.run("vault", "check", "--read-data", "--vault", home.vault)
    tell(f"interrupted: {walk.moments}")
    assert sum(walk.moments.values()) >= 5


def test_a_failover_and_the_way_home(sites: Sites, tell: Callable[[str], None]) -> None:
    """No step is made twice: the generations are those of one failover and one failback."""
    home, away, walk = sites.home, sites.away, Walk()
    live = home.image(DISK)
    walk(away, "failover", "start", DISK, is_done="not possible in state FailedOver")
    [found] = away.json("failover", "list")["failovers"]
    name = found["name"]
    assert found["state"] == "FailedOver"
    walk(away, "failover", "commit", name, is_done="not possible in state Committed")
    write_at(sites.copy, 0, os.urandom(8192))
    walk(away, "reprotect", DISK, is_done="not possible in state FailbackReady")
    away.wait_shipped(DISK)
    content = sites.copy.read_bytes()
    walk(home, "failback", "start", DISK, is_done="not possible in state FailingBack")
    walk(home, "failback", "complete", DISK, is_done="not possible in state FailbackUncommitted")
    assert refuses_writes(sites.copy)
    walk(home, "failback", "commit", DISK, is_done="not possible in state FailedBack")
    home.wait_shipped(DISK)
    assert live.read_bytes() == content
    write_at(live, 0, b"at home")
    home.wait_shipped(DISK)
    walk(away, "failover", "cleanup", name, is_done=f"no failover {name} here")
    assert home.points(DISK)[-1]["generation"] == 3
    assert vault_record(sites)["moved"] is None
    home.run("vault", "check", "--read-data", "--vault", home.vault)
    tell(f"interrupted: {walk.moments}")
    assert sum(walk.moments.values()) >= 8
