"""The mounts of this host that run now: one small file each, written by its daemon.

``mount_entries`` is how the command line finds a daemon; ``write_entry`` and
``remove_entry`` are for the daemon. The directory belongs to one user and lies where it
is gone after a reboot. Nothing here is true for longer than the process it names: an
entry whose process is gone is removed by whoever reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from vdiskfs.errors import RefusedError

_ADDRESS_LIMIT = 107
"""Bytes of a path in the address of a Unix socket (unix(7)), without the NUL."""


@dataclass(frozen=True)
class MountEntry:
    """One running mount. ``pid_start`` tells the process from a later one with its number.

    ``keeper`` is the process that starts the daemon again, 0: none of ours.
    """

    mountpoint: str
    pid: int
    socket: str
    state: str
    vault: str
    site: str
    source: str | None
    pid_start: int = 0
    keeper: int = 0
    keeper_start: int = 0


@contextmanager
def address_of(socket: str | Path) -> Iterator[str]:
    """Give a name of a Unix socket's path that an address has room for, however deep it lies.

    Raises:
        OSError: its directory cannot be opened.
    """
    path = Path(socket)
    if len(os.fsencode(path)) <= _ADDRESS_LIMIT:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def registry_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of this user's entries. It need not exist."""
    uid = os.geteuid()
    if uid == 0:
        return Path("/run/vdiskfs")
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        return Path(runtime) / "vdiskfs"
    return Path(f"/tmp/vdiskfs-{uid}")  # noqa: S108 (whose it is gets checked before use)


def entry_path(mountpoint: str, directory: Path) -> Path:
    """Return the file of a mountpoint's entry; the mountpoint is a real, absolute path."""
    digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]
    return directory / f"{digest}.json"


def write_entry(entry: MountEntry, directory: Path | None = None) -> Path:
    """Make a mount known to this host's command line; replaces an older entry at once.

    Raises:
        RefusedError: the directory belongs to, or is open to, somebody else.
    """
    directory = registry_directory() if directory is None else directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(directory)
    path = entry_path(entry.mountpoint, directory)
    whole = replace(
        entry, pid_start=entry.pid_start or process_start(entry.pid),
        keeper_start=entry.keeper_start or process_start(entry.keeper),
    )  # fmt: skip
    partial = path.with_suffix(f".{os.getpid()}.new")
    partial.write_text(json.dumps(asdict(whole)), encoding="ascii")
    partial.rename(path)
    return path


def remove_entry(mountpoint: str, directory: Path | None = None) -> None:
    """Forget a mount. Nothing happens when it is not known."""
    directory = registry_directory() if directory is None else directory
    entry_path(mountpoint, directory).unlink(missing_ok=True)


def mount_entries(directory: Path | None = None) -> list[MountEntry]:
    """Return the mounts whose daemon lives, by mountpoint; remove the entries of the others.

    Raises:
        RefusedError: the directory belongs to, or is open to, somebody else.
    """
    directory = registry_directory() if directory is None else directory
    if not directory.is_dir():
        return []
    _check_private(directory)
    found = []
    for path in directory.glob("*.json"):
        entry = _read_entry(path)
        if entry is None or not (is_serving(entry) or is_alive(entry.keeper, entry.keeper_start)):
            path.unlink(missing_ok=True)
        else:
            found.append(entry)
    return sorted(found, key=lambda entry: entry.mountpoint)


def process_start(pid: int) -> int:
    """Return when a process started, in clock ticks since boot, or 0 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    # The second field is the program's name and may hold anything, so count from its end.
    rest = text.rpartition(")")[2].split()
    return int(rest[19]) if len(rest) > 19 and rest[0] not in ("Z", "X") else 0


def is_alive(pid: int, started: int = 0) -> bool:
    """Tell whether the process runs, and is the one that started then (0: any)."""
    now = process_start(pid) if pid > 0 else 0
    return now != 0 and started in (0, now)


def is_serving(entry: MountEntry) -> bool:
    """Tell whether the daemon lives; its keeper may be about to start the next one."""
    return is_alive(entry.pid, entry.pid_start)


def _read_entry(path: Path) -> MountEntry | None:
    """Return one entry, or None where the file is not (or no longer) one."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "pid": int,
        "pid_start": int,
        "keeper": int,
        "keeper_start": int,
        "source": (str, type(None)),
    }
    try:
        table = json.loads(path.read_text(encoding="ascii"))
        values = {item.name: table[item.name] for item in fields(MountEntry) if item.name in table}
        if any(not isinstance(value, kinds.get(key, str)) for key, value in values.items()):
            return None
        return MountEntry(**values)
    except (OSError, ValueError, TypeError):
        return None


def _check_private(directory: Path) -> None:
    """Refuse a directory that another user could have put there, or could write to."""
    info = directory.lstat()
    private = stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()
    if not private or stat.S_IMODE(info.st_mode) & 0o022:
        raise RefusedError(
            f"{directory}: not a directory of yours alone", hint="remove it, or chmod 700 it"
        )
