"""What this process and its children hold: mounts, loop devices, processes, threads, files."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from dataclasses import dataclass, fields
from pathlib import Path

# Idle workers that a library keeps for the next call, and files that it opens once.
_KEPT_THREADS = re.compile(r"Trio (worker )?thread|asyncio_|OpenBLAS|pytest[-_]timeout|Tmr")
_KEPT_FILES = re.compile(r"/dev/u?random|/dev/null|/dev/pts/|/dev/tty|anon_inode:\[io_uring\]")


@dataclass(frozen=True)
class Holdings:
    """Names of everything held, each kind a set of lines for people."""

    mounts: frozenset[str]
    loops: frozenset[str]
    processes: frozenset[str]
    threads: frozenset[str]
    files: frozenset[str]
    temporary: frozenset[str]

    def beyond(self, other: Holdings) -> list[str]:
        """Return what is held here and not there, one line each."""
        return [
            f"{field.name}: {line}"
            for field in fields(self)
            for line in sorted(getattr(self, field.name) - getattr(other, field.name))
        ]


def holdings(base: Path) -> Holdings:
    """Look at what is held now; of mounts and loop devices only those under ``base``."""
    return Holdings(
        _mounts(str(base)), _loops(str(base)), _processes(), _threads(), _files(), _temporary()
    )


def _mounts(base: str) -> frozenset[str]:
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").split("\n")
    points = (line.split()[4] for line in lines if line)
    return frozenset(p for p in points if p.startswith(base))


def _loops(base: str) -> frozenset[str]:
    found = set()
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = file.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            continue  # detached while we looked
        if backing.startswith(base):
            found.add(f"{file.parts[3]} on {backing}")
    return frozenset(found)


def _processes() -> frozenset[str]:
    """Return processes with our mark, however far they got away from us."""
    mark = b"VDISKFS_TEST_MARK=" + os.environ.get("VDISKFS_TEST_MARK", "-").encode()
    found = set()
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit() or int(directory.name) == os.getpid():
            continue
        try:
            if mark in (directory / "environ").read_bytes().split(b"\0"):
                line = (
                    (directory / "cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode(errors="replace")
                )
                found.add(f"{directory.name}: {line.strip()[:160]}")
        except OSError:
            continue  # gone, or not ours
    return frozenset(found)


def _threads() -> frozenset[str]:
    python = (t.name for t in threading.enumerate() if t is not threading.main_thread())
    found = {name for name in python if not _KEPT_THREADS.search(name)}
    # Threads of the C core are not Python's.
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if name.startswith("vdf"):
            found.add(f"{name} ({task.name})")
    return frozenset(found)


def _files() -> frozenset[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")  # noqa: PTH115
        except OSError:
            continue  # the listing's own descriptor
        if not _KEPT_FILES.search(target) and "/fd" not in target:
            found.add(f"{number} -> {target}")
    return frozenset(found)


def _temporary() -> frozenset[str]:
    return frozenset(str(p) for p in Path(tempfile.gettempdir()).glob("*") if _is_test_directory(p))


def _is_test_directory(path: Path) -> bool:
    """Only the directory that conftest set: /tmp belongs to everybody."""
    return path.parent.parent.name.startswith(("pytest-", "popen-"))
