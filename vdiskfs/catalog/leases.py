"""Leases: which points are open somewhere. Thinning leaves them, and what they need is not deleted.

A mount says in its heartbeat what it has open. A command that reads a point has none: it keeps a
lease, ``leases/ID.json``, written again every minute and removed at the end. Whether it lives is
told by the store's clock alone. A lease that was not renewed for an hour is doubted: marked as
such in the document, which whoever holds it takes back with the next renewal. It counts for one
more hour, then it has lapsed and is removed. So a command that was killed holds its point for two
hours, and a clock that jumps takes no lease away. vdiskfs-format(5), "Objects".
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import NoReturn

import trio

from vdiskfs.catalog.documents import (
    DOCUMENT_LIMIT,
    FORMAT,
    decode_document,
    encode_document,
    take,
)
from vdiskfs.catalog.points import Point
from vdiskfs.catalog.records import WHOLE_LINE, DiskRecord, SiteRecord, Use, decode_uses
from vdiskfs.catalog.vault import Vault, now_text
from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    DamagedError,
    FormatError,
    LocalError,
    NotFoundError,
    RefusedError,
    VdiskfsError,
)
from vdiskfs.point.fetch import first_error
from vdiskfs.store import ObjectInfo, Store
from vdiskfs.units import NS

log = logging.getLogger(__name__)

SITE_S = 7 * 86400
"""A site that was silent for so long does not keep the points that it had open."""

RENEW_S = 60.0
"""Between two renewals of a lease."""

OLD_S = 3600
"""A lease that was not renewed for so long is doubted; one that is doubted has lapsed."""

PREFIX = "leases/"
_TRIES = 4
_RETURN_S = 5.0


@dataclass(frozen=True, slots=True)
class Lease:
    """The points that a command reads, and who it is, for people."""

    uses: tuple[Use, ...]
    what: str
    host: str
    pid: int
    since: str
    doubted: bool = False

    def encode(self) -> bytes:
        """Return the document."""
        return encode_document({
            "format": FORMAT, "what": self.what, "host": self.host, "pid": self.pid,
            "since": self.since, "uses": [list(use) for use in self.uses],
            "doubted": self.doubted,
        })  # fmt: skip


def decode_lease(data: bytes, *, where: str) -> Lease:
    """Return what a lease says.

    Raises:
        FormatError: it is damaged.
    """
    values = decode_document(data, where=where)
    what, host, since = (take(values, key, str, where=where) for key in ("what", "host", "since"))
    return Lease(
        decode_uses(take(values, "uses", list, where=where), where), what, host,
        take(values, "pid", int, where=where), since, take(values, "doubted", bool, where=where),
    )  # fmt: skip


@asynccontextmanager
async def leased(
    vault: Vault, points: Sequence[tuple[DiskRecord, Point]], what: str
) -> AsyncIterator[None]:
    """Hold points while they are read: they are not thinned away, and what they need stays.

    Open them inside: what was thinned away just before is found out then. Where the vault takes no
    note of it (a key that may only read) they are read all the same, with a warning.

    Args:
        vault: that has them.
        points: each with the record of its disk.
        what: the command, for people.

    Raises:
        VaultUnreachableError: the vault does not answer.
    """
    uses = tuple((record.id, point.generation, point.epoch) for record, point in points)
    held = _Held(vault.store, Lease(uses, what, socket.gethostname(), os.getpid(), now_text()))
    try:
        await held.renew()
    except (RefusedError, LocalError) as error:
        names = ", ".join(f"{record.name}@#{point.epoch}" for record, point in points)
        log.warning("%s may be thinned away meanwhile: there is no lease: %s", names, error)
        yield
        return
    async with _kept(held):
        yield


@asynccontextmanager
async def leased_whole(vault: Vault, record: DiskRecord, what: str) -> AsyncIterator[None]:
    """Keep all objects of a disk while they are read: it is thinned, but nothing is deleted.

    Read the record and the ledgers inside. Where the vault takes no note of it, or is full, the
    disk is read all the same: what is deleted meanwhile has to be told from damage then.

    Args:
        vault: that has the disk.
        record: the disk's.
        what: the command, for people.

    Raises:
        VaultUnreachableError: the vault does not answer.
    """
    uses = tuple((record.id, number, WHOLE_LINE) for number in sorted(record.parents))
    held = _Held(vault.store, Lease(uses, what, socket.gethostname(), os.getpid(), now_text()))
    try:
        await held.renew()
    except (RefusedError, LocalError) as error:
        log.info("disk %s is read without a lease: %s", record.name, error)
        yield
        return
    async with _kept(held):
        yield


@asynccontextmanager
async def _kept(held: _Held) -> AsyncIterator[None]:
    """Renew a lease, and give it back at the end, however that comes."""
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(held.keep)
            yield
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    finally:
        with trio.move_on_after(_RETURN_S, shield=True):
            await held.give_back()


class _Held:
    """A lease, by whoever has it."""

    def __init__(self, store: Store, lease: Lease) -> None:
        self._store = store
        self._body = lease.encode()
        self._ended = replace(lease, uses=()).encode()
        self._name = f"{PREFIX}{uuid.uuid4().hex}.json"
        self._etag: str | None = None

    async def keep(self) -> NoReturn:
        while True:
            await trio.sleep(RENEW_S)
            # A vault that is away ends the reading, or is back before the lease is doubted.
            with contextlib.suppress(VdiskfsError):
                await self.renew()

    async def renew(self) -> None:
        for _ in range(_TRIES):
            try:
                self._etag = await self._store.replace(self._name, self._body, etag=self._etag)
            except (AlreadyExistsError, ConflictError, NotFoundError):
                # It was doubted, or removed. Read, and not only asked for: what is written next
                # has to be newer than what the other one wrote, whatever its clock says.
                try:
                    self._etag = (await self._store.read(self._name, limit=DOCUMENT_LIMIT))[1].etag
                except NotFoundError:
                    self._etag = None
            else:
                return
        raise ConflictError(f"{self._name}: it is changed by others all the time")

    async def give_back(self) -> None:
        # Where that fails it lapses.
        with contextlib.suppress(VdiskfsError):
            try:
                await self._store.delete(self._name)
            except RefusedError:
                # A key that may not delete: it holds nothing until somebody else removes it.
                self._body = self._ended
                await self.renew()


async def open_points(
    vault: Vault, record: DiskRecord, now_ns: int, *, tidy: bool = True
) -> set[tuple[int, int]]:
    """Return the points (generation, epoch) of a disk that are open somewhere.

    With the epoch `WHOLE_LINE`: the generation is read as a whole.

    Args:
        vault: that has the disk.
        record: the disk's.
        now_ns: the time of the store's clock.
        tidy: doubt leases that are old, and remove those that have lapsed.

    Raises:
        FormatError: what somebody has open cannot be read. A site's heartbeat that cannot be
            read counts for a week, as one that can be.
    """
    sites, unreadable = await vault.read_sites()
    for one in unreadable:
        if not is_forgotten(one.modified_ns, now_ns):
            raise FormatError(
                f"{one.why}: nobody knows which points its site has open: nothing is thinned",
                where=one.object,
                hint="its site writes it again; of one that is gone it counts for a week",
            )
    uses = [use for site in _alive(sites, now_ns) for use in site.uses]
    uses += await _leases(vault.store, now_ns, tidy=tidy)
    found = set()
    for disk_id, generation, epoch in uses:
        if disk_id != record.id or generation not in record.parents:
            continue
        if epoch == WHOLE_LINE:
            found.add((generation, epoch))
            continue
        # A copy names the line that its point is looked up on: it may be an ancestor's.
        line = next((one for one, end in record.lineage(generation) if epoch <= end), generation)
        found.add((line, epoch))
    return found


async def list_leases(vault: Vault) -> list[Lease]:
    """Return the leases that there are, the oldest first; those that are damaged are left out."""
    found = []
    for listed in [info async for info in vault.store.list(PREFIX)]:
        with contextlib.suppress(NotFoundError, DamagedError):
            data, _ = await vault.store.read(listed.name, limit=DOCUMENT_LIMIT)
            found.append(decode_lease(data, where=listed.name))
    return sorted(found, key=lambda lease: lease.since)


async def _leases(store: Store, now_ns: int, *, tidy: bool) -> list[Use]:
    found: list[Use] = []
    for listed in [info async for info in store.list(PREFIX)]:
        try:
            data, info = await store.read(listed.name, limit=DOCUMENT_LIMIT)
            lease = decode_lease(data, where=listed.name)
        except NotFoundError:
            continue  # it was given back just now
        except DamagedError:
            # Who knows what it holds; a command that lives writes it again within a minute.
            if not _is_old(listed, now_ns):
                raise
            if tidy:
                await _remove(store, listed.name)
            continue
        old = _is_old(info, now_ns)
        if old and lease.doubted:
            if tidy:
                await _remove(store, info.name)
            continue
        found += lease.uses
        if old and tidy:
            await _doubt(store, info, lease)
    return found


def is_forgotten(modified_ns: int, now_ns: int) -> bool:
    """Say whether a heartbeat that cannot be read counts no more, by the store's clock."""
    return abs(now_ns - modified_ns) >= SITE_S * NS


def _is_old(info: ObjectInfo, now_ns: int) -> bool:
    # What was written in the future was, by a clock that was set back since: nobody knows when.
    return abs(now_ns - info.modified_ns) > OLD_S * NS


async def _doubt(store: Store, info: ObjectInfo, lease: Lease) -> None:
    # Refused where it was renewed, or given back, just now.
    with contextlib.suppress(ConflictError, NotFoundError):
        await store.replace(info.name, replace(lease, doubted=True).encode(), etag=info.etag)


async def _remove(store: Store, name: str) -> None:
    # Somebody else was faster, or this key may not delete: it counts no more all the same.
    with contextlib.suppress(ConflictError, NotFoundError, RefusedError):
        await store.delete(name)


def _alive(sites: Collection[SiteRecord], now_ns: int) -> list[SiteRecord]:
    """Return the sites whose open points count: those that were heard of within a week."""
    found = []
    for site in sites:
        try:
            heard = datetime.fromisoformat(site.time)
            heard = heard if heard.tzinfo is not None else heard.replace(tzinfo=UTC)
            silent_s = now_ns / NS - heard.timestamp()
        except ValueError:
            silent_s = 0.0  # who knows: what it has open stays
        if silent_s < SITE_S:
            found.append(site)
    return found
