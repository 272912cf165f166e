"""``vdiskfs vault repair``: heal what is damaged in a vault."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from vdiskfs.errors import DamagedError, RefusedError, VdiskfsError
from vdiskfs_tools.call import Call, Command, dry_run_option
from vdiskfs_tools.completion import disks_option
from vdiskfs_tools.mounts import vault_url
from vdiskfs_tools.names import parse_disk
from vdiskfs_tools.output import counted, format_bytes

_LOOK_S = 0.5

Progress = Callable[[int, int], None]


@click.command("repair", cls=Command)
@disks_option
@dry_run_option
@click.pass_obj
def repair(call: Call, *, disks: tuple[str, ...], dry_run: bool) -> None:
    """Check a vault, all data read, and heal what is damaged or missing.

    What is damaged is put together anew from the images of the disks that mounts of this host
    have, their spools and copies of indexes, and from other objects of the vault, wherever a
    checksum says that it is the same. Exit code 6 when damage is left; what it hurts is printed.

    Example:
        vdiskfs vault repair --vault file:///srv/vault
    """
    url = vault_url(call)
    names = [parse_disk(name) for name in disks]
    with call.out.progress(f"repairing {url}", counts=True) as progress:
        document = _repair(call, url, names, progress, dry_run=dry_run)
    if not call.out.document({"vault": url, **document}):
        _show(call, document, dry_run=dry_run)
    if document["refused"]:
        raise RefusedError(
            f"{url}: lets nothing be replaced: {counted(len(document['left']), 'object')} damaged"
            " or missing, and not healed",
            hint="an immutable vault keeps damage too: repair it where it may be written",
        )
    if not document["ok"]:
        raise DamagedError(
            f"{url}: {counted(len(document['left']), 'object')} damaged or missing, and not healed",
            hint="run it where the disk's mount is; vdiskfs disk resync makes a new whole point",
        )


def _repair(
    call: Call, url: str, names: list[str], progress: Progress, *, dry_run: bool
) -> dict[str, Any]:
    """Let mounts of this host heal their disks, and heal the others from the vault alone."""
    from vdiskfs.catalog import repair as repair_vault
    from vdiskfs.catalog import repair_document
    from vdiskfs.registry import mount_entries
    from vdiskfs.store import same_place
    from vdiskfs_tools.client import Client
    from vdiskfs_tools.vaults import with_vault

    done: list[dict[str, Any]] = []
    here: set[str] = set()
    failed: VdiskfsError | None = None
    for entry in mount_entries():
        if not same_place(entry.vault, url):
            continue
        with Client(entry) as client:
            status = client.get("status")
            rows = status["disks"] if status["plain"] is None else []
            mine = [row for row in rows if not names or {row["name"], row["id"]} & set(names)]
            if mine or (not names and status["plain"] is None):
                here |= {word for row in mine for word in (row["name"], row["id"])}
                # Two sites may have a disk here: what the next one says of it is newer.
                again = {row["name"] for row in mine}
                for before in done:
                    before["left"] = [one for one in before["left"] if one["disk"] not in again]
                try:
                    body = {"disks": [row["id"] for row in mine], "dry_run": dry_run,
                            "documents": not names}  # fmt: skip
                    done.append(_by_daemon(entry, body, progress))
                except VdiskfsError as error:
                    failed = failed or error
                    done.append(_stopped(error, sorted(again)))
    rest = [name for name in names if name not in here]

    async def work(vault: Any) -> dict[str, Any]:
        report = await repair_vault(
            vault, rest or None, skip=here, dry_run=dry_run,
            progress=lambda _, done, total: progress(done, total),
        )  # fmt: skip
        return repair_document(report)

    if rest or not names:
        try:
            done.append(with_vault(call, work))
        except VdiskfsError as error:
            failed = failed or error
            done.append(_stopped(error, rest or [url]))
    if failed is not None and not any(one["disks"] or one["healed"] for one in done):
        raise failed
    return _sum(done, dry_run=dry_run)


def _by_daemon(entry: Any, body: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Let a mount's daemon heal disks and documents; it has their images, and copies."""
    from concurrent.futures import Future, ThreadPoolExecutor, wait

    from vdiskfs_tools.client import Client

    with Client(entry) as client, Client(entry) as asking, ThreadPoolExecutor(1) as thread:
        answer: Future[dict[str, Any]] = thread.submit(
            client.post, "repairs", body=body, patient=True
        )
        while not wait([answer], timeout=_LOOK_S).done:
            running = asking.get("repairs")["running"]
            if running is not None:
                progress(running["done"], running["total"])
        return answer.result()


def _sum(documents: list[dict[str, Any]], *, dry_run: bool) -> dict[str, Any]:
    counts = {key: sum(one[key] for one in documents) for key in ("disks", "points", "read_bytes")}
    lists = {key: [row for one in documents for row in one[key]] for key in ("healed", "left")}
    # A document that is no disk's may be in several: who has a copy of it comes first.
    settled = {one["object"] for one in lists["healed"] if not one["disk"]}
    left, lists["left"] = lists["left"], []
    for row in left:
        if row["disk"] or row["object"] not in settled:
            lists["left"].append(row)
        if not row["disk"]:
            settled.add(row["object"])
    refused = any(one["refused"] for one in documents)
    return {"ok": not lists["left"], "dry_run": dry_run, "refused": refused, **counts, **lists}


def _stopped(error: VdiskfsError, names: list[str]) -> dict[str, Any]:
    """Return what is said of disks whose repair an error ended."""
    left = [
        {"object": name, "message": "could not be checked", "disk": name, "points": [],
         "why": str(error)} for name in names
    ]  # fmt: skip
    refused = isinstance(error, RefusedError)
    return {"refused": refused, "disks": 0, "points": 0, "read_bytes": 0, "healed": [],
            "left": left}  # fmt: skip


def _show(call: Call, document: dict[str, Any], *, dry_run: bool) -> None:
    for one in document["healed"]:
        how = "would be healed" if dry_run else "healed"
        places = (("pages_here", "from here"), ("pages_vault", "from elsewhere in the vault"))
        how += " in part" if one["in_part"] else ""
        pages = [f"{counted(one[key], 'page')} {where}" for key, where in places if one[key]]
        more = "".join(f", {text}" for text in pages)
        call.out.line(f"{one['object']}: {one['message']}: {how}{more}")
    for one in document["left"]:
        why = f": {one['why']}" if one["why"] else ""
        call.out.line(f"{one['object']}: {one['message']}{why}", colour="red")
        for hurt in one["points"]:
            call.out.line(f"  {hurt_text(one['disk'], hurt)}")
    looked_at = [counted(document["disks"], "disk"), counted(document["points"], "point")]
    call.out.line(", ".join(looked_at) + f", {format_bytes(document['read_bytes'])} read")


def hurt_text(disk: str, hurt: dict[str, Any]) -> str:
    """Write which points of a generation cannot be restored."""
    epochs = hurt["epochs"]
    span = f"#{epochs[0]}" if len(epochs) == 1 else f"#{epochs[0]} to #{epochs[-1]}"
    points = counted(len(epochs), "point")
    return f"hurts {points} of {disk}, generation {hurt['generation']}: {span}"
