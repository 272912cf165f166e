"""``vdiskfs group``: disks that are sealed at one instant."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

from typing import Any

import click

from vdiskfs.errors import UsageError
from vdiskfs_tools.call import Call, Group, dry_run_option
from vdiskfs_tools.completion import complete_disks, complete_groups
from vdiskfs_tools.mounts import client_of
from vdiskfs_tools.names import parse_disk


@click.group(cls=Group)
def group() -> None:
    """Make, change and show consistency groups: disks that are sealed at one instant.

    While a group's disks are protected in one mount, each of its recovery points is the state
    of all of them at one instant. A disk is in one group at most.
    """


@group.command("create")
@click.argument("name", metavar="NAME")
@click.argument("disks", metavar="DISK...", nargs=-1, required=True, shell_complete=complete_disks)
@dry_run_option
@click.pass_obj
def create(call: Call, *, name: str, disks: tuple[str, ...], dry_run: bool) -> None:
    """Make a group of disks. They are sealed together from then on; nothing is restarted.

    Example:
        vdiskfs group create shop web01 db01
    """
    body = _body(disks, dry_run=dry_run) | {"name": _checked(name)}
    with client_of(call) as client:
        document = client.post("groups", body=body)
    _tell_changed(call, document, "made")


@group.command("add")
@click.argument("name", metavar="NAME", shell_complete=complete_groups)
@click.argument("disks", metavar="DISK...", nargs=-1, required=True, shell_complete=complete_disks)
@dry_run_option
@click.pass_obj
def add(call: Call, *, name: str, disks: tuple[str, ...], dry_run: bool) -> None:
    """Let disks join a group, while they are written to and replicated.

    Example:
        vdiskfs group add shop cache01
    """
    _change(call, name, "add", disks, dry_run=dry_run)


@group.command("remove")
@click.argument("name", metavar="NAME", shell_complete=complete_groups)
@click.argument("disks", metavar="DISK...", nargs=-1, required=True, shell_complete=complete_disks)
@dry_run_option
@click.pass_obj
def remove(call: Call, *, name: str, disks: tuple[str, ...], dry_run: bool) -> None:
    """Let disks leave a group. They are protected on, each by itself.

    Example:
        vdiskfs group remove shop cache01
    """
    _change(call, name, "remove", disks, dry_run=dry_run)


@group.command("delete")
@click.argument("name", metavar="NAME", shell_complete=complete_groups)
@dry_run_option
@click.pass_obj
def delete(call: Call, *, name: str, dry_run: bool) -> None:
    """End a group. Its disks are protected on, each by itself; all points stay.

    Example:
        vdiskfs group delete shop
    """
    with client_of(call) as client:
        document = client.post("groups", _checked(name), "delete", body={"dry_run": dry_run})
    if not call.out.document(document):
        call.out.say(f"group {name}: {'would be' if dry_run else 'is'} deleted")


@group.command("list")
@click.pass_obj
def list_groups(call: Call) -> None:
    """List the groups of a vault.

    Example:
        vdiskfs group list
    """
    if call.vault is not None:
        document: dict[str, Any] = _vault_groups(call)
    else:
        with client_of(call) as client:
            document = client.get("groups")
    if call.out.document(document):
        return
    for item in document["groups"]:
        if item.get("error"):
            call.out.say(f"{item['name']}: {item['error']}")
    rows = [[item["name"], item.get("created") or "damaged", _disks(item)]
            for item in document["groups"]]  # fmt: skip
    if not rows:
        call.out.say("no groups")
        return
    call.out.table(("GROUP", "CREATED", "DISKS"), rows)
    _tell_away(call, document)


@group.command("show")
@click.argument("name", metavar="NAME", shell_complete=complete_groups)
@click.pass_obj
def show(call: Call, *, name: str) -> None:
    """Show a group: its disks, which of them can be sealed now, and its newest points.

    Example:
        vdiskfs group show shop
    """
    _checked(name)
    if call.vault is not None:
        document: dict[str, Any] = _vault_group(call, name)
    else:
        with client_of(call) as client:
            document = client.get("groups", name)
    if call.out.document(document):
        return
    facts: dict[str, object] = {key: document[key] for key in ("name", "id", "created")}
    for row in document["disks"]:
        facts[f"disk {row['disk']}"] = _member(row)
    for point in document["points"] or []:
        epochs = ", ".join(f"{one['disk']}@#{one['epoch']}" for one in point["disks"])
        facts[f"point {point['time']}"] = epochs
    call.out.facts(facts)
    if document["points"] == []:
        call.out.say(f"group {name}: no point that all its disks share")
    _tell_away(call, document)


def _change(call: Call, name: str, change: str, disks: tuple[str, ...], *, dry_run: bool) -> None:
    with client_of(call) as client:
        document = client.post("groups", _checked(name), change, body=_body(disks, dry_run=dry_run))
    _tell_changed(call, document, "changed")


def _tell_changed(call: Call, document: dict[str, Any], done: str) -> None:
    if call.out.document(document):
        return
    would = "would be" if document.get("dry_run") else "is"
    call.out.say(f"group {document['name']}: {would} {done}: {_disks(document)}")
    away = [row["disk"] for row in document["disks"] if not row["here"]]
    if away:
        them = "it is" if len(away) == 1 else "they are"
        call.out.say(
            f"{', '.join(away)}: not protected in this mount; until {them}, the group has no points"
        )


def _disks(document: dict[str, Any]) -> str:
    return ", ".join(row["disk"] for row in document.get("disks") or [])


def _member(row: dict[str, Any]) -> str:
    if not row["here"]:
        return "not protected in this mount"
    return f"{row['state']}{'' if row['ready'] else ', cannot be sealed with the others now'}"


def _tell_away(call: Call, document: dict[str, Any]) -> None:
    if document.get("vault_error"):
        call.out.say(f"as it was known last: {document['vault_error']}")


def _body(disks: tuple[str, ...], *, dry_run: bool) -> dict[str, Any]:
    return {"disks": [parse_disk(disk) for disk in disks], "dry_run": dry_run}


def _checked(name: str) -> str:
    if not name or len(name.encode(errors="replace")) > 240 or "/" in name or "@" in name:
        raise UsageError(
            f"not a name for a group: {name[:60]!r}", hint="1 to 240 bytes without slash and @"
        )
    return name


def _vault_groups(call: Call) -> dict[str, Any]:
    from vdiskfs.catalog.groups import list_groups as groups_of
    from vdiskfs_tools.vaults import with_vault

    async def work(vault: Any) -> list[Any]:
        return await groups_of(vault.store)

    rows = [
        {"name": one.name, "error": str(one.error)} if one.group is None else _document(one.group)
        for one in with_vault(call, work)
    ]
    return {"groups": rows, "vault_error": None}


def _vault_group(call: Call, name: str) -> dict[str, Any]:
    from vdiskfs.catalog import shared_points
    from vdiskfs.catalog.groups import read_group
    from vdiskfs.groupview import group_point_document
    from vdiskfs_tools.vaults import with_vault

    async def work(vault: Any) -> dict[str, Any]:
        found, _ = await read_group(vault.store, name)
        names = sorted(disk.name for disk in found.disks)
        points = await shared_points(vault.find_log, names, limit=5)
        rows = [group_point_document(name, names, one) for one in points]
        return _document(found) | {"points": rows, "vault_error": None}

    return with_vault(call, work)


def _document(found: Any) -> dict[str, Any]:
    from vdiskfs.groupview import group_document

    return group_document(found, [])
