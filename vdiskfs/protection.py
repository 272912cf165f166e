"""Which files are disks: the registry of a mount, and what follows when files come and go.

Implements the tree's `DiskHooks`. A file that matches the patterns becomes a disk when the
mount starts, or at its last close if it was made in the mount. Renaming keeps the disk;
unlinking or replacing its file retires it, with all its history. Nothing here waits for
the vault in the name of a guest: what needs the vault runs in tasks.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from functools import partial

import trio

from vdiskfs import enrolment, native
from vdiskfs.disk import ProtectedDisk, Site
from vdiskfs.diskfiles import DiskFiles, source_file, writable_again
from vdiskfs.earlydisk import EarlyDisk
from vdiskfs.errors import (
    BusyError,
    NotFoundError,
    StateError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.health import State
from vdiskfs.image import end_image
from vdiskfs.ownernote import Start, read_note
from vdiskfs.replicator import Replicator
from vdiskfs.state import DiskRecord, FileStamp, ImageLock, LastEnd, find_record
from vdiskfs.tree import Disks, SourceFile

log = logging.getLogger(__name__)

STARTS_AT_ONCE = 8

TAKE_UP_S = 5.0
"""Seconds between two tries to take a disk up of which guests go on already."""


class Protection(DiskFiles):
    """All disks of a mount. Trio thread only."""

    def adopt(self, disk: ProtectedDisk) -> None:
        """Count a disk in that others start and stop: a failover's."""
        self.adopted.add(disk)
        self._by_cookie[disk.image.cookie] = disk
        disk.on_displaced = self._later_read_only
        disk.on_returned = writable_again

    def release(self, disk: ProtectedDisk) -> None:
        """Count a disk of `adopt` no more."""
        self.adopted.discard(disk)
        self._by_cookie.pop(disk.image.cookie, None)

    @property
    def site(self) -> Site:
        """What the disks of this mount share."""
        return self._site

    # ---- start and end -------------------------------------------------------------------

    async def resume(self, files: Disks) -> None:
        """Track every known disk as a predecessor did, by what is on this host alone.

        So machines go on at once, whether the vault answers or not; `start` does the rest. A
        disk that cannot be tracked yet is logged.
        """
        self._files = files
        records = await trio.to_thread.run_sync(self._site.state.records)
        known = {record.file for record in records if not record.retired}
        for file in [*files.scan(lambda path: path in known or self.matches(path)),
                     *files.unnamed()]:  # fmt: skip
            record = find_record(records, file.identity(), file.path)
            if record is not None and self._is_parked(record):
                self._hold_parked(record.disk_id, file)
                continue
            if record is None or file in self._early or not self._was_tracked(record):
                file.drop()
                continue
            try:
                self._resume_disk(file, record)  # nobody is served yet
            except (VdiskfsError, OSError) as error:
                log.error("disk %s: cannot be tracked yet: %s", record.name, error)
                file.drop()

    def _is_parked(self, record: DiskRecord) -> bool:
        return self._site.state.disk(record.disk_id).parked.exists()

    def _was_tracked(self, record: DiskRecord) -> bool:
        """Say whether the predecessor had started the disk: else its bitmaps say too little."""
        return self._site.state.end_of_disk(record) is LastEnd.DAEMON_DIED

    def _resume_disk(self, file: SourceFile, record: DiskRecord) -> None:
        if self._site.state.end_of_disk(record) is not LastEnd.DAEMON_DIED:
            raise StateError("the predecessor had not started it")
        with contextlib.suppress(BusyError):  # `start` says it, and what to do
            self._locks[file] = ImageLock(file.descriptor, file.path)
        image = self._plain.open(file, writable=True)
        try:
            paths = self._site.state.disk(record.disk_id)
            note = read_note(paths.directory)
            on = self._site.when_displaced == "keep"
            image.refuse_writes(note.handed != "" or (note.line > 0 and not on))
            image.set_track(native.Track(paths.track, image.size()))
            native.begin_intent(image)
        except BaseException:
            image.close()
            raise
        self._early[file] = EarlyDisk(image, record)

    async def start(self, files: Disks, *, protect: bool, patient: bool = False) -> None:
        """Take up every disk that is known, and with ``protect`` all files that match.

        With ``patient`` (after `resume`: guests write already) a disk that cannot be started is
        tried again until it can.

        Raises:
            VdiskfsError: the first disk that cannot be started says why.
        """
        self._files = files
        # Neither a successor nor what is made later is forced: the user meant what was there.
        self._force = self._site.force and not patient
        self._accept = self._site.accept_rollback and not patient
        records = await trio.to_thread.run_sync(self._site.state.records)
        limit = trio.CapacityLimiter(STARTS_AT_ONCE)
        known = {record.file for record in records if not record.retired}

        def wanted(path: str) -> bool:
            return path in known or self.matches(path)

        async def take(file: SourceFile) -> None:
            async with limit:
                record = find_record(records, file.identity(), file.path)
                ended = enrolment.unprotected(records, file) is not None
                # Of a file that is open and has no name only what was a disk is one.
                if record is not None and self._is_parked(record):
                    if record.disk_id in self._parked:
                        file.drop()
                    else:
                        self._hold_parked(record.disk_id, file)
                elif record is not None or (protect and not ended and wanted(file.path)):
                    take_up = self._take_up if patient else self._protect_at_once
                    await take_up(file, record, self._how(self._site.state.last_end))
                else:
                    file.drop()

        for early in list(self._early.values()):
            # Until then a death of the host would make everything suspect.
            await trio.to_thread.run_sync(native.begin_intent, early.image)
        unnamed = files.unnamed() if patient else []
        async with trio.open_nursery() as nursery:
            for file in [*files.scan(wanted), *unnamed]:
                if file in self._disks:
                    file.drop()
                else:
                    nursery.start_soon(take, file)
        self._force = self._accept = False

    def _how(self, last_end: LastEnd) -> Start:
        return Start(last_end, self._force, self._accept)

    async def _take_up(self, file: SourceFile, record: DiskRecord | None, how: Start) -> None:
        """Protect a held file; guests use it, and it waits for the vault, not they for it."""
        if file not in self._early and record is not None:
            how = replace(
                how, last_end=LastEnd.UNKNOWN
            )  # guests write, and nobody has tracked them so far
        told = ""
        while not (self.closing or file in self._disks or file in self._starting):
            file.hold()
            try:
                await self._protect(file, record, how)
                break
            except VdiskfsError as error:
                early = self._early.get(file)
                if str(error) != told:
                    told = str(error)
                    log.log(logging.WARNING if early is not None else logging.ERROR,
                            "%s: is not replicated yet: %s", file.path, error)  # fmt: skip
                    if record is None:
                        self._site.refused(file.path, error)
                if early is not None:
                    await early.wait_retry(error, TAKE_UP_S)
                elif isinstance(error, VaultUnreachableError):
                    await trio.sleep(TAKE_UP_S)
                    if record is None and not self._may_become_disk(file):
                        break
                else:
                    break
            except Exception as error:
                # Whatever is the matter with one file, the others are served and replicated on.
                log.exception("%s: is not replicated", file.path)
                if (early := self._early.get(file)) is not None:
                    early.give_up(error)
                break
        file.drop()

    def _may_become_disk(self, file: SourceFile) -> bool:
        return file.status().st_nlink > 0 and self.matches(file.path)

    async def _protect_at_once(
        self, file: SourceFile, record: DiskRecord | None, how: Start
    ) -> ProtectedDisk:
        """Protect a held file; a new one that cannot become a disk leaves a job that failed."""
        try:
            return await self._protect(file, record, how)
        except VdiskfsError as error:
            if record is None:
                self._site.refused(file.path, error)
            raise

    async def _protect(
        self, file: SourceFile, record: DiskRecord | None, how: Start
    ) -> ProtectedDisk:
        """Start a disk over a held file; the hold becomes the disk's."""
        if file in self._disks or file in self._starting:
            file.drop()
            raise StateError(f"{file.path}: is protected already")
        self._starting.add(file)
        try:
            lock = self._locks.pop(file, None) or await enrolment.lock_image(
                self._site, file, record, force=how.force
            )
            try:
                if record is None:
                    record, how = await self._enrolled(file, how)
                disk = await self._start_disk(file, record, how)
            except BaseException:
                if file in self._early:
                    self._locks[file] = lock
                else:
                    lock.close()
                raise
            self._locks[file] = lock
            if (early := self._early.pop(file, None)) is not None:
                early.started.set()
                file.drop()  # the hold of `resume`
        except BaseException:
            file.drop()
            raise
        finally:
            self._starting.discard(file)
        self._nursery.start_soon(disk.run)
        log.info("disk %s: protected, %s", disk.name, file.path)
        # What happened to the file while the disk was started told nobody.
        if file.status().st_nlink == 0:
            self._nursery.start_soon(self._retire_later, disk)
        elif record.file != file.path:
            self._nursery.start_soon(self._tell_name, disk, file.path)
        return disk

    async def _enrolled(self, file: SourceFile, how: Start) -> tuple[DiskRecord, Start]:
        """Make a disk of a file; an earlier try may have, and have failed to start it."""
        records = await trio.to_thread.run_sync(self._site.state.records)
        record = find_record(records, file.identity(), file.path)
        if record is not None and not record.retired:
            return record, replace(how, last_end=LastEnd.UNKNOWN)
        made = await enrolment.enroll(self._site, file, force=how.force)
        return made, replace(how, last_end=LastEnd.NONE)

    async def _start_disk(self, file: SourceFile, record: DiskRecord, how: Start) -> ProtectedDisk:
        refused = file in self._plain.refused
        self._plain.refused.discard(file)
        image = self._writable_image(file)
        disk = ProtectedDisk(self._site, file, record, image, image.track)
        was_refused = image.refuses  # another site had it, as `resume` knew
        disk.refuse_writes(refused or was_refused)  # while it is parked still
        self._disks[file] = disk
        self._by_cookie[image.cookie] = disk
        disk.on_displaced = self._later_read_only
        disk.on_returned = writable_again
        try:
            await disk.start(how)
        except BaseException:
            self._forget(disk)
            raise
        if was_refused and not refused and disk.line.displaced is None:
            disk.refuse_writes(False)
        return disk

    def _later_read_only(self, disk: ProtectedDisk) -> None:
        if self._site.when_displaced == "stop-machine" and not disk.line.handed:
            self._nursery.start_soon(self._stop_machine, disk)
        elif self._site.when_displaced == "read-only" or disk.line.handed:
            disk.refuse_writes(True)
            log.error("disk %s: takes no more writes", disk.name)

    async def _stop_machine(self, disk: ProtectedDisk) -> None:
        """Stop what writes to a displaced disk; what it wrote until then is in the branch."""
        try:
            await self.stop_machine(disk, "displaced")
        except (VdiskfsError, OSError) as error:
            log.error("%s", error)
        disk.refuse_writes(True)
        log.error("disk %s: takes no more writes", disk.name)

    def _writable_image(self, file: SourceFile) -> native.Image:
        """Return the image that guests have open already, if it can be written, or a new one."""
        early = self._early.get(file)
        if early is not None:
            return early.image
        return self._plain.take_writable(file) or self._plain.open(file, writable=True)

    def _forget(self, disk: ProtectedDisk) -> None:
        file = source_file(disk)
        self._disks.pop(file, None)
        self._by_cookie.pop(disk.image.cookie, None)
        if file in self._early:
            return  # guests go on with it, tracked, while it is tried again
        lock = self._locks.pop(file, None)
        if lock is not None:
            lock.close()
        if file.is_open:
            self._plain.put(file, disk.image)
        else:
            disk.image.close()

    async def stop(self, *, clean: bool) -> None:
        """End all disks: the mount is gone."""
        self.closing = True
        for disk in list(self._disks.values()):
            await disk.stop(clean=clean)
            self._forget(disk)
            source_file(disk).drop()
        self._plain.close()
        for file, early in self._early.items():
            # Never taken up again: what its bitmaps say holds until the next mount.
            image, record = early.image, early.record
            sums = self._site.state.disk(record.disk_id).sums if clean else None
            await trio.to_thread.run_sync(end_image, image, sums)
            if clean:
                stamp = FileStamp.of(file.identity())
                self._site.state.write_disk(replace(record, end=stamp, file=file.path))
            file.drop()
        self._early.clear()
        for file in self._parked.values():
            file.drop()
        self._parked.clear()

    # ---- a disk that is brought home -------------------------------------------------------

    @property
    def files(self) -> Disks:
        """The files of the source.

        Raises:
            StateError: this mount has none.
        """
        if self._files is None:
            raise StateError("this mount has no source: no disk has its home here")
        return self._files

    def replicators(self) -> list[Replicator]:
        """Return what replicates the disks that are started."""
        return [disk.replicator for disk in self.disks() if disk.started]

    async def park(self, disk: ProtectedDisk) -> SourceFile:
        """End a disk whose image is changed from outside; nobody else writes it until `unpark`.

        Note it first (`DiskPaths.parked`), so that it is so after a restart, too.
        """
        file = source_file(disk)
        await disk.stop(clean=True)
        self._forget(disk)
        self._hold_parked(disk.disk_id, file)
        log.info("disk %s: is brought home", disk.name)
        return file

    def parked(self, disk_id: str) -> SourceFile | None:
        """Return the held file of a disk that is parked, or None."""
        return self._parked.get(disk_id)

    def _hold_parked(self, disk_id: str, file: SourceFile) -> None:
        self._parked[disk_id] = file
        self._plain.refused.add(file)

    async def unpark(self, file: SourceFile, record: DiskRecord, how: Start) -> ProtectedDisk:
        """Protect the file of a parked disk again, or one that was never protected; it is held.

        Raises:
            VdiskfsError: as `ProtectedDisk.start`; it is parked still.
        """
        file.hold()
        self._plain.refused.add(file)
        try:
            disk = await self._protect(file, record, how)
        except BaseException:
            self._plain.refused.add(file)
            raise
        if self._parked.pop(record.disk_id, None) is not None:
            file.drop()
        if disk.line.displaced is None:
            disk.refuse_writes(False)
        return disk

    # ---- what the user asks ----------------------------------------------------------------

    async def protect(self, path: str) -> ProtectedDisk:
        """Protect a file of the source, or a disk that was unprotected.

        Raises:
            NotFoundError: no such file.
            StateError: it is protected already.
        """
        if self._files is None:
            raise StateError("this mount has no source: a recovery site protects nothing")
        records = await trio.to_thread.run_sync(self._site.state.records)
        named = next((one.file for one in records if one.name == path), path)
        try:
            file = self._files.find(named)
        except (OSError, ValueError) as error:
            raise NotFoundError(f"{path}: no such file below disks/") from error
        record = enrolment.unprotected(records, file)
        if record is None:
            return await self._protect_at_once(file, None, Start(LastEnd.NONE))
        # The same disk goes on. What was written meanwhile is not known: nothing is trusted.
        try:
            await enrolment.tell(self._site, record.disk_id, enrolment.revived)
        except BaseException:
            file.drop()
            raise
        record = replace(record, retired=False)
        return await self._protect(file, record, Start(LastEnd.UNKNOWN))

    async def unprotect(self, name: str) -> ProtectedDisk:
        """End protection. What is captured is shipped first; the history stays."""
        disk = self.find(name)
        if disk in self.adopted:
            raise StateError(
                f"disk {disk.name}: is a failover's: {disk.file.path}", hint="vdiskfs failover list"
            )
        await self._retire(disk, gone=False)
        return disk

    async def _retire(self, disk: ProtectedDisk, *, gone: bool) -> None:
        """Ship what there is, mark the disk retired, and let the file go.

        A file that is not ``gone`` is remembered: it is not protected again by itself, and
        is the same disk if the user protects it again.

        Raises:
            StateError: it is being retired already.
        """
        if disk in self._retiring:
            raise StateError(f"disk {disk.name}: is being retired already")
        self._retiring.add(disk)
        try:
            await self._let_go(disk, gone=gone)
        finally:
            self._retiring.discard(disk)
        log.info("disk %s: no longer protected; its recovery points stay", disk.name)

    async def _let_go(self, disk: ProtectedDisk, *, gone: bool) -> None:
        await disk.replicator.resume()
        await disk.replicator.seal_if_changed()
        await disk.replicator.wait_shipped()
        while disk.replicator.suspects.needed:  # what waited was given back: it is compared
            await disk.replicator.seal_if_changed()
            await disk.replicator.wait_shipped()
        disk.health.state = State.RETIRED
        await disk.health.until_done(
            "retiring", partial(enrolment.tell, self._site, disk.disk_id, enrolment.retired)
        )
        await disk.stop(clean=False)
        self._forget(disk)
        if gone:
            await trio.to_thread.run_sync(self._site.state.remove_disk, disk.disk_id)
        else:
            record = replace(disk.record, retired=True)
            await trio.to_thread.run_sync(self._site.state.write_disk, record)
        source_file(disk).drop()
