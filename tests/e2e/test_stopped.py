"""A daemon is stopped by a signal, its disk is taken meanwhile, and it is continued."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.gauges import digests
from tests.e2e.test_two_writers import Sites, branches, refused

pytestmark = [pytest.mark.e2e, pytest.mark.root]

MIB = 1 << 20
SIZE = 4 * MIB
PAGE = 4096
PAGES = 128  # that are written; by the others the disk is known again


# A program of its own: a process that has the image open cannot start another one, which closes
# it on its way, while nobody answers.
WRITER = """
import os, struct, sys
image, answered, pages, size = os.open(sys.argv[1], os.O_RDWR), 0, *map(int, sys.argv[2:])
progress = os.fdopen(1, "wb", buffering=0)
try:
    while True:
        number = struct.pack("<Q", answered + 1)
        os.pwrite(image, number * (size // 8), (answered + 1) % pages * size)
        os.pwrite(1, number, 0)
        answered += 1
except OSError as error:
    sys.exit(error.errno)
"""


class Counter:
    """Writes one page after the other, each full of its number, until it gets an error."""

    def __init__(self, image: Path, progress: Path) -> None:
        self._progress = progress
        with progress.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WRITER, image, str(PAGES), str(PAGE)], stdout=out
            )

    @property
    def answered(self) -> int:
        """The number of the last write that was answered; the first is 1."""
        return int.from_bytes(self._progress.read_bytes(), "little")


def content(number: int) -> bytes:
    """Return the page that has this number."""
    return struct.pack("<Q", number) * (PAGE // 8)


def numbers(image: bytes) -> list[int]:
    """Return the number of each page; all of a page is of one write."""
    found = []
    for at in range(0, PAGES * PAGE, PAGE):
        (number,) = struct.unpack_from("<Q", image, at)
        assert image[at : at + PAGE] == content(number)
        found.append(number)
    return found


def hold(pid: int) -> None:
    """Stop a process, and wait until each of its threads stands."""
    os.kill(pid, signal.SIGSTOP)
    while any(state(task) != "T" for task in Path(f"/proc/{pid}/task").iterdir()):
        pass


def state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(") ")[2].split()[0]


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process stopped, and continue it whatever happens."""
    hold(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    two = Sites(tmp_path, f"file://{tmp_path}/vault", {})
    with two.a, two.b:
        yield two


def test_a_daemon_that_is_displaced_while_it_is_stopped_writes_a_branch(
    sites: Sites, tmp_path: Path
) -> None:
    a, b = sites.a, sites.b
    a.add_image("web01", SIZE, bytes(PAGES * PAGE) + os.urandom(SIZE - PAGES * PAGE))
    a.init().mount().wait_shipped("web01")
    keeper = a.keeper
    guest = Counter(a.image("web01"), tmp_path / "progress")
    try:
        a.wait("a few points", lambda: len(a.points("web01")) > 3)
        with stopped(a.pid):
            before = guest.answered
            # What the other site goes on with: all that was answered.
            shutil.copy(a.source / "web01.img", b.source / "web01.img")
            assert "site-a owns it" in refused(b)
            b.mount("--force").wait_shipped("web01")
            main = digests(b.point_images("web01"))
            taken = b.image("web01").read_bytes()
            assert b.disk("web01")["generation"] == 2
            assert guest.answered == before
        assert guest.process.wait(60) == errno.EROFS
    finally:
        guest.process.kill()
        guest.process.wait()
    assert guest.answered > before
    assert (a.keeper, a.json("status")["pid"]) == (keeper, a.pid)  # nobody was started anew
    a.wait("displaced", lambda: a.disk("web01")["state"] == "Displaced")
    assert a.disk("web01")["health"] == "Critical"
    a.wait("shipped", lambda: a.disk("web01")["dirty_bytes"] == 0
           and a.disk("web01")["spooled_bytes"] == 0)  # fmt: skip
    # The main line is what it was: no page of it is from after the stop, no point is another.
    assert b.point("web01").read_bytes() == taken
    assert max(numbers(taken)) in (before, before + 1)  # one may have been in flight
    now = digests(b.point_images("web01"))
    assert {path: now[path] for path in main} == main
    # What the stopped one wrote later is a line of its own, all of it, at both sites.
    (branch,) = branches(a)
    left = (a.source / "web01.img").read_bytes()
    assert max(numbers(left)) == guest.answered
    for site in (a, b):
        seen = site.point(f"web01@{branch['name']}").with_name("web01.img")
        site.wait("the branch is seen", seen.exists)
        assert seen.read_bytes() == left
        assert site.point("web01").read_bytes() == taken
    for point in b.point_images(f"web01@{branch['name']}"):
        written = numbers(point.with_name("web01.img").read_bytes())
        # One writer: all up to some number, and nothing later.
        assert sorted(written) == [
            *[0] * max(0, PAGES - max(written)),
            *range(max(1, max(written) - PAGES + 1), max(written) + 1),
        ]
    b.wait_shipped("web01")
    a.run("vault", "check", "--read-data", "--vault", a.vault)
