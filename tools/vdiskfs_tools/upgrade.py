"""``vdiskfs upgrade``: another daemon takes the mount over, under running machines."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import time

import click

from vdiskfs.errors import LocalError
from vdiskfs.registry import is_serving
from vdiskfs_tools.call import Call, Command, dry_run_option
from vdiskfs_tools.mounts import find_mount
from vdiskfs_tools.served import has_ended, process, served

END_S = 60.0
RESTART_S = 60.0


@click.command(cls=Command)
@click.option("--no-wait", is_flag=True, help="Come back when the daemon was asked to hand over.")
@dry_run_option
@click.pass_obj
def upgrade(call: Call, *, no_wait: bool, dry_run: bool) -> None:
    """Let the installed version take over from the daemon that runs.

    Programs with disks open see a pause of about a second, and no error. What the daemon
    had begun and not answered, its successor does.

    Example:
        vdiskfs upgrade -m /mnt/vd
    """
    from vdiskfs_tools.client import Client

    entry = find_mount(call)
    with Client(entry) as client:
        before = client.get("status")
    document = {"mountpoint": entry.mountpoint, "from": before["version"]}
    if dry_run:
        if not call.out.document(document | {"dry_run": True}):
            call.out.say(f"{entry.mountpoint}: its daemon (process {entry.pid}) would be replaced")
        return
    with call.out.waiting(f"{entry.mountpoint}: replacing the daemon"):
        began = time.monotonic()
        with process(entry.pid) as daemon:
            _ask(Client, entry, daemon)
            if no_wait:
                if not call.out.document(document):
                    call.out.say(f"{entry.mountpoint}: its daemon (process {entry.pid}) hands over")
                return
            if not has_ended(daemon, END_S):
                raise LocalError(
                    f"{entry.mountpoint}: its daemon (process {entry.pid}) does not end",
                    hint=f"see its log in {entry.state}",
                )
        after = served(entry, after=entry.pid, limit_s=RESTART_S)
        if after.pid == entry.pid or not is_serving(after):
            raise LocalError(
                f"{entry.mountpoint}: no new daemon answers yet; programs in the mount wait",
                hint=f"see the log in {entry.state}",
            )
        with Client(after) as client:
            now = client.get("status")
    took_s = round(time.monotonic() - began, 3)
    document |= {"to": now["version"], "pid": after.pid, "took_s": took_s}
    if not call.out.document(document):
        call.out.say(
            f"{entry.mountpoint}: version {now['version']} serves now"
            f" (process {after.pid}; it took {took_s:.1f} s)"
        )


def _ask(client_class: type, entry: object, daemon: int | None) -> None:
    """Ask the daemon to hand over. It may be gone before its answer is here."""
    try:
        with client_class(entry) as client:
            client.post("upgrade")
    except LocalError:
        if not has_ended(daemon, 1.0):
            raise
