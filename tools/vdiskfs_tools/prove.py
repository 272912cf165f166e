"""``vdiskfs point prove``: a recovery point is read back, and its file systems are checked."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import socket
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from vdiskfs.errors import DamagedError, StateError, UsageError, VdiskfsError
from vdiskfs_tools.call import Call, Command, dry_run_option
from vdiskfs_tools.completion import complete_points
from vdiskfs_tools.mounts import client_of
from vdiskfs_tools.names import PointName, parse_point
from vdiskfs_tools.output import format_bytes

COPY = "proof-"
"""What the names of the copies begin with that are made to be checked."""


@click.command(cls=Command)
@click.argument("name", metavar="DISK@POINT", shell_complete=complete_points)
@click.option(
    "--level", type=click.Choice(["hashed", "checked"]), default="hashed",
    help="hashed: every page is read back and verified; checked: its file systems as well.",
)  # fmt: skip
@dry_run_option
@click.pass_obj
def prove(call: Call, *, name: str, level: str, dry_run: bool) -> None:
    """Prove that a recovery point can be restored, and keep the outcome with the point.

    hashed reads every page of it from the vault and compares it with what was sealed. checked
    does that too, then replays the journals of its file systems (ext4, xfs, btrfs) on a copy that
    is thrown away, and checks them; it needs a mount, and to be root. What fails is exit code 6;
    what cannot be told (no file system, no tool for it) is said, and is exit code 0.

    Example:
        vdiskfs point prove web01@latest --level checked
    """
    wanted = parse_point(name)
    if level == "checked" and call.vault is not None:
        raise UsageError("--level checked needs a mount", hint="-m MOUNTPOINT instead of --vault")
    document = _prove(call, wanted, level, dry_run=dry_run)
    if not call.out.document(document):
        what = f"{document['disk']}@#{document['epoch']} of {document['time']}"
        if dry_run:
            call.out.say(f"{what}: would be proven")
            return
        read = format_bytes(document["read_bytes"])
        call.out.say(f"{what}: {level}: {document['outcome']}, {read} read back")
        if document["reason"]:
            call.out.say(document["reason"])
    if document.get("outcome") == "fail":
        raise DamagedError(
            f"{name}: its proof failed: {document['reason']}",
            hint=f"vdiskfs point list {shlex.quote(wanted.disk)} shows what is proven",
        )


def _prove(call: Call, wanted: PointName, level: str, *, dry_run: bool) -> dict[str, Any]:
    from vdiskfs.catalog.leases import leased
    from vdiskfs.proving import prove_point
    from vdiskfs_tools.vaults import found_point, point_document, with_vault

    async def work(vault: Any, progress: Any) -> dict[str, Any]:
        log, item, disk = await found_point(vault, wanted)
        document = point_document(disk, item) | {"level": level}
        if dry_run:
            return document | {"dry_run": True}
        check = partial(_check, call, disk, item.epoch) if level == "checked" else None
        async with leased(vault, [(log.record, item)], "point prove"):
            proof = await prove_point(
                log, item, site=socket.gethostname(), progress=progress, check=check
            )
        return document | {
            "outcome": proof.outcome, "reason": proof.reason, "read_bytes": proof.read_bytes,
            "seconds": proof.seconds,
        }  # fmt: skip

    with call.out.progress(f"{wanted}") as progress:
        return with_vault(call, lambda vault: work(vault, progress))


async def _check(call: Call, disk: str, epoch: int) -> tuple[str, str]:
    """Check the file systems of a copy of a point; return the outcome, and its reason."""
    from vdiskfs.proving import check_image, verdict

    async with _copy(call, disk, epoch) as image:
        return verdict(await check_image(image, call.out.say))


@contextlib.asynccontextmanager
async def _copy(call: Call, disk: str, epoch: int) -> AsyncIterator[Path]:
    """Make a writable copy of a point, and throw it away."""
    with client_of(call) as client:
        await _tidy_up(client)
        name = f"{COPY}{os.getpid()}-{secrets.token_hex(4)}"
        body = {"disk": disk, "point": str(epoch), "name": name, "vm": "none", "dry_run": False}
        document = client.post("failovers", body=body)
        try:
            yield Path(document["disks"][0]["path"])
        finally:
            _throw_away(client, name)


def _throw_away(client: Any, name: str) -> None:
    """Throw a copy away; a loop device lets go of it a moment after it was detached."""
    for rest in range(50, -1, -1):
        try:
            client.post("failovers", name, "cleanup", body={"notes": "proof", "dry_run": False})
        except StateError:
            if not rest:
                raise
            time.sleep(0.2)
        else:
            return


def _is_left(name: str) -> bool:
    """Say whether a copy was made by a proof whose process is gone."""
    pid = name.removeprefix(COPY).partition("-")[0]
    return name.startswith(COPY) and pid.isdigit() and not Path("/proc", pid).exists()


async def _tidy_up(client: Any) -> None:
    """Throw away what proofs that were killed have left."""
    from vdiskfs.proving import let_go

    for one in client.get("failovers")["failovers"]:
        if _is_left(one["name"]):
            with contextlib.suppress(VdiskfsError):
                for disk in client.get("failovers", one["name"])["disks"]:
                    await let_go(Path(disk["path"]))
                _throw_away(client, one["name"])
