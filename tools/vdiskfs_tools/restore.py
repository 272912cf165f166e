"""``vdiskfs point restore``: the disk at one instant, as a file."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from vdiskfs.errors import AlreadyExistsError, LocalError, StateError, UsageError
from vdiskfs.registry import mount_entries
from vdiskfs_tools.call import Call, Command, FilePath, dry_run_option
from vdiskfs_tools.completion import complete_points
from vdiskfs_tools.names import PointName, parse_point
from vdiskfs_tools.output import Progress, format_bytes


@click.command(cls=Command)
@click.argument("name", metavar="DISK@POINT", shell_complete=complete_points)
@click.argument("file", type=FilePath())
@click.option(
    "--format",
    "form",
    type=click.Choice(["raw", "qcow2"]),
    default="raw",
    help="raw: the bytes as they are; qcow2: converted, by qemu-img.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@dry_run_option
@click.pass_obj
def restore(call: Call, *, name: str, file: str, form: str, force: bool, dry_run: bool) -> None:
    """Write the disk as it was at DISK@POINT to FILE, which is sparse; - is standard output.

    FILE appears whole or not at all.

    Example:
        vdiskfs point restore web01@-15m /tmp/web01.img
    """
    wanted = parse_point(name)
    _check_target(call, file, force=force)
    if file == "-" and form != "raw":
        raise UsageError("only raw can go to standard output")
    document = _run(call, wanted, file, form=form, force=force, dry_run=dry_run)
    if file != "-" and call.out.document(document):
        return
    done = "would be restored" if dry_run else "restored"
    size, data = format_bytes(document["size"]), document.get("data_bytes")
    held = f", {format_bytes(data)} of it data" if data is not None else ""
    call.out.say(f"{document['disk']}@#{document['epoch']} of {document['time']}: {done} to {file}")
    call.out.say(f"{size}{held}")


def _check_target(call: Call, file: str, *, force: bool) -> None:
    """Refuse a target that would lose something, before the vault is asked for anything."""
    if file == "-":
        if call.json:
            raise UsageError("- and --json both want standard output")
        if sys.stdout.isatty():
            raise UsageError("a disk is not for a terminal", hint="redirect standard output")
        return
    if not file:
        raise UsageError("not a file name: it is empty")
    if Path(file).is_dir():
        raise UsageError(f"{file}: a directory", hint="name the file to write")
    if not Path(file).parent.is_dir():
        raise LocalError(f"{file}: its directory does not exist")
    if not os.path.lexists(file):
        return
    real = Path(os.path.realpath(file))
    for entry in mount_entries():
        for place in (entry.mountpoint, entry.source):
            if place is not None and real.is_relative_to(place):
                raise StateError(
                    f"{file}: lies in a live mount ({entry.mountpoint})",
                    hint="restore to another file, stop what uses this one, then rename",
                )
    if not force:
        raise AlreadyExistsError(f"{file}: exists", hint="--force replaces it")


def _run(
    call: Call, wanted: PointName, file: str, *, form: str, force: bool, dry_run: bool
) -> dict[str, Any]:
    """Find the point, and write it unless this is a dry run."""
    from vdiskfs.catalog.leases import leased
    from vdiskfs.point import restore as restore_point
    from vdiskfs_tools.vaults import found_point, point_document, with_vault

    async def work(vault: Any, progress: Progress) -> dict[str, Any]:
        log, item, disk = await found_point(vault, wanted)
        if form != "raw" and log.record.file.endswith(".qcow2"):
            raise UsageError(
                f"{disk}: a qcow2 file itself", hint="restore it without --format, as it is"
            )
        document = point_document(disk, item) | {"file": file}
        if dry_run:
            return document | {"dry_run": True}
        async with (
            leased(vault, [(log.record, item)], "point restore"),
            await log.open(item) as reader,
        ):
            written = await restore_point(reader, file, force=force, format=form, progress=progress)
        return document | {"data_bytes": written}

    with call.out.progress(f"{wanted}") as progress:
        return with_vault(call, lambda vault: work(vault, progress))
