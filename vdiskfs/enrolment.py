"""A file becomes a disk, comes back as one, or is refused: what the vault is told and asked."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePath

import trio

from vdiskfs.catalog import DiskRecord as VaultRecord
from vdiskfs.catalog import Owner
from vdiskfs.catalog.vault import now_text
from vdiskfs.crash import hook
from vdiskfs.disk import Site
from vdiskfs.errors import BusyError, DamagedError, NotFoundError, UsageError
from vdiskfs.ownernote import refusal
from vdiskfs.state import (
    DiskPaths,
    DiskRecord,
    ImageLock,
    read_record,
    remove_file,
    write_record,
)
from vdiskfs.tree import SourceFile
from vdiskfs.twin import find_twin

Change = Callable[[VaultRecord], VaultRecord]


async def enroll(site: Site, file: SourceFile, *, force: bool) -> DiskRecord:
    """Make a disk in the vault and here for a file that is none yet; a forced copy takes over.

    Raises:
        StateError: it is a disk of another writer, and nothing is to be taken over.
    """
    vault, identity = site.vault, file.identity()
    made = await _foreign(site, file, None, force=force)
    is_new = made is None
    note = site.state.path / f"enrolling-{identity.inode}-{identity.birth_ns}.json"
    if made is None:
        # Known here before it is known there: who ends in between has made one disk, not two.
        disk_id = await trio.to_thread.run_sync(_id_for, site, note)
        made = await vault.create_disk(
            _disk_name(file), file=file.path, size=identity.size, site=site.name, disk_id=disk_id,
            owner=Owner(site.name, site.state.writer_id, "", now_text()),
        )  # fmt: skip
        hook("enrolment.told")
    record = DiskRecord(
        disk_id=made.id, name=made.name, file=made.file, vault_id=vault.vault_id,
        writer_id=site.state.writer_id, device=identity.device,
        inode=identity.inode, birth_ns=identity.birth_ns,
    )  # fmt: skip
    fill = _to_be_finalized if is_new else _nothing_more
    await trio.to_thread.run_sync(site.state.create_disk, record, fill)
    if is_new:
        await trio.to_thread.run_sync(remove_file, note)
    return record


def _id_for(site: Site, note: Path) -> str:
    """Return the id of a new disk: that which an earlier try has noted, or one that is noted."""
    vault_id = site.vault.vault_id
    try:
        noted = read_record(note)
    except (NotFoundError, DamagedError):
        noted = {}
    disk_id = str(noted.get("disk_id", ""))
    if noted.get("vault_id") == vault_id and not site.state.disk(disk_id).directory.exists():
        return disk_id
    disk_id = uuid.uuid4().hex
    write_record(note, {"vault_id": vault_id, "disk_id": disk_id})
    return disk_id


def _to_be_finalized(paths: DiskPaths) -> None:
    paths.unfinished.touch(mode=0o600)


def _nothing_more(_: DiskPaths) -> None:
    """A disk of which the vault has points already."""


async def lock_image(
    site: Site, file: SourceFile, record: DiskRecord | None, *, force: bool
) -> ImageLock:
    """Take the image's lock bytes.

    Raises:
        StateError: they are taken, by the disk's owner where that is another writer.
    """
    try:
        return ImageLock(file.descriptor, file.path)
    except BusyError:
        if not force:
            await _foreign(site, file, record, force=False)
        raise


async def _foreign(
    site: Site, file: SourceFile, record: DiskRecord | None, *, force: bool
) -> VaultRecord | None:
    """Return the disk of another writer that a file is; StateError if it is not forced."""
    vault, writer = site.vault, site.state.writer_id
    if record is not None:
        found = await vault.disk(record.disk_id)
        twin = found if found.owner is not None and found.owner.writer != writer else None
    else:
        fd, _ = file.open_file(writable=False)
        try:
            twin = await find_twin(vault, _disk_name(file), fd, writer)
        finally:
            os.close(fd)
    if twin is not None and twin.owner is not None and not force:
        raise await refusal(site.liveness, twin, twin.owner, "owns it")
    return twin


def unprotected(records: Iterable[DiskRecord], file: SourceFile) -> DiskRecord | None:
    """Return the record of the disk that this file was until the user unprotected it."""
    identity = file.identity()
    found = [one for one in records if one.retired and one.matches(identity)]
    return found[-1] if found else None


def with_file(path: str) -> Change:
    """Say that the image has another name."""
    return lambda record: replace(record, file=path)


def retired(record: VaultRecord) -> VaultRecord:
    """Say that the disk went away now."""
    return replace(record, retired=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")


def revived(record: VaultRecord) -> VaultRecord:
    """Say that the disk is back."""
    return replace(record, retired=None)


async def tell(site: Site, disk_id: str, change: Change) -> None:
    """Change a disk's record, unless it is another writer's now: then it is not ours to say."""

    def own(record: VaultRecord) -> VaultRecord:
        foreign = record.owner is not None and record.owner.writer != site.state.writer_id
        return record if foreign else change(record)

    await site.vault.update_disk(disk_id, own)


def _disk_name(file: SourceFile) -> str:
    name = PurePath(file.path).stem or "disk"
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{file.path!r}: its name is not UTF-8, which names in a vault are",
            hint="rename it, then: vdiskfs disk protect",
        ) from None
    return name
