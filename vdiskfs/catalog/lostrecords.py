"""The documents that lead to a disk, put back: its name, and its record.

A name never changes. A record is the truth about who owns a disk, and an older one put back
would undo what others decided; so the copy that a disk's owner keeps is put back only where the
vault shows that nobody has decided anything since: no takeover has fenced the line, no line was
begun, no line was thinned further.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from vdiskfs.catalog.documents import DOCUMENT_LIMIT, FORMAT, encode_document
from vdiskfs.catalog.ledger import ledger_prefix, read_ledger
from vdiskfs.catalog.line import Line
from vdiskfs.catalog.records import DiskRecord, decode_disk, encode_disk
from vdiskfs.catalog.report import Healed, Left, Problem
from vdiskfs.catalog.swap import disk_object
from vdiskfs.catalog.vault import Vault, name_object
from vdiskfs.errors import ConflictError, DamagedError, NotFoundError, VdiskfsError

YOUNG_S = 180
"""A copy that was compared so lately has all but what was decided in these minutes."""

_GENERATION = re.compile(r"disks/[0-9a-f]{32}/g([0-9a-f]{8})[./]")


async def restore_name(
    vault: Vault, name: str, disk_id: str, *, dry_run: bool
) -> Healed | Left | None:
    """Let a disk have its name again; None: it is there, or somebody else's by now."""
    where = name_object(name)
    message, etag = "is missing", None
    try:
        await vault.named_id(where)
        return None
    except NotFoundError:
        pass
    except DamagedError as error:
        message, etag = error.message.removeprefix(f"{where}: "), await _etag(vault, where)
    problem = Problem(where, message, name)
    if not dry_run:
        document = encode_document({"format": FORMAT, "disk": disk_id})
        metadata = {"disk": disk_id}
        try:
            await vault.store.replace(where, document, etag=etag, metadata=metadata)
        except ConflictError:
            return Left(problem, "somebody else has changed it meanwhile")
    return Healed(problem, 1, 0, 0)


async def restore_record(
    vault: Vault,
    name: str,
    disk_id: str,
    copies: list[bytes],
    writer: str,
    *,
    age_s: float = math.inf,
    dry_run: bool,
) -> Healed | Left | None:
    """Put a disk's record back from its owner's copy; None: it is whole.

    Args:
        vault: which.
        name: the disk's.
        disk_id: the disk's.
        copies: of the record, the newest first.
        writer: who the copies say is the owner, or nothing is put back.
        age_s: for how long they may not have been what the vault had.
        dry_run: store nothing.
    """
    where = disk_object(disk_id)
    message, etag = "is missing", None
    try:
        await vault.disk(disk_id)
    except NotFoundError:
        pass
    except DamagedError as error:
        message, etag = error.message.removeprefix(f"{where}: "), await _etag(vault, where)
    else:
        return None
    problem = Problem(where, message, name)
    found = _decoded(copies, disk_id, where)
    if found is None:
        return Left(problem, "no copy of it is known here")
    data, record = found
    why = await _since(vault, record, writer)
    if why:
        return Left(problem, f"the copy of it that is here may be too old: {why}")
    if record.policy and not 0 <= age_s < YOUNG_S:
        # Whoever set a hold, or another policy, since then must not lose points by it.
        data = encode_disk(replace(record, policy=""))
        problem.message += (
            f" (put back without its policy {record.policy}, as holds may have been set since the"
            " copy was made: nothing is thinned until a policy is set again)"
        )
    if not dry_run:
        try:
            await vault.store.replace(where, data, etag=etag)
        except ConflictError:
            return Left(problem, "somebody else has changed it meanwhile")
    return Healed(problem, 1, 0, 0)


def _decoded(copies: list[bytes], disk_id: str, where: str) -> tuple[bytes, DiskRecord] | None:
    for copy in copies:
        try:
            return copy, decode_disk(copy, disk_id, where=where)
        except DamagedError:
            continue
    return None


async def _since(vault: Vault, record: DiskRecord, writer: str) -> str:
    """Return what the vault shows to have been decided after a copy was made; or nothing."""
    if record.owner is None or record.owner.writer != writer:
        return "another site owned the disk"
    if record.handover is not None or record.moved is not None:
        return "the disk was on its way to another site"
    numbers = {
        int(match[1], 16)
        async for info in vault.store.list(f"disks/{record.id}/g")
        if (match := _GENERATION.match(info.name))
    }
    if not numbers <= record.parents.keys():
        return "a line was begun since"
    number, ref = record.generation, record.ledgers.get(record.generation)
    line = Line(vault.store, record.id, number, record.base(number), ref=ref)
    try:
        await line.load()
        if line.fence is not None:
            return "another site has taken the disk over"
        for one in numbers:
            if await _was_thinned(vault, record, one):
                return "its points were thinned since"
    except DamagedError as error:
        return f"it cannot be told, for damage: {error.message}"
    return ""


async def _was_thinned(vault: Vault, record: DiskRecord, generation: int) -> bool:
    """Say whether there is a ledger of a generation that is newer than the record's."""
    ref = record.ledgers.get(generation)
    base, newest, serial = record.base(generation), (-1, -1), -1
    if ref is not None:
        ledger = await read_ledger(vault.store, record.id, generation, ref.id, base)
        newest, serial = (ledger.horizon, ledger.now_ns), ledger.serial
    prefix = ledger_prefix(record.id, generation)
    for name in [info.name async for info in vault.store.list(prefix)]:
        ledger_id = name.removeprefix(prefix)
        if ref is not None and ledger_id == ref.id:
            continue
        try:
            ledger = await read_ledger(vault.store, record.id, generation, ledger_id, base)
        except NotFoundError:
            continue
        if (ledger.horizon, ledger.now_ns) > newest or ledger.serial > serial:
            return True
    return False


async def _etag(vault: Vault, name: str) -> str | None:
    try:
        return (await vault.store.stat(name)).etag
    except VdiskfsError:
        _, info = await vault.store.read(name, limit=DOCUMENT_LIMIT)
        return info.etag
