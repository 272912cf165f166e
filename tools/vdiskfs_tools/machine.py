"""``vdiskfs machine``: the definitions of machines in a vault. No daemon is needed."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiskfs.errors import NotFoundError, UsageError
from vdiskfs_tools.call import Call, FilePath, Group, dry_run_option
from vdiskfs_tools.completion import complete_machines
from vdiskfs_tools.mounts import vault_url
from vdiskfs_tools.output import format_bytes

if TYPE_CHECKING:
    from vdiskfs.catalog import Vault
    from vdiskfs.machines import Listed, Machine


@click.group(cls=Group)
def machine() -> None:
    """List, show and set the machines that disks belong to.

    A machine is what a failover starts: its disks, its size, its networks. It is kept in the
    vault, so that it is there when its site is not; MACHINES in vdiskfs(1) describes it.
    """


@machine.command("list")
@click.pass_obj
def list_machines(call: Call) -> None:
    """List the machines of a vault.

    Example:
        vdiskfs machine list --vault file:///srv/vault
    """
    from vdiskfs.machines import list_machines
    from vdiskfs_tools.vaults import with_vault

    async def work(vault: Vault) -> list[Listed]:
        return await list_machines(vault.store)

    listed = with_vault(call, work)
    document = {"machines": [_listed_document(item) for item in listed]}
    if not call.out.document(document):
        if not listed:
            call.out.say("no machines")
            return
        header = ("MACHINE", "RUNNER", ">MEMORY", ">PROCESSORS", "DISKS", "NETWORKS")
        call.out.table(header, [_row(item) for item in listed])
    for item in listed:
        if item.error is not None:
            call.out.say(f"{item.name}: {item.error}")


@machine.command("show")
@click.argument("name", metavar="NAME", shell_complete=complete_machines)
@click.pass_obj
def show(call: Call, *, name: str) -> None:
    """Show a machine's definition, as `machine set` takes it.

    Example:
        vdiskfs machine show web01 > web01.toml
    """
    from vdiskfs.machines.definition import to_dict
    from vdiskfs.machines.vaulted import read_machine
    from vdiskfs_tools.vaults import with_vault

    async def work(vault: Vault) -> Machine:
        return (await read_machine(vault.store, _checked(name)))[0]

    found = with_vault(call, work)
    if not call.out.document(to_dict(found)):
        for line in found.to_toml().splitlines():
            call.out.line(line)


@machine.command("set")
@click.argument("name", metavar="NAME", shell_complete=complete_machines)
@click.option(
    "--file",
    "path",
    metavar="FILE",
    type=FilePath(),
    required=True,
    help="The definition; - is standard input.",
)
@dry_run_option
@click.pass_obj
def set_machine(call: Call, *, name: str, path: str, dry_run: bool) -> None:
    """Put a machine's definition into the vault, or replace the one that is there.

    Its disks must be in the vault, and belong to no other machine.

    Example:
        vdiskfs machine set web01 --file web01.toml
    """
    from vdiskfs.machines.definition import parse_machine, to_dict
    from vdiskfs_tools.vaults import with_vault

    wanted = parse_machine(_text(path), name=_checked(name), where=path)

    async def work(vault: Vault) -> bool:
        return await _put(vault, wanted, dry_run=dry_run)

    replaced = with_vault(call, work)
    document: dict[str, Any] = to_dict(wanted) | {"replaced": replaced}
    if call.out.document(document | {"dry_run": True} if dry_run else document):
        return
    done = "replaced" if replaced else "added"
    call.out.say(f"{name}: {'would be ' if dry_run else ''}{done} in {vault_url(call)}")


async def _put(vault: Vault, wanted: Machine, *, dry_run: bool) -> bool:
    """Check a definition against the vault and write it; tell whether one was there."""
    from vdiskfs.machines.vaulted import list_machines, read_etag, write_machine

    for disk in wanted.disks:
        try:
            await vault.find_disk(disk.disk)
        except NotFoundError:
            raise NotFoundError(
                f"machine {wanted.name}: the vault has no disk {disk.disk!r}",
                hint="protect it first, or see `vdiskfs disk list`",
            ) from None
    # Invariant: read before the others are looked at, so that a change meanwhile is refused.
    etag = await read_etag(vault.store, wanted.name)
    names = {disk.disk for disk in wanted.disks}
    for other in await list_machines(vault.store):
        shared = names & {disk.disk for disk in other.machine.disks} if other.machine else set()
        if shared and other.name != wanted.name:
            raise UsageError(
                f"machine {wanted.name}: disk {min(shared)} belongs to machine {other.name}",
                hint=f"take it out there first: vdiskfs machine set {shlex.quote(other.name)}",
            )
    if not dry_run:
        await write_machine(vault.store, wanted, etag=etag)
    return etag is not None


def _checked(name: str) -> str:
    from vdiskfs.machines.rules import check_name

    try:
        return check_name(name)
    except ValueError as error:
        raise UsageError(f"not a name of a machine: {name!r}: it {error}") from None


def _text(path: str) -> str:
    """Return what a file, or standard input, holds; a little more than is allowed at most."""
    from vdiskfs.machines.definition import TEXT_LIMIT

    try:
        if path == "-":
            return sys.stdin.buffer.read(TEXT_LIMIT + 1).decode()
        with Path(path).open("rb") as file:
            return file.read(TEXT_LIMIT + 1).decode()
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not TOML: it is not UTF-8") from None


def _listed_document(item: Listed) -> dict[str, Any]:
    from vdiskfs.machines.definition import to_dict

    if item.machine is None:
        return {"name": item.name, "error": str(item.error)}
    return to_dict(item.machine) | {"error": None}


def _row(item: Listed) -> list[object]:
    found = item.machine
    if found is None:
        return [item.name, "damaged", "-", "-", "-", "-"]
    disks = ", ".join(disk.disk for disk in found.disks)
    networks = ", ".join(network.name for network in found.networks) or "-"
    return [found.name, found.runner, format_bytes(found.memory), found.processors, disks, networks]
