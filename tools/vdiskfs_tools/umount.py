"""``vdiskfs umount``: end a mount, or clear away one whose daemon is gone."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import click

from vdiskfs.errors import BusyError, LocalError, NotFoundError
from vdiskfs.registry import MountEntry, is_serving
from vdiskfs_tools.call import Call, Command, FilePath, dry_run_option
from vdiskfs_tools.mounts import find_mount, mounted_types, named_mount, real_mountpoint
from vdiskfs_tools.served import has_ended, process, served

END_S = 60.0
GONE_S = 1.0
"""Seconds in which a daemon that does not answer must have ended, or it hangs."""
TRIES = 3
"""How many daemons that die under the request are asked before it is done without one."""


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
        if not _clear_away(call, lazy=lazy, dry_run=dry_run):
            raise
        return
    document = _document(entry.mountpoint, dry_run=dry_run)
    if not dry_run:
        text = "shipping everything" if drain else "ending the mount"
        with call.out.waiting(f"{entry.mountpoint}: {text}"):
            _end(served(entry), drain=drain, lazy=lazy)
    if not call.out.document(document):
        done = "would be unmounted" if dry_run else "unmounted"
        call.out.say(f"{entry.mountpoint}: {done}")


def _document(mountpoint: str, *, dry_run: bool) -> dict[str, object]:
    document: dict[str, object] = {"mountpoint": mountpoint, "unmounted": not dry_run}
    return document | {"dry_run": True} if dry_run else document


def _end(entry: MountEntry, *, drain: bool, lazy: bool) -> None:
    """Have the mount ended, and wait until whoever served and kept it has ended, too.

    A daemon may die under the request: what counts is whether anything is mounted.
    """
    with process(entry.keeper) as keeper:
        for _ in range(TRIES):
            if _ask(entry, drain=drain, lazy=lazy):
                break
            entry = served(entry)
        else:
            if drain:
                raise LocalError(
                    f"{entry.mountpoint}: its daemons die before everything is shipped",
                    hint=f"see the log in {entry.state}, or unmount without --drain",
                )
            _unmount_dead(entry, lazy=lazy)  # its keeper sees it, and ends
        if not lazy:
            _wait_ended(entry, "keeper", entry.keeper, keeper)


def _ask(entry: MountEntry, *, drain: bool, lazy: bool) -> bool:
    """Ask the daemon to end the mount, and wait for its end; False: it could not do it.

    Raises:
        VdiskfsError: it refuses, or lives and does not answer.
    """
    from vdiskfs_tools.client import Client

    with process(entry.pid) as daemon:
        if daemon is None or (entry.keeper and not is_serving(entry)):
            return not _is_mounted(entry)
        try:
            with Client(entry) as client:
                client.post("umount", body={"drain": drain, "lazy": lazy}, patient=True)
        except LocalError:
            if _is_mounted(entry):
                if has_ended(daemon, GONE_S):
                    return False
                raise
            # The last answer was cut off, maybe by an end in order.
            _wait_ended(entry, "daemon", entry.pid, daemon)
            if drain and not (Path(entry.state) / "clean").exists():
                raise LocalError(
                    f"{entry.mountpoint}: unmounted, but its daemon died before everything was"
                    " shipped", hint="the rest is shipped after the next mount",
                ) from None  # fmt: skip
        if not lazy:
            # The keeper lets go of the source last.
            _wait_ended(entry, "daemon", entry.pid, daemon)
    return True


def _wait_ended(entry: MountEntry, what: str, pid: int, descriptor: int | None) -> None:
    if not has_ended(descriptor, END_S):
        raise LocalError(
            f"{entry.mountpoint}: unmounted, but its {what} (process {pid}) goes on",
            hint=f"see its log in {entry.state}",
        )


def _is_mounted(entry: MountEntry) -> bool:
    return any("vdiskfs" in kind for kind in mounted_types(entry.mountpoint))


def _clear_away(call: Call, *, lazy: bool, dry_run: bool) -> bool:
    """Unmount what a daemon that is gone has left behind; tell whether there was any."""
    named = named_mount(call)
    if named is None:
        return False
    place = real_mountpoint(named)
    if not any("vdiskfs" in kind for kind in mounted_types(place)):
        return False
    if not dry_run:
        _unmount_place(place, lazy=lazy)
    if not call.out.document(_document(place, dry_run=dry_run)):
        done = "would be cleared away" if dry_run else "cleared away"
        call.out.say(f"{place}: its daemon was gone; {done}")
    return True


def _unmount_dead(entry: MountEntry, *, lazy: bool) -> None:
    """Unmount without a daemon, the source first that shows the mount (``--over``).

    Raises:
        BusyError: the host refuses; says what it said.
    """
    for place in (entry.source, entry.mountpoint):
        if place is not None and any("vdiskfs" in kind for kind in mounted_types(place)):
            _unmount_place(place, lazy=lazy)


def _unmount_place(place: str, *, lazy: bool) -> None:
    """Unmount without a daemon.

    Raises:
        BusyError: the host refuses; says what it said.
    """
    import subprocess

    helper = shutil.which("fusermount3")
    root = os.geteuid() == 0
    if not root and helper is None:
        raise LocalError(f"{place}: fusermount3 is not installed", hint="apt install fuse3")
    # -c: the path is real, and a look at it would wait for a daemon that is not there.
    later = ["-l"] if root else ["-z"]
    command = ["umount", "-c"] if root else [str(helper), "-u"]
    command += [*(later if lazy else []), "--", place]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        hint = "" if lazy else "if programs have files of it open: vdiskfs umount --lazy"
        raise BusyError(f"{place}: cannot be unmounted: {result.stderr.strip()}", hint=hint)
