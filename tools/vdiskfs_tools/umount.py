"""``vdiskfs umount``: end a mount, or clear away one whose daemon is gone."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import os
import select
import shutil
from dataclasses import replace

import click

from vdiskfs.errors import BusyError, LocalError, NotFoundError
from vdiskfs.registry import MountEntry
from vdiskfs_tools.call import Call, Command, FilePath, dry_run_option
from vdiskfs_tools.mounts import find_mount, mounted_types, named_mount, real_mountpoint

END_S = 60.0


@click.command(cls=Command)
@click.argument("mountpoint", required=False, type=FilePath())
@click.option("--drain", is_flag=True, help="Ship everything to the vault first.")
@click.option("--lazy", is_flag=True, help="Take it out of sight now, end it when it is unused.")
@dry_run_option
@click.pass_obj
def umount(call: Call, *, mountpoint: str | None, drain: bool, lazy: bool, dry_run: bool) -> None:
    """End the mount at MOUNTPOINT.

    What is not shipped yet stays in the state directory, and is shipped after the next mount.

    Example:
        vdiskfs umount /mnt/vd --drain
    """
    if mountpoint is not None:
        call = replace(call, mount=mountpoint)
    try:
        entry = find_mount(call)
    except NotFoundError:
        if not _clear_away(call, dry_run=dry_run):
            raise
        return
    document = _document(entry.mountpoint, dry_run=dry_run)
    if not dry_run:
        text = "shipping everything" if drain else "ending the mount"
        with call.out.waiting(f"{entry.mountpoint}: {text}"):
            _end(entry, drain=drain, lazy=lazy)
    if not call.out.document(document):
        done = "would be unmounted" if dry_run else "unmounted"
        call.out.say(f"{entry.mountpoint}: {done}")


def _document(mountpoint: str, *, dry_run: bool) -> dict[str, object]:
    document: dict[str, object] = {"mountpoint": mountpoint, "unmounted": not dry_run}
    return document | {"dry_run": True} if dry_run else document


def _end(entry: MountEntry, *, drain: bool, lazy: bool) -> None:
    """Ask the daemon to end, and wait until it has."""
    from vdiskfs_tools.client import Client

    try:
        process = os.pidfd_open(entry.pid)
    except ProcessLookupError:
        return
    try:
        with Client(entry) as client:
            client.post("umount", body={"drain": drain, "lazy": lazy}, patient=True)
        if lazy:
            return
        poll = select.poll()
        poll.register(process, select.POLLIN)
        if not poll.poll(END_S * 1000):
            raise LocalError(
                f"{entry.mountpoint}: unmounted, but its daemon (process {entry.pid}) goes on",
                hint=f"see its log in {entry.state}",
            )
    finally:
        os.close(process)


def _clear_away(call: Call, *, dry_run: bool) -> bool:
    """Unmount what a daemon that is gone has left behind; tell whether there was any."""
    named = named_mount(call)
    if named is None:
        return False
    place = real_mountpoint(named)
    if not any("vdiskfs" in kind for kind in mounted_types(place)):
        return False
    if not dry_run:
        _unmount_dead(place)
    if not call.out.document(_document(place, dry_run=dry_run)):
        done = "would be cleared away" if dry_run else "cleared away"
        call.out.say(f"{place}: its daemon was gone; {done}")
    return True


def _unmount_dead(place: str) -> None:
    """Unmount without a daemon.

    Raises:
        BusyError: the host refuses; says what it said.
    """
    import subprocess

    helper = shutil.which("fusermount3")
    root = os.geteuid() == 0
    if not root and helper is None:
        raise LocalError(f"{place}: fusermount3 is not installed", hint="apt install fuse3")
    command = ["umount", "--", place] if root else [str(helper), "-u", "--", place]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BusyError(f"{place}: cannot be unmounted: {result.stderr.strip()}")
