"""A disk that a failover has taken: tracked like any other, over a writable copy.

It is started once, at the point that the copy begins with, so that every later change is known
and nothing ever has to be compared. Until it is to be replicated, its replication is paused.
After a restart it is tracked at once by what is on this host; what needs the vault is tried
until the vault answers, and guests do not wait for it. Trio thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import trio

from vdiskfs import native
from vdiskfs.catalog.moves import Fork, is_forked
from vdiskfs.crash import hook
from vdiskfs.disk import ProtectedDisk, Site
from vdiskfs.diskfiles import writable_again
from vdiskfs.errors import VdiskfsError
from vdiskfs.failover.copy import WritableCopy
from vdiskfs.failover.copyfile import CopyFile
from vdiskfs.failover.known import prepare_disk
from vdiskfs.failover.record import Member
from vdiskfs.health import State
from vdiskfs.ownernote import Start, read_note
from vdiskfs.protection import Protection
from vdiskfs.state import DiskRecord, FileStamp, LastEnd

log = logging.getLogger(__name__)

TAKE_UP_S = 5.0
"""Seconds between two tries to start a disk again."""


class TakenDisk:
    """One disk of a failover."""

    def __init__(
        self, site: Site, protection: Protection, copy: WritableCopy, path: str,
        nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            site: the mount's.
            protection: counts the disk in.
            copy: what holds its bytes; stays the caller's.
            path: of the copy, for people.
            nursery: where it is replicated.
        """
        self.copy = copy
        self.disk: ProtectedDisk | None = None
        self._site = site
        self._protection = protection
        self._file = CopyFile(copy, path)
        self._nursery = nursery
        self._track: native.Track | None = None
        self._scope = trio.CancelScope()
        self.on_ours: Callable[[], None] = lambda: None

    @property
    def is_ours(self) -> bool:
        """Whether it is known that no other site has the disk."""
        line = self.disk.line if self.disk is not None else None
        return line is not None and line.displaced is None and not line.handed

    @property
    def member(self) -> Member:
        """Which disk, at which point."""
        return self.copy.member

    # ---- taking --------------------------------------------------------------------------

    async def take(self, fork: Fork) -> None:
        """Take the disk at the copy's point; again, if an earlier run was cut off.

        Raises:
            StateError: another site has taken it since the point was chosen.
            VdiskfsError: the vault does not answer, or this host's disk refuses.
        """
        if self._track is None:
            self.copy.image.refuse_writes(True)
        if is_forked(await self._site.vault.disk(self.member.disk_id), fork):
            # An earlier run was cut off when programs could write already.
            if self._track is None:
                await trio.to_thread.run_sync(self.resume)
            await self._again()
            return
        record = await trio.to_thread.run_sync(self._prepare)
        await self._start(record, Start(LastEnd.CLEAN, sure=True, fork=fork))

    def _prepare(self) -> DiskRecord:
        record = prepare_disk(
            self._site, self.member, self._file,
            lambda paths: (paths.directory / "paused").touch(mode=0o600),
        )  # fmt: skip
        hook("failover.prepared")
        return record

    async def _start(self, record: DiskRecord, how: Start) -> None:
        disk = ProtectedDisk(self._site, self._file, record, self.copy.image, self._track)
        self._protection.adopt(disk)
        disk.on_returned = self._returned
        try:
            await disk.start(how)
        except BaseException:
            self._protection.release(disk)
            raise
        self._track = None
        disk.replicator.live.fetch = self.copy.fetch_page
        if disk.replicator.paused and disk.line.displaced is None:
            disk.health.shown_as = State.FAILED_OVER
        if disk.line.displaced is None:
            self.copy.image.refuse_writes(False)
        self.disk = disk
        self._nursery.start_soon(disk.run)
        if self.is_ours:
            self.on_ours()

    def _returned(self, disk: ProtectedDisk) -> None:
        writable_again(disk)
        self.on_ours()

    # ---- after a restart -----------------------------------------------------------------

    def resume(self) -> None:
        """Track it as a predecessor did, by what is here alone; blocks on the local disk.

        Where that cannot be, nobody writes to it before `take_up` has come to its end.
        """
        state, image = self._site.state, self.copy.image
        image.refuse_writes(True)
        try:
            record = state.record(self.member.disk_id)
            paths = state.disk(record.disk_id)
            note = read_note(paths.directory)
            if note.handed or note.line:
                return  # another site has it
            if record.end is not None and record.end == FileStamp.of(self._file.identity()):
                paths.sums.check()
                paths.sums.remove()
            elif state.end_of_disk(record) is not LastEnd.DAEMON_DIED:
                return
            self._track = native.Track(paths.track, image.size())
            image.set_track(self._track)
            native.begin_intent(image)
            state.note_started(record.disk_id)
            state.write_disk(replace(record, end=None))
            image.refuse_writes(False)
        except (VdiskfsError, OSError) as error:
            log.error("%s: cannot be tracked yet: %s", self.copy.name, error)
            if self._track is not None:
                image.set_track(None)
                self._track.close()
            self._track = None

    async def take_up(self) -> None:
        """Start it again, as soon as the vault answers."""
        with self._scope:
            while True:
                try:
                    await self._again()
                    return
                except (VdiskfsError, OSError) as error:
                    log.warning("%s: is not replicated yet: %s", self.copy.name, error)
                await trio.sleep(TAKE_UP_S)

    async def _again(self) -> None:
        state = self._site.state
        record = await trio.to_thread.run_sync(state.record, self.member.disk_id)
        # What is written since `resume` is tracked: its bitmaps go on, as a successor's do.
        tracked = self._track is not None
        how = Start(LastEnd.DAEMON_DIED, sure=True) if tracked else Start(state.end_of_disk(record))
        await self._start(record, how)

    # ---- the end -------------------------------------------------------------------------

    async def stop(self, *, clean: bool) -> None:
        """End tracking; with ``clean`` nobody writes any more, and what is known is kept."""
        self._scope.cancel()
        if self.disk is not None:
            disk, self.disk = self.disk, None
            self._protection.release(disk)
            await disk.stop(clean=clean)
        elif self._track is not None:
            track, self._track = self._track, None
            self.copy.image.set_track(None)
            await trio.to_thread.run_sync(track.close)

    async def forget(self) -> None:
        """End it, and remove what is known of the disk here; the vault keeps its history."""
        await self.stop(clean=False)
        state, disk_id = self._site.state, self.member.disk_id
        if state.disk(disk_id).directory.exists():
            await trio.to_thread.run_sync(state.remove_disk, disk_id)
