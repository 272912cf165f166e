"""Policies, holds and garbage of a vault, without a daemon. Slow to import."""

from __future__ import annotations

import shlex
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from vdiskfs.catalog import CheckReport, DiskRecord, Vault
from vdiskfs.catalog.check import find_records
from vdiskfs.catalog.policy import (
    PRESETS,
    Policy,
    changed_policy,
    list_policies,
    read_or_new,
    read_policy,
    set_policy,
)
from vdiskfs.catalog.retention import Ladder
from vdiskfs.catalog.upkeep import (
    Tended,
    Upkeep,
    check_held,
    choose_policy,
    hold_point,
    release_point,
)
from vdiskfs.catalog.walk import is_damage
from vdiskfs.errors import DamagedError, VaultUnreachableError, VdiskfsError
from vdiskfs.units import format_time
from vdiskfs_tools.call import Call
from vdiskfs_tools.names import PointName
from vdiskfs_tools.vaults import found_point, point_document, with_vault


def policies_of(call: Call) -> dict[str, Any]:
    """Return all policies, each with the disks that follow it, and the objects of damaged ones."""

    async def work(vault: Vault) -> dict[str, Any]:
        disks, hidden = await vault.read_disks()
        policies, unreadable = await list_policies(vault.store)
        # Whether they follow one is not known.
        unreadable |= {one.object: one.why for one in hidden}
        return {
            "policies": [_document(one, disks) for one in policies],
            "unreadable": [{"object": name, "why": why} for name, why in unreadable.items()],
        }

    return with_vault(call, work)


def policy_of(call: Call, name: str) -> dict[str, Any]:
    """Return one policy."""

    async def work(vault: Vault) -> dict[str, Any]:
        return _document(await read_policy(vault.store, name), await vault.disks())

    return with_vault(call, work)


def preview_policy(call: Call, name: str, values: dict[str, str]) -> dict[str, Any]:
    """Return what a change of a policy would delete; only its retention deletes."""

    async def work(vault: Vault) -> dict[str, Any]:
        policy, etag = await read_or_new(vault.store, name, anew="retention" in values)
        changed = changed_policy(policy, values)
        is_known = etag is not None or name in PRESETS
        if is_known and "retention" not in values:
            return {"policy": changed.to_body(), "disks": []}
        followers = [record for record in await vault.disks() if record.policy == name]
        rows = [await _preview(vault, record, changed.ladder) for record in followers]
        return {"policy": changed.to_body(), "disks": rows}

    return with_vault(call, work)


def change_policy(call: Call, name: str, values: dict[str, str]) -> dict[str, Any]:
    """Change a policy; return it."""

    async def work(vault: Vault) -> dict[str, Any]:
        found = await set_policy(
            vault.store, name, lambda one: changed_policy(one, values), anew="retention" in values
        )
        return found.to_body()

    return with_vault(call, work)


def preview_choice(call: Call, disk: str, name: str) -> dict[str, Any]:
    """Return what a disk would lose by following a policy ("": none)."""

    async def work(vault: Vault) -> dict[str, Any]:
        ladder = (await read_policy(vault.store, name)).ladder if name else ()
        return await _preview(vault, await vault.find_disk(disk), ladder)

    return with_vault(call, work)


def follow_policy(call: Call, disk: str, name: str) -> None:
    """Let a disk follow a policy."""

    async def work(vault: Vault) -> None:
        if name:
            await read_policy(vault.store, name)
        await _tell_owner(vault, await choose_policy(vault, (await vault.find_disk(disk)).id, name))

    with_vault(call, work)


def change_hold(
    call: Call, wanted: PointName, note: str | None, *, dry_run: bool
) -> dict[str, Any]:
    """Hold a point with a note, or (None) release it; return it."""

    async def work(vault: Vault) -> dict[str, Any]:
        log, point, disk = await found_point(vault, wanted)
        if dry_run:
            if note is None:
                check_held(log.record, point)
            return point_document(disk, point) | {"dry_run": True}
        if note is None:
            record = await release_point(vault, log, point)
        else:
            record = await hold_point(vault, log, point, note)
        await _tell_owner(vault, record)
        return point_document(disk, await log.find(point.epoch))

    return with_vault(call, work)


