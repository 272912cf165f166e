"""Who uses a mount: processes, loop devices, and mounts within it.

Found by the paths that /proc gives and never by looking at the files themselves: the mount
may be our own, and a request to it would wait for us. Blocks; call it from a thread.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_LOOPS = Path("/sys/block")
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountUser:
    """Somebody who keeps a mount busy. ``pid`` is 0 for a loop device or a mount."""

    pid: int
    name: str
    path: str

    def __str__(self) -> str:
        """As in ``qemu-system-x86 (pid 4711): /mnt/vd/disks/web01.img``."""
        who = f"{self.name} (pid {self.pid})" if self.pid else self.name
        return f"{who}: {self.path}"


def users_of(*mountpoints: str) -> list[MountUser]:
    """Return who uses anything below the mountpoints, this process left out.

    Processes of others cannot be looked into without being root.
    """
    tops = [_top(Path(path)) for path in mountpoints]
    found: list[MountUser] = []
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            paths = sorted({path for path in _paths(entry) if _is_below(path, tops)})
            found += [MountUser(int(entry.name), _name(entry), path) for path in paths]
    found += [MountUser(0, name, path) for name, path in _loops() if _is_below(path, tops)]
    found += [
        MountUser(0, "mount", path)
        for path in mounted_paths()
        if _is_below(path, tops) and path not in tops
    ]
    return sorted(found, key=lambda user: (user.pid, user.path))


def _top(mountpoint: Path) -> str:
    """The real path, without asking the mount for anything: it may be this process's own."""
    mounted = set(mounted_paths()) - {"/"}
    top = next(
        (one for one in (mountpoint, *mountpoint.parents) if str(one) in mounted), mountpoint
    )
    return str(top.parent.resolve() / top.name / mountpoint.relative_to(top))


def _is_below(path: str, tops: list[str]) -> bool:
    return any(path == top or path.startswith(top.rstrip("/") + "/") for top in tops)


def _paths(process: Path) -> Iterator[str]:
    """What a process holds, as far as we may see it and it has not ended meanwhile."""
    links = [process / "cwd", process / "root", process / "exe"]
    maps = ""
    with suppress(OSError):
        links += (process / "fd").iterdir()
        maps = (process / "maps").read_text(errors="surrogateescape")
    for link in links:
        with suppress(OSError):
            yield str(link.readlink())
    for line in maps.splitlines():
        columns = line.split(maxsplit=5)
        if len(columns) == 6:
            yield columns[5]


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text(errors="replace").strip()
    except OSError:
        return "?"


def _loops() -> Iterator[tuple[str, str]]:
    for loop in _LOOPS.glob("loop*"):
        try:
            yield f"/dev/{loop.name}", (loop / "loop/backing_file").read_text().rstrip("\n")
        except OSError:
            continue


def mounted_paths() -> Iterator[str]:
    """Yield every mountpoint of this mount namespace."""
    for line in (_PROC / "self/mountinfo").read_text(errors="surrogateescape").splitlines():
        yield _ESCAPE.sub(lambda match: chr(int(match[1], 8)), line.split()[4])
