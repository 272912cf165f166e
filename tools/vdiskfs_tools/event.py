"""``vdiskfs event``: what has happened at a mount, and whether those who are told hear of it."""

from __future__ import annotations

import time
from typing import Any

import click

from vdiskfs.errors import LocalError, VdiskfsError
from vdiskfs_tools.call import Call, Group
from vdiskfs_tools.completion import complete_disks
from vdiskfs_tools.mounts import client_of

LOOK_S = 1.0
_COLOURS = {"warning": "yellow", "error": "red"}
PATIENCE_S = 60.0
"""How long a daemon that is followed may be away: it is replaced, say."""


@click.group(cls=Group)
def event() -> None:
    """See what has happened at a mount, and try who is told of it."""


@event.command("list")
@click.option("--since", default="", metavar="TIME", help="From then on: -1h, or a time.")
@click.option("--follow", is_flag=True, help="Go on with what happens, until interrupted.")
@click.option(
    "--level", type=click.Choice(["info", "warning", "error"]), default="info",
    help="Only what is at least so bad.",
)  # fmt: skip
@click.option(
    "--disk", default="", metavar="DISK", shell_complete=complete_disks, help="Only of it."
)
@click.pass_obj
def list_events(call: Call, *, since: str, follow: bool, level: str, disk: str) -> None:
    """List what has happened, the newest last; repeats are one event with their number.

    With --json and --follow each event is a document of its own, and comes again when it
    is repeated.

    Example:
        vdiskfs event list --since -1h --level warning
    """
    asked: dict[str, Any] = {"since": since, "level": level, "disk": disk}
    rows = _ask(call, asked)
    if call.json and not follow:
        call.out.document({"events": rows})
        return
    after = 0
    while True:
        for row in rows:
            after = row["number"]
            if not call.out.document(row):
                call.out.line(_line(row), colour=_COLOURS.get(row["level"]))
        if not follow:
            return
        time.sleep(LOOK_S)
        rows = _ask_patiently(call, {**asked, "after": after} if after else asked)


@event.command("test")
@click.pass_obj
def test_sinks(call: Call) -> None:
    """Send an event through everything that is told of events, and say what each answered.

    Exit status 1 when one did not take it.

    Example:
        vdiskfs event test
    """
    with client_of(call) as client, call.out.waiting("they answer"):
        rows = client.post("events", "test", patient=True)["sinks"]
    if not call.out.document({"sinks": rows}):
        for row in rows:
            call.out.line(f"{row['sink']}: {'ok' if row['ok'] else 'FAILED'}: {row['answer']}")
        if not rows:
            call.out.say("nobody is told of events; see [mail] and [webhook] in vdiskfs.conf(5)")
    failed = [row["sink"] for row in rows if not row["ok"]]
    if failed:
        raise VdiskfsError(f"{', '.join(failed)}: not told", hint="see vdiskfs.conf(5)")


def _ask(call: Call, asked: dict[str, Any]) -> list[dict[str, Any]]:
    with client_of(call) as client:
        rows: list[dict[str, Any]] = client.get("events", **asked)["events"]
        return rows


def _ask_patiently(call: Call, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Ask on while a daemon is replaced.

    Raises:
        LocalError: none answered for too long.
        NotFoundError: the mount is gone.
    """
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return _ask(call, asked)
        except LocalError:
            if time.monotonic() > end:
                raise
        time.sleep(LOOK_S)


def _line(row: dict[str, Any]) -> str:
    again = f"  ({row['count']} times since {row['first']})" if row["count"] > 1 else ""
    todo = f"  -> {row['todo']}" if row["todo"] else ""
    what = f"{row['code']} {row['subject']}: {row['text']}"
    return f"{row['time']}  {row['level']:7} {what}{again}{todo}"
