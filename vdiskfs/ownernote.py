"""What a disk knows here of who owns it: its note, its memory, and what it says to people.

``owner.json`` lies in the disk's directory. It is written before and after each swap in the
vault, so that a crash in between finds its own effect there.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from vdiskfs import native
from vdiskfs.catalog import DiskRecord, Owner
from vdiskfs.catalog.moves import Fork
from vdiskfs.errors import DamagedError, NotFoundError, StateError
from vdiskfs.liveness import Liveness, age_s
from vdiskfs.state import LastEnd, read_record, write_record

_SPENT = 32  # are remembered: one, mostly


@dataclass(frozen=True, slots=True)
class Remembered:
    """The newest epoch that this site knows the vault to hold; epoch 0: none."""

    generation: int
    epoch: int
    digest: str

    def __str__(self) -> str:
        """As a note has it."""
        return f"{self.generation}:{self.epoch}:{self.digest}"


@dataclass(frozen=True, slots=True)
class Start:
    """How a disk is to be started: how its last run ended, what the user allows.

    ``sure``: ``last_end`` is this very disk's. With ``fork`` it comes from another site, at that
    point, which is what it holds.
    """

    last_end: LastEnd = LastEnd.CLEAN
    force: bool = False
    accept_rollback: bool = False
    sure: bool = False
    fork: Fork | None = None


@dataclass(frozen=True, slots=True)
class Displaced:
    """Another writer has taken the disk over: who, since when; where our writes are kept.

    Without a ``branch`` it was handed over, and nothing was written here since.
    """

    by: str
    since: str
    branch: str

    def __str__(self) -> str:
        """One line for people."""
        if not self.branch:
            return f"handed over to {self.by} since {self.since}; nothing is written here"
        return (
            f"displaced by {self.by} since {self.since}; what is written here is kept as "
            f"branch {self.branch}"
        )


@dataclass(frozen=True, slots=True)
class Note:
    """What owner.json says.

    ``start`` is the number in the vault that is ours, ``pending`` one that may have got
    there; ``token`` marks a branch that is being made, ``line`` is the branch that is
    written, 0 the main line; ``spent`` are the newest stored epochs, as they were known when
    the spool was emptied into a branch; ``place`` is the directory that wrote this; ``handed``
    is the handover that released the disk to another site.
    """

    start: str = ""
    pending: str = ""
    place: str = ""
    token: str = ""
    line: int = 0
    spent: str = ""
    by: str = ""
    since: str = ""
    handed: str = ""

    def has_spent(self, last: Remembered) -> bool:
        """Say whether the spool was emptied when this was the newest stored epoch."""
        return str(last) in self.spent.split()

    def spend(self, *lasts: Remembered) -> str:
        """Return ``spent`` with more of them."""
        more = [str(one) for one in lasts]
        return " ".join([*(one for one in self.spent.split() if one not in more), *more][-_SPENT:])


async def refusal(liveness: Liveness, record: DiskRecord, owner: Owner, what: str) -> StateError:
    """Return the error that says who owns a disk, since when, and what can be done."""
    sign = await liveness.last_sign(owner)
    seen = "no sign of life"
    if sign is not None:
        age = max(0.0, age_s(sign))
        seen = f"last sign of life {sign.time} ({age:.0f} s ago) from host {sign.host}"
    return StateError(
        f"disk {record.name}: site {owner.site} {what} since {owner.since}; {seen}",
        hint="stop it there, or take the disk over with --force "
        "(what it has not shipped becomes a branch)",
    )


def rolled_back(name: str, last: Remembered) -> StateError:
    """Return the error that says that the vault lacks what it had."""
    return StateError(
        f"disk {name}: the vault lacks epoch {last.epoch} of generation {last.generation}, "
        "which it had: it was rolled back, or is another one",
        hint="find the vault that has it, or go on without with --accept-rollback",
    )


def read_note(directory: Path) -> Note:
    """Return the note of a disk's directory; an empty one where none is.

    Raises:
        DamagedError: it is not what was written.
    """
    try:
        body = read_record(directory / "owner.json")
    except NotFoundError:
        return Note()
    body.pop("format", None)
    try:
        return Note(**body)
    except TypeError:
        raise DamagedError(f"{directory / 'owner.json'}: not the note of an owner") from None


def write_note(directory: Path, note: Note) -> None:
    """Write the note of a disk's directory. Durable on return."""
    write_record(directory / "owner.json", {"format": 1, **asdict(note)})


def place_of(directory: Path) -> str:
    """Name a directory so that a copy of it has another name: inode and time of birth."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        identity = native.file_identity(fd)
    finally:
        os.close(fd)
    return f"{identity.inode}:{identity.birth_ns}"
