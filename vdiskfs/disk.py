"""One protected disk: its image, its record, its place in the vault, its replicator.

Starting a disk answers one question: which of its pages are known to be what the vault
holds? All, after a clean end of a file that nobody touched since, or when only the daemon
died. All but the regions of the intent log, after the host died. Otherwise all that is
allocated here, or has data there, is suspect until a pass has compared it. A vault whose
newest epoch this site does not know is never continued: which line is written, and by what
right, is `vdiskfs.ownership`'s.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from vdiskfs import crash, native
from vdiskfs.catalog import DiskLog, Policy, Vault
from vdiskfs.catalog.lastpolicy import last_policy
from vdiskfs.delta import DeltaWriter, Spooled, remove_leftovers
from vdiskfs.errors import DamagedError, LocalError, VdiskfsError
from vdiskfs.health import Health
from vdiskfs.image import ChainEnd, LiveImage, open_track
from vdiskfs.leftovers import spool_end
from vdiskfs.liveness import Liveness
from vdiskfs.ownernote import Displaced, Remembered, Start
from vdiskfs.ownership import DiskLine
from vdiskfs.point.fetch import first_error
from vdiskfs.ratelimit import RateLimiter
from vdiskfs.recovery import clear_track, doubted, recover_track
from vdiskfs.replicator import Joint, Replicator
from vdiskfs.state import DISK_END, DiskPaths, DistrustNote, FileStamp, LastEnd, StateDirectory
from vdiskfs.state import DiskRecord as LocalRecord
from vdiskfs.stride import Pace
from vdiskfs.tree import Access

log = logging.getLogger(__name__)

RESTART_S = 5.0
"""Seconds before a replicator that failed is started again."""


@dataclass(frozen=True)
class Site:
    """What all disks of a mount share."""

    name: str
    core: native.Core
    vault: Vault
    state: StateDirectory
    pace: Pace
    next_cookie: Callable[[], int]
    liveness: Liveness
    when_displaced: str = "read-only"
    force: bool = False
    accept_rollback: bool = False
    uploads: RateLimiter = field(default_factory=RateLimiter)
    """Bounds what all disks upload together."""
    joint_of: Callable[[str], Joint | None] = lambda _: None
    """What seals a disk (by its id) together with the others of its group."""
    beside: Callable[[ProtectedDisk], Awaitable[None]] | None = None
    """Runs beside a disk's replication, and never raises."""
    refused: Callable[[str, VdiskfsError], None] = lambda *_: None
    """Is told of a file that was to become a disk, and why it could not."""


class DiskFile(Protocol):
    """The file that a disk is: one of the source, or a failover's copy."""

    @property
    def path(self) -> str:
        """Its name for people: below ``disks/``, or the copy's."""

    @property
    def is_open(self) -> bool:
        """Whether a program has it open, as far as this daemon knows."""

    def identity(self) -> native.FileIdentity:
        """Return which file it is, its size and its times."""

    def access(self) -> Access:
        """Return who may read it."""


