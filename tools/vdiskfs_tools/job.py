"""``vdiskfs job``: the long work of a mount, step by step."""

from __future__ import annotations

import time
from typing import Any

import click

from vdiskfs.errors import VdiskfsError
from vdiskfs_tools.call import Call, Group, dry_run_option
from vdiskfs_tools.completion import complete_jobs
from vdiskfs_tools.mounts import client_of
from vdiskfs_tools.output import format_bytes

LOOK_S = 1.0

job_argument = click.argument("job_id", metavar="JOB", shell_complete=complete_jobs)


@click.group(cls=Group)
def job() -> None:
    """See the long work of a mount, step by step: of its disks, and of its failovers."""


@job.command("list")
@click.option("--running", is_flag=True, help="Only those that are not over.")
@click.pass_obj
def list_jobs(call: Call, *, running: bool) -> None:
    """List the jobs of this mount, the oldest first.

    Example:
        vdiskfs job list
    """
    with client_of(call) as client:
        document: dict[str, Any] = client.get("jobs")
    if running:
        document["jobs"] = [one for one in document["jobs"] if one["ended"] is None]
    if call.out.document(document):
        return
    rows = [
        [one["id"], one["kind"], one["failover"] or one["disk"], one["state"], one["began"],
         _comment(one)]
        for one in document["jobs"]
    ]  # fmt: skip
    if not rows:
        call.out.say("no jobs")
        return
    call.out.table(("JOB", "KIND", "OF", "STATE", "BEGAN", "STEPS"), rows)


@job.command("show")
@job_argument
@click.pass_obj
def show_job(call: Call, *, job_id: str) -> None:
    """Show one job.

    Example:
        vdiskfs job show 1f0c77aa-1
    """
    with client_of(call) as client:
        document = _job(client, job_id)
    if not call.out.document(document):
        _show(call, document)


@job.command("wait")
@job_argument
@click.pass_obj
def wait_job(call: Call, *, job_id: str) -> None:
    """Wait until a job has ended, or stands still: then its error is this command's.

    Example:
        vdiskfs job wait 1f0c77aa-1
    """
    with client_of(call) as client, call.out.waiting(f"job {job_id}"):
        while (document := _job(client, job_id))["state"] == "running":
            time.sleep(LOOK_S)
    if not call.out.document(document):
        _show(call, document)
    check_job(document)


@job.command("cancel")
@job_argument
@dry_run_option
@click.pass_obj
def cancel_job(call: Call, *, job_id: str, dry_run: bool) -> None:
    """End a job that can be ended: a resynchronization, a proof, a finalize job.

    Of a resynchronization the marks stay, and replication goes on in any case.

    Example:
        vdiskfs job cancel 1f0c77aa-1
    """
    with client_of(call) as client:
        document: dict[str, Any] = client.post(
            "jobs", job_id, "cancel", body={"dry_run": True} if dry_run else {}
        )
    if not call.out.document(document | {"dry_run": True} if dry_run else document):
        call.out.say(f"job {job_id}: {'would be' if dry_run else 'is being'} cancelled")


def check_job(document: dict[str, Any]) -> None:
    """Raise what a job that stands still says of it."""
    if document.get("state") in ("failed", "interrupted"):
        error = VdiskfsError(document["error"], hint=document["hint"] or "")
        error.exit_code = document["exit_code"] or 1
        raise error


def _show(call: Call, document: dict[str, Any]) -> None:
    facts = {key: value for key, value in document.items() if key != "step_times"}
    facts["steps"] = " ".join(document["steps"])
    facts["progress"] = _progress(document)
    call.out.facts({key: value for key, value in facts.items() if value not in (None, "")})


def _comment(document: dict[str, Any]) -> str:
    """Return what is worth knowing of a job in a list: why not, what came of it, how far."""
    said = (document[key] for key in ("error", "outcome", "waits_for"))
    found = next((one for one in said if one), None) or _progress(document)
    return str(found or " ".join(document["steps"]))


def _progress(document: dict[str, Any]) -> str:
    progress = document["progress"]
    if progress is None:
        return ""
    return f"{format_bytes(progress['done_bytes'])} of {format_bytes(progress['total_bytes'])}"


def _job(client: Any, job_id: str) -> dict[str, Any]:
    document: dict[str, Any] = client.get("jobs", job_id)
    return document
