"""What must survive the daemon, and what it needs of the host.

files        small files, written whole, with a check
directory    the state directory: lock, last end, disks
distrust     stretches of which it is not known what the vault holds
records      what is known of each disk, and which file is which disk
tracksums    what the bitmaps were at a clean stop
imagelock    QEMU's lock bytes on a source file
mountpoint   the directory beneath the mount
users        who keeps a mount busy
"""

from __future__ import annotations

from vdiskfs.state.directory import DiskPaths, LastEnd, StateDirectory
from vdiskfs.state.distrust import DISK_END, DistrustNote, Stretch
from vdiskfs.state.files import (
    read_record,
    remove_file,
    sync_directory,
    write_file,
    write_record,
)
from vdiskfs.state.imagelock import ImageLock, is_in_use
from vdiskfs.state.mountpoint import open_mountpoint, seal_mountpoint, unseal_mountpoint
from vdiskfs.state.records import DiskRecord, FileStamp, find_record
from vdiskfs.state.tracksums import TrackSums
from vdiskfs.state.users import MountUser, users_of

__all__ = [
    "DISK_END", "DiskPaths", "DiskRecord", "DistrustNote", "FileStamp", "ImageLock", "LastEnd",
    "MountUser", "StateDirectory", "Stretch", "TrackSums", "find_record", "is_in_use",
    "open_mountpoint", "read_record", "remove_file", "seal_mountpoint", "sync_directory",
    "unseal_mountpoint", "users_of", "write_file", "write_record",
]  # fmt: skip
