"""``vdiskfs site``: who keeps disks in a vault, and when each was last heard of."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

from typing import Any

import click

from vdiskfs.errors import DamagedError, NotFoundError
from vdiskfs_tools.call import Call, Group

HEALTHS = ("Normal", "Warning", "Critical")
"""From the best to the worst."""

MISSED = 3
"""Heartbeats that are missed before a site is said to be silent."""


@click.group(cls=Group)
def site() -> None:
    """List and show the sites of a vault: the mounts that keep disks in it.

    A site whose heartbeat is three times as old as it may be is silent: its host is down, or cut
    off. Clocks count: a site's is compared with this host's.
    """


@site.command("list")
@click.pass_obj
def list_sites(call: Call) -> None:
    """List the sites of a vault, each with its last contact and its disks' health.

    Example:
        vdiskfs site list --vault file:///srv/vault
    """
    sites, unreadable = _sites(call)
    if call.out.document({"sites": sites, "unreadable": unreadable}):
        return
    if not sites and not unreadable:
        call.out.say("no site has written to the vault yet")
        return
    rows = [
        [one["site"], one["host"], "here" if one["contact"] else "SILENT", _ago(one["age_s"]),
         len(one["disks"]), one["health"] or "-", one["version"]]
        for one in sites
    ]  # fmt: skip
    rows += [[one["object"], "-", "unreadable", f"{one['written']}", "-", "-", "-"]
             for one in unreadable]  # fmt: skip
    header = ("SITE", "HOST", "CONTACT", ">LAST SEEN", ">DISKS", "HEALTH", "VERSION")
    call.out.table(header, rows)


@site.command("show")
@click.argument("name", metavar="SITE")
@click.pass_obj
def show(call: Call, *, name: str) -> None:
    """Show a site: where it runs, its last contact, and where each of its disks stands.

    Example:
        vdiskfs site show berlin
    """
    from vdiskfs.catalog.records import safe_name

    sites, unreadable = _sites(call)
    found = [one for one in sites if one["site"] == name]
    if not found:
        for one in unreadable:
            if one["object"].startswith(f"sites/{safe_name(name)}."):
                raise DamagedError(f"{one['object']}: {one['why']}", hint="vdiskfs vault repair")
        raise NotFoundError(f"there is no site {name} in the vault", hint="vdiskfs site list")
    if call.out.document({"sites": found}):
        return
    for one in found:
        call.out.facts({
            "site": one["site"], "host": one["host"], "pid": one["pid"],
            "started": one["started"], "version": one["version"], "last seen": one["last_seen"],
            "contact": "here" if one["contact"] else f"silent for {_ago(one['age_s'])}",
        })  # fmt: skip
        if one["disks"]:
            call.out.line()
            rows = [[disk["name"], disk["state"] or "-", disk["health"] or "-"]
                    for disk in one["disks"]]  # fmt: skip
            call.out.table(("DISK", "STATE", "HEALTH"), rows)


def _sites(call: Call) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the sites, and the heartbeats that cannot be read."""
    from vdiskfs.liveness import age_s
    from vdiskfs_tools.vaults import site_problem, with_vault

    async def work(vault: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        names = {record.id: record.name for record in (await vault.read_disks())[0]}
        found = []
        signs, unreadable = await vault.read_sites()
        for sign in signs:
            age = age_s(sign)
            disks = [
                {"name": names.get(one, one), "id": one, "state": sign.states.get(one),
                 "health": sign.healths.get(one)}
                for one in sign.disks
            ]  # fmt: skip
            worst = [HEALTHS.index(one["health"]) for one in disks if one["health"] in HEALTHS]
            found.append({
                "site": sign.site, "host": sign.host, "pid": sign.pid, "version": sign.version,
                "started": sign.started, "last_seen": sign.time, "age_s": round(age, 1),
                "contact": age <= MISSED * sign.interval_s + 1,
                "health": HEALTHS[max(worst)] if worst else None,
                "disks": sorted(disks, key=lambda disk: str(disk["name"])),
            })  # fmt: skip
        return found, [site_problem(one) for one in unreadable]

    return with_vault(call, work)


def _ago(seconds: float) -> str:
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{max(seconds, 0) / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
