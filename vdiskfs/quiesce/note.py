"""What is, or may be, frozen: ``STATE/quiesce/NUMBER.json``, durable before anything is frozen.

The daemon writes a note, a holder takes it (a lock on the file says that somebody cares for
it) and removes it when nothing is frozen any more. One that nobody holds is undone by the
next holder.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1
_LIMIT = 1 << 20


class Note:
    """A note that this process holds."""

    def __init__(self, path: Path, fd: int, body: dict[str, Any]) -> None:
        self._path = path
        self._fd = fd
        self.body = body

    @classmethod
    def take(cls, path: Path) -> Note | None:
        """Hold a note; waits for who holds it. None: it is done with, nothing is frozen.

        Raises:
            ValueError: it is not a note.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink == 0:
            os.close(fd)
            return None
        body = json.loads(os.pread(fd, _LIMIT, 0))
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"{path}: not a note of format {FORMAT}")
        return cls(path, fd, body)

    def remove(self) -> None:
        """Nothing is frozen any more; durable on return."""
        self._path.unlink(missing_ok=True)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        os.close(self._fd)


def is_held(path: Path) -> bool:
    """Say whether a process cares for a note; one that is gone is held by nobody."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
