"""vdiskfs vault, and what works on a vault without a mount."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import Result

from tests.delta.model import DiskModel
from tests.tools.conftest import FakeDaemon
from tests.vaults import PLAIN, given, put_object
from vdiskfs.catalog import Branch, Vault
from vdiskfs.catalog.leases import Lease
from vdiskfs.catalog.owners import add_branch
from vdiskfs.store import open_store

Run = Callable[..., Result]


def test_a_vault_is_made_once(run: Run, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/v"
    first = run("vault", "init", "--encryption", "none", url)
    assert first.exit_code == 0
    assert first.stderr.startswith(f"{url}: vault ")
    second = run("vault", "init", "--encryption", "none", url)
    assert second.exit_code == 4
    assert second.stderr.count("\n") == 1


def test_a_dry_run_makes_nothing(run: Run, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/v"
    result = run("vault", "init", "--encryption", "none", url, "--dry-run", "--json")
    assert json.loads(result.stdout) == {
        "vault": url, "vault_id": None, "encryption": "none", "dry_run": True,
    }  # fmt: skip
    assert not (tmp_path / "v").exists()
    run("vault", "init", "--encryption", "none", url)
    assert run("vault", "init", "--encryption", "none", url, "--dry-run").exit_code == 4


def test_the_document_names_the_vault(run_json: Callable[..., Any], tmp_path: Path) -> None:
    url = f"file://{tmp_path}/v"
    made = run_json("vault", "init", "--encryption", "none", url)
    info = run_json("vault", "info", "--vault", url)
    assert info["vault_id"] == made["vault_id"]
    assert info["vault"] == url
    assert info["disks"] == info["sites"] == []


@pytest.mark.parametrize(
    ("url", "code"),
    [("", 2), ("/srv/v", 2), ("file://relative", 2), ("s3://bucket", 2), ("azure://A", 2),
     ("azure://aaa/..", 2), ("file:///x\0y", 2)],
)  # fmt: skip
def test_an_address_that_is_none_is_wrong_use(run: Run, url: str, code: int) -> None:
    for line in (["vault", "init", "--encryption", "none", url], ["vault", "info", "--vault", url]):
        result = run(*line)
        assert result.exit_code == code
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [["vault", "info"], ["vault", "check"], ["disk", "list"], ["disk", "show", "web01"],
     ["point", "list", "web01"], ["point", "show", "web01@latest"],
     ["point", "diff", "web01@1", "web01@2"], ["point", "restore", "web01@1", "out"]],
    ids=" ".join,
)  # fmt: skip
def test_a_vault_that_is_not_there_is_exit_3(run: Run, tmp_path: Path, line: list[str]) -> None:
    result = run(*line, "--vault", f"file://{tmp_path}/absent")
    assert result.exit_code == 3
    assert "vdiskfs vault init" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_vault_is_shown(history: Any, run: Run, run_json: Callable[..., Any]) -> None:
    shown = run("vault", "info", "--vault", history.url).stdout
    assert "web01" in shown
    (disk,) = run_json("vault", "info", "--vault", history.url)["disks"]
    assert set(disk) == {
        *("name", "id", "size", "site", "file", "generation", "created", "retired"),
    }
    assert (disk["name"], disk["site"], disk["file"]) == ("web01", "here", "web01.img")


def test_a_vault_says_which_points_commands_hold(
    history: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    info = run_json("vault", "info", "--vault", history.url)
    [disk] = info["disks"]
    assert info["leases"] == []
    lease = Lease(((disk["id"], 1, 7), ("f" * 32, 2, 9)), "point restore", "db-host", 4711, "then")
    put_object(history.directory, f"leases/{'a' * 32}.json", lease.encode())
    put_object(history.directory, f"leases/{'b' * 32}.json", b"damaged")
    (history.directory / "leases" / ("c" * 32)).write_bytes(b"damaged")
    [found] = run_json("vault", "info", "--vault", history.url)["leases"]
    points = [{"disk": "web01", "generation": 1, "epoch": 7},
              {"disk": "f" * 32, "generation": 2, "epoch": 9}]  # fmt: skip
    assert found == {"what": "point restore", "host": "db-host", "pid": 4711, "since": "then",
                     "doubted": False, "points": points}  # fmt: skip
    shown = run("vault", "info", "--vault", history.url).stdout
    assert "point restore" in shown
    assert f"web01@#7 {'f' * 32}@#9" in shown


def test_disks_are_listed_from_the_vault(
    history: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    assert "web01" in run("disk", "list", "--vault", history.url).stdout
    listed = run_json("disk", "list", "--vault", history.url)["disks"]
    assert run_json("disk", "show", "web01", "--vault", history.url) == listed[0]
    assert run("disk", "show", "absent", "--vault", history.url).exit_code == 3


async def add_disk(url: str, name: str) -> str:
    store = open_store(url)
    vault = await Vault.open(store, given())
    record = await vault.create_disk(name, file="b.img", size=4096, site="here")
    await store.aclose()
    return record.id


def test_a_damaged_record_hides_no_other_disk(
    history: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    where = f"disks/{trio.run(add_disk, history.url, 'db01')}/disk.json"
    path = history.directory / where
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-30])
    result = run("disk", "list", "--vault", history.url)
    assert (result.exit_code, result.stderr.count("\n")) == (6, 1)
    assert "web01" in result.stdout
    assert f"disk db01 is not listed: {where}: " in result.stderr
    assert "vdiskfs vault repair" in result.stderr
    listed = run("disk", "list", "--vault", history.url, "--json")
    assert listed.exit_code == 6
    document = json.loads(listed.stdout)
    assert [disk["name"] for disk in document["disks"]] == ["web01"]
    [hidden] = document["unreadable"]
    assert (hidden["name"], hidden["object"]) == ("db01", where)
    assert run_json("vault", "info", "--vault", history.url)["unreadable_disks"] == [hidden]
    for line in (["vault", "info"], ["policy", "list"], ["site", "list"]):
        assert run(*line, "--vault", history.url).exit_code == 0
    assert where in run("policy", "list", "--vault", history.url).stderr


def test_points_are_listed_from_the_vault(
    history: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    points = run_json("point", "list", "web01", "--vault", history.url)["points"]
    assert [point["epoch"] for point in points] == [1, 2, 3]
    assert set(points[0]) >= {
        *("disk", "epoch", "time", "consistency", "proof", "label", "held"),
        *("changed_bytes", "stored_bytes", "generation"),
    }
    assert points[0]["label"] is None
    limited = run_json("point", "list", "web01", "--limit", "1", "--vault", history.url)
    assert limited["points"] == points[2:]
    middle = points[1]["time"]
    ranged = run_json(
        *("point", "list", "web01", "--since", middle, "--until", middle, "--vault", history.url)
    )
    assert ranged["points"] == points[1:2]
    shown = run("point", "list", "web01", "--vault", history.url).stdout
    assert "before the upgrade" in shown
    assert "\x1b" not in shown


def test_a_point_is_shown_from_the_vault(history: Any, run_json: Callable[..., Any]) -> None:
    document = run_json("point", "show", "web01@latest", "--vault", history.url)
    assert document["epoch"] == 3
    assert document["objects"] > 0
    assert document["requests"] > 0
    assert document["size"] == len(history.states[3])


def test_a_dry_run_of_a_hold_holds_nothing(
    history: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    where = ("--vault", history.url)
    assert run_json("point", "hold", "web01@#2", "--dry-run", *where)["dry_run"] is True
    assert run("point", "release", "web01@#2", "--dry-run", *where).exit_code == 3
    assert not run_json("point", "show", "web01@#2", *where)["held"]
    assert run("point", "hold", "web01@#2", *where).exit_code == 0
    result = run("point", "release", "web01@#2", "--dry-run", *where)
    assert (result.exit_code, "would not be held" in result.stderr) == (0, True)
    assert run_json("point", "show", "web01@#2", *where)["held"]
    assert run("point", "hold", "web01@#9", "--dry-run", *where).exit_code == 3


def test_a_dry_run_of_a_proof_proves_nothing(history: Any, run_json: Callable[..., Any]) -> None:
    where = ("--vault", history.url)
    assert run_json("point", "prove", "web01@#2", "--dry-run", *where)["dry_run"] is True
    assert "hashed" not in json.dumps(run_json("point", "list", "web01", *where))
    run_json("point", "prove", "web01@#2", *where)
    assert "hashed" in json.dumps(run_json("point", "list", "web01", *where))


def test_two_points_are_compared(history: Any, run: Run, run_json: Callable[..., Any]) -> None:
    line = ("point", "diff", "web01@1", "web01@2", "--vault", history.url)
    document = run_json(*line)
    assert document == {"extents": [{"offset": 0, "length": 8192}], "bytes": 8192}
    assert run(*line).stdout.split() == ["OFFSET", "LENGTH", "0", "8192"]
    same = run_json("point", "diff", "web01@2", "web01@2", "--vault", history.url)
    assert same == {"extents": [], "bytes": 0}


async def add_line(history: Any, spool: Path) -> None:
    """Start a branch from the second point, with a page that is written otherwise."""
    store = open_store(history.url)
    vault = await Vault.open(store, given())
    disk = (await vault.disks())[0]
    branch = Branch("here", "here", "c" * 32, "token", "2026-11-21T01:40:05Z")
    record, number = await add_branch(vault, disk, (1, 2), branch)
    model = DiskModel(spool, vault_id=vault.vault_id, disk_id=disk.id, generation=number)
    log = vault.log(record, number)
    model.data, model.epoch = bytearray(history.states[2]), 2
    model.digest = (await log.tip()).digest
    model.cut = model.from_size = len(model.data)
    model.write(4096, b"otherwise")
    await log.publish(model.seal())
    await store.aclose()


def test_points_of_a_branch_are_compared_with_those_of_the_disk(
    history: Any, run_json: Callable[..., Any], tmp_path: Path
) -> None:
    """What both have from before the fork does not differ; what either wrote since does."""
    spool = tmp_path / "branch"
    spool.mkdir()
    trio.run(add_line, history, spool)
    line = ("point", "diff", "web01@here-2@latest", "web01@2", "--vault", history.url)
    assert run_json(*line) == {"extents": [{"offset": 4096, "length": 4096}], "bytes": 4096}
    line = ("point", "diff", "web01@here-2@latest", "web01@3", "--vault", history.url)
    extents = [(one["offset"], one["length"]) for one in run_json(*line)["extents"]]
    assert extents == [(4096, 4096), (500_000 // 4096 * 4096, 4096)]


def test_a_whole_vault_is_whole(history: Any, run: Run, run_json: Callable[..., Any]) -> None:
    for line in (["vault", "check"], ["vault", "check", "--read-data"]):
        assert run(*line, "--vault", history.url).exit_code == 0
        document = run_json(*line, "--vault", history.url)
        assert document["ok"] is True
        assert document["problems"] == []
        assert document["points"] == 3
    assert run_json("vault", "check", "--disk", "web01", "--vault", history.url)["ok"] is True
    assert run("vault", "check", "--disk", "absent", "--vault", history.url).exit_code == 3


def test_a_missing_delta_is_damage(history: Any, run: Run) -> None:
    (slot,) = [path for path in history.directory.rglob("*0001") if path.parent.name[0] == "g"]
    slot.unlink()
    result = run("vault", "check", "--vault", history.url)
    assert result.exit_code == 6
    document = run("vault", "check", "--vault", history.url, "--json")
    assert document.exit_code == 6
    assert json.loads(document.stdout)["ok"] is False
    assert json.loads(document.stdout)["problems"]


@PLAIN  # of a sealed block nothing is read once a bit of it is wrong: no copy is in the vault
def test_a_vault_without_a_mount_is_repaired_from_itself(
    history: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    where = ["--vault", history.url]
    assert run_json("vault", "repair", *where) == {
        "vault": history.url, "ok": True, "dry_run": False, "disks": 1, "points": 3,
        "read_bytes": run_json("vault", "check", "--read-data", *where)["read_bytes"],
        "healed": [], "left": [], "refused": False,
    }  # fmt: skip
    (slot,) = [path for path in history.directory.rglob("*0001") if path.parent.name[0] == "g"]
    data = bytearray(slot.read_bytes())
    data[100] ^= 1  # its head, of which there are two
    slot.unlink()
    slot.write_bytes(data)
    dry = run("vault", "repair", "--dry-run", *where)
    assert (dry.exit_code, slot.read_bytes()) == (0, bytes(data))
    assert "would be healed" in dry.stdout
    assert "healed" in run("vault", "repair", "--disk", "web01", *where).stdout
    assert slot.read_bytes()[100] == data[100] ^ 1
    slot.unlink()
    result = run("vault", "repair", *where)
    assert result.exit_code == 6
    assert "no copy is known here" in result.stdout
    assert "hurts" in result.stdout
    assert run("vault", "repair", "--disk", "absent", *where).exit_code == 3


def test_a_mount_repairs_its_disks_however_the_vault_is_written(
    run: Run, daemon: FakeDaemon, tmp_path: Path
) -> None:
    daemon.answer("GET", "/status", {"disks": [{"name": "web01", "id": "a" * 32}], "plain": None})
    daemon.answer("POST", "/repairs", {
        "ok": True, "refused": False, "disks": 1, "points": 3, "read_bytes": 9,
        "healed": [], "left": [],
    })  # fmt: skip
    (tmp_path / "vault").mkdir()
    (tmp_path / "link").symlink_to("vault")
    urls = [f"{daemon.entry.vault}/", f"file://{tmp_path}/link", f"file://{tmp_path}/other"]
    for url in urls:
        run("vault", "repair", "--disk", "web01", "--vault", url)
    assert len([path for method, path, _ in daemon.asked if method == "POST"]) == 2
