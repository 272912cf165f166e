"""Waiting for the daemon of a mount: while its keeper starts the next one, and for its end."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator

from vdiskfs.registry import MountEntry, is_serving, mount_entries

LOOK_S = 0.05
RETURN_S = 10.0
"""Seconds that a command waits for a daemon to come back."""


def served(entry: MountEntry, *, after: int = 0, limit_s: float = RETURN_S) -> MountEntry:
    """Return the mount with a daemon that lives, other than process ``after``.

    Where none comes within the limit the newest entry is returned: see ``is_serving``.
    """
    end = time.monotonic() + limit_s
    while entry.pid == after or (entry.keeper and not is_serving(entry)):
        if time.monotonic() > end:
            break
        time.sleep(LOOK_S)
        found = [one for one in mount_entries() if one.mountpoint == entry.mountpoint]
        entry = found[0] if found else entry
    return entry


@contextlib.contextmanager
def process(pid: int) -> Iterator[int | None]:
    """Have a descriptor of a process over the block; None: it has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except (ProcessLookupError, ValueError, OSError):
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def has_ended(descriptor: int | None, limit_s: float) -> bool:
    """Wait for the end of a process; False: it goes on after the limit."""
    if descriptor is None:
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(limit_s * 1000))
