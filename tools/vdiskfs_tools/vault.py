"""``vdiskfs vault``: make a vault, look at it, check it."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

from typing import Any

import click

from vdiskfs_tools.call import Call, Group, dry_run_option
from vdiskfs_tools.mounts import vault_url
from vdiskfs_tools.output import format_bytes


@click.group(cls=Group)
def vault() -> None:
    """Make, look at and check the place that holds disks and their points.

    A vault is a folder (file:///srv/vault) or a container of Azure Blob Storage
    (azure://CONTAINER/PREFIX); see vdiskfs(1) for its credentials.
    """


@vault.command("init")
@click.argument("url")
@dry_run_option
@click.pass_obj
def init(call: Call, *, url: str, dry_run: bool) -> None:
    """Make a vault at URL.

    Example:
        vdiskfs vault init file:///srv/vault
    """
    from vdiskfs_tools.vaults import make_vault

    vault_id = make_vault(url, dry_run=dry_run)
    document: dict[str, Any] = {"vault": url, "vault_id": vault_id}
    if call.out.document(document | {"dry_run": True} if dry_run else document):
        return
    call.out.say(f"{url}: a vault would be made" if dry_run else f"{url}: vault {vault_id} made")


@vault.command("info")
@click.pass_obj
def info(call: Call) -> None:
    """Show a vault: its disks and its sites.

    Example:
        vdiskfs vault info --vault file:///srv/vault
    """
    from vdiskfs_tools.vaults import vault_document, with_vault

    url = vault_url(call)
    document = {"vault": url, **with_vault(call, vault_document)}
    if call.out.document(document):
        return
    disks, sites = document["disks"], document["sites"]
    call.out.facts({"vault": url, "id": document["vault_id"], "made": document["created"]})
    if disks:
        call.out.line()
        keys = ("site", "generation", "retired")
        call.out.table(
            ("DISK", ">SIZE", "SITE", ">GENERATION", "RETIRED"),
            [[d["name"], format_bytes(d["size"]), *(d[key] or "-" for key in keys)] for d in disks],
        )
    if sites:
        call.out.line()
        call.out.table(
            ("SITE", "HOST", "LAST SEEN", "VERSION"),
            [
                [site.get(key) or "-" for key in ("site", "host", "time", "version")]
                for site in sites
            ],
        )
