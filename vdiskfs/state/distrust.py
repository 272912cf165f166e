"""Stretches of a disk of which it is not known what the vault holds, noted durably.

What is allocated there, or has data in the vault, is suspect. The note stands until both
are marked in the bitmaps, durably; what the bitmaps said before may be gone with the host.
"""

from __future__ import annotations

import json
from pathlib import Path

from vdiskfs import crash
from vdiskfs.state.files import remove_file, write_file

DISK_END = 2**63
"""The end of any disk."""

Stretch = tuple[int, int]


class DistrustNote:
    """The note of one disk, a file. Stretches are (start, end) in bytes."""

    def __init__(self, path: Path) -> None:
        """Take the file's path; it need not be there."""
        self._path = path

    def exists(self) -> bool:
        """Say whether anything is distrusted."""
        return self._path.exists()

    def stretches(self) -> list[Stretch]:
        """Return what is distrusted; a note that cannot be read means the whole disk."""
        try:
            found = json.loads(self._path.read_text(encoding="ascii"))
            return [(int(start), int(end)) for start, end in found]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError):
            return [(0, DISK_END)]

    def add(self, stretches: list[Stretch]) -> None:
        """Note more. Durable on return."""
        every = sorted({*self.stretches(), *stretches})
        write_file(self._path, json.dumps(every).encode())
        crash.hook("distrust.noted")

    def clear(self) -> None:
        """Everything is marked, durably: forget it. Durable on return."""
        remove_file(self._path)
        crash.hook("distrust.cleared")
