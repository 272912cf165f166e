"""``vdiskfs completion``, and what completes the names of disks, groups, points, machines."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import click

from vdiskfs_tools.call import Call, Command, F, call_of
from vdiskfs_tools.names import LATEST

ANSWER_S = 0.5


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, *, shell: str) -> None:
    """Print the script that completes vdiskfs in a shell.

    Example:
        vdiskfs completion bash > /etc/bash_completion.d/vdiskfs
    """
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    source = script(ctx.find_root().command, {}, "vdiskfs", "_VDISKFS_COMPLETE").source()
    if not call_of(ctx).out.document({"shell": shell, "script": source}):
        click.echo(source)


def complete_disks(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of the mount's disks that begin so."""
    return [name for name in _disk_names(call_of(ctx)) if name.startswith(incomplete)]


def complete_points(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the beginnings of DISK@POINT."""
    disk, sign, _ = incomplete.rpartition("@")
    names = [disk] if sign else _disk_names(call_of(ctx))
    points = [f"{name}@{point}" for name in names for point in LATEST]
    return [point for point in points if point.startswith(incomplete)]


def complete_failovers(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of the mount's failovers that begin so."""
    names = _names(call_of(ctx), "failovers")
    return [name for name in names if name.startswith(incomplete)]


def complete_groups(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of the vault's groups that begin so."""
    names = _names(call_of(ctx), "groups")
    return [name for name in names if name.startswith(incomplete)]


def complete_jobs(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the ids of the mount's jobs that begin so."""
    names = _names(call_of(ctx), "jobs", key="id")
    return [name for name in names if name.startswith(incomplete)]


def disks_option(function: F) -> F:
    """Add ``--disk DISK``, which may be given again."""
    return click.option(
        "--disk", "disks", metavar="DISK", multiple=True, shell_complete=complete_disks,
        help="Only this disk; may be given again.",
    )(function)  # fmt: skip


def complete_disks_and_groups(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[str]:
    """Return the names of disks and of groups that begin so."""
    return [*complete_disks(ctx, param, incomplete), *complete_groups(ctx, param, incomplete)]


def complete_machines(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of the vault's machines that begin so; no answer is no names."""
    from vdiskfs.errors import VdiskfsError
    from vdiskfs.machines.vaulted import machine_names
    from vdiskfs_tools.output import clean
    from vdiskfs_tools.vaults import with_vault

    try:
        names = with_vault(
            call_of(ctx), lambda vault: machine_names(vault.store), limit_s=ANSWER_S, ask=False
        )
    except (VdiskfsError, OSError):
        return []
    return [name for name in names if name == clean(name) and name.startswith(incomplete)]


def _disk_names(call: Call) -> list[str]:
    return _names(call, "disks")


def _names(call: Call, what: str, *, key: str = "name") -> list[str]:
    """Ask the daemon for the names, for a short time. No answer is no names."""
    from vdiskfs.errors import VdiskfsError
    from vdiskfs_tools.client import Client
    from vdiskfs_tools.mounts import find_mount
    from vdiskfs_tools.output import clean

    try:
        with Client(find_mount(call), answer_s=ANSWER_S) as client:
            found = client.get(what).get(what)
    except (VdiskfsError, OSError):
        return []
    rows = found if isinstance(found, list) else []
    names = [row.get(key) for row in rows if isinstance(row, dict)]
    return [name for name in names if isinstance(name, str) and name == clean(name)]
