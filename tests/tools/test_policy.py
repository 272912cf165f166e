"""vdiskfs policy, and what it does to disks; point hold and release; vault gc."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import Result

from tests.vaults import PLAIN, given
from vdiskfs.catalog import DiskRecord, Vault
from vdiskfs.catalog.swap import disk_object
from vdiskfs.catalog.upkeep import choose_policy
from vdiskfs.delta.frames import FrameEncoder
from vdiskfs.delta.names import segment_name
from vdiskfs.delta.segments import BATCH, batch_of, new_batch
from vdiskfs.store import open_store
from vdiskfs.units import NS

Run = Callable[..., Result]


def test_presets_are_listed_and_shown(history: Any, run_json: Callable[..., Any]) -> None:
    names = {
        item["name"] for item in run_json("policy", "list", "--vault", history.url)["policies"]
    }
    assert names == {"default", "asr-standard", "asr-premium"}
    shown = run_json("policy", "show", "default", "--vault", history.url)
    assert shown["retention"] == "1s for 1h, 1m for 1d, 1h for 15d, 1d for 1y"
    assert shown["disks"] == []


def test_a_policy_that_is_none_is_wrong_use(history: Any, run: Run) -> None:
    for line in (["shop", "retention=often"], ["shop", "speed=1"], ["shop", "retention"],
                 ["a/b", "retention=all"], ["shop", "rpo_warning=soon"],
                 ["shop", "retention=1h for 585y"], ["shop", f"rpo_warning={'9' * 400}d"],
                 ["shop", f"bandwidth_limit={'9' * 400}"],
                 ["shop", "rpo_warning=1m", "rpo_warning=2m"]):  # fmt: skip
        result = run("policy", "set", *line, "--vault", history.url)
        assert result.exit_code == 2, line
        assert result.stderr.count("\n") == 1
    assert run("policy", "show", "shop", "--vault", history.url).exit_code == 3


@PLAIN
def test_a_damaged_policy_is_said_and_the_others_are_listed(
    history: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    vault = ("--vault", history.url)
    for name in ("gold", "asr-premium"):
        assert run("policy", "set", name, "retention=1h for 2h", *vault).exit_code == 0
        path = Path(history.url.removeprefix("file://")) / "policies" / f"{name}.json"
        path.write_bytes(b"x" + path.read_bytes()[1:])
    listed = run_json("policy", "list", *vault)
    assert [one["name"] for one in listed["policies"]] == ["asr-standard", "default"]
    assert sorted(one["object"] for one in listed["unreadable"]) == [
        "policies/asr-premium.json", "policies/gold.json",
    ]  # fmt: skip
    assert "policies/gold.json: not a document" in run("policy", "list", *vault).stderr


def test_what_a_policy_deletes_is_said_and_asked_first(
    history: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    vault = ("--vault", history.url)
    before = run_json("point", "list", "web01", *vault)["points"]
    first, labelled, newest = (item["epoch"] for item in before)
    assert run_json("policy", "set", "tight", "retention=1h for 2h", *vault)["disks"] == []
    refused = run("disk", "protect", "web01", "--policy", "tight", *vault)
    assert refused.exit_code == 4
    assert "would be deleted" in refused.stderr
    said = run_json("disk", "protect", "web01", "--policy", "tight", "--dry-run", *vault)
    assert said["preview"]["points"] == 1
    # What is held is not lost, and nothing is asked then.
    run_json("point", "hold", f"web01@{first}", *vault)
    run_json("disk", "protect", "web01", "--policy", "tight", *vault)
    (kept,) = run_json("vault", "gc", *vault)["lines"]
    assert kept["points"] == 0
    held = [item["held"] for item in run_json("point", "list", "web01", *vault)["points"]]
    assert held == [True, False, False]
    # A change of the policy says it, too.
    looser = run_json("policy", "set", "tight", "retention=1s for 2h", "--dry-run", *vault)
    assert looser["disks"][0]["points"] == 0
    assert run_json("policy", "show", "tight", *vault)["retention"] == "1h for 2h"
    run_json("point", "release", f"web01@{first}", *vault)
    again = run("policy", "set", "tight", "retention=2h for 3h", *vault, "--json")
    assert again.exit_code == 4
    assert json.loads(again.stdout or "{}") == {}
    with pytest.MonkeyPatch.context() as patch:
        # Who has the disk is told of what was done, which is written into the vault.
        patch.setattr("vdiskfs_tools.policies._tell_owner", None)
        (planned,) = run_json("vault", "gc", "--dry-run", *vault)["lines"]
    (done,) = run_json("vault", "gc", *vault)["lines"]
    assert planned["points"] == done["points"] == 1
    left = run_json("point", "list", "web01", *vault)["points"]
    assert [item["epoch"] for item in left] == [labelled, newest]
    assert run_json("vault", "check", "--read-data", *vault)["ok"]
    assert run("disk", "protect", "web01", "--policy", "none", "--yes", *vault).exit_code == 0
    assert run("vault", "gc", *vault).stderr == "no disk has a policy\n"


def test_what_fails_on_one_disk_does_not_keep_gc_from_the_others(
    history: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    """One follows a policy that is gone, the record of another is damaged."""
    vault = ("--vault", history.url)
    run_json("disk", "protect", "web01", "--policy", "default", "--yes", *vault)
    damaged = trio.run(_add_disks, history.url)
    result = run("vault", "gc", *vault, "--json")
    document = json.loads(result.stdout)
    assert [row["disk"] for row in document["lines"]] == ["web01"]
    assert document["failed"] == ["aa", damaged]
    assert result.exit_code == 6
    assert "the vault has no policy 'gone'" in result.stderr
    assert "vdiskfs vault repair" in result.stderr
    shown = run("vault", "gc", "--disk", "aa", "--disk", "web01", *vault)
    assert (shown.exit_code, shown.stderr.count("\n")) == (3, 1)
    assert shown.stdout.splitlines()[-1].startswith("web01")


def test_gc_compresses_as_the_policy_says(
    history: Any, run_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = []

    def encoder(level: int) -> FrameEncoder:
        levels.append(level)
        return FrameEncoder(level)

    monkeypatch.setattr("vdiskfs.delta.writer.FrameEncoder", encoder)
    vault = ("--vault", history.url)
    run_json("policy", "set", "tight", "retention=1h for 2h", "compression_level=11", *vault)
    run_json("disk", "protect", "web01", "--policy", "tight", "--yes", *vault)
    assert run_json("vault", "gc", *vault)["lines"][0]["points"] == 1
    assert set(levels) == {11}


def test_what_a_killed_gc_has_moved_is_found_a_week_later(
    history: Any, run: Run, run_json: Callable[..., Any], tmp_path: Path
) -> None:
    vault = ("--vault", history.url)
    run_json("policy", "set", "tight", "retention=1h for 2h", *vault)
    run_json("disk", "protect", "web01", "--policy", "tight", "--yes", *vault)
    killed = subprocess.run(
        [sys.executable, "-m", "vdiskfs_tools", "vault", "gc", *vault],
        env={**os.environ, "VDISKFS_CRASH": "thin.moved:1", "TMPDIR": str(tmp_path)},
        check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    (lost,) = (path for path in (history.directory / "segments").rglob("*") if path.is_file())
    assert "1 segment that no delta uses (" in run("vault", "check", *vault).stdout
    (row,) = run_json("vault", "gc", *vault)["lines"]
    assert row["points"] == 1
    assert lost.name not in trio.run(_doomed, history.url)
    old_ns = lost.stat().st_mtime_ns - 8 * 86400 * NS
    os.utime(lost, ns=(old_ns, old_ns))
    run_json("vault", "gc", *vault)
    assert lost.name in trio.run(_doomed, history.url)


async def _doomed(url: str) -> set[str]:
    """Return the last parts of the names that are doomed."""
    store = open_store(url)
    vault = await Vault.open(store, given())
    log = vault.log(await vault.find_disk("web01"))
    await log.line.load()
    assert log.line.ledger is not None
    await store.aclose()
    return {name.rpartition("/")[2] for name in log.line.ledger.doomed}


def test_segments_that_no_point_ever_names_are_collected_whatever_the_policy(
    history: Any, run: Run, run_json: Callable[..., Any]
) -> None:
    """Of a first replication whose host never comes back: no policy, no point."""
    vault = ("--vault", history.url)
    assert run("disk", "protect", "web01", "--policy", "none", "--yes", *vault).exit_code == 0
    assert run_json("vault", "gc", *vault)["unnamed"] == []
    disk_id, segment = trio.run(_abandon, history)
    (lost,) = (path for path in (history.directory / "segments").rglob("*") if path.is_file())
    old_ns = lost.stat().st_mtime_ns - 8 * 86400 * NS
    os.utime(lost, ns=(old_ns, old_ns))
    waits = {"disk": "aa", "deleted": 0, "waiting": 1, "refused": 0}
    assert run_json("vault", "gc", "--dry-run", *vault)["unnamed"] == [waits]
    assert run_json("vault", "gc", *vault)["unnamed"] == [waits]
    trio.run(_doubt_earlier, history.url, disk_id)
    said = run_json("vault", "gc", "--dry-run", *vault)["unnamed"]
    assert said == [{"disk": "aa", "deleted": 1, "waiting": 0, "refused": 0}]
    assert lost.exists()
    shown = run("vault", "gc", *vault)
    assert "disk aa: segments that no point names: 1 deleted, 0 wait\n" in shown.stderr
    assert not lost.exists()
    assert run_json("vault", "gc", *vault)["unnamed"] == []
    assert segment not in run("vault", "check", *vault).stdout


async def _abandon(history: Any) -> tuple[str, str]:
    """Store a segment of a disk that has no point; return the disk's id and the segment's."""
    store = open_store(history.url)
    vault = await Vault.open(store, given())
    disk = await vault.create_disk("aa", file="aa.img", size=4096, site="here")
    segment = new_batch() + "00" * 8
    await vault.store.create(
        segment_name(disk.id, segment), b"data", metadata={BATCH: batch_of(segment)}
    )
    await store.aclose()
    return disk.id, segment


async def _doubt_earlier(url: str, disk_id: str) -> None:
    """Let a month pass since the first look."""
    store = open_store(url)
    vault = await Vault.open(store, given())

    def change(found: DiskRecord) -> DiskRecord:
        return replace(found, batches={
            batch: replace(one, since=one.since - 31 * 86400 * NS)
            for batch, one in found.batches.items()
        })  # fmt: skip

    await vault.update_disk(disk_id, change)
    await store.aclose()


async def _add_disks(url: str) -> str:
    """Add a disk whose policy is not there, and one without a record; return that's name."""
    store = open_store(url)
    vault = await Vault.open(store, given())
    first = await vault.create_disk("aa", file="aa.img", size=4096, site="here")
    await choose_policy(vault, first.id, "gone")
    other = disk_object((await vault.create_disk("bb", file="bb", size=4096, site="here")).id)
    etag = (await store.stat(other)).etag
    await store.replace(other, b"{}", etag=etag)
    await store.aclose()
    return other
