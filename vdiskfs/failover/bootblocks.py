"""What machines read of a disk until they answered: fetched first the next time.

Kept in the vault, ``boot/DISK-ID.json``, so that any site that starts the machine has it. It is
a hint: without it, or with a wrong one, a machine starts as well, only slower.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from vdiskfs.catalog.documents import FORMAT, decode_document, encode_document, take
from vdiskfs.errors import ConflictError, FormatError, NotFoundError, VdiskfsError
from vdiskfs.store import Store
from vdiskfs.units import CHUNK_SIZE

log = logging.getLogger(__name__)

RUNS_MAX = 16384
"""Runs that are kept; what was read later is left out."""

BYTES_MAX = 1 << 30
"""Bytes that are kept, and fetched before they are asked for."""

Run = tuple[int, int]
"""A first chunk and a number of chunks of 64 KiB."""


def boot_name(disk_id: str) -> str:
    """Return the name of the object."""
    return f"boot/{disk_id}.json"


def joined(runs: Iterable[Run]) -> list[Run]:
    """Return each chunk once, in the order in which it came first, as few runs as that takes."""
    seen: set[int] = set()
    found: list[list[int]] = []
    for first, count in runs:
        for chunk in range(first, first + count):
            if len(seen) * CHUNK_SIZE >= BYTES_MAX:
                break
            if chunk in seen:
                continue
            seen.add(chunk)
            if found and found[-1][0] + found[-1][1] == chunk:
                found[-1][1] += 1
            else:
                found.append([chunk, 1])
    return [(first, count) for first, count in found[:RUNS_MAX]]


async def read_boot(store: Store, disk_id: str) -> list[Run]:
    """Return what to fetch first; nothing where nothing is known, or it cannot be read now."""
    name = boot_name(disk_id)
    try:
        runs = (await _read(store, name))[0]
    except NotFoundError:
        return []
    except VdiskfsError as error:
        log.info("%s: started without it: %s", name, error)
        return []
    return runs


async def write_boot(store: Store, disk_id: str, runs: Iterable[Run]) -> bool:
    """Keep what was read now and before; tell whether anything was new.

    Raises:
        VaultUnreachableError, RefusedError: as the store.
    """
    name = boot_name(disk_id)
    while True:
        etag: str | None = None
        before: list[Run] = []
        try:
            before, etag = await _read(store, name)
        except NotFoundError:
            pass
        except FormatError as error:
            log.warning("%s: replaced: %s", name, error)
            etag = (await store.stat(name)).etag
        wanted = joined([*before, *runs])
        if wanted == before:
            return False
        document = encode_document({"format": FORMAT, "runs": [list(run) for run in wanted]})
        try:
            await store.replace(name, document, etag=etag)
        except (ConflictError, NotFoundError):
            continue  # another site was faster: with what it has kept
        return True


async def _read(store: Store, name: str) -> tuple[list[Run], str]:
    data, info = await store.read(name, limit=1 << 20)
    values = take(decode_document(data, where=name), "runs", list, where=name)
    runs = []
    for one in values:
        ok = isinstance(one, list) and len(one) == 2 and all(type(part) is int for part in one)
        if not ok or not 0 <= one[0] < 1 << 47 or not 0 < one[1] <= BYTES_MAX // CHUNK_SIZE:
            raise FormatError("a run that no disk has", where=name)
        runs.append((one[0], one[1]))
    return joined(runs), info.etag
