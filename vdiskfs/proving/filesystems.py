"""The file systems in an image, checked as after a power loss: journal replayed, then read.

The image is written to: it is to be a copy that is thrown away. Nothing that it holds is
executed, and no name in it is followed; xfs alone is mounted, for its log, where nothing in it
can be a device or a program (SECURITY.md says it in these words, and is to be kept true).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from vdiskfs.catalog.proofs import FAIL, INCONCLUSIVE, PASS
from vdiskfs.errors import LocalError

_LIMIT = 16 << 10
_SECTOR = 512
_IDLE = ("nice", "-n", "19", "ionice", "-c", "3")


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found at one place of an image: a file system, or what is none.

    ``place`` is ``disk`` or ``partition N``; ``kind`` as blkid(8) names it, empty: unknown;
    ``ok`` None: it was not checked.
    """

    place: str
    kind: str
    ok: bool | None
    detail: str

    def __str__(self) -> str:
        """One line for people."""
        how = {True: "clean", False: "DAMAGED", None: "not checked"}[self.ok]
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.place} ({self.kind or 'unknown'}) {how}{detail}"


@dataclass(frozen=True, slots=True)
class _Area:
    place: str
    offset: int
    size: int


async def check_image(image: Path, say: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """Check the file systems of a writable image: of its partitions, or of the whole of it.

    ext2, ext3, ext4, xfs and btrfs are checked. The image is changed where a journal is replayed.

    Args:
        image: a raw image; nobody else uses it.
        say: is told what is looked at.

    Raises:
        LocalError: this user may not attach loop devices, or a tool that finds out is missing.
    """
    found: list[Finding] = []
    for area in await _areas(image):
        kind = await _kind(image, area)
        say(f"{area.place}: {kind or 'no file system'}")
        found.append(await _check(image, area, kind))
    return found


async def let_go(image: Path) -> None:
    """Detach the loop devices that a check which was killed has left on an image.

    Raises:
        LocalError: a tool is missing.
    """
    words = ("losetup", "--noheadings", "--output", "NAME", "--associated")
    done = await _run(*words, image)
    for device in done.stdout.split():
        await _run("umount", "--quiet", "--all-targets", device)
        await _run("losetup", "--detach", device)


def verdict(findings: Sequence[Finding]) -> tuple[str, str]:
    """Return the outcome of a check, and its reason: one line."""
    reason = "; ".join(map(str, findings)) or "nothing is in it"
    if any(one.ok is False for one in findings):
        return FAIL, reason
    if any(one.ok for one in findings):
        return PASS, reason
    return INCONCLUSIVE, reason


async def _areas(image: Path) -> list[_Area]:
    """Return the partitions of an image; the whole of it, where it has none."""
    # By a tool: a thread of the daemon that waits for its own mount could never be ended.
    size = await _run("stat", "--format", "%s", image)
    if size.returncode != 0:
        raise LocalError(f"{image}: {_last(size)}")
    whole = _Area("disk", 0, int(size.stdout))
    words = ("partx", "--raw", "--noheadings", "--output", "NR,START,SECTORS")
    done = await _run(*words, image)
    if done.returncode != 0:
        return [whole]  # no partition table
    areas = []
    for line in done.stdout.splitlines():
        number, start, sectors = (int(word) for word in line.split())
        areas.append(_Area(f"partition {number}", start * _SECTOR, sectors * _SECTOR))
    inside = [one for one in areas if one.size > 0 and one.offset + one.size <= whole.size]
    return inside or [whole]


async def _kind(image: Path, area: _Area) -> str:
    done = await _run(
        "blkid", "--probe", "--offset", area.offset, "--size", area.size,
        "--match-tag", "TYPE", "--output", "value", image,
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else ""


async def _check(image: Path, area: _Area, kind: str) -> Finding:
    how = _CHECKS.get(kind)
    if how is None:
        return Finding(area.place, kind, None, "")
    tool, check = how
    if shutil.which(tool) is None:
        return Finding(area.place, kind, None, f"{tool} is not installed")
    async with _loop_device(image, area) as device:
        ok, detail = await check(device)
    return Finding(area.place, kind, ok, detail)


async def _check_ext(device: str) -> tuple[bool, str]:
    replayed = await _run(*_IDLE, "e2fsck", "-y", "-E", "journal_only", device)
    if replayed.returncode & ~1:
        return False, f"its journal cannot be replayed: {_last(replayed)}"
    done = await _run(*_IDLE, "e2fsck", "-f", "-n", device)
    return (True, "") if done.returncode == 0 else (False, _last(done))


async def _check_xfs(device: str) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory(prefix="vdiskfs-proof-") as directory:
        options = "nouuid,nosuid,nodev,noexec,noatime"
        try:
            done = await _run("mount", "-t", "xfs", "-o", options, device, directory)
        finally:
            with trio.CancelScope(shield=True):
                await _run("umount", "--quiet", directory)
        if done.returncode != 0:
            return False, f"its log cannot be replayed: {_last(done)}"
    done = await _run(*_IDLE, "xfs_repair", "-n", device)
    return (True, "") if done.returncode == 0 else (False, _last(done))


async def _check_btrfs(device: str) -> tuple[bool, str]:
    # Not mounted: the kernel would take it for the disk that it is a copy of. Its log holds only
    # what was synced since the last commit, and the rest is whole without it.
    done = await _run(*_IDLE, "btrfs", "check", "--readonly", device)
    return (True, "") if done.returncode == 0 else (False, _last(done))


_CHECKS = {
    "ext2": ("e2fsck", _check_ext), "ext3": ("e2fsck", _check_ext), "ext4": ("e2fsck", _check_ext),
    "xfs": ("xfs_repair", _check_xfs), "btrfs": ("btrfs", _check_btrfs),
}  # fmt: skip


@asynccontextmanager
async def _loop_device(image: Path, area: _Area) -> AsyncIterator[str]:
    words = ("losetup", "--find", "--show", "--offset", area.offset, "--sizelimit", area.size)
    try:
        done = await _run(*words, image)
    except BaseException:
        with trio.CancelScope(shield=True):
            await let_go(image)  # it may have been killed when the device was there already
        raise
    if done.returncode != 0:
        raise LocalError(
            f"{image}: no loop device: {_last(done)}", hint="be root; is /dev/loop-control there?"
        )
    device = done.stdout.strip()
    try:
        yield device
    finally:
        with trio.CancelScope(shield=True):
            await _run("losetup", "--detach", device)


async def _run(*words: str | int | Path) -> subprocess.CompletedProcess[str]:
    """Run a tool; killed when this is cancelled.

    Raises:
        LocalError: it is not installed.
    """
    # The tools of administrators lie where not every user's PATH leads.
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    environ = {"LC_ALL": "C", "PATH": path}  # and no credentials
    try:
        done = await trio.run_process(
            [os.fspath(word) if isinstance(word, Path) else str(word) for word in words],
            capture_stdout=True, capture_stderr=True, check=False, env=environ,
        )  # fmt: skip
    except FileNotFoundError:
        raise LocalError(f"{words[0]} is not installed", hint="vdiskfs doctor") from None
    texts = [part[-_LIMIT:].decode(errors="replace") for part in (done.stdout, done.stderr)]
    return subprocess.CompletedProcess(done.args, done.returncode, texts[0], texts[1])


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stdout + done.stderr).split("\n") if line.strip()]
    return lines[-1][:200] if lines else f"exit {done.returncode}"
