"""``vdiskfs vault``: make a vault, look at it, check it, heal it."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

from typing import Any

import click

from vdiskfs.errors import DamagedError, UsageError
from vdiskfs_tools.call import Call, Group, dry_run_option
from vdiskfs_tools.completion import disks_option
from vdiskfs_tools.mounts import vault_url
from vdiskfs_tools.names import parse_disk
from vdiskfs_tools.output import counted, format_bytes
from vdiskfs_tools.repair import hurt_text, repair
from vdiskfs_tools.vaultkey import key


@click.group(cls=Group)
def vault() -> None:
    """Make, look at and check the place that holds disks and their points.

    A vault is a folder (file:///srv/vault) or a container of Azure Blob Storage
    (azure://CONTAINER/PREFIX); see vdiskfs(1) for its credentials.
    """


@vault.command("init")
@click.argument("url")
@click.option(
    "--encryption",
    type=click.Choice(["aes-256-gcm", "none"]),
    default="aes-256-gcm",
    show_default=True,
    help="How what lies in it is encrypted.",
)
@click.option(
    "--control", metavar="URL",
    help="The container of what changes: azure://CONTAINER. Part of the vault's URL from then on.",
)  # fmt: skip
@dry_run_option
@click.pass_obj
def init(call: Call, *, url: str, encryption: str, control: str | None, dry_run: bool) -> None:
    """Make a vault at URL.

    It is encrypted with a passphrase (asked for, or from VDISKFS_PASSPHRASE or
    VDISKFS_PASSPHRASE_FILE), with a key file (--key-file; made if it is absent), or with both.
    Without the key nobody can read it, nor help you.

    Example:
        vdiskfs vault init file:///srv/vault --key-file /root/vault.key
    """
    from vdiskfs.crypto import Secrets
    from vdiskfs_tools.keys import NewKey, first_key
    from vdiskfs_tools.vaults import make_vault, may_open, with_control

    url = with_control(url, control)
    new = NewKey(Secrets())
    if encryption != "none":
        new = first_key(call, dry_run=dry_run)
    elif call.key_file is not None:
        raise UsageError("--encryption none needs no --key-file")
    try:
        vault_id = make_vault(url, new.secrets, dry_run=dry_run, sending=new.sending)
    except BaseException:
        new.clear_away(taken=new.sent and may_open(url, new.secrets))
        raise
    document: dict[str, Any] = {"vault": url, "vault_id": vault_id, "encryption": encryption}
    if new.made is not None:
        document["key_file"] = str(new.made)
    if call.out.document(document | {"dry_run": True} if dry_run else document):
        return
    call.out.say(f"{url}: a vault would be made" if dry_run else f"{url}: vault {vault_id} made")
    if new.made is not None:
        call.out.say(f"{new.made}: its key; keep a copy elsewhere: without it the vault is lost")


vault.add_command(key)
vault.add_command(repair)


@vault.command("info")
@click.option(
    "--probe", is_flag=True,
    help="Try whether data can be overwritten and deleted: an object is made, and may stay.",
)  # fmt: skip
@click.pass_obj
def info(call: Call, *, probe: bool) -> None:
    """Show a vault: its disks, its sites, and which points commands hold open now.

    Example:
        vdiskfs vault info --vault file:///srv/vault
    """
    from vdiskfs_tools.vaults import probed_document, vault_document, with_vault

    url = vault_url(call)
    document = {"vault": url, **with_vault(call, probed_document if probe else vault_document)}
    if call.out.document(document):
        return
    disks, sites = document["disks"], document["sites"]
    call.out.facts(
        {
            "vault": url,
            "id": document["vault_id"],
            "made": document["created"],
            "encryption": document["encryption"],
            **(document.get("data") or {}),
        }
    )
    if disks:
        call.out.line()
        keys = ("site", "generation", "retired")
        call.out.table(
            ("DISK", ">SIZE", "SITE", ">GENERATION", "RETIRED"),
            [[d["name"], format_bytes(d["size"]), *(d[key] or "-" for key in keys)] for d in disks],
        )
    for one in document["unreadable_disks"]:
        call.out.say(f"disk {one['name']}: {one['object']}: {one['why']}; vdiskfs vault repair")
    if sites:
        call.out.line()
        call.out.table(
            ("SITE", "HOST", "LAST SEEN", "VERSION"),
            [
                [site.get(key) or "-" for key in ("site", "host", "time", "version")]
                for site in sites
            ],
        )
    for one in document["unreadable_sites"]:
        call.out.say(f"{one['object']}: unreadable: {one['why']} (written {one['written']})")
    if document["leases"]:
        call.out.line()
        call.out.table(
            ("READ BY", "HOST", ">PID", "SINCE", "POINTS"),
            [
                [lease["what"], lease["host"], lease["pid"], lease["since"],
                 " ".join(dict.fromkeys(_shown(one) for one in lease["points"]))]
                for lease in document["leases"]
            ],
        )  # fmt: skip


def _shown(point: dict[str, Any]) -> str:
    """Return a point that is held open as people read it; without an epoch it is the whole disk."""
    return f"{point['disk']}@#{point['epoch']}" if point["epoch"] else f"{point['disk']} (whole)"


@vault.command("check")
@click.option("--read-data", is_flag=True, help="Read all data too, and compare its checksums.")
@disks_option
@click.pass_obj
def check(call: Call, *, read_data: bool, disks: tuple[str, ...]) -> None:
    """Check that every point of a vault can be restored.

    Exit code 6 when something is damaged; what is damaged is printed, and whom it hurts.

    Example:
        vdiskfs vault check --read-data --vault file:///srv/vault
    """
    from vdiskfs.catalog import check as check_vault
    from vdiskfs_tools.vaults import check_document, with_vault

    url = vault_url(call)
    names = [parse_disk(name) for name in disks] or None
    with call.out.progress(f"checking {url}", counts=True) as progress:

        async def work(vault: Any) -> dict[str, Any]:
            report = await check_vault(
                vault,
                names,
                read_data=read_data,
                progress=lambda _, done, total: progress(done, total),
            )
            return check_document(report)

        document = {"vault": url, **with_vault(call, work)}
    problems = document["problems"]
    if not call.out.document(document):
        for problem in problems:
            call.out.line(f"{problem['object']}: {problem['message']}", colour="red")
            for hurt in problem["points"]:
                call.out.line(f"  {hurt_text(problem['disk'], hurt)}")
        read = f", {format_bytes(document['read_bytes'])} read" if read_data else ""
        looked_at = [counted(document["disks"], "disk"), counted(document["points"], "point")]
        call.out.line(", ".join(looked_at) + read)
        if unused := document["unused_segments"]:
            size = format_bytes(document["unused_bytes"])
            call.out.line(f"{counted(unused, 'segment')} that no delta uses ({size})")
    if problems:
        raise DamagedError(
            f"{url}: {counted(len(problems), 'object')} damaged or missing",
            hint="vdiskfs vault repair heals what can be healed",
        )


@vault.command("gc")
@disks_option
@dry_run_option
@click.pass_obj
def gc(call: Call, *, disks: tuple[str, ...], dry_run: bool) -> None:
    """Thin disks by their policies, and delete what no point needs any more.

    Mounts do this by themselves for the disks that they own. What was thinned away is deleted
    an hour later at the earliest.

    Example:
        vdiskfs vault gc --dry-run --vault file:///srv/vault
    """
    from vdiskfs_tools.policies import tend_vault

    names = [parse_disk(name) for name in disks]
    with call.out.waiting("thinning"):
        rows, unnamed, failed = tend_vault(call, names, dry_run=dry_run)
    document = {
        "lines": rows, "unnamed": unnamed, "dry_run": dry_run, "failed": sorted(failed),
    }  # fmt: skip
    if not call.out.document(document):
        if rows:
            header = ("DISK", ">GENERATION", ">POINTS", ">BYTES", ">LEFT", ">DELETED", ">WAITING")
            call.out.table(header, [
                [row["disk"], row["generation"], row["points"], format_bytes(row["bytes"]),
                 row["left"], row["deleted"], row["waiting"] + row["refused"]] for row in rows
            ])  # fmt: skip
        elif not failed:
            call.out.say("no disk has a policy")
        for one in unnamed:
            kept = one["waiting"] + one["refused"]
            call.out.say(f"disk {one['disk']}: segments that no point names: "
                         f"{one['deleted']} deleted, {kept} wait")  # fmt: skip
    first, *others = failed.values() or (None,)
    for error in others:
        call.out.say(str(error))
    if first is not None:
        raise first
