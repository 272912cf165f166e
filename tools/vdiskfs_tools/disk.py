"""``vdiskfs disk``: which disks there are, and which of them are protected."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

from typing import Any

import click

from vdiskfs_tools.call import Call, Group, dry_run_option
from vdiskfs_tools.completion import complete_disks
from vdiskfs_tools.mounts import find_mount
from vdiskfs_tools.names import parse_disk
from vdiskfs_tools.output import format_age, format_bytes


@click.group(cls=Group)
def disk() -> None:
    """List, show, protect and unprotect disks."""


@disk.command("list")
@click.pass_obj
def list_disks(call: Call) -> None:
    """List the disks of a mount; with --vault, those of the vault.

    Example:
        vdiskfs disk list --vault file:///srv/vault
    """
    if call.vault is not None:
        document: dict[str, Any] = {"disks": _vault_disks(call)}
    else:
        with _client(call) as client:
            document = client.get("disks")
    if call.out.document(document):
        return
    disks = [item for item in document.get("disks") or [] if isinstance(item, dict)]
    if not disks:
        call.out.say("no disks")
        return
    if call.vault is not None:
        header = ("DISK", ">SIZE", "SITE", ">GENERATION", "CREATED", "RETIRED")
        keys = ("site", "generation", "created", "retired")
        rows = [
            [item["name"], format_bytes(item["size"]), *(item[key] or "-" for key in keys)]
            for item in disks
        ]
    else:
        header = ("DISK", ">SIZE", "STATE", "HEALTH", ">EPOCH", ">POINT AGE")
        rows = [
            [
                item.get("name", "-"),
                format_bytes(item.get("size")),
                *(item.get(key) or "-" for key in ("state", "health", "epoch")),
                format_age(item.get("usable_point_age_s")),
            ]
            for item in disks
        ]
    call.out.table(header, rows)


@disk.command("show")
@click.argument("name", metavar="DISK", shell_complete=complete_disks)
@click.pass_obj
def show(call: Call, *, name: str) -> None:
    """Show all that is known of one disk.

    Example:
        vdiskfs disk show web01
    """
    parse_disk(name)
    if call.vault is not None:
        document = _vault_disk(call, name)
    else:
        with _client(call) as client:
            document = client.get("disks", name)
    if not call.out.document(document):
        call.out.facts(dict(_flat(document)))


@disk.command("protect")
@click.argument("name", metavar="DISK", shell_complete=complete_disks)
@dry_run_option
@click.pass_obj
def protect(call: Call, *, name: str, dry_run: bool) -> None:
    """Protect a disk: DISK is the name of a file in disks/, or of a disk.

    Example:
        vdiskfs disk protect data.bin
    """
    _change(call, name, "protect", {"policy": None}, dry_run=dry_run)


@disk.command("unprotect")
@click.argument("name", metavar="DISK", shell_complete=complete_disks)
@dry_run_option
@click.pass_obj
def unprotect(call: Call, *, name: str, dry_run: bool) -> None:
    """Stop protecting a disk. Its recovery points stay in the vault.

    Example:
        vdiskfs disk unprotect scratch
    """
    _change(call, name, "unprotect", {}, dry_run=dry_run)


@disk.command("branches")
@click.argument("name", metavar="DISK", shell_complete=complete_disks)
@click.pass_obj
def branches(call: Call, *, name: str) -> None:
    """List what displaced sites wrote beside the disk's main line.

    The points of a branch are those of DISK@BRANCH: in recovery-points/ and in every
    command that takes a point.

    Example:
        vdiskfs point restore web01@site-a-3@latest web01-of-site-a.img
    """
    parse_disk(name)
    document = _vault_branches(call, name)
    if call.out.document(document):
        return
    if not document["branches"]:
        call.out.say(f"{name}: no branches")
        return
    rows = [
        [
            f"{name}@{item['name']}", item["site"], item["since"], item["parent"]["epoch"],
            item["points"], item["last_time"] or "-",
        ]
        for item in document["branches"]
    ]  # fmt: skip
    call.out.table(("BRANCH", "SITE", "SINCE", ">FROM EPOCH", ">POINTS", "LAST POINT"), rows)


def _change(call: Call, name: str, verb: str, body: dict[str, Any], *, dry_run: bool) -> None:
    """Have the daemon protect a disk, or stop it."""
    parse_disk(name)
    with _client(call) as client:
        if dry_run:
            document: dict[str, Any] = {"dry_run": True, "disk": name, "would": verb}
            client.get("disks", name)
        else:
            document = client.post("disks", name, verb, body=body)
    if call.out.document(document):
        return
    shown = document.get("name") or name
    call.out.say(f"{shown}: would be {verb}ed" if dry_run else f"{shown}: {verb}ed")


def _client(call: Call) -> Any:
    from vdiskfs_tools.client import Client

    return Client(find_mount(call))


def _vault_disks(call: Call) -> list[dict[str, Any]]:
    from vdiskfs_tools.vaults import disk_document, with_vault

    async def work(vault: Any) -> list[dict[str, Any]]:
        return [disk_document(record) for record in await vault.disks()]

    return with_vault(call, work)


def _vault_disk(call: Call, name: str) -> dict[str, Any]:
    from vdiskfs_tools.vaults import disk_document, with_vault

    async def work(vault: Any) -> dict[str, Any]:
        return disk_document(await vault.find_disk(name))

    return with_vault(call, work)


def _vault_branches(call: Call, name: str) -> dict[str, Any]:
    from vdiskfs_tools.vaults import branches_document, with_vault

    async def work(vault: Any) -> dict[str, Any]:
        record = await vault.find_disk(name)
        document = branches_document(record)
        for row in document["branches"]:
            log = vault.log(record, row["generation"])
            own = [one for one in await log.points() if one.generation == row["generation"]]
            row["points"] = len(own)
            row["last_time"] = own[-1].time if own else None
        return document

    return with_vault(call, work)


def _flat(document: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Return the facts of a document, the nested ones with a path for a name."""
    facts: list[tuple[str, object]] = []
    for key, value in document.items():
        if isinstance(value, dict) and value:
            facts.extend(_flat(value, f"{prefix}{key}."))
        elif key.endswith("_bytes") or key == "size":
            facts.append((f"{prefix}{key}", f"{value} ({format_bytes(value)})"))
        else:
            facts.append((f"{prefix}{key}", value))
    return facts
