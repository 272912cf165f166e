"""Which vault a command means, and the way into it without a daemon.

Slow to import: it needs the library's vault side.
"""

from __future__ import annotations

import math
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import trio

from vdiskfs.catalog import (
    CheckReport,
    DiskLog,
    DiskRecord,
    Point,
    Vault,
    group_members,
    shared_points,
)
from vdiskfs.catalog.anchor import check_unclaimed
from vdiskfs.catalog.enforced import probe_enforced
from vdiskfs.catalog.leases import Lease, list_leases
from vdiskfs.catalog.records import UnreadableDisk, UnreadableSite
from vdiskfs.catalog.report import problem_document
from vdiskfs.catalog.vaultfile import read_vault_file, slots_opened
from vdiskfs.config import load_config, vault_environ
from vdiskfs.crypto import SCHEME_AES_256_GCM, SCHEME_NONE, Secrets
from vdiskfs.errors import (
    AlreadyExistsError,
    NotFoundError,
    UsageError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.groupview import group_point_document
from vdiskfs.store import Store, open_store
from vdiskfs.units import format_time
from vdiskfs_tools.call import Call
from vdiskfs_tools.failures import first_error
from vdiskfs_tools.keys import open_vault
from vdiskfs_tools.mounts import vault_url
from vdiskfs_tools.names import PointName

T = TypeVar("T")


@asynccontextmanager
async def opened_store(url: str) -> AsyncIterator[Store]:
    """Open the byte-level store under a vault, with this user's configuration."""
    store = open_store(url, environ=vault_environ(load_config(None)))
    try:
        yield store
    finally:
        with trio.move_on_after(5, shield=True):
            await store.aclose()


def with_store(url: str, work: Callable[[Store], Awaitable[T]], *, limit_s: float = math.inf) -> T:
    """Run work on a store, in a loop of its own.

    Raises:
        VaultUnreachableError: it took longer than ``limit_s``.
    """

    async def run() -> T:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_heed_termination)
            with trio.move_on_after(limit_s):
                async with opened_store(url) as store:
                    result = await work(store)
                nursery.cancel_scope.cancel()
                return result
            raise VaultUnreachableError(f"{url}: no answer within {limit_s:g} s")
        raise AssertionError  # the nursery ends by what is in it

    try:
        return trio.run(run)
    except BaseExceptionGroup as group:
        raise first_error(group) from None