def tend_vault(
    call: Call, disks: list[str], *, dry_run: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, VdiskfsError]]:
    """Thin disks by their policies and collect what nothing needs; all, if none is named.

    Returns:
        A row for each line that was thinned, one for each disk with segments that no delta
        names, and what failed first on each disk where something did: it keeps neither its
        other lines nor other disks from their turn.
    """

    async def work(
        vault: Vault,
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, VdiskfsError]]:
        report = CheckReport()
        records = await find_records(vault, disks or None, report)
        failed: dict[str, VdiskfsError] = {
            one.object: DamagedError(f"{one.object}: {one.message}", hint="vdiskfs vault repair")
            for one in report.problems
        }
        upkeep = Upkeep(vault, uuid.uuid4().hex)
        rows: list[dict[str, Any]] = []
        unnamed: list[dict[str, Any]] = []
        for record in records:
            try:
                await _tend_disk(upkeep, record, rows, unnamed, dry_run=dry_run)
                if record.policy and not dry_run:
                    await _tell_owner(vault, record)
            except VdiskfsError as error:
                error.message = f"disk {record.name}: {error.message}"
                failed[record.name] = error
                if isinstance(error, VaultUnreachableError):
                    break
        return rows, unnamed, failed

    return with_vault(call, work)


async def _tend_disk(
    upkeep: Upkeep, record: DiskRecord, rows: list[dict[str, Any]],
    unnamed: list[dict[str, Any]], *, dry_run: bool,
) -> None:  # fmt: skip
    """Thin and collect the lines of a disk, all that can be; raise what failed first."""
    failed: VdiskfsError | None = None
    try:
        found = await upkeep.sweep(record.id, dry_run=dry_run)
        if found.deleted or found.waiting or found.refused:
            unnamed.append({"disk": record.name, "deleted": found.deleted,
                            "waiting": found.waiting, "refused": found.refused})  # fmt: skip
    except VaultUnreachableError:
        raise
    except VdiskfsError as error:
        failed = error
    if record.policy:
        failed = await _tend_lines(upkeep, record, rows, dry_run=dry_run) or failed
    if failed is not None:
        raise failed


async def _tend_lines(
    upkeep: Upkeep, record: DiskRecord, rows: list[dict[str, Any]], *, dry_run: bool
) -> VdiskfsError | None:
    vault, failed = upkeep.vault, None
    policy = await read_policy(vault.store, record.policy)
    for number in sorted(record.parents):
        try:
            with tempfile.TemporaryDirectory(prefix="vdiskfs-thin-") as scratch:
                while True:
                    tended = await upkeep.tend(
                        vault.log(record, number), policy.ladder, Path(scratch) / "line",
                        compression_level=policy.compression_level, dry_run=dry_run,
                    )  # fmt: skip
                    rows.append(_row(record, tended))
                    if dry_run or not tended.thinned.more:
                        break
        except VaultUnreachableError:
            raise
        except VdiskfsError as error:
            if is_damage(error):
                error.hint = error.hint or f"vdiskfs vault repair --disk {shlex.quote(record.name)}"
            failed = failed or error
    return failed


async def _preview(vault: Vault, record: DiskRecord, ladder: Ladder) -> dict[str, Any]:
    upkeep = Upkeep(vault, uuid.uuid4().hex)
    points = size = 0
    oldest: int | None = None
    for number in sorted(record.parents):
        with tempfile.TemporaryDirectory(prefix="vdiskfs-thin-") as scratch:
            tended = await upkeep.tend(
                vault.log(record, number), ladder, Path(scratch), dry_run=True
            )
        thinned = tended.thinned
        points, size = points + thinned.points, size + thinned.bytes
        if thinned.oldest_ns is not None:
            oldest = thinned.oldest_ns if oldest is None else min(oldest, thinned.oldest_ns)
    return {
        "disk": record.name, "points": points, "bytes": size,
        "oldest": None if oldest is None else format_time(oldest),
    }  # fmt: skip


def _row(record: DiskRecord, tended: Tended) -> dict[str, Any]:
    thinned, done = tended.thinned, tended.collected
    return {
        "disk": record.name, "generation": thinned.generation, "points": thinned.points,
        "bytes": thinned.bytes, "left": thinned.left, "deleted": done.deleted,
        "waiting": done.waiting, "refused": done.refused, "time": format_time(time.time_ns()),
    }  # fmt: skip


async def _tell_owner(vault: Vault, record: DiskRecord) -> None:
    """Let who has the disk see it at its next heartbeat."""
    if record.owner is not None:
        await vault.touch_site(record.owner.site, record.owner.writer)


def _document(policy: Policy, disks: list[DiskRecord]) -> dict[str, Any]:
    return {**policy.to_body(), "disks": [one.name for one in disks if one.policy == policy.name]}
