"""Whether a file that is no disk here is a copy of a disk that the vault has.

A state directory knows its disks by their files' inodes, so another host, or another state
directory, sees only a file. One that has the name of a disk in the vault and mostly its
bytes is that disk: it has an owner, and is not enrolled a second time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import trio

from vdiskfs import native
from vdiskfs.catalog import DiskRecord, Vault
from vdiskfs.errors import NotFoundError
from vdiskfs.point import PointReader
from vdiskfs.units import PAGE_SIZE

SAMPLES = 64
"""Pages looked at: evenly spread, all with data in the vault."""

ALIKE = 0.75
"""The share of them that a copy still has. Two machines made from one template differ in names;
if they do not, the error says to rename one."""

_SUFFIXES = 20
_DATA = 2


async def find_twin(vault: Vault, name: str, fd: int, writer: str) -> DiskRecord | None:
    """Return the disk of another writer that a file is a copy of, or None.

    Args:
        vault: where to look.
        name: the name that the file would get as a disk.
        fd: the file, open for reading.
        writer: our own id: a copy of a disk of ours is a disk of its own.
    """
    for number in range(1, _SUFFIXES):
        try:
            record = await vault.find_disk(name if number == 1 else f"{name}-{number}")
        except NotFoundError:
            return None
        owner = record.owner
        if record.retired or owner is None or owner.writer == writer:
            continue
        if await _is_alike(vault, record, fd):
            return record
    return None


async def _is_alike(vault: Vault, record: DiskRecord, fd: int) -> bool:
    log = vault.log(record)
    try:
        newest = await log.find("latest")
    except NotFoundError:
        return False
    async with await log.open(newest) as reader:
        pages = await _sample(reader)
        sums = [await reader.sums(page, 1) for page in pages]
    wanted = [int(column[0]) for column, kind in sums if kind[0] == _DATA]
    known = [page for page, (_, kind) in zip(pages, sums, strict=True) if kind[0] == _DATA]
    if not known:
        return False
    found = await trio.to_thread.run_sync(_local_sums, fd, known)
    same = sum(one == other for one, other in zip(wanted, found, strict=True))
    return same >= ALIKE * len(known)


async def _sample(reader: PointReader) -> list[int]:
    """Return numbers of pages that have data, spread over the disk."""
    found: list[int] = []
    for number in range(SAMPLES):
        offset = await reader.next_data(reader.size * number // SAMPLES)
        if offset is None:
            break
        page = offset // PAGE_SIZE
        if not found or page > found[-1]:
            found.append(page)
    return found


def _local_sums(fd: int, pages: Sequence[int]) -> list[int]:
    data = b"".join(
        os.pread(fd, PAGE_SIZE, page * PAGE_SIZE).ljust(PAGE_SIZE, b"\0") for page in pages
    )
    return [int(one) for one in native.pages_sum(data)]
