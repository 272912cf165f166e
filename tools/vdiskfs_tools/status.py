"""``vdiskfs status``: the disks of a mount, how far behind the vault is, and why."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from vdiskfs.errors import UsageError
from vdiskfs_tools.call import Call, Command
from vdiskfs_tools.mounts import client_of
from vdiskfs_tools.output import COLOURS, columns, format_age, format_bytes, format_countdown

WATCH_S = 1.0

_HEADER = ("DISK", "STATE", "HEALTH", ">SIZE", ">LAG", ">POINT AGE", ">PROVEN AGE", ">DIRTY",
           ">SPOOLED", ">RETRY IN")  # fmt: skip


@click.command(cls=Command)
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
@click.pass_obj
def status(call: Call, *, watch: bool) -> None:
    """Show the disks of a mount and how far the vault is behind.

    LAG is how long the oldest write that the vault lacks has waited, POINT AGE how old the
    newest usable point is, PROVEN AGE how old the newest proven one.

    Example:
        vdiskfs status --watch
    """
    if watch and (call.json or not sys.stdout.isatty()):
        raise UsageError("--watch is for a terminal", hint="run vdiskfs status --json repeatedly")
    with client_of(call) as client:
        if watch:
            _watch(client)
        document = client.get("status")
    if call.out.document(document):
        return
    for number, line in enumerate(status_lines(document)):
        call.out.line(line, colour=_colour(line), bold=number == 0)


def status_lines(document: dict[str, Any]) -> Iterator[str]:
    """Lay a status document out for people; whatever it lacks shows as a dash."""
    site, place = document.get("site", "-"), document.get("mountpoint", "-")
    state = document.get("vault_state")
    yield f"{place}  site {site}  vault {document.get('vault', '-')}" + (
        f" ({state})" if state else ""
    )
    plain = document.get("plain")
    if isinstance(plain, dict):
        again = format_countdown(plain.get("again_s"))
        yield (
            f"NOT PROTECTED: served plainly, untracked: {plain.get('reason', '-')}; "
            f"vdiskfs upgrade tries a daemon, or it is tried in {again}; then all is compared"
        )
    if document.get("vault_error"):
        yield f"the vault: {document['vault_error']}"
    waiting = document.get("points_waiting")
    if waiting:
        yield f"points that wait for the vault: {waiting}"
    disks = [disk for disk in _list(document.get("disks")) if isinstance(disk, dict)]
    if not disks:
        yield "no disk is protected; see vdiskfs disk protect"
        return
    yield ""
    yield from columns(_HEADER, [_row(disk) for disk in disks])
    for disk in disks:
        yield from (f"{disk.get('name', '-')}: {note}" for note in _notes(disk))


def _notes(disk: dict[str, Any]) -> Iterator[str]:
    """Say what does not fit into the table: why, when it is tried again, how far a pass is."""
    if disk.get("paused"):
        yield "replication is paused; changes are tracked"
    error, wait_s = disk.get("last_error"), disk.get("next_retry_s")
    if error:
        again = "" if wait_s is None else f" (tried again in {format_countdown(wait_s)})"
        yield f"{error}{again}"
    progress = disk.get("progress")
    if isinstance(progress, dict):
        done, total, sent = (
            format_bytes(progress.get(key)) for key in ("done_bytes", "total_bytes", "sent_bytes")
        )
        yield f"{progress.get('phase', '-')}: {done} of {total} compared, {sent} differ"


def _row(disk: dict[str, Any]) -> list[object]:
    ages = ("shipped_lag_s", "usable_point_age_s", "proven_point_age_s")
    return [
        disk.get("name") or "-",
        f"{disk.get('state') or '-'}{' (paused)' if disk.get('paused') else ''}",
        disk.get("health") or "-",
        format_bytes(disk.get("size")),
        *(format_age(disk.get(key)) for key in ages),
        *(format_bytes(disk.get(key)) for key in ("dirty_bytes", "spooled_bytes")),
        format_countdown(disk.get("next_retry_s")),
    ]


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _colour(line: str) -> str | None:
    return next((COLOURS[word] for word in line.split() if word in COLOURS), None)


def _watch(client: Any) -> None:
    """Show the status until Ctrl-C, or until the daemon no longer answers."""
    from rich.live import Live
    from rich.text import Text

    from vdiskfs_tools.output import clean

    with Live(auto_refresh=False, screen=False) as live:
        while True:
            lines = [
                Text(clean(line), style=_colour(line) or "")
                for line in status_lines(client.get("status"))
            ]
            live.update(Text("\n").join(lines), refresh=True)
            time.sleep(WATCH_S)
