"""The state directory of one mount: private, used by one daemon at a time.

    state.json            the site's writer id
    lock                  locked by the daemon that runs; holds its pid
    running               boot id of the daemon that runs, or that did not end in order, and
                          which mount of the file system it used
    clean                 what it is renamed to by an orderly end; removed at start
    site.json             what the vault was last told of this site
    groups.json           the consistency groups that the vault told of last
    documents.others/     copies of the vault's policies, groups and machines
    control.sock          the control socket
    cache/                local copies of recovery points; emptied at start
    failovers/<id>/       record.json, and a copy of each disk: see vdiskfs.failover
    disks/<disk id>/      record.json, boot, sums.json, distrusted, track/, spool/, pass/

Everything is 0700 and 0600. A directory of a disk appears and goes by one rename, so that
a crash never leaves half of one; what is found by halves all the same is an error, never
taken for new. Everything here blocks on the local disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Self

from vdiskfs import native
from vdiskfs.crash import hook
from vdiskfs.errors import BusyError, DamagedError, LocalError, NotFoundError, RefusedError
from vdiskfs.state.distrust import DISK_END, DistrustNote
from vdiskfs.state.files import read_record, remove_file, sync_directory, write_file, write_record
from vdiskfs.state.records import DiskRecord
from vdiskfs.state.tracksums import TrackSums

_KINDS = ("ext4", "xfs", "f2fs")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PARTS = ("track", "spool", "pass")
_EXCHANGE = 2  # RENAME_EXCHANGE
_PARTIAL = "."  # names of half-made and half-removed disks begin with it


class LastEnd(Enum):
    """How the daemon before this one ended."""

    NONE = "there was none"
    CLEAN = "in order"
    DAEMON_DIED = "the daemon died, the host lived on: what it wrote is whole"
    HOST_DIED = "the host died: what was not synced is gone"
    STATE_LOST = "the file system of the state directory was taken away under the daemon"
    UNKNOWN = "it is not known"


@dataclass(frozen=True, slots=True)
class DiskPaths:
    """Where the files of one disk lie."""

    directory: Path

    @property
    def record(self) -> Path:
        """The disk's record."""
        return self.directory / "record.json"

    @property
    def track(self) -> Path:
        """The C core's bitmaps."""
        return self.directory / "track"

    @property
    def spool(self) -> Path:
        """Deltas that the vault does not hold yet."""
        return self.directory / "spool"

    @property
    def pass_(self) -> Path:
        """What a pass has read so far."""
        return self.directory / "pass"

    @property
    def fence(self) -> Path:
        """The fence that a takeover writes; only a killed one leaves it."""
        return self.directory / "fence"

    @property
    def sums(self) -> TrackSums:
        """What the bitmaps were at the disk's clean end."""
        return TrackSums(self.directory / "sums.json", self.track)

    @property
    def distrusted(self) -> Path:
        """What `DistrustNote` keeps."""
        return self.directory / "distrusted"

    @property
    def unfinished(self) -> Path:
        """Is there until the first replication is followed by a finalize job that is done."""
        return self.directory / "unfinished"

    @property
    def parked(self) -> Path:
        """Is there while the image is changed from outside: the disk is not to be started."""
        return self.directory / "parked"

    @property
    def boot(self) -> Path:
        """The boot id of the host while which the bitmaps were last known to be right."""
        return self.directory / "boot"


