"""``vdiskfs failover``: writable copies of recovery points, and machines on them."""

from __future__ import annotations

import time
from typing import Any

import click

from vdiskfs.errors import DamagedError
from vdiskfs_tools.call import Call, Group, dry_run_option
from vdiskfs_tools.completion import complete_disks_and_groups, complete_failovers
from vdiskfs_tools.mounts import client_of
from vdiskfs_tools.names import parse_disk, parse_point
from vdiskfs_tools.output import format_bytes

LOOK_S = 0.25


@click.group(cls=Group)
def failover() -> None:
    """Try a recovery point out: on a writable copy, while replication goes on."""


@failover.command("test")
@click.argument("name", metavar="DISK|GROUP", shell_complete=complete_disks_and_groups)
@click.option(
    "--point", default="latest", metavar="POINT", help="latest, -15m, a time, or #123, an epoch."
)
@click.option("--name", "failover_name", metavar="NAME", help="Of the failover, else one is found.")
@click.option(
    "--vm", type=click.Choice(["auto", "none"]), default="auto",
    help="Start the machine that the vault has for the disk, if it has one; or none.",
)  # fmt: skip
@click.option("--no-wait", is_flag=True, help="Come back when the machine runs, not when it is up.")
@dry_run_option
@click.pass_obj
def test(
    call: Call, *, name: str, point: str, failover_name: str | None, vm: str, no_wait: bool,
    dry_run: bool,
) -> None:  # fmt: skip
    """Make a writable copy of a recovery point, and start the machine on it, isolated.

    It is there at once, whatever its size. What is read and not here yet comes from the vault;
    what is written stays here, until the clean-up throws it away. Any number of failovers may
    be there at once. A machine that does not pass its health check is exit code 6.

    Example:
        vdiskfs failover test web01 --point -15m
        vdiskfs failover cleanup web01-test-1 --notes "boots, database fine"
    """
    parse_disk(name)
    wanted = parse_point(f"{name}@{point}")
    body = {"disk": name, "point": str(wanted.point), "name": failover_name, "vm": vm,
            "dry_run": dry_run}  # fmt: skip
    with client_of(call) as client:
        document: dict[str, Any] = client.post("failovers", body=body)
        if not dry_run and not no_wait and document.get("machine"):
            machine = document["machine"]["name"]
            with call.out.waiting(f"machine {machine}: waiting for its health check"):
                while document.get("health") is None:
                    time.sleep(LOOK_S)
                    document = client.get("failovers", document["name"])
    if not call.out.document(document):
        _tell(call, document)
    health = document.get("health")
    if health is not None and not health["healthy"]:
        raise DamagedError(
            f"machine {document['machine']['name']} is not healthy: {health['detail']}",
            hint=f"its console lies in {document['machine']['directory']}; then: "
            f"vdiskfs failover cleanup {document['name']}",
        )


def _tell(call: Call, document: dict[str, Any]) -> None:
    if document.get("dry_run"):
        call.out.say(f"{document['name']}: would be made")
        return
    for row in document["disks"]:
        call.out.say(f"{row['disk']} at {row['point_time']}: {row['path']}")
    health = document.get("health")
    if health is not None:
        call.out.say(f"machine {document['machine']['name']}: {health['detail']}")
    call.out.say(f"when done: vdiskfs failover cleanup {document['name']}")


@failover.command("list")
@click.pass_obj
def list_failovers(call: Call) -> None:
    """List the failovers of a mount, the oldest first.

    Example:
        vdiskfs failover list
    """
    with client_of(call) as client:
        document: dict[str, Any] = client.get("failovers")
    if call.out.document(document):
        return
    rows = [
        [item["name"], _state(item), item["created"], member["disk"], member["point_time"] or "-",
         *_here(item, member["id"])]
        for item in document["failovers"]
        for member in item["members"]
    ]  # fmt: skip
    if not rows:
        call.out.say("no failovers")
        return
    header = ("FAILOVER", "STATE", "CREATED", "DISK", "POINT", ">SIZE", ">HERE")
    call.out.table(header, rows)


def _state(item: dict[str, Any]) -> str:
    return f"{item['state']} (damaged)" if item.get("damaged") else str(item["state"])


def _here(item: dict[str, Any], disk_id: str) -> tuple[str, str]:
    """Return the size of a disk's copy, and how much of it is here."""
    for row in item["disks"]:
        if row["id"] == disk_id:
            return format_bytes(row["size"]), format_bytes(row["present_bytes"])
    return "-", "-"  # there is none yet; or it is the image at home


@failover.command("show")
@click.argument("name", metavar="NAME", shell_complete=complete_failovers)
@click.pass_obj
def show(call: Call, *, name: str) -> None:
    """Show all that is known of one failover.

    Example:
        vdiskfs failover show web01-test-1
    """
    with client_of(call) as client:
        document: dict[str, Any] = client.get("failovers", name)
    if call.out.document(document):
        return
    parts = ("disks", "machine", "health", "job", "members", "moving")
    facts: dict[str, object] = {key: value for key, value in document.items() if key not in parts}
    for part in ("machine", "health", "job"):
        _add(facts, part, document.get(part) or {})
    rows = {row["disk"]: row for row in document["disks"]}
    for member in document["members"]:
        moved = document["moving"].get(member["disk"], {})
        _add(facts, member["disk"], rows.get(member["disk"], member) | moved)
    call.out.facts(facts)


def _add(facts: dict[str, object], name: str, values: dict[str, Any]) -> None:
    """Add what is known of a part, one line for each value that is none of several."""
    for key, value in values.items():
        if isinstance(value, dict):
            _add(facts, f"{name}.{key}", value)
        elif key == "size" or key.endswith("_bytes"):
            facts[f"{name}.{key}"] = f"{value} ({format_bytes(value)})"
        else:
            facts[f"{name}.{key}"] = value


@failover.command("cleanup")
@click.argument("name", metavar="NAME", shell_complete=complete_failovers)
@click.option(
    "--notes", default="", metavar="TEXT", help="What the test showed; goes into the log."
)
@dry_run_option
@click.pass_obj
def cleanup(call: Call, *, name: str, notes: str, dry_run: bool) -> None:
    """Throw a test failover away, with all that was written to its copies.

    Example:
        vdiskfs failover cleanup web01-test-1 --notes "boots, database fine"
    """
    with client_of(call) as client:
        document: dict[str, Any] = client.post(
            "failovers", name, "cleanup", body={"notes": notes, "dry_run": dry_run}
        )
    if not call.out.document(document):
        call.out.say(f"{name}: {'would be' if dry_run else 'is'} cleaned up")
