"""vdiskfs group, with a mount and with nothing but the vault."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import trio
from click.testing import Result

from tests.tools.test_completion import completed
from tests.vaults import given, put_object
from vdiskfs.catalog import Group, Vault
from vdiskfs.catalog.groups import GroupDisk, create_group
from vdiskfs.store import open_store

Run = Callable[..., Result]

WEB = {"disk": "web01", "id": "a" * 32, "here": True, "state": "Protected", "ready": True}
DB = {"disk": "db01", "id": "b" * 32, "here": False, "state": None, "ready": False}
SHOP = {"name": "shop", "id": "c" * 32, "created": "2026-11-21T01:40:05Z", "disks": [DB, WEB]}
POINT = {
    "group": "shop", "disk": None, "epoch": None, "time": "2026-11-21T01:40:05.000Z",
    "consistency": "crash", "proof": "stored", "label": None, "held": False, "size": 2 << 20,
    "changed_bytes": 8192, "stored_bytes": 3072, "generation": None,
    "disks": [{"disk": "db01", "epoch": 7, "generation": 1},
              {"disk": "web01", "epoch": 9, "generation": 2}],
}  # fmt: skip


def test_a_group_is_made_and_says_who_is_not_there(daemon: Any, run: Run) -> None:
    daemon.answer("POST", "/groups", SHOP)
    result = run("group", "create", "shop", "web01", "db01")
    assert result.stderr.splitlines() == [
        "group shop: is made: db01, web01",
        "db01: not protected in this mount; until it is, the group has no points",
    ]
    body = {"name": "shop", "disks": ["web01", "db01"], "dry_run": False}
    assert daemon.asked == [("POST", "/groups", body)]


@pytest.mark.parametrize("change", ["add", "remove"])
def test_disks_join_and_leave(daemon: Any, run: Run, change: str) -> None:
    daemon.answer("POST", f"/groups/shop/{change}", {**SHOP, "dry_run": True})
    result = run("group", change, "shop", "web01", "--dry-run")
    assert "group shop: would be changed: db01, web01" in result.stderr
    body = {"disks": ["web01"], "dry_run": True}
    assert daemon.asked == [("POST", f"/groups/shop/{change}", body)]


def test_a_group_is_deleted(daemon: Any, run: Run) -> None:
    daemon.answer("POST", "/groups/shop/delete", {"name": "shop", "id": None})
    assert run("group", "delete", "shop").stderr == "group shop: is deleted\n"


def test_groups_are_listed_and_shown(daemon: Any, run: Run, run_json: Callable[..., Any]) -> None:
    daemon.answer("GET", "/groups", {"groups": [SHOP], "vault_error": "no answer"})
    listed = run("group", "list")
    assert listed.stdout.splitlines()[1].split() == ["shop", SHOP["created"], "db01,", "web01"]
    assert listed.stderr == "as it was known last: no answer\n"
    assert run_json("group", "list")["groups"] == [SHOP]
    daemon.answer("GET", "/groups/shop", {**SHOP, "points": [POINT], "vault_error": None})
    shown = run("group", "show", "shop").stdout
    assert "db01@#7, web01@#9" in shown
    assert "not protected in this mount" in shown
    daemon.answer("GET", "/groups/shop", {**SHOP, "points": [], "vault_error": None})
    assert "no point that all its disks share" in run("group", "show", "shop").stderr
    daemon.answer("GET", "/groups", {"groups": [], "vault_error": None})
    assert run("group", "list").stderr == "no groups\n"


def test_points_of_a_group_are_listed(daemon: Any, run: Run) -> None:
    daemon.answer("GET", "/disks/shop/points", {"points": [POINT]})
    lines = run("point", "list", "shop").stdout.splitlines()
    assert lines[0].split() == ["TIME", "CONSISTENCY", "PROOF", "DISKS", "CHANGED", "STORED",
                                "LABEL"]  # fmt: skip
    assert lines[1].split() == ["2026-11-21T01:40:05.000Z", "crash", "stored", "2", "8.0", "KiB",
                                "3.0", "KiB"]  # fmt: skip


def test_a_dry_run_of_a_point_looks_for_a_group_too(daemon: Any, run: Run) -> None:
    daemon.answer("GET", "/groups/shop", SHOP)
    assert run("point", "create", "shop", "--dry-run").exit_code == 0
    result = run("point", "create", "absent", "--dry-run")
    assert (result.exit_code, "/disks/absent" in result.stderr) == (3, True)


def test_names_are_completed(daemon: Any) -> None:
    daemon.answer("GET", "/groups", {"groups": [SHOP, {"name": "\x1b"}, 3]})
    daemon.answer("GET", "/disks", {"disks": [{"name": "web01"}]})
    assert completed("group", "show") == ["shop"]
    assert completed("group", "add", "shop") == ["web01"]
    assert completed("point", "list") == completed("failover", "test") == ["web01", "shop"]
    assert completed("point", "create", incomplete="s") == ["shop"]


@pytest.mark.parametrize(
    "words",
    [["create", "a/b", "web01"], ["create", "a@b", "web01"], ["add", "shop"], ["show", ""],
     ["create", "shop", "a/b"]],
)  # fmt: skip
def test_what_names_nothing_is_not_asked_for(daemon: Any, run: Run, words: list[str]) -> None:
    assert run("group", *words).exit_code == 2
    assert daemon.asked == []


def test_without_a_mount_the_vault_says_what_groups_there_are(
    history: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    """Also where the document of one is damaged."""

    async def make() -> None:
        store = open_store(history.url)
        vault = await Vault.open(store, given())
        disk = await vault.find_disk("web01")
        members = (GroupDisk(disk.id, disk.name),)
        await create_group(vault.store, Group("shop", "c" * 32, "2026-11-21T01:40:05Z", members))
        await store.aclose()

    trio.run(make)
    vault = ("--vault", history.url)
    put_object(history.directory, "groups/bad.json", json.dumps({"format": 1}).encode())
    listed = run("group", "list", *vault)
    assert listed.exit_code == 0
    assert [line.split()[:2] for line in listed.stdout.splitlines()[1:]] == [
        ["bad", "damaged"], ["shop", "2026-11-21T01:40:05Z"],
    ]  # fmt: skip
    assert "bad: " in listed.stderr
    document = run_json("group", "show", "shop", *vault)
    assert [row["disk"] for row in document["disks"]] == ["web01"]
    # Of a group of one disk every point is one of the group's.
    assert [row["disks"][0]["epoch"] for row in document["points"]] == sorted(history.times)
    points = run_json("point", "list", "shop", *vault)["points"]
    assert [row["group"] for row in points] == ["shop"] * len(history.times)
    assert run("group", "show", "bad", *vault).exit_code == 6
    assert run("group", "show", "absent", *vault).exit_code == 3
    assert run("point", "list", "absent", *vault).exit_code == 3