class StateDirectory:
    """The state directory, locked. ``last_end`` says what may be trusted in it."""

    def __init__(self, path: Path, lock: int, boot_id: str) -> None:
        self.path = path
        self._lock = lock
        self._boot_id = f"{boot_id} {filesystem_instance(path)}".strip()
        self.last_end = self._read_last_end()
        self.writer_id = self._read_writer_id()

    @classmethod
    def open(cls, path: Path, *, boot_id: str | None = None) -> Self:
        """Lock the directory, made if it is absent, and note that a daemon runs.

        ``boot_id`` is the running kernel's unless given.

        Raises:
            BusyError: another daemon uses it; names its pid.
            RefusedError: it is another user's.
            DamagedError: it is not what a daemon left behind.
            LocalError: the disk refused.
        """
        boot_id = _BOOT_ID.read_text().strip() if boot_id is None else boot_id
        try:
            _make_private(path)
            lock = _lock(path)
        except OSError as error:
            raise LocalError(f"{path}: {error.strerror}") from error
        try:
            state = cls(path, lock, boot_id)
            state._start()
        except BaseException:
            os.close(lock)
            raise
        return state

    def _start(self) -> None:
        self._sweep()
        # First the note that somebody runs, then away with the one of the clean end.
        if not self._is_noted():  # after a death it stands there, and needs no room
            write_file(self.path / "running", self._boot_id.encode())
        remove_file(self.path / "clean")

    def _is_noted(self) -> bool:
        try:
            return (self.path / "running").read_text() == self._boot_id
        except FileNotFoundError:
            return False

    def _sweep(self) -> None:
        for name in ("disks", "cache", "failovers"):
            (self.path / name).mkdir(mode=0o700, exist_ok=True)
        halves = [*self._disks.glob(f"{_PARTIAL}*"), *self.failovers.glob(f"{_PARTIAL}*")]
        for left in [*halves, *self.cache.iterdir()]:
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()
        self.control.unlink(missing_ok=True)

    def _read_last_end(self) -> LastEnd:
        if (self.path / "clean").exists():
            return LastEnd.CLEAN
        try:
            before = (self.path / "running").read_text()
        except FileNotFoundError:
            # Disks without any note of a daemon: not a directory that we left.
            return LastEnd.UNKNOWN if self._disk_ids() else LastEnd.NONE
        return self._end_after(before)

    def _end_after(self, before: str) -> LastEnd:
        """Say what became of bitmaps that were right while ``before`` was the boot."""
        boot, _, mounted = before.partition(" ")
        now_boot, _, now_mounted = self._boot_id.partition(" ")
        if boot != now_boot:
            return LastEnd.HOST_DIED
        # Nothing is said where it is not known which mounting of the file system it was.
        gone = mounted and now_mounted and mounted != now_mounted
        return LastEnd.STATE_LOST if gone else LastEnd.DAEMON_DIED

    def _read_writer_id(self) -> str:
        path = self.path / "state.json"
        try:
            body = read_record(path)
        except NotFoundError:
            if self._disk_ids():
                raise DamagedError(
                    f"{path}: missing, though there are disks",
                    hint="restore the state directory, or move it away to start anew",
                ) from None
            body = {"format": 1, "writer_id": secrets.token_hex(16)}
            write_record(path, body)
        writer_id = body.get("writer_id")
        if body.get("format") != 1 or not isinstance(writer_id, str):
            raise DamagedError(f"{path}: not the state of a site of format 1")
        return writer_id

    # -- places -----------------------------------------------------------

    @property
    def _disks(self) -> Path:
        return self.path / "disks"

    @property
    def cache(self) -> Path:
        """Copies of recovery points; empty at start."""
        return self.path / "cache"

    @property
    def failovers(self) -> Path:
        """The writable copies of recovery points."""
        return self.path / "failovers"

    @property
    def boot_id(self) -> str:
        """What tells this run of the host, and this mounting of the directory, from others."""
        return self._boot_id

    @property
    def groups(self) -> Path:
        """What the vault said last of consistency groups."""
        return self.path / "groups.json"

    @property
    def documents(self) -> Path:
        """Copies of documents of the vault: what the names of their directories begin with."""
        return self.path / "documents"

    @property
    def control(self) -> Path:
        """The control socket."""
        return self.path / "control.sock"

    @property
    def site(self) -> Path:
        """What the vault was last told of this site: a record of the daemon's."""
        return self.path / "site.json"

    def disk(self, disk_id: str) -> DiskPaths:
        """Return where the files of a disk lie."""
        return DiskPaths(self._disks / disk_id)

    # -- disks ------------------------------------------------------------

    def _disk_ids(self) -> list[str]:
        try:
            names = sorted(entry.name for entry in os.scandir(self._disks))
        except FileNotFoundError:
            return []
        return [name for name in names if not name.startswith(_PARTIAL)]

    def records(self) -> list[DiskRecord]:
        """Return the records of all disks.

        Raises:
            DamagedError: a record is damaged or absent, or parts of a disk are; names it.
        """
        return [self.record(disk_id) for disk_id in self._disk_ids()]

    def record(self, disk_id: str) -> DiskRecord:
        """Return the record of one disk.

        Raises:
            DamagedError: it is damaged or absent, or parts of the disk are; names it.
        """
        paths = self.disk(disk_id)
        try:
            body = read_record(paths.record)
        except NotFoundError:
            raise DamagedError(
                f"{paths.record}: missing, though the disk's files are here"
            ) from None
        record = DiskRecord.from_body(body, where=str(paths.record))
        if record.disk_id != disk_id:
            raise DamagedError(f"{paths.record}: the record of another disk, {record.disk_id}")
        for part in _PARTS:
            if not (paths.directory / part).is_dir():
                raise DamagedError(f"{paths.directory / part}: missing")
        return record

    def create_disk(
        self, record: DiskRecord, fill: Callable[[DiskPaths], None] = lambda _: None, *,
        again: bool = False,
    ) -> DiskPaths:  # fmt: skip
        """Make the files of a disk: all of them, or none. Durable on return.

        ``fill`` adds to them before they appear. With ``again`` those of an earlier life of the
        disk give way in the same step.

        Raises:
            LocalError: the disk refused, or they are there already.
        """
        paths = self.disk(record.disk_id)
        partial = DiskPaths(self._disks / f"{_PARTIAL}{record.disk_id}.new")
        try:
            partial.directory.mkdir(mode=0o700)
            for part in _PARTS:
                (partial.directory / part).mkdir(mode=0o700)
            write_record(partial.record, record.to_body())
            fill(partial)
            sync_directory(partial.directory)
            hook("disk.made")
            if paths.directory.exists() and not again:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            self._place(partial.directory, paths.directory)
            hook("disk.named")
        except OSError as error:
            shutil.rmtree(partial.directory, ignore_errors=True)
            raise LocalError(f"{paths.directory}: {error.strerror}") from error
        return paths

    def _place(self, made: Path, named: Path) -> None:
        """Give a directory its name, also where another one has it, which is removed."""
        if not named.exists():
            made.rename(named)
            sync_directory(self._disks)
            return
        fd = os.open(self._disks, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            native.rename(fd, made.name, fd, named.name, _EXCHANGE)
        finally:
            os.close(fd)
        sync_directory(self._disks)
        shutil.rmtree(made, ignore_errors=True)

    def end_of_disk(self, record: DiskRecord) -> LastEnd:
        """Return how tracking of this one disk ended: a start may have been cut short.

        A disk that was not started since its own clean end had no part in what came later;
        one that was not started to the end since the host died has yet to be recovered.
        """
        if self.last_end in (LastEnd.NONE, LastEnd.UNKNOWN):
            return self.last_end
        if record.end is not None or self.last_end is LastEnd.CLEAN:
            return LastEnd.CLEAN
        try:
            before = self.disk(record.disk_id).boot.read_text()
        except FileNotFoundError:
            return LastEnd.UNKNOWN
        if self.last_end in (LastEnd.HOST_DIED, LastEnd.STATE_LOST):
            return self.last_end
        return self._end_after(before)

    def note_started(self, disk_id: str) -> None:
        """From now until the host dies, the disk's bitmaps are right. Durable on return."""
        write_file(self.disk(disk_id).boot, self._boot_id.encode())

    def distrust_all(self) -> None:
        """Nothing is known of any page of any disk from now on. Durable on return.

        Raises:
            LocalError: the disk refused, also what needs no room.
        """
        for disk_id in self._disk_ids():
            paths = self.disk(disk_id)
            try:
                DistrustNote(paths.distrusted).add([(0, DISK_END)])
            except LocalError:
                # A full disk. Without this file the next start trusts nothing, too.
                try:
                    remove_file(paths.boot)
                except OSError as error:
                    raise LocalError(f"{paths.boot}: {error.strerror}") from error
                hook("distrust.forgotten")

    def write_disk(self, record: DiskRecord) -> None:
        """Write a disk's record anew. Durable on return."""
        write_record(self.disk(record.disk_id).record, record.to_body())

    def remove_disk(self, disk_id: str) -> None:
        """Remove the files of a disk; the vault keeps its history."""
        gone = self._disks / f"{_PARTIAL}{disk_id}.old"
        self.disk(disk_id).directory.rename(gone)
        sync_directory(self._disks)
        hook("disk.removed")
        shutil.rmtree(gone)

    def set_aside(self) -> Path:
        """Forget all disks, and keep their files beside: return where."""
        aside = self.path / f"disks.{time.time_ns():020d}"
        self._disks.rename(aside)
        self._disks.mkdir(mode=0o700)
        sync_directory(self.path)
        return aside

    # -- the end ----------------------------------------------------------

    def end_clean(self) -> None:
        """Note the orderly end, after everything else is durable, and unlock.

        Raises:
            LocalError: the disk refused. It needs no room.
        """
        try:
            (self.path / "running").rename(self.path / "clean")
            sync_directory(self.path)
        except OSError as error:
            raise LocalError(f"{self.path}: {error.strerror}") from error
        hook("end.noted")
        self.close()

    def close(self) -> None:
        """Unlock, without a word of a clean end. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def filesystem_instance(path: Path) -> str:
    """Return what tells this mounting of the path's file system from an earlier one.

    It is the inode number that sysfs gave to the file system's directory there, which is new
    whenever the file system is mounted, in whatever mount namespace; empty where there is none.
    """
    status = path.stat()
    number = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    try:
        name = Path(f"/sys/dev/block/{number}").readlink().name
    except OSError:
        return ""
    for kind in _KINDS:
        with contextlib.suppress(OSError):
            return str(Path(f"/sys/fs/{kind}/{name}").stat().st_ino)
    return ""


def _make_private(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise RefusedError(f"{path}: the state directory belongs to user {status.st_uid}")
    if status.st_mode & 0o077:
        path.chmod(0o700)


def _lock(path: Path) -> int:
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 64, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise BusyError(
            f"{path}: in use by the vdiskfs daemon with pid {holder}",
            hint="unmount it first, or choose another --state",
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
