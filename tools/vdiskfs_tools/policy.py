"""``vdiskfs policy``: replication policies; and what follows from them for disks."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import sys
from typing import Any

import click

from vdiskfs.errors import StateError, UsageError
from vdiskfs_tools.call import Call, Group, dry_run_option
from vdiskfs_tools.output import counted, format_bytes


@click.group(cls=Group)
def policy() -> None:
    """List, show and set replication policies: how disks are replicated, which points stay.

    A disk follows the policy that it was given (disk protect --policy); one without a policy
    keeps every point.
    """


@policy.command("list")
@click.pass_obj
def list_policies(call: Call) -> None:
    """List the policies of the vault, the presets among them.

    Example:
        vdiskfs policy list --vault file:///srv/vault
    """
    from vdiskfs_tools.policies import policies_of

    document = policies_of(call)
    if call.out.document(document):
        return
    rows = [
        [item["name"], item["retention"], item["epoch_interval"] or "-", ", ".join(item["disks"])]
        for item in document["policies"]
    ]
    call.out.table(("POLICY", "RETENTION", "EPOCH", "DISKS"), rows)
    for one in document["unreadable"]:
        call.out.say(f"{one['object']}: {one['why']}; see `vdiskfs vault repair`")


@policy.command("show")
@click.argument("name", metavar="NAME")
@click.pass_obj
def show(call: Call, *, name: str) -> None:
    """Show one policy. What is not set is as the mount's configuration has it.

    Example:
        vdiskfs policy show default
    """
    from vdiskfs_tools.policies import policy_of

    document = policy_of(call, name)
    if not call.out.document(document):
        call.out.facts({key: value or "-" for key, value in document.items() if key != "disks"})


@policy.command("set")
@click.argument("name", metavar="NAME")
@click.argument("settings", metavar="KEY=VALUE...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@dry_run_option
@click.pass_obj
def set_policy(
    call: Call, *, name: str, settings: tuple[str, ...], yes: bool, dry_run: bool
) -> None:
    """Change a policy, or make it. Says first what that would delete, and asks.

    Example:
        vdiskfs policy set shop retention="1s for 2h, 1m for 7d" rpo_warning=5m
    """
    from vdiskfs_tools.policies import change_policy, preview_policy

    values = {}
    for text in settings:
        key, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"not KEY=VALUE: {text!r}")
        if key.strip() in values:
            raise UsageError(f"{key.strip()} is given twice")
        values[key.strip()] = value
    with call.out.waiting("looking what that would delete"):
        document = preview_policy(call, name, values)
    if not dry_run:
        confirm(call, document["disks"], yes=yes)
        document |= {"policy": change_policy(call, name, values)}
    if call.out.document(document | {"dry_run": True} if dry_run else document):
        return
    say_preview(call, document["disks"])
    call.out.say(f"policy {name}: would be set" if dry_run else f"policy {name}: set")


def say_preview(call: Call, disks: list[dict[str, Any]]) -> None:
    """Print what would be deleted of each disk."""
    for item in disks:
        call.out.line(
            f"{item['disk']}: {counted(item['points'], 'point')} "
            f"({format_bytes(item['bytes'])}) would be deleted; the oldest that stays: "
            f"{item['oldest'] or 'none'}"
        )


def confirm(call: Call, disks: list[dict[str, Any]], *, yes: bool) -> None:
    """Ask whether points may be deleted, where some would be.

    Raises:
        StateError: the answer is no, or there is nobody to ask.
    """
    lost = [item for item in disks if item["points"]]
    if yes or not lost:
        return
    if call.json or not sys.stdin.isatty():
        total = sum(item["points"] for item in lost)
        raise StateError(
            f"{counted(total, 'point')} would be deleted",
            hint="look with --dry-run, confirm with --yes",
        )
    say_preview(call, lost)
    if not click.confirm("Delete these points?", err=True):
        raise StateError("nothing was changed")
