"""Which mount a command means: ``-m``, else $VDISKFS_MOUNT, else the only one of this host."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from vdiskfs.errors import NotFoundError, UsageError
from vdiskfs.registry import MountEntry, mount_entries
from vdiskfs_tools.call import Call

if TYPE_CHECKING:
    from vdiskfs_tools.client import Client


def real_mountpoint(path: str) -> str:
    """Return a mountpoint's real path without asking the file system that is mounted there."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would ask it)
    return str(Path(os.path.realpath(absolute.parent)) / absolute.name)


def real_path(path: str) -> str:
    """Return a real path as `os.path.realpath` does, without asking what is mounted at its end.

    A successor starts while nobody answers for the mount that hides its source (``--over``).
    """
    rest, real = os.path.abspath(path).split("/")[:0:-1], "/"  # noqa: PTH100
    for _ in range(40 + len(rest)):
        if not rest:
            break
        part = os.path.normpath(os.path.join(real, rest.pop()))  # noqa: PTH118
        try:
            link = os.readlink(part)  # noqa: PTH115
        except OSError:
            real = part
        else:
            rest += os.path.join(real, link).split("/")[::-1]  # noqa: PTH118
            real = "/"
    return os.path.abspath(path) if rest else real  # noqa: PTH100


def named_mount(call: Call) -> str | None:
    """Return the mountpoint that the user named, in whichever way."""
    return os.environ.get("VDISKFS_MOUNT") or None if call.mount is None else call.mount


def find_mount(call: Call) -> MountEntry:
    """Return the mount that a command means.

    Raises:
        NotFoundError: there is none, or none there.
        UsageError: there are several, and none was named.
    """
    entries = mount_entries()
    named = named_mount(call)
    if named is not None:
        return find_entry(named, entries)
    if not entries:
        raise NotFoundError(
            "no mount of vdiskfs runs here", hint="start one with vdiskfs mount, or see vdiskfs(1)"
        )
    if len(entries) > 1:
        places = ", ".join(entry.mountpoint for entry in entries)
        raise UsageError(f"several mounts run here: {places}", hint="name one with -m")
    return entries[0]


def client_of(call: Call) -> Client:
    """Return a client of the daemon that a command means. Close it after use.

    Raises:
        NotFoundError, UsageError: as `find_mount`.
    """
    from vdiskfs_tools.client import Client

    return Client(find_mount(call))


def vault_url(call: Call) -> str:
    """Return the address of the vault that a command means: ``--vault``, else the mount's.

    Raises:
        NotFoundError, UsageError: neither says it.
    """
    if call.vault is not None:
        return call.vault
    try:
        return find_mount(call).vault
    except NotFoundError as error:
        raise NotFoundError(error.message, hint="name a vault with --vault") from None


def find_entry(mountpoint: str, entries: list[MountEntry]) -> MountEntry:
    """Return the mount at a mountpoint.

    Raises:
        NotFoundError: none runs there.
    """
    names = {os.path.abspath(mountpoint), real_mountpoint(mountpoint)}  # noqa: PTH100
    for entry in entries:
        if entry.mountpoint in names:
            return entry
    raise NotFoundError(f"{mountpoint}: no mount of vdiskfs runs there")


def mounted_types(path: str) -> list[str]:
    """Return the types of the file systems mounted at a real path, the topmost last.

    Reads the kernel's table: a file system that hangs or is dead is not touched.
    """
    types = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        place = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields.split(" ")[4])
        if place == path:
            types.append(rest.split(" ")[0])
    return types
