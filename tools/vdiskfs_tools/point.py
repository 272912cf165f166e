"""``vdiskfs point``: the recovery points of disks. Restoring is in ``restore``."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

from typing import Any

import click

from vdiskfs.errors import NotFoundError, UsageError, VdiskfsError
from vdiskfs_tools import prove, restore
from vdiskfs_tools.call import Call, Group, dry_run_option
from vdiskfs_tools.completion import complete_disks_and_groups, complete_points
from vdiskfs_tools.mounts import client_of
from vdiskfs_tools.names import PointName, iso_time, parse_disk, parse_point, parse_time_range
from vdiskfs_tools.output import counted, format_bytes


@click.group(cls=Group)
def point() -> None:
    """List, create, show, compare and restore recovery points.

    A point is named DISK@POINT: web01@latest, web01@-15m (the newest at or before 15 minutes
    ago), web01@2026-11-21T01:40:05Z, or web01@#123 (an epoch).
    """


@point.command("list")
@click.argument("name", metavar="DISK|GROUP", shell_complete=complete_disks_and_groups)
@click.option("--since", metavar="TIME", help="Not older: 2026-11-21T01:40:05Z, -15m.")
@click.option("--until", metavar="TIME", help="Not newer.")
@click.option("--limit", metavar="N", type=click.IntRange(1, 1 << 31), help="The newest N only.")
@click.pass_obj
def list_points(
    call: Call, *, name: str, since: str | None, until: str | None, limit: int | None
) -> None:
    """List the recovery points of a disk, the newest last.

    Of a group: the instants of which all its disks have a point.

    Example:
        vdiskfs point list web01 --since -2h
    """
    parse_disk(name)
    start, end = parse_time_range(since, until)
    if call.vault is not None:
        document: dict[str, Any] = {"points": _vault_points(call, name, start, end, limit)}
    else:
        with client_of(call) as client:
            # The daemon reads a time as the end of its microsecond: the one before ends at start.
            before = None if start is None else max(start - 1000, 0)
            times = {"since": iso_time(before), "until": iso_time(end)}
            document = client.get("disks", name, "points", limit=limit, **times)
    if call.out.document(document):
        return
    points = [item for item in document.get("points") or [] if isinstance(item, dict)]
    if not points:
        call.out.say(f"{name}: no points")
        return
    if "group" in points[0]:
        _show_group_points(call, points)
        return
    header = (">EPOCH", "TIME", "CONSISTENCY", "PROOF", ">CHANGED", ">STORED", "LABEL")
    keys = ("epoch", "time", "consistency", "proof")
    rows = [
        [
            *(item.get(key, "-") for key in keys),
            format_bytes(item.get("changed_bytes")),
            format_bytes(item.get("stored_bytes")),
            " ".join([*(["held"] if item.get("held") else []), item.get("label") or ""]).strip(),
        ]
        for item in points
    ]
    call.out.table(header, rows)


@point.command("create")
@click.argument(
    "names", metavar="DISK|GROUP...", nargs=-1, required=True,
    shell_complete=complete_disks_and_groups,
)  # fmt: skip
@click.option("--label", metavar="TEXT", help="A text that the point carries; 120 bytes at most.")
@click.option(
    "--consistency", type=click.Choice(["crash", "application"]), default="crash",
    help="application: what uses the disks is brought to rest first.",
)  # fmt: skip
@click.option("--wait", is_flag=True, help="Come back when the vault has it.")
@dry_run_option
@click.pass_obj
def create(
    call: Call,
    *,
    names: tuple[str, ...],
    label: str | None,
    consistency: str,
    wait: bool,
    dry_run: bool,
) -> None:
    """Make a recovery point now: of several disks, or all of a group, at one instant.

    Example:
        vdiskfs point create web01 db01 --label "before the upgrade" --wait
    """
    for name in names:
        parse_disk(name)
    if label is not None and len(label.encode(errors="replace")) > 120:
        raise UsageError("--label: more than 120 bytes")
    body = {"disks": list(names), "label": label, "consistency": consistency, "wait": wait}
    with client_of(call) as client:
        if dry_run:
            for name in names:
                _look_up(client, name)
            document: dict[str, Any] = {"dry_run": True, **body}
        else:
            with call.out.waiting("waiting for the vault" if wait else "making a point"):
                document = client.post("points", body=body, patient=True)
    if not call.out.document(document):
        if dry_run:
            call.out.say(f"a point would be made of {', '.join(names)}")
        for item in document.get("points") or []:
            call.out.line(f"{item.get('disk')}@#{item.get('epoch')}  {item.get('time')}")
    if why := document.get("fell_back"):
        raise VdiskfsError(f"the point is crash-consistent only: {why}", hint="vdiskfs event list")


@point.command("show")
@click.argument("name", metavar="DISK@POINT", shell_complete=complete_points)
@click.pass_obj
def show(call: Call, *, name: str) -> None:
    """Show one recovery point, and how many objects and requests opening it takes.

    Example:
        vdiskfs point show web01@latest
    """
    wanted = parse_point(name)
    if call.vault is not None:
        document = _vault_point(call, wanted)
    else:
        with client_of(call) as client:
            document = client.get("disks", wanted.disk, "points", str(wanted.point))
    if call.out.document(document):
        return
    sizes = ("size", "changed_bytes", "stored_bytes")
    call.out.facts(
        {key: format_bytes(value) if key in sizes else value for key, value in document.items()}
    )


@point.command("diff")
@click.argument("first", metavar="DISK@A", shell_complete=complete_points)
@click.argument("second", metavar="DISK@B", shell_complete=complete_points)
@click.pass_obj
def diff(call: Call, *, first: str, second: str) -> None:
    """Print the extents in which two points differ. No data is read, only checksums.

    Of points of one disk only what changed since they had one history is looked at.

    Example:
        vdiskfs point diff web01@-1h web01@latest
    """
    extents = _vault_diff(call, parse_point(first), parse_point(second))
    total = sum(length for _, length in extents)
    rows = [{"offset": offset, "length": length} for offset, length in extents]
    if call.out.document({"extents": rows, "bytes": total}):
        return
    if rows:
        call.out.table((">OFFSET", ">LENGTH"), extents)
    call.out.say(f"{counted(len(rows), 'extent')}, {format_bytes(total)}")


@point.command("hold")
@click.argument("name", metavar="DISK@POINT", shell_complete=complete_points)
@click.option("--note", metavar="TEXT", default="", help="Why; shown with the point.")
@dry_run_option
@click.pass_obj
def hold(call: Call, *, name: str, note: str, dry_run: bool) -> None:
    """Keep a point until it is released, whatever the disk's policy says.

    Example:
        vdiskfs point hold web01@-15m --note "before the upgrade"
    """
    from vdiskfs_tools.policies import change_hold

    if len(note.encode(errors="replace")) > 400:
        raise UsageError("--note: more than 400 bytes")
    document = change_hold(call, parse_point(name), note, dry_run=dry_run)
    if not call.out.document(document):
        done = "would be held" if dry_run else "is held"
        call.out.say(f"{document['disk']}@#{document['epoch']} ({document['time']}) {done}")


@point.command("release")
@click.argument("name", metavar="DISK@POINT", shell_complete=complete_points)
@dry_run_option
@click.pass_obj
def release(call: Call, *, name: str, dry_run: bool) -> None:
    """Let the disk's policy decide about a point again.

    Example:
        vdiskfs point release web01@#123
    """
    from vdiskfs_tools.policies import change_hold

    document = change_hold(call, parse_point(name), None, dry_run=dry_run)
    if not call.out.document(document):
        done = "would not be held any more" if dry_run else "is not held any more"
        call.out.say(f"{document['disk']}@#{document['epoch']} {done}")


point.add_command(restore.restore)
point.add_command(prove.prove)


def _show_group_points(call: Call, points: list[dict[str, Any]]) -> None:
    rows = [
        [
            item["time"], item["consistency"], item["proof"], len(item["disks"]),
            format_bytes(item["changed_bytes"]), format_bytes(item["stored_bytes"]),
            item["label"] or "",
        ]
        for item in points
    ]  # fmt: skip
    header = ("TIME", "CONSISTENCY", "PROOF", ">DISKS", ">CHANGED", ">STORED", "LABEL")
    call.out.table(header, rows)


def _look_up(client: Any, name: str) -> None:
    """Ask for a disk, or else a group."""
    try:
        client.get("disks", name)
    except NotFoundError as error:
        try:
            client.get("groups", name)
        except NotFoundError:
            raise error from None


def _vault_points(
    call: Call, name: str, since_ns: int | None, until_ns: int | None, limit: int | None
) -> list[dict[str, Any]]:
    from vdiskfs.catalog.proofs import with_proofs
    from vdiskfs_tools.vaults import group_points_of, point_document, with_vault

    async def work(vault: Any) -> list[dict[str, Any]]:
        try:
            log = await vault.find_log(name)
        except NotFoundError:
            found = await group_points_of(vault, name, since_ns, until_ns, limit)
            if found is None:
                raise
            return found
        points = await log.points(since_ns, until_ns, limit)
        points = await with_proofs(vault.store, log.record.id, points)
        return [point_document(name, item) for item in points]

    return with_vault(call, work)


def _vault_point(call: Call, wanted: PointName) -> dict[str, Any]:
    from vdiskfs_tools.vaults import found_point, point_document, with_vault

    async def work(vault: Any) -> dict[str, Any]:
        log, item, disk = await found_point(vault, wanted)
        before = vault.store.requests
        async with await log.open(item) as reader:
            opening = {"objects": reader.objects, "requests": vault.store.requests - before}
        return point_document(disk, item) | opening

    return with_vault(call, work)


def _vault_diff(call: Call, first: PointName, second: PointName) -> list[tuple[int, int]]:
    from vdiskfs.catalog import open_differences
    from vdiskfs.catalog.leases import leased
    from vdiskfs.point import diff as diff_points
    from vdiskfs.units import PAGE_SIZE
    from vdiskfs_tools.vaults import found_point, with_vault

    async def work(vault: Any) -> list[tuple[int, int]]:
        log_a, a, _ = await found_point(vault, first)
        log_b, b, _ = await found_point(vault, second)
        async with leased(vault, [(log_a.record, a), (log_b.record, b)], "point diff"):
            if log_a.record.id != log_b.record.id:
                async with await log_a.open(a) as reader_a, await log_b.open(b) as reader_b:
                    return await diff_points(reader_a, reader_b)
            async with await open_differences(log_a, a, log_b, b) as found:
                runs = [run async for run in found.runs()]
        size = max(a.size, b.size)
        # The last page may be larger than what the disk has of it.
        return [
            (page * PAGE_SIZE, min(count * PAGE_SIZE, size - page * PAGE_SIZE))
            for page, count in runs
        ]

    with call.out.waiting("comparing"):
        return with_vault(call, work)
