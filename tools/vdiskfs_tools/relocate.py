"""``vdiskfs failover start`` and what follows it; ``vdiskfs reprotect``."""

from __future__ import annotations

import shlex
import time
from typing import Any

import click

from vdiskfs.errors import DamagedError, NotFoundError, StateError, UsageError
from vdiskfs_tools.call import Call, Command, Group, dry_run_option
from vdiskfs_tools.completion import complete_disks, complete_failovers
from vdiskfs_tools.failover import failover
from vdiskfs_tools.job import LOOK_S, check_job
from vdiskfs_tools.mounts import client_of
from vdiskfs_tools.names import parse_disk, parse_point

no_wait_option = click.option(
    "--no-wait", is_flag=True, help="Come back when it is under way; see `vdiskfs failover show`."
)
failover_argument = click.argument("name", metavar="NAME", shell_complete=complete_failovers)


@failover.command("start")
@click.argument("disk", metavar="DISK|GROUP", shell_complete=complete_disks)
@click.option("--planned", is_flag=True, help="Stop it at the other site first: nothing is lost.")
@click.option("--unplanned", is_flag=True, help="From a point, whatever the other site does.")
@click.option("--point", metavar="POINT", help="Of an unplanned one: latest (if none), a time, ...")
@click.option("--name", "failover_name", metavar="NAME", help="Of the failover, else one is found.")
@click.option(
    "--vm", type=click.Choice(["auto", "none"]), default="auto",
    help="Start the machine that the vault has for the disk, if it has one; or none.",
)  # fmt: skip
@click.option(
    "--rollback-after", type=click.FloatRange(1), metavar="SECONDS",
    help="Roll it back by itself, unless it is committed by then.",
)  # fmt: skip
@no_wait_option
@dry_run_option
@click.pass_obj
def start(
    call: Call, *, disk: str, planned: bool, unplanned: bool, point: str | None,
    failover_name: str | None, vm: str, rollback_after: float | None, no_wait: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Move a disk, and the machine on it, to this site.

    Planned, unless you say otherwise: the site that has it stops the machine, ships the last
    bytes and lets go. Unplanned: from a recovery point; what the other site has not shipped
    becomes a branch there. The disk is there at once, whatever its size; the rest of its bytes
    comes from the vault. The same command again goes on with one that was cut off.

    Example:
        vdiskfs failover start web01 --unplanned --point -5m
        vdiskfs failover commit web01-failover-1
        vdiskfs reprotect web01
    """
    parse_disk(disk)
    if planned and unplanned:
        raise UsageError("--planned and --unplanned exclude each other")
    if point is not None and not unplanned:
        raise UsageError(
            "--point is of an unplanned failover: a planned one loses nothing",
            hint="add --unplanned, or leave --point out",
        )
    wanted = parse_point(f"{disk}@{point or 'latest'}")
    body = {
        "disk": disk, "planned": not unplanned, "point": str(wanted.point), "name": failover_name,
        "vm": vm, "rollback_s": rollback_after or 0, "dry_run": dry_run,
    }  # fmt: skip
    with client_of(call) as client:
        document: dict[str, Any] = client.post("failovers", "start", body=body)
        if not dry_run:
            document = _follow(call, client, document, no_wait=no_wait)
    if not call.out.document(document):
        _tell_started(call, document)
    _check_health(document)


def _tell_started(call: Call, document: dict[str, Any]) -> None:
    if document.get("dry_run"):
        for row in document["members"]:
            point = f"at {row['point_time']}" if row["point_time"] else "at its last byte"
            call.out.say(f"{document['name']}: {row['disk']} would be taken {point}")
        return
    for row in document.get("disks", ()):
        call.out.say(f"{row['disk']} at {row['point_time']}: {row['path']}")
    name = document["name"]
    if document["state"] == "FailedOver":
        call.out.say(f"then: vdiskfs failover commit {name}, or change-point, or rollback")
    else:
        call.out.say(f"{name}: {document['state']}; look: vdiskfs failover show {name}")


@failover.command("change-point")
@failover_argument
@click.option("--point", required=True, metavar="POINT", help="latest, -15m, a time, or #123.")
@no_wait_option
@dry_run_option
@click.pass_obj
def change_point(call: Call, *, name: str, point: str, no_wait: bool, dry_run: bool) -> None:
    """Begin a failover anew at another point; what was written here since is thrown away.

    Example:
        vdiskfs failover change-point web01-failover-1 --point -1h
    """
    wanted = parse_point(f"disk@{point}")
    body = {"point": str(wanted.point), "dry_run": dry_run}
    document = _step(call, name, "change-point", body, no_wait=no_wait)
    if not call.out.document(document):
        _tell_started(call, document)
    _check_health(document)


@failover.command("commit")
@failover_argument
@dry_run_option
@click.pass_obj
def commit(call: Call, *, name: str, dry_run: bool) -> None:
    """Make a failover final: no other point, no way back but a failback.

    Example:
        vdiskfs failover commit web01-failover-1
    """
    document = _step(call, name, "commit", {"dry_run": dry_run}, no_wait=True)
    if not call.out.document(document):
        call.out.say(f"{name}: {'would be' if dry_run else 'is'} committed")


@failover.command("rollback")
@failover_argument
@no_wait_option
@dry_run_option
@click.pass_obj
def rollback(call: Call, *, name: str, no_wait: bool, dry_run: bool) -> None:
    """Give the disk back to the site that had it; what was written here is thrown away.

    Example:
        vdiskfs failover rollback web01-failover-1
    """
    with client_of(call) as client:
        body = {"dry_run": dry_run}
        document: dict[str, Any] = client.post("failovers", name, "rollback", body=body)
        if not dry_run:
            document = _follow(call, client, document, no_wait=no_wait, ends=True)
    if not call.out.document(document):
        call.out.say(f"{name}: {'would be' if dry_run else 'is'} rolled back")


@click.command("reprotect", cls=Command)
@click.argument("disk", metavar="DISK|GROUP", shell_complete=complete_disks)
@no_wait_option
@dry_run_option
@click.pass_obj
def reprotect(call: Call, *, disk: str, no_wait: bool, dry_run: bool) -> None:
    """Replicate a disk that was failed over to this site from here, so that it can go home.

    Only what changed since the failover is shipped.

    Example:
        vdiskfs reprotect web01
    """
    with client_of(call) as client:
        document: dict[str, Any] = client.post("reprotect", disk, body={"dry_run": dry_run})
        if not dry_run:
            document = _follow(call, client, document, no_wait=no_wait)
    if not call.out.document(document):
        state = document["state"]
        call.out.say(f"{disk}: would be replicated from here" if dry_run else f"{disk}: {state}")


@click.group(cls=Group)
def failback() -> None:
    """Bring a disk that was failed over home: only what differs is moved."""


@failback.command("start")
@click.argument("disk", metavar="DISK|GROUP", shell_complete=complete_disks)
@click.option(
    "--mode", type=click.Choice(["minimize-downtime", "full-download"]),
    default="minimize-downtime",
    help="Move what differs while the machine runs there; or everything, whatever is here.",
)  # fmt: skip
@click.option("--create-vm", is_flag=True, help="Make the image anew: it is not here (any more).")
@click.option(
    "--vm", type=click.Choice(["auto", "none"]), default="auto",
    help="Start the machine that the vault has for the disk when it is home; or none.",
)  # fmt: skip
@no_wait_option
@dry_run_option
@click.pass_obj
def start_failback(
    call: Call, *, disk: str, mode: str, create_vm: bool, vm: str, no_wait: bool, dry_run: bool
) -> None:
    """Bring the image at home up to the other site's newest point, and keep it there.

    The machine runs on at the other site meanwhile, and nothing is stopped before you complete
    the failback. The same command again goes on with one that was cut off.

    Example:
        vdiskfs failback start web01
        vdiskfs failback complete web01
        vdiskfs failback commit web01
    """
    body = {
        "full": mode == "full-download", "create": create_vm, "vm": vm, "dry_run": dry_run,
    }  # fmt: skip
    document = _failback(call, disk, "", body, no_wait=no_wait)
    if not call.out.document(document):
        call.out.say(f"{disk}: would come home" if dry_run else f"{disk}: {document['state']}; "
                     f"then: vdiskfs failback complete {shlex.quote(disk)}")  # fmt: skip


@failback.command("complete")
@click.argument("disk", metavar="DISK|GROUP", shell_complete=complete_disks)
@click.option(
    "--unplanned", is_flag=True,
    help="Take it without asking the other site, which is gone, or is not to be waited for.",
)  # fmt: skip
@click.option("--point", metavar="POINT", help="Of an unplanned one: latest (if none), a time, ...")
@no_wait_option
@dry_run_option
@click.pass_obj
def complete_failback(
    call: Call, *, disk: str, unplanned: bool, point: str | None, no_wait: bool, dry_run: bool
) -> None:
    """Stop the machine at the other site, move the last delta, and start it here.

    Unplanned, as a failover is: from a recovery point, also after the other site was asked in
    vain; what it has not shipped becomes a branch there.

    Example:
        vdiskfs failback complete web01
        vdiskfs failback complete web01 --unplanned
    """
    if point is not None and not unplanned:
        raise UsageError("--point is of an unplanned failback: add --unplanned")
    unasked = str(parse_point(f"disk@{point or 'latest'}").point) if unplanned else ""
    body = {"dry_run": dry_run, "unasked": unasked}
    document = _failback(call, disk, "complete", body, no_wait=no_wait)
    if not call.out.document(document):
        call.out.say(f"{disk}: would be completed" if dry_run else f"{disk}: {document['state']}; "
                     f"then: vdiskfs failback commit {shlex.quote(disk)}")  # fmt: skip
    _check_health(document)


@failback.command("commit")
@click.argument("disk", metavar="DISK|GROUP", shell_complete=complete_disks)
@dry_run_option
@click.pass_obj
def commit_failback(call: Call, *, disk: str, dry_run: bool) -> None:
    """Make a failback final: the disk is at home, and replicated from here as ever.

    Example:
        vdiskfs failback commit web01
    """
    document = _failback(call, disk, "commit", {"dry_run": dry_run}, no_wait=True)
    if not call.out.document(document):
        call.out.say(f"{disk}: {'would be' if dry_run else 'is'} home")


def _failback(
    call: Call, disk: str, step: str, body: dict[str, object], *, no_wait: bool
) -> dict[str, Any]:
    parse_disk(disk)
    with client_of(call) as client:
        way = ("failbacks", disk, step) if step else ("failbacks", disk)
        document: dict[str, Any] = client.post(*way, body=body)
        if body["dry_run"]:
            return document
        return _follow(call, client, document, no_wait=no_wait)


def _step(
    call: Call, name: str, step: str, body: dict[str, object], *, no_wait: bool
) -> dict[str, Any]:
    with client_of(call) as client:
        document: dict[str, Any] = client.post("failovers", name, step, body=body)
        if body["dry_run"]:
            return document
        return _follow(call, client, document, no_wait=no_wait)


def _follow(
    call: Call, client: Any, document: dict[str, Any], *, no_wait: bool, ends: bool = False
) -> dict[str, Any]:
    """Wait for a failover's job, then for its machine's health; return what it has come to.

    With ``ends`` nothing is left of it in the end.
    """
    if no_wait:
        return document
    name = document["name"]
    with call.out.waiting(f"failover {name}") as waiting:
        while True:
            job = document.get("job") or {}
            if job.get("state") == "failed":
                break
            if job.get("state") != "running" and not _is_judged_yet(document):
                break
            judged = "waiting for its machine's health check"
            waiting((job.get("waits_for") or "") if job.get("state") == "running" else judged)
            time.sleep(LOOK_S)
            try:
                document = client.get("failovers", name)
            except NotFoundError:
                if ends:
                    return document
                raise StateError(
                    f"failover {name}: was rolled back, or called off, meanwhile",
                    hint="vdiskfs job list",
                ) from None
    check_job(document.get("job") or {})
    return document


def _is_judged_yet(document: dict[str, Any]) -> bool:
    return (
        document["state"] in ("FailedOver", "FailbackUncommitted")
        and bool(document.get("machine"))
        and (document.get("health") is None)
    )


def _check_health(document: dict[str, Any]) -> None:
    health = document.get("health")
    if health is not None and not health["healthy"]:
        back = f"; then: vdiskfs failover change-point or rollback {document['name']}"
        then = back if document["state"] == "FailedOver" else ""
        raise DamagedError(
            f"machine {document['machine']['name']} is not healthy: {health['detail']}",
            hint=f"its console lies in {document['machine']['directory']}{then}",
        )
