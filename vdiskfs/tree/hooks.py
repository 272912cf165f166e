"""What the tree asks of the rest of the daemon: two protocols and their records.

The tree knows names; which file is a disk, and what a recovery point holds, others know.
All calls come from the trio thread. A hook tells of what has happened already and must
not wait for the vault; an error it raises is answered to the caller (`EIO` and a log line).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from vdiskfs import native

if TYPE_CHECKING:
    from vdiskfs.tree.sourcefile import SourceFile

PointKind = Literal["any", "application-consistent", "proven"]


class DiskHooks(Protocol):
    """What happens to the regular files of the source."""

    async def image_for(self, file: SourceFile, *, writable: bool) -> native.Image:
        """Return the image that answers for the file from now on.

        Called when the first handle is opened (or a path is truncated); the tree attaches it
        to ``file.id``. It stays the daemon's: the tree never closes it. With ``writable``
        an image that cannot be written must not be returned (raise `OSError`). Called again
        when the first writing handle comes after reading ones: another image than before takes
        its place.
        """

    async def closed_last(self, file: SourceFile) -> None:
        """The last handle is gone and the image is detached from ``file.id``.

        A new file that matches the patterns becomes a disk now. Also called for a file that
        has no name any more.
        """

    async def created(self, file: SourceFile) -> None:
        """The file is new, empty, and not open yet (CREATE) or at all (MKNOD)."""

    async def linked(self, file: SourceFile, path: str) -> None:
        """The file has one more name."""

    async def unlinked(self, file: SourceFile, path: str, *, last: bool) -> None:
        """A name is gone; with ``last`` it was the only one: the disk is retired."""

    async def replaced(self, file: SourceFile, path: str, *, last: bool) -> None:
        """A rename put another file at the file's name.

        With ``last`` it was the only name: the disk is retired. Comes before `renamed` of
        the file that took the name.
        """

    async def renamed(self, file: SourceFile, old_path: str, new_path: str) -> None:
        """The file has another name (an exchange is told for both files)."""

    async def directory_renamed(self, old_path: str, new_path: str) -> None:
        """All that lies below ``old_path`` lies below ``new_path`` now."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may read: an owner, a group and the read bits of a mode (of 0o444)."""

    uid: int
    gid: int
    mode: int


@dataclass(frozen=True, slots=True)
class DiskName:
    """A disk of the vault: its name, and the name its image has in recovery points."""

    name: str
    file: str


@dataclass(frozen=True, slots=True, order=True)
class PointRef:
    """A recovery point as a listing knows it. ``epoch`` tells two points of one disk apart."""

    time_ns: int
    epoch: int
    generation: int


@dataclass(frozen=True, slots=True)
class PointFacts:
    """What the point's own directory shows: the size of the image, the text of point.json."""

    size: int
    json: bytes


class OpenPoint(Protocol):
    """A point that is being read. The tree attaches ``image`` to its node."""

    @property
    def image(self) -> native.Image:
        """The image: LAZY, READONLY, KEEP_CACHE."""


@dataclass(frozen=True, slots=True)
class CopyRef:
    """A writable copy in a failover: the name its image has there, and the disk's id."""

    file: str
    disk_id: str


@dataclass(frozen=True, slots=True)
class FailoverRef:
    """A failover as a listing knows it. ``id`` tells it from one of the same name later."""

    id: str
    name: str
    time_ns: int
    copies: tuple[CopyRef, ...]


class OpenCopy(Protocol):
    """A writable copy. It stays the daemon's; the tree attaches ``image`` to its node."""

    users: int
    """How many nodes have it attached."""

    @property
    def fd(self) -> int:
        """The file it lies in: its owner, mode and times are the copy's."""

    @property
    def image(self) -> native.Image:
        """The image: LAZY, writable."""

    async def truncate(self, size: int) -> None:
        """Set the size in bytes."""


class FailoverSource(Protocol):
    """The failovers of this site. Asks nobody."""

    def failovers(self) -> Sequence[FailoverRef]:
        """Return all of them."""

    def copy(self, failover_id: str, disk_id: str) -> OpenCopy | None:
        """Return a copy; None: it is gone."""


class PointSource(Protocol):
    """The recovery points of all disks. Waits are bounded by the tree (30 s, then EREMOTEIO)."""

    async def disks(self) -> Sequence[DiskName]:
        """Return all disks that have a directory, retired ones too."""

    async def days(self, disk: str) -> Sequence[str]:
        """Return the days (UTC, ``YYYY-MM-DD``) that have points."""

    async def points(self, disk: str, since_ns: int, until_ns: int) -> Sequence[PointRef]:
        """Return the points with since <= time < until, in order. No request of the vault each."""

    async def latest(self, disk: str, kind: PointKind) -> PointRef | None:
        """Return the newest point of that kind."""

    async def find(self, disk: str, text: str) -> PointRef | None:
        """Return the newest point at or before a time (``2026-11-21T01:40:07Z``, ``-15m``).

        None, `ValueError`, `UsageError` and `NotFoundError` all mean: no such name.
        """

    async def describe(self, disk: str, point: PointRef) -> PointFacts:
        """Return the facts; may read the vault."""

    async def open_point(self, disk: str, point: PointRef) -> OpenPoint:
        """Return the point's image, ready to be attached; called once per node while it is open."""

    async def close_point(self, opened: OpenPoint) -> None:
        """The image is detached, its last handle gone."""

    def access(self, disk: str) -> Access | None:
        """Return who may read the live image (`SourceFile.access`); None: not known here."""