class ProtectedDisk:
    """A disk from `start` to `stop`. Only the trio thread uses it."""

    def __init__(
        self, site: Site, file: DiskFile, record: LocalRecord, image: native.Image,
        track: native.Track | None = None,
    ) -> None:  # fmt: skip
        """Take over the file (held by the caller), the image over it, and the track it may have."""
        self.site = site
        self.file = file
        self.record = record
        self.image = image
        self.health = Health(record.name)
        self.health.finalizing = site.state.disk(record.disk_id).unfinished.exists()
        self._track = track
        self.scope = trio.CancelScope()
        self.line = DiskLine(
            vault=site.vault, name=record.name, disk_id=record.disk_id,
            directory=site.state.disk(record.disk_id).directory, site=site.name,
            writer=site.state.writer_id, liveness=site.liveness,
        )  # fmt: skip
        self.line.on_displaced = self._note_displaced
        self.line.on_returned = self._note_returned
        self.on_displaced: Callable[[ProtectedDisk], None] = lambda _: None
        self.on_returned: Callable[[ProtectedDisk], None] = lambda _: None
        self.proven_ns: int | None = None
        self._replicator: Replicator | None = None
        self.policy: Policy | None = None

    @property
    def name(self) -> str:
        """The disk's name in the vault."""
        return self.record.name

    @property
    def disk_id(self) -> str:
        """The disk's id: 32 hex digits."""
        return self.record.disk_id

    @property
    def refuses(self) -> bool:
        """Whether guests may not write: another site has the disk."""
        return self.image.refuses

    @property
    def replicator(self) -> Replicator:
        """The replicator, once started."""
        if self._replicator is None:
            raise RuntimeError(f"disk {self.name} is not started")
        return self._replicator

    @property
    def started(self) -> bool:
        """Whether `start` has come to its end."""
        return self._replicator is not None

    @property
    def points(self) -> DiskLog:
        """The disk's points."""
        return self.line.points

    @property
    def title(self) -> str:
        """What its points are listed as here: a displaced disk writes a branch."""
        branch = self.line.displaced.branch if self.line.displaced is not None else ""
        return f"{self.name}@{branch}" if branch else self.name

    # ---- start -------------------------------------------------------------------------

    async def start(self, how: Start) -> None:
        """Find out where the disk stands, and track every change from now on.

        Raises:
            StateError: another site owns the disk.
            VdiskfsError: the vault does not answer, or says what cannot be.
        """
        paths = self.site.state.disk(self.disk_id)
        if not how.sure:
            how = replace(how, last_end=self._own_end(how.last_end))
        remembered = Remembered(self.record.generation, self.record.epoch, self.record.digest)
        used = await trio.to_thread.run_sync(self._learn_here, paths)
        end, known = await self.line.start(remembered, how)
        last_end = how.last_end
        if self.line.moved and last_end is not LastEnd.CLEAN:
            last_end = LastEnd.UNKNOWN  # a copy of bitmaps that were written meanwhile
        died = last_end in (LastEnd.HOST_DIED, LastEnd.UNKNOWN, LastEnd.STATE_LOST)
        found = await self._recover(last_end, end) if known else None
        track, new = await self._open_track(lost=died and found is None, known=known)
        trusted = known and not (new or track.counts().lost)
        trusted = trusted and (found is not None or self._is_unchanged(last_end))
        last = await trio.to_thread.run_sync(spool_end, paths.spool, end) or end
        # Numbers go on above all that the vault and the spool have seen, also when an earlier
        # start was killed before it numbered its track. The size is what the next delta starts
        # from: a killed daemon may have spooled an epoch that it had not forgotten.
        seen = max(last.epoch, used.epoch if used else 0)
        track.set_epoch(max(track.epoch, seen + 1), last.size)
        live = await trio.to_thread.run_sync(LiveImage, self.image, track)
        _mark_unseen_end(self.image, end.size)
        replicator = Replicator(
            name=self.name, live=live, line=self.line, end=end, directory=paths.directory,
            make_writer=self._make_writer, pace=self.site.pace, health=self.health,
            published=self._note_published, joint=lambda: self.site.joint_of(self.disk_id),
        )  # fmt: skip
        if not trusted:
            await trio.to_thread.run_sync(self._distrust, replicator, track)
        # Before the spool lets go of what it proves; after what is not known is noted durably.
        self._remember(end)
        self._write_record(end=None)
        await trio.to_thread.run_sync(partial(replicator.load, host_died=died))
        await trio.to_thread.run_sync(_tidy, paths)
        _note_size(live.image, replicator.end.size)
        if found is not None:
            log.info("disk %s: %d pages were marked changed", self.name, live.counts().dirty_pages)
            await trio.to_thread.run_sync(replicator.suspects.doubt, doubted(found), found.spans)
        await trio.to_thread.run_sync(native.begin_intent, self.image)
        await trio.to_thread.run_sync(self.site.state.note_started, self.disk_id)
        crash.hook("disk.started")
        if trusted and end.epoch:
            self.health.pass_finished()
        # From here to the end without a wait: a change is either counted now or comes as an event.
        self._replicator = replicator
        counts = live.counts()
        if counts.changed or replicator.suspects.needed or end.epoch == 0:
            replicator.touched()

    def _learn_here(self, paths: DiskPaths) -> ChainEnd | None:
        """Take the policy followed last, until the vault says it anew; return the spool's end.

        So what a policy asks of the disk's lag holds from the start. Blocks.
        """
        documents = self.site.state.documents
        self.policy = last_policy(paths.directory / "indexes", documents, self.disk_id)
        return spool_end(paths.spool, None)

    async def _open_track(self, *, lost: bool, known: bool) -> tuple[native.Track, bool]:
        """Return the track, and whether it is new: the one that guests' writes use already, if any.

        With ``lost`` bits that were only in the page cache are gone: none of them says anything.
        """
        if self._track is not None:
            if not known:
                # What is written until it is tracked again is allocated, and so made suspect.
                await trio.to_thread.run_sync(self.image.set_track, None)
            return self._track, False
        lost = lost or not await trio.to_thread.run_sync(self._is_sound)
        paths = self.site.state.disk(self.disk_id)
        if lost or not (paths.track / "track").exists():
            # Durable before there is an empty track, which the next start must not believe.
            note = DistrustNote(paths.directory / "distrusted")
            await trio.to_thread.run_sync(note.add, [(0, DISK_END)])
        if lost:
            await trio.to_thread.run_sync(clear_track, paths.track)
        await trio.to_thread.run_sync(paths.sums.remove)
        try:
            return await trio.to_thread.run_sync(open_track, paths.track, self.image.size())
        except DamagedError as error:
            if lost:
                raise
            log.error("disk %s: all is compared: %s", self.name, error)
            return await self._open_track(lost=True, known=known)

    def _distrust(self, replicator: Replicator, track: native.Track) -> None:
        replicator.suspects.distrust()
        if track.counts().lost:
            native.settle_track(self.image)
        # What a pass has read of it is as old as the rest.
        _clear(self.site.state.disk(self.disk_id).pass_)

    def _is_sound(self) -> bool:
        """Say whether the bitmaps are what a clean end left, if there was one; in a thread."""
        if self._track is not None or self.record.end is None:
            return True
        try:
            self.site.state.disk(self.disk_id).sums.check()
        except DamagedError as error:
            log.error("disk %s: all is compared: %s", self.name, error)
            return False
        return True

    def _own_end(self, last_end: LastEnd) -> LastEnd:
        """Say how tracking of this disk ended, if the mount's end says anything of it."""
        if last_end in (LastEnd.NONE, LastEnd.UNKNOWN):
            return last_end
        return self.site.state.end_of_disk(self.record)

    async def _recover(self, last_end: LastEnd, end: ChainEnd) -> native.Recovery | None:
        """After the death of the host: what is suspect; None: nothing is known, or it lived."""
        if last_end is not LastEnd.HOST_DIED:
            return None
        paths = self.site.state.disk(self.disk_id)
        last = await trio.to_thread.run_sync(spool_end, paths.spool, end) or end
        changed_ns = self.file.identity().change_ns
        return await trio.to_thread.run_sync(
            recover_track, self.name, self.image, changed_ns, paths.track, last
        )

    def _is_unchanged(self, last_end: LastEnd) -> bool:
        """Say whether what the bitmaps say is all that changed."""
        end = self.record.end
        if end is None or last_end not in (LastEnd.CLEAN, LastEnd.DAEMON_DIED):
            return last_end is LastEnd.DAEMON_DIED
        # It ended in order, and no daemon has come as far as to start it since.
        if end == FileStamp.of(self.file.identity()):
            return True
        log.warning("disk %s: %s was changed behind the mount", self.name, self.file.path)
        return False

    def _note_displaced(self, displaced: Displaced) -> None:
        self.health.displaced(str(displaced), handed=not displaced.branch)
        self.on_displaced(self)
        self._look_again()

    def _note_returned(self) -> None:
        self.health.returned()
        self.on_returned(self)
        self._look_again()

    def _look_again(self) -> None:
        if self._replicator is not None:  # else it looks when it begins
            self._replicator.look_again()

    def _make_writer(self, directory: Path, *, inside: bool, batch: str = "") -> DeltaWriter:
        limits = {} if inside else {"inline_limit": 0}
        return DeltaWriter(
            directory,
            **limits,
            vault_id=self.site.vault.vault_id,
            disk_id=self.disk_id,
            writer_id=self.site.state.writer_id,
            level=(self._replicator or self.site).pace.compression_level,
            batch=batch,
        )

    def _note_published(self, spooled: Spooled) -> None:
        self._remember(ChainEnd.of(spooled.head))
        self.site.state.write_disk(self.record)

    def _remember(self, end: ChainEnd) -> None:
        """The vault holds this epoch; not durable yet."""
        digest = end.digest.hex() if end.epoch else ""
        self.record = replace(
            self.record, generation=end.generation, epoch=end.epoch, digest=digest,
            size=end.size, time_ns=end.time_ns,
        )  # fmt: skip

    def _write_record(self, end: FileStamp | None) -> None:
        self.record = replace(self.record, end=end, file=self.file.path)
        self.site.state.write_disk(self.record)

    # ---- life and end --------------------------------------------------------------------

    async def run(self) -> None:
        """Replicate until `stop`."""
        self.replicator.shipper.shared = self.site.uploads
        with self.scope:
            async with trio.open_nursery() as nursery:
                if self.site.beside is not None:
                    nursery.start_soon(self.site.beside, self)
                await self._replicate()

    async def _replicate(self) -> None:
        while True:
            try:
                await self.replicator.run()
            except Exception as failure:  # noqa: BLE001 (whatever it is, the disk is served on)
                # The guest writes on, tracked; only its shipping stands still.
                self._tell_failed(failure)
                await trio.sleep(RESTART_S)

    def _tell_failed(self, failure: Exception) -> None:
        error = first_error(failure) if isinstance(failure, BaseExceptionGroup) else failure
        if isinstance(error, LocalError | OSError):
            log.error("disk %s: replication is started again: %s", self.name, error)
            self.health.local_failed(error)
            return
        log.error("disk %s: replication failed; it is started again", self.name, exc_info=failure)
        self.health.local_failed(LocalError(f"replication failed: {error!r}"))

    def refuse_writes(self, refuse: bool) -> None:
        """Let guests write no more: what they wrote is kept; or let them again."""
        self.image.refuse_writes(refuse)

    def renamed(self, path: str) -> None:
        """The file has another name; the disk is the same."""
        self.record = replace(self.record, file=path)
        self.site.state.write_disk(self.record)

    async def stop(self, *, clean: bool) -> None:
        """End tracking. With ``clean`` the image is synced and its stamp is kept.

        Nobody may write any more when ``clean`` is asked for. Where the local disk refuses there
        is no stamp, and the next start compares all of it.
        """
        self.scope.cancel()
        if self._replicator is None:
            return
        await self._replicator.finish()
        live = self._replicator.live
        try:
            if clean:
                await trio.to_thread.run_sync(live.image.sync_internal)
                await trio.to_thread.run_sync(native.sync_track, live.track)
        except OSError as error:
            clean = False
            log.error("disk %s: cannot be synced at its end, the next start compares all of it: %s",
                      self.name, error)  # fmt: skip
        finally:
            live.end()  # it is listed still
            await trio.to_thread.run_sync(live.close)
        if clean:
            paths = self.site.state.disk(self.disk_id)
            await trio.to_thread.run_sync(paths.sums.write)
            self._write_record(FileStamp.of(self.file.identity()))


def _tidy(paths: DiskPaths) -> None:
    for directory in (paths.spool, paths.pass_):
        remove_leftovers(directory)
    shutil.rmtree(paths.fence, ignore_errors=True)


def _note_size(image: native.Image, known: int) -> None:
    """Mark a size that is not the newest epoch's as a change, though no page may differ."""
    size = image.size()
    if size != known:
        # The page of the end: what the delta says of a new end needs it.
        image.mark(max(size, 1) - 1, 1)


def _mark_unseen_end(image: native.Image, known: int) -> None:
    """Mark the page of an end that nobody saw come: what lay behind it is to be gone."""
    if 0 < image.size() < known:
        image.mark(image.size() - 1, 1)


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
