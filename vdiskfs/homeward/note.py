"""What is known of an image on its way: one durable record in a directory of its own.

Invariant: the image equals ``path[0]`` in all pages below ``known`` (None: in all), but for
those in which two neighbours of ``path`` differ: these may hold anything. Nothing is known of
the other pages. So a note with one place and no ``known`` says which point the image is, and
any run, towards any point, can go on from any note.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vdiskfs.errors import DamagedError, LocalError
from vdiskfs.homeward.moves import Place
from vdiskfs.state import read_record, remove_file, sync_directory, write_record

_FORMAT = 1
_NAME = "home.json"


@dataclass(frozen=True, slots=True)
class HomeNote:
    """The note of one disk's image."""

    disk_id: str
    path: tuple[Place, ...]
    known: int | None = None

    @property
    def at(self) -> Place | None:
        """Return the point that the image is, byte for byte; None: it is on its way."""
        return self.path[0] if len(self.path) == 1 and self.known is None else None

    def toward(self, place: Place) -> HomeNote:
        """Return the note with which a move to a point begins."""
        if self.path and self.path[-1] == place:
            return self
        # Of an image of which nothing is known it does not matter where it was to go.
        path = (place,) if self.known == 0 else (*self.path, place)
        return replace(self, path=path)

    def arrived(self, known: int | None) -> HomeNote:
        """Return the note of an image that is its target in all pages below ``known``."""
        return replace(self, path=self.path[-1:], known=known)


def prepare_home(directory: Path, disk_id: str, at: Place | None) -> HomeNote:
    """Note which point an image is, before its first move. Durable on return.

    Args:
        directory: for the note alone; made if need be.
        disk_id: whose points they are.
        at: the image equals this point byte for byte. None: nobody knows what it holds, and
            all of it is brought (full download).

    Raises:
        LocalError: the disk refused.
    """
    if not directory.is_dir():
        directory.mkdir(mode=0o700)
        sync_directory(directory.parent)
    note = HomeNote(disk_id, () if at is None else (at,), 0 if at is None else None)
    write_home(directory, note)
    return note


def read_home(directory: Path) -> HomeNote:
    """Return what the note says.

    Raises:
        NotFoundError: there is none.
        DamagedError: it is damaged: what the image holds is not known.
    """
    where = directory / _NAME
    body = read_record(where)
    try:
        known = body["known"]
        path = tuple((int(generation), int(epoch)) for generation, epoch in body["path"])
        ok = body["format"] == _FORMAT and isinstance(body["disk"], str)
        if not ok or not (known is None or (type(known) is int and known >= 0)):
            raise ValueError
        if not path and known != 0:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise DamagedError(f"{where}: not a note of an image") from None
    return HomeNote(body["disk"], path, known)


def write_home(directory: Path, note: HomeNote) -> None:
    """Write the note; durable on return."""
    body: dict[str, Any] = {
        "format": _FORMAT, "disk": note.disk_id, "path": [list(place) for place in note.path],
        "known": note.known,
    }  # fmt: skip
    write_record(directory / _NAME, body)


def has_home(directory: Path) -> bool:
    """Say whether there is a note in a directory."""
    return (directory / _NAME).exists()


def move_home(source: Path, target: Path) -> None:
    """Move the note to another directory, which is made if need be. Durable on return.

    Raises:
        LocalError: the disk refused; the note is in one of the two.
    """
    try:
        if not target.is_dir():
            target.mkdir(mode=0o700)
            sync_directory(target.parent)
        (source / _NAME).rename(target / _NAME)
        sync_directory(target)
        sync_directory(source)
    except OSError as error:
        raise LocalError(f"{target / _NAME}: {error.strerror}") from error


def remove_home(directory: Path) -> None:
    """Remove the note, if there is one. Durable on return."""
    if has_home(directory):
        remove_file(directory / _NAME)
