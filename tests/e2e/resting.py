"""A mounted file system that rests: writers in it, and what its points are without log replay."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tests.e2e.loopdev import ToolError, attached, make_fs, mounted, run_tool
from tests.e2e.mounted import MountedSite

SIZES = {"ext4": 96 << 20, "xfs": 320 << 20}


class Writers:
    """Threads that make, extend, rename and remove files until the block ends.

    ``count`` grows with every file that is durable; ``longest_s`` is the longest that one took.
    """

    def __init__(self, root: Path, threads: int = 2) -> None:
        self._root = root
        self._stopped = False
        self._changed = threading.Condition()
        self._errors: list[BaseException] = []
        self.count = 0
        self.longest_s = 0.0
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"writer{number}")
            for number in range(threads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def wait_more(self, more: int, timeout_s: float = 60) -> None:
        """Return once so many more files are durable: writes go on."""
        with self._changed:
            goal = self.count + more
            done = self._changed.wait_for(lambda: self._errors or self.count >= goal, timeout_s)
        assert done, f"writes do not go on: {goal - self.count} of {more} are missing"

    def _run(self, number: int) -> None:
        home = self._root / f"writer{number}"
        home.mkdir()
        turn = 0
        try:
            while not self._stopped:
                turn += 1
                began = time.monotonic()
                path = home / f"{turn % 40}.new"
                with path.open("wb") as file:
                    file.write(bytes([turn % 256]) * (4096 * (turn % 7 + 1)))
                    os.fsync(file.fileno())
                path.rename(home / f"{turn % 40}")
                if turn % 5 == 0:
                    (home / f"{(turn - 3) % 40}").unlink(missing_ok=True)
                with self._changed:
                    self.count += 1
                    self.longest_s = max(self.longest_s, time.monotonic() - began)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised at the end of the block
            with self._changed:
                self._errors.append(error)
                self._changed.notify_all()


@contextmanager
def on_disk(site: MountedSite, kind: str, root: Path, disk: str = "web01") -> Iterator[Path]:
    """Make a file system on a live disk of a mount, through a loop device, and mount it."""
    with attached(site.image(disk)) as device:
        make_fs(kind, device)
        with mounted(device, root, kind=kind) as directory:
            yield directory


def unclean(kind: str, point: Path, directory: Path, *, trusted: bool = True) -> str:
    """Say why the file system in a point needs its log, or nothing: it is clean without.

    Clean: it says so itself, a check that replays nothing finds nothing, and mounted without
    its log it has the same files, with the same bytes, as mounted with it. What a guest wrote is
    not ``trusted``: this host's kernel does not mount it.
    """
    says = _said_by_ext4(point) if kind == "ext4" else _said_by_xfs(point)
    if says or not trusted:
        return says
    copy = directory / "copy.img"
    run_tool(["cp", "--sparse=always", point, copy])
    copy.chmod(0o600)
    skip, more = (["noload"], []) if kind == "ext4" else (["norecovery", "nouuid"], ["nouuid"])
    try:
        with (
            attached(point, read_only=True, direct=False) as device,
            mounted(device, directory / "raw", kind=kind, options=["ro", *skip]) as root,
        ):
            unplayed = tree(root)
        with (
            attached(copy) as device,
            mounted(device, directory / "played", kind=kind, options=more) as root,
        ):
            played = tree(root)
    except (ToolError, OSError) as error:
        return str(error)
    finally:
        copy.unlink()
    return "" if played == unplayed else "other files without the log"


def _said_by_ext4(point: Path) -> str:
    if "needs_recovery" in run_tool(["dumpe2fs", "-h", point]):
        return "needs_recovery"
    try:
        run_tool(["e2fsck", "-f", "-n", point])
    except ToolError as error:
        return str(error)
    return ""


def _said_by_xfs(point: Path) -> str:
    """Return what a check finds beyond the counters of the superblock.

    A freeze leaves these in the log on purpose, so that whoever mounts a snapshot clears
    what was deleted while it was open (fs/xfs/xfs_super.c: xfs_fs_freeze).
    """
    done = subprocess.run(
        ["xfs_repair", "-n", "-f", point], capture_output=True, text=True, check=False, timeout=120
    )
    usual = re.compile(
        r"Phase \d|\s+- |No modify flag|Cannot get host|Repair may fail|the image and|ALERT: The "
        r"filesystem has valuable|ignored because|which may be resolved|sb_(fdblocks|icount|ifree) "
    )
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    return "; ".join(line for line in lines if line.strip() and not usual.match(line))


def is_frozen(root: Path, limit_s: float = 2.0) -> bool:
    """Whether a write to a mounted file system is held up; waits for it in a process."""
    probe = subprocess.Popen(["touch", root / ".probe"])
    try:
        probe.wait(limit_s)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.wait()
        return True
    return False


def tree(root: Path) -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name] = path.read_bytes() if path.is_file() else None
    return found
