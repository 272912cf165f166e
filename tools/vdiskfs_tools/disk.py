"""``vdiskfs disk``: which disks there are, and which of them are protected."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

from typing import Any

import click

from vdiskfs.errors import DamagedError, NotFoundError, UsageError, VaultUnreachableError
from vdiskfs_tools.call import Call, Group, dry_run_option
from vdiskfs_tools.completion import complete_disks
from vdiskfs_tools.mounts import client_of
from vdiskfs_tools.names import parse_disk
from vdiskfs_tools.output import format_age, format_bytes


@click.group(cls=Group)
def disk() -> None:
    """List and show disks; protect, pause, retry and resynchronize them."""


@disk.command("list")
@click.pass_obj
def list_disks(call: Call) -> None:
    """List the disks of a mount; with --vault, those of the vault.

    Exit code 6 when one of the vault cannot be read, 5 when the vault of a mount does not answer;
    the others are listed, and those of other sites as they were last seen.

    Example:
        vdiskfs disk list --vault file:///srv/vault
    """
    if call.vault is not None:
        document = _vault_disks(call)
    else:
        with client_of(call) as client:
            document = client.get("disks")
    unreadable = document.get("unreadable") or []
    if not call.out.document(document):
        disks = [item for item in document.get("disks") or [] if isinstance(item, dict)]
        _say_disks(call, disks, complete=not unreadable)
    if away := document.get("vault_error"):
        raise VaultUnreachableError(
            f"{away}; disks of other sites are listed as they were last seen",
            hint="vdiskfs status",
        )
    for one in unreadable[:-1]:
        call.out.say(str(_damaged(one)))
    if unreadable:
        raise _damaged(unreadable[-1])


def _damaged(one: dict[str, Any]) -> DamagedError:
    return DamagedError(
        f"disk {one['name']} is not listed: {one['object']}: {one['why']}",
        hint="vdiskfs vault repair heals what can be healed",
    )


def _say_disks(call: Call, disks: list[dict[str, Any]], *, complete: bool) -> None:
    if not disks:
        if complete:
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
        with client_of(call) as client:
            document = client.get("disks", name)
    if not call.out.document(document):
        call.out.facts(dict(_flat(document)))


@disk.command("protect")
@click.argument("name", metavar="DISK", shell_complete=complete_disks)
@click.option("--policy", metavar="NAME", help="Let it follow a policy; none: keep all points.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@dry_run_option
@click.pass_obj
def protect(call: Call, *, name: str, policy: str | None, yes: bool, dry_run: bool) -> None:
    """Protect a disk: DISK is the name of a file in disks/, or of a disk.

    With --policy, also of a disk that is protected already: says first which points that would
    delete, and asks.

    Example:
        vdiskfs disk protect data.bin
        vdiskfs disk protect web01 --policy default
    """
    if policy is None:
        _change(call, name, "protect", {"policy": None}, dry_run=dry_run)
        return
    from vdiskfs_tools.policies import follow_policy, policy_of, preview_choice
    from vdiskfs_tools.policy import confirm, say_preview

    chosen = "" if policy == "none" else policy
    if chosen:
        policy_of(call, chosen)
    if call.vault is None:
        with client_of(call) as client:
            try:
                known = client.get("disks", name)
            except NotFoundError:
                if dry_run:
                    raise
                known = client.post("disks", name, "protect", body={"policy": None})
        name = known.get("name") or name
    preview = preview_choice(call, name, chosen)
    if not dry_run:
        confirm(call, [preview], yes=yes)
        follow_policy(call, name, chosen)
    document = {"disk": name, "policy": policy, "preview": preview}
    if call.out.document(document | {"dry_run": True} if dry_run else document):
        return
    say_preview(call, [preview])
    call.out.say(f"{name}: {'would follow' if dry_run else 'follows'} policy {policy}")


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
        vdiskfs disk branches web01
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


@disk.command("retry")
@click.argument("name", metavar="DISK", shell_complete=complete_disks)
@dry_run_option
@click.pass_obj
def retry(call: Call, *, name: str, dry_run: bool) -> None:
    """Try again now what failed, instead of at the end of the wait that status shows.

    Example:
        vdiskfs disk retry web01
    """
    if dry_run:
        _would(call, name, "retry", "what failed would be tried again")
        return
    document = _ask(call, name, "retry", {})
    if not call.out.document(document):
        done = "is tried again" if document.get("retried") else "nothing waits to be tried again"
        call.out.say(f"{document.get('name') or name}: {done}")


@disk.command("pause")
@click.argument("name", metavar="DISK", shell_complete=complete_disks)
@dry_run_option
@click.pass_obj
def pause(call: Call, *, name: str, dry_run: bool) -> None:
    """Let replication of a disk stand still. Its changes are tracked on.

    Example:
        vdiskfs disk pause web01
    """
    _change(call, name, "pause", {}, dry_run=dry_run)


@disk.command("resume")
@click.argument("name", metavar="DISK", shell_complete=complete_disks)
@dry_run_option
@click.pass_obj
def resume(call: Call, *, name: str, dry_run: bool) -> None:
    """Let replication of a disk go on.

    Example:
        vdiskfs disk resume web01
    """
    _change(call, name, "resume", {}, dry_run=dry_run)


@disk.command("resync")
@click.argument("name", metavar="DISK", shell_complete=complete_disks)
@click.option("--now", is_flag=True, help="At once, whatever resync_window says.")
@click.option("--cancel", is_flag=True, help="Stop it; what was found out stays.")
@dry_run_option
@click.pass_obj
def resync(call: Call, *, name: str, now: bool, cancel: bool, dry_run: bool) -> None:
    """Compare a disk with the vault and send what differs; its points stay usable meanwhile.

    What is compared are the pages that are marked, or else all that are allocated. No data
    is read from the vault.

    Example:
        vdiskfs disk resync web01 --now
    """
    if now and cancel:
        raise UsageError("--now and --cancel exclude each other")
    if dry_run:
        done = "would not be resynchronized until you ask" if cancel else "would be resynchronized"
        _would(call, name, "resync", done)
        return
    document = _ask(call, name, "resync", {"now": now, "cancel": cancel})
    if not call.out.document(document):
        done = "is not resynchronized until you ask" if cancel else "is resynchronized"
        waits = (
            "" if cancel or (document.get("resync") or {}).get("in_window") else ", in its window"
        )
        call.out.say(f"{document.get('name') or name}: {done}{waits}")


def _ask(call: Call, name: str, verb: str, body: dict[str, Any]) -> dict[str, Any]:
    parse_disk(name)
    with client_of(call) as client:
        document: dict[str, Any] = client.post("disks", name, verb, body=body)
    return document


def _would(call: Call, name: str, verb: str, text: str) -> None:
    """Say what would be done to a disk of the mount, which is looked up."""
    parse_disk(name)
    with client_of(call) as client:
        found = client.get("disks", name)
    if not call.out.document({"dry_run": True, "disk": name, "would": verb}):
        call.out.say(f"{found.get('name') or name}: {text}")


def _change(call: Call, name: str, verb: str, body: dict[str, Any], *, dry_run: bool) -> None:
    """Have the daemon do something to a disk that it can also undo."""
    done = verb + ("d" if verb.endswith("e") else "ed")
    if dry_run:
        _would(call, name, verb, f"would be {done}")
        return
    document = _ask(call, name, verb, body)
    if not call.out.document(document):
        call.out.say(f"{document.get('name') or name}: {done}")


def _vault_disks(call: Call) -> dict[str, Any]:
    from vdiskfs_tools.vaults import disks_document, with_vault

    async def work(vault: Any) -> dict[str, Any]:
        return disks_document(*await vault.read_disks())

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