async def _heed_termination() -> None:
    """Let SIGTERM end the work as Ctrl-C does: with what it made cleared away."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            raise KeyboardInterrupt


def with_vault(
    call: Call, work: Callable[[Vault], Awaitable[T]], *, given: Secrets | None = None,
    limit_s: float = math.inf, ask: bool = True,
) -> T:  # fmt: skip
    """Run work on the vault that a command means, opened with its key.

    ``given`` is the key if it is known already; else it is looked for, and asked for.

    Raises:
        NotFoundError: there is no vault there, or nothing says which one is meant.
    """

    async def run(store: Store) -> T:
        if given:
            return await work(await Vault.open(store, given))
        return await work(await open_vault(store, call, ask=ask))

    return with_store(vault_url(call), run, limit_s=limit_s)


def make_vault(
    url: str, given: Secrets | None, *, dry_run: bool, sending: Callable[[], None]
) -> str | None:
    """Make a vault and return its id; with ``dry_run``, only look whether that would work.

    Raises:
        StateError: there is one.
    """

    async def work(store: Store) -> str | None:
        if not dry_run:
            return (await Vault.init(store, given, sending=sending)).vault_id
        try:
            file, _ = await read_vault_file(store)
        except NotFoundError:
            await check_unclaimed(store)
            return None
        raise AlreadyExistsError(f"{url}: there is a vault already: {file.vault_id}")

    return with_store(url, work)


def may_open(url: str, given: Secrets) -> bool:
    """Tell whether a vault opens with what is given; where nothing answers it may."""

    async def work(store: Store) -> bool:
        try:
            file, _ = await read_vault_file(store)
        except NotFoundError:
            return False
        return bool(await slots_opened(file, given))

    try:
        return with_store(url, work, limit_s=10)
    except NotFoundError:
        return False
    except VdiskfsError:
        return True


def with_control(url: str, control: str | None) -> str:
    """Return the URL of a vault whose documents lie in a container of their own.

    Raises:
        UsageError: what is named is no container, or the vault's URL names one already.
    """
    if control is None:
        return url
    container = control.removeprefix("azure://").rstrip("/")
    if "/" in container or "?" in url or not url.startswith("azure://"):
        raise UsageError(
            "--control names a container of the vault's own account",
            hint="vdiskfs vault init azure://CONTAINER/PREFIX --control azure://CONTAINER",
        )
    return f"{url}?control={container}"


async def probed_document(vault: Vault) -> dict[str, Any]:
    """Return `vault_document`, and what was found out about what the vault enforces."""
    return {**await vault_document(vault), "data": asdict(await probe_enforced(vault.store))}


async def vault_document(vault: Vault) -> dict[str, Any]:
    """Return a vault as ``vault info --json`` prints it."""
    disks, unreadable_disks = await vault.read_disks()
    names = {record.id: record.name for record in disks}
    sites, unreadable = await vault.read_sites()
    return {
        "vault_id": vault.vault_id,
        "created": vault.created,
        "encryption": SCHEME_NONE if vault.key is None else SCHEME_AES_256_GCM,
        "disks": [disk_document(record) for record in disks],
        "unreadable_disks": [asdict(one) for one in unreadable_disks],
        "sites": [asdict(record) for record in sites],
        "unreadable_sites": [site_problem(one) for one in unreadable],
        "leases": [lease_document(lease, names) for lease in await list_leases(vault)],
    }


def site_problem(one: UnreadableSite) -> dict[str, Any]:
    """Return a heartbeat that cannot be read as ``--json`` prints it."""
    return {"object": one.object, "why": one.why, "written": format_time(one.modified_ns)}


def lease_document(lease: Lease, names: Mapping[str, str]) -> dict[str, Any]:
    """Return a lease as ``vault info --json`` prints it; ``names`` are those of disks, by id."""
    keys = ("what", "host", "pid", "since", "doubted")
    points = [
        {"disk": names.get(disk_id, disk_id), "generation": generation, "epoch": epoch}
        for disk_id, generation, epoch in lease.uses
    ]
    return {**{key: getattr(lease, key) for key in keys}, "points": points}


async def found_point(vault: Vault, wanted: PointName) -> tuple[DiskLog, Point, str]:
    """Return a disk's log, the point in it that is meant, and the disk's name.

    Raises:
        NotFoundError: there is no such disk, or no such point of it.
    """
    log = await vault.find_log(wanted.disk)
    return log, await log.find(wanted.point), wanted.disk


def disk_document(record: DiskRecord) -> dict[str, Any]:
    """Return a disk as ``--json`` prints it."""
    keys = ("name", "id", "size", "site", "file", "generation", "created", "retired")
    return {key: getattr(record, key) for key in keys}


def disks_document(
    disks: Sequence[DiskRecord], unreadable: Sequence[UnreadableDisk]
) -> dict[str, Any]:
    """Return the disks of a vault as ``disk list --vault --json`` prints them."""
    return {
        "disks": [disk_document(record) for record in disks],
        "unreadable": [asdict(one) for one in unreadable],
    }


def branches_document(record: DiskRecord) -> dict[str, Any]:
    """Return a disk's branches as ``disk branches --json`` prints them."""
    rows = [
        {
            "name": branch.name, "generation": number, "site": branch.site,
            "since": branch.since,
            "parent": {"generation": fork[0], "epoch": fork[1]},
        }
        for number, branch in sorted(record.branches.items())
        for fork in [record.parents[number] or (0, 0)]
    ]  # fmt: skip
    return {"disk": record.name, "branches": rows}


def point_document(disk: str, point: Point) -> dict[str, Any]:
    """Return a recovery point as ``--json`` prints it."""
    keys = ("epoch", "time", "consistency", "proof", "label", "size")
    sizes = ("changed_bytes", "stored_bytes", "generation", "recovery_s")
    facts = {key: getattr(point, key) for key in (*keys, *sizes)}
    return {"disk": disk, **facts, "label": facts["label"] or None, "held": point.held}


def check_document(report: CheckReport) -> dict[str, Any]:
    """Return what a check found as ``--json`` prints it."""
    counts = ("disks", "points", "deltas", "joined", "segments", "read_bytes")
    unused = ("unused_segments", "unused_bytes")
    problems = [problem_document(problem) for problem in report.problems]
    facts = {key: getattr(report, key) for key in (*counts, *unused)}
    return {"ok": report.ok, **facts, "problems": problems}


async def group_points_of(
    vault: Vault, name: str, since_ns: int | None, until_ns: int | None, limit: int | None
) -> list[dict[str, Any]] | None:
    """Return a group's points as ``--json`` prints them; None: there is no group of that name."""
    try:
        names = await group_members(vault, name)
    except NotFoundError:
        return None
    found = await shared_points(
        vault.find_log, names, since_ns=since_ns, until_ns=until_ns, limit=limit
    )
    return [group_point_document(name, names, points) for points in found]
