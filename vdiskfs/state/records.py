"""What is known of each protected disk between two mounts, and which file is which disk.

A disk is known by its file's device, inode and birth time, never by its name: a rename
keeps the disk, another file under its name is another disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from vdiskfs.errors import DamagedError, StateError
from vdiskfs.native import FileIdentity

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class FileStamp:
    """The file at the last clean end: another stamp at the next start is a change behind us."""

    size: int
    modify_ns: int
    change_ns: int

    @staticmethod
    def of(identity: FileIdentity) -> FileStamp:
        """Return the stamp of the file as it is now."""
        return FileStamp(identity.size, identity.modify_ns, identity.change_ns)


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """One disk of this site.

    ``epoch``, ``digest`` (hex), ``size`` and ``time_ns`` are those of the last delta of
    ``generation`` that the vault holds for certain; ``end`` is None while the disk is in
    use and after an unclean end.
    """

    disk_id: str
    name: str
    file: str
    vault_id: str
    writer_id: str
    device: int
    inode: int
    birth_ns: int
    generation: int = 1
    epoch: int = 0
    digest: str = ""
    size: int = 0
    time_ns: int = 0
    retired: bool = False
    end: FileStamp | None = None

    def matches(self, identity: FileIdentity) -> bool:
        """Say whether the file is this disk's."""
        return self.device == identity.device and self._is_same_inode(identity)

    def _is_same_inode(self, identity: FileIdentity) -> bool:
        return self.inode == identity.inode and self.birth_ns == identity.birth_ns

    def matches_moved(self, identity: FileIdentity) -> bool:
        """Say whether the file is this disk's on a device that has another number now.

        Only where the file system keeps birth times: an inode number alone says nothing.
        """
        return self.birth_ns != 0 and self._is_same_inode(identity)

    def to_body(self) -> dict[str, Any]:
        """Return what is written into the record's file."""
        return {"format": _FORMAT, **asdict(self)}

    @staticmethod
    def from_body(body: dict[str, Any], *, where: str) -> DiskRecord:
        """Read what `to_body` gave.

        Raises:
            DamagedError: it is not a record of a disk; ``where`` names it.
        """
        rest = dict(body)
        version = rest.pop("format", None)
        if version != _FORMAT:
            raise DamagedError(f"{where}: a record of format {version}; this is format {_FORMAT}")
        try:
            end = rest.pop("end")
            record = DiskRecord(**rest, end=None if end is None else FileStamp(**end))
        except (TypeError, KeyError):
            raise DamagedError(f"{where}: not a disk's record") from None
        wrong = [
            item.name
            for item in fields(DiskRecord)
            if item.name != "end" and type(getattr(record, item.name)).__name__ != item.type
        ]
        if wrong:
            raise DamagedError(f"{where}: not a disk's record: {', '.join(wrong)}")
        return record


def find_record(
    records: Iterable[DiskRecord], identity: FileIdentity, file: str
) -> DiskRecord | None:
    """Return the record of the disk that this file is, or None: the file is no disk yet.

    Retired disks are not looked at. Where the file system keeps no birth time, an inode
    may have been used again: then the file must also have the recorded name.

    Raises:
        StateError: several records could be meant.
    """
    live = [record for record in records if not record.retired]
    found = [record for record in live if record.matches(identity)]
    if identity.birth_ns == 0:
        found = [record for record in found if record.file == file]
    if not found:
        # Device numbers may change over a reboot.
        found = [record for record in live if record.matches_moved(identity)]
    if len(found) > 1:
        names = ", ".join(sorted(record.name for record in found))
        raise StateError(
            f"{file}: could be each of the disks {names}",
            hint="unprotect those that are gone",
        )
    return found[0] if found else None
