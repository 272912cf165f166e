"""What is to be known of a disk before it is taken: in the vault, and on this host."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from vdiskfs.catalog import DiskRecord, Owner, Vault
from vdiskfs.catalog.moves import Fork
from vdiskfs.catalog.proofs import Recovery, write_recovery
from vdiskfs.catalog.records import Moved
from vdiskfs.catalog.vault import now_text
from vdiskfs.disk import DiskFile, Site
from vdiskfs.errors import VdiskfsError
from vdiskfs.failover.record import FailoverRecord, Health, Member
from vdiskfs.failover.states import State
from vdiskfs.image import make_track
from vdiskfs.ownernote import read_note, write_note
from vdiskfs.state import DiskPaths, FileStamp
from vdiskfs.state import DiskRecord as LocalRecord

log = logging.getLogger(__name__)


def fork_of(
    record: FailoverRecord, member: Member, disk: DiskRecord, *, site: str, state: State
) -> Fork:
    """Return where the generation begins with which a site takes a member of a failover.

    Args:
        record: the failover, or failback.
        member: at its point.
        disk: as the vault has it now.
        site: who takes it.
        state: what all sites are told of the failover.
    """
    before, source, generation = disk.moved, disk.owner, disk.generation
    if before is not None and before.id == record.id:
        source, generation = before.source, before.generation
    if source is None:
        source = Owner(disk.site, "", "", disk.created)
    moved = Moved(record.id, member.token, str(record.kind), str(state), site, now_text(),
                  generation, source)  # fmt: skip
    return Fork(member.generation, member.epoch, member.current, moved)


def is_taken(disk: DiskRecord, member: Member) -> bool:
    """Say whether this failover, or failback, has a member already, by an earlier run perhaps."""
    return disk.moved is not None and member.token != "" and disk.moved.token == member.token


async def note_recovery(vault: Vault, record: FailoverRecord, machine: str, health: Health) -> None:
    """Keep with the points how long a machine took on them until it answered."""
    recovery = Recovery(health.seconds, now_text(), machine, health.detail)
    for member in record.members:
        place = (member.generation, member.epoch)
        try:
            await write_recovery(vault.store, member.disk_id, place, recovery)
        except VdiskfsError as error:
            log.warning("%s: the recovery time of its point is not kept: %s", record.name, error)


def prepare_disk(
    site: Site, member: Member, file: DiskFile, mark: Callable[[DiskPaths], None]
) -> LocalRecord:
    """Make what is known of a member here, as after a clean end: its file is its point.

    What an earlier run that was cut off has told the vault is known again. Blocks on the disk.

    Args:
        site: the mount's.
        member: at its point.
        file: whose bytes that point is.
        mark: adds to the disk's files before they appear.

    Raises:
        LocalError: the disk refused.
    """
    state, identity = site.state, file.identity()
    note = read_note(state.disk(member.disk_id).directory)
    record = LocalRecord(
        disk_id=member.disk_id, name=member.disk, file=file.path,
        vault_id=site.vault.vault_id, writer_id=state.writer_id,
        device=identity.device, inode=identity.inode, birth_ns=identity.birth_ns,
        generation=member.generation, epoch=member.epoch, digest=member.digest,
        size=member.size, time_ns=member.time_ns, end=FileStamp.of(identity),
    )  # fmt: skip

    def fill(paths: DiskPaths) -> None:
        mark(paths)
        write_note(paths.directory, replace(note, place="", line=0, handed=""))
        make_track(paths, member.size)

    state.create_disk(record, fill, again=True)
    return record
