"""The image that a failback brings to a point: one that is known here, or one made anew.

What is known of it on its way lies in the directory of the failback. A failback that is called
off leaves that with the disk, whose image stays parked; the next failback goes on from it. Trio
thread only, but for what is said to be called in a thread.
"""

from __future__ import annotations

from pathlib import Path

import trio

from vdiskfs.crash import hook
from vdiskfs.disk import ProtectedDisk, Site
from vdiskfs.errors import NotFoundError, StateError
from vdiskfs.failover.record import Member
from vdiskfs.homeward import has_home, move_home, prepare_home, remove_home
from vdiskfs.protection import Protection
from vdiskfs.state import sync_directory
from vdiskfs.tree import SourceFile

PARTIAL = ".vdiskfs-partial"
"""Ends the name of an image that is being made anew: no pattern of disks has it."""


class HomeImages:
    """The images of a source that come home."""

    def __init__(self, site: Site, protection: Protection) -> None:
        """Take the mount's."""
        self._site = site
        self._protection = protection

    def protected(self, disk_id: str) -> ProtectedDisk | None:
        """Return the disk of this source, unless it is parked, or not known here."""
        own = [one for one in self._protection.disks() if one not in self._protection.adopted]
        return next((one for one in own if one.disk_id == disk_id), None)

    def known(self, disk_id: str) -> str | None:
        """Return where the image of a disk lies below the source; None: none is known."""
        disk = self.protected(disk_id)
        if disk is not None:
            return disk.file.path
        parked = self._protection.parked(disk_id)
        return None if parked is None else parked.path

    def path(self, member: Member) -> Path:
        """Return the file that is moved."""
        file = self._protection.parked(member.disk_id)
        return Path(file.proc_path) if file is not None else self._partial(member)

    # ---- what is known of it ---------------------------------------------------------------

    async def park(self, notes: Path, member: Member) -> None:
        """See that nobody else writes the image, and that what is known of it lies in ``notes``.

        Durable on return. A member with an epoch is at that point, byte for byte.
        """
        disk = self.protected(member.disk_id)
        place = (member.generation, member.epoch) if not member.full and member.epoch else None
        await trio.to_thread.run_sync(self._note, notes, member, place, disk is not None)
        if disk is not None:
            # Nobody writes to it any more; what is parked is believed.
            await trio.to_thread.run_sync(disk.image.sync_internal)
            paths = self._site.state.disk(member.disk_id)
            paths.parked.touch(mode=0o600)
            await trio.to_thread.run_sync(sync_directory, paths.directory)
            hook("failback.parked")
            await self._protection.park(disk)
        elif self._protection.parked(member.disk_id) is None:
            if member.epoch:
                raise StateError(f"disk {member.disk}: is not known here yet")
            await trio.to_thread.run_sync(self._make_partial, member)

    def _note(self, notes: Path, member: Member, place: tuple[int, int] | None, anew: bool) -> None:
        kept = self._site.state.disk(member.disk_id).directory
        if anew or (member.full and has_home(kept)):
            remove_home(kept)
            prepare_home(notes, member.disk_id, place)
        elif not has_home(notes) and has_home(kept):
            move_home(kept, notes)
        elif not has_home(notes):
            prepare_home(notes, member.disk_id, place)

    def leave(self, notes: Path, member: Member) -> None:
        """Keep with a parked disk what is known of its image; remove one made anew. In a thread.

        Durable on return; may be done again.
        """
        if self._protection.parked(member.disk_id) is None:
            self._partial(member).unlink(missing_ok=True)
        elif has_home(notes):
            move_home(notes, self._site.state.disk(member.disk_id).directory)
            hook("failback.left")

    def let_write(self, disk_id: str) -> None:
        """Take writes again to an image that is not parked, where a displaced disk takes them."""
        disk = self.protected(disk_id)
        if disk is not None and self._site.when_displaced == "keep" and not disk.line.handed:
            disk.refuse_writes(False)

    def is_named(self, member: Member) -> bool:
        """Say whether an image that is made anew is complete, and has its name."""
        unknown = self._protection.parked(member.disk_id) is None
        return unknown and not self._partial(member).exists()

    # ---- one that is made anew -------------------------------------------------------------

    def check_free(self, path: str) -> None:
        """Check that no file is where an image is to be made.

        Raises:
            StateError: one is.
        """
        try:
            self._protection.files.find(path).drop()
        except NotFoundError:
            return
        raise StateError(f"{path}: is in the way in the source", hint="move it aside first")

    def _make_partial(self, member: Member) -> None:
        path = self._partial(member)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            path.chmod(0o600)
        sync_directory(path.parent)

    def _partial(self, member: Member) -> Path:
        root = Path(f"/proc/self/fd/{self._protection.files.descriptor}")
        return root / f"{member.file}{PARTIAL}"

    async def hold(self, member: Member) -> SourceFile:
        """Return the file of an image that has come to its point, held, under its name."""
        file = self._protection.parked(member.disk_id)
        return file if file is not None else await trio.to_thread.run_sync(self._named, member)

    def _named(self, member: Member) -> SourceFile:
        part = self._partial(member)
        if part.exists():
            self.check_free(member.file)
            part.rename(part.with_name(part.name.removesuffix(PARTIAL)))
            sync_directory(part.parent)
            hook("failback.named")
        return self._protection.files.find(member.file)
