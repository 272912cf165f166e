"""vdiskfs mount: everything is checked before anything is changed."""

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from vdiskfs.config import Config, MountSettings
from vdiskfs.registry import MountEntry, write_entry
from vdiskfs_tools import launch, mount

Run = Callable[..., Result]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[MountSettings]:
    """What would be started, in place of the start."""
    found: list[MountSettings] = []

    def start(settings: MountSettings) -> int:
        found.append(settings)
        return 77

    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr(launch, "run_in_place", start)
    return found


@pytest.fixture
def places(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A source, a mountpoint, and a vault."""
    monkeypatch.setattr("vdiskfs.config.default_state", lambda *_: tmp_path / "usual-state")
    for name in ("src", "mp"):
        (tmp_path / name).mkdir()
    vault = f"file://{tmp_path}/v"
    assert run("vault", "init", "--encryption", "none", vault).exit_code == 0
    return {"src": f"{tmp_path}/src", "mp": f"{tmp_path}/mp", "vault": vault}


def test_it_says_where_things_are(
    places: dict[str, str], started: list[MountSettings], run: Run, run_json: Callable[..., Any]
) -> None:
    line = ["mount", places["src"], places["mp"], "--vault", places["vault"], "--site", "kvm1"]
    shown = run(*line).stdout
    assert f"{places['mp']}/disks" in shown
    assert f"vdiskfs umount {places['mp']}" in shown
    document = run_json(*line)
    assert document == {
        "mountpoint": places["mp"],
        "source": places["src"],
        "vault": places["vault"],
        "site": "kvm1",
        "state": str(Path(places["src"]).parent / "usual-state"),
        "pid": 77,
        "disks": f"{places['mp']}/disks",
        "recovery_points": f"{places['mp']}/recovery-points",
    }
    assert len(started) == 2


def test_the_options_reach_the_daemon(
    places: dict[str, str], started: list[MountSettings], run: Run, tmp_path: Path
) -> None:
    config = tmp_path / "c.conf"
    config.write_text("workers = 3")
    result = run(
        *("--vault", places["vault"], "mount", places["src"], places["mp"], "--site", "b"),
        *("--config", str(config), "--state", str(tmp_path / "st"), "--allow-other"),
        *("--no-protect", "--force", "--accept-rollback"),
    )
    assert result.exit_code == 0, result.stderr
    assert started == [
        MountSettings(
            source=places["src"],
            mountpoint=places["mp"],
            vault=places["vault"],
            site="b",
            state=str(tmp_path / "st"),
            allow_other=True,
            protect=False,
            force=True,
            accept_rollback=True,
            options=Config(workers=3),
        )
    ]


def test_without_a_source_it_is_a_recovery_site(
    places: dict[str, str], started: list[MountSettings], run: Run
) -> None:
    result = run("mount", places["mp"], "--vault", places["vault"])
    assert result.exit_code == 0
    assert started[0].source is None
    assert "recovery site" in result.stdout


def test_a_dry_run_starts_nothing(
    places: dict[str, str], started: list[MountSettings], run_json: Callable[..., Any]
) -> None:
    before = sorted(Path(places["src"]).parent.rglob("*"))
    line = ["mount", places["src"], places["mp"], "--vault", places["vault"], "--dry-run"]
    assert run_json(*line)["dry_run"] is True
    assert started == []
    assert sorted(Path(places["src"]).parent.rglob("*")) == before


def test_links_and_relative_paths_are_resolved(
    places: dict[str, str],
    started: list[MountSettings],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("src")
    assert run("mount", "link", "./mp/", "--vault", places["vault"]).exit_code == 0
    assert (started[0].source, started[0].mountpoint) == (places["src"], places["mp"])


Refusal = tuple[list[str], int, str]
REFUSALS: dict[str, Refusal] = {
    "no paths": (["--vault", "{vault}"], 2, "MOUNTPOINT"),
    "three paths": (["a", "b", "c", "--vault", "{vault}"], 2, "MOUNTPOINT"),
    "no vault": (["{src}", "{mp}"], 2, "--vault"),
    "source absent": (["{src}x", "{mp}", "--vault", "{vault}"], 1, "does not exist"),
    "source a file": (["{file}", "{mp}", "--vault", "{vault}"], 2, "not a directory"),
    "mountpoint absent": (["{src}", "{mp}x", "--vault", "{vault}"], 1, "mkdir"),
    "mountpoint a file": (["{src}", "{file}", "--vault", "{vault}"], 2, "not a directory"),
    "mountpoint not empty": (["{src}", "{full}", "--vault", "{vault}"], 4, "not empty"),
    "mounted on": (["{src}", "/proc", "--vault", "{vault}"], 4, "(proc) is mounted"),
    "the same": (["{mp}", "{mp}", "--vault", "{vault}"], 2, "--over"),
    "one in the other": (["{full}", "{full}/in", "--vault", "{vault}"], 2, "lies in the other"),
    "the other way": (["{full}/in", "{full}", "--vault", "{vault}"], 2, "lies in the other"),
    "state inside": (["{mp}", "--state", "{mp}/s", "--vault", "{vault}"], 2, "state directory"),
    "state over": (
        ["{src}", "{mp}", "--over", "--state", "{src}/s", "--vault", "{vault}"],
        2,
        "--over hides",
    ),
    "over nothing": (["{mp}", "--over", "--vault", "{vault}"], 2, "source"),
    "site": (["{mp}", "--site", "A B", "--vault", "{vault}"], 2, "name of a site"),
    "config absent": (["{mp}", "--config", "{mp}/c", "--vault", "{vault}"], 3, "configuration"),
    "config wrong": (["{mp}", "--config", "{file}", "--vault", "{vault}"], 2, "not TOML"),
    "vault malformed": (["{mp}", "--dry-run", "--vault", "/srv/vault"], 2, "file:///"),
    "vault unknown": (["{mp}", "--dry-run", "--vault", "s3://x"], 2, "vault URL"),
    "vault absent": (["{mp}", "--dry-run", "--vault", "{vault}x"], 3, "vault init"),
    "vault newer": (["{mp}", "--dry-run", "--vault", "{newer}"], 6, "newer"),
    "nul": (["{mp}\0", "--vault", "{vault}"], 2, "NUL"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_work_is_refused_before_anything_is_changed(
    name: str, places: dict[str, str], started: list[MountSettings], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no toml")
    (tmp_path / "full" / "in").mkdir(parents=True)
    newer = tmp_path / "newer"
    assert run("vault", "init", "--encryption", "none", f"file://{newer}").exit_code == 0
    document = newer / "vault.json"
    document.write_bytes(document.read_bytes().replace(b'"format": 2', b'"format": 99'))
    words = {"file": f"{tmp_path}/file", "full": f"{tmp_path}/full", "newer": f"file://{newer}"}
    line, code, said = REFUSALS[name]
    result = run("mount", *(word.format(**places, **words) for word in line))
    assert result.exit_code == code, result.stderr
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert started == []
    assert not (tmp_path / "usual-state").exists()


def test_what_is_mounted_is_not_mounted_again(
    places: dict[str, str], entry: MountEntry, started: list[MountSettings], run: Run
) -> None:
    vault = ("--vault", places["vault"])
    write_entry(replace(entry, mountpoint=places["mp"], source=places["src"]))
    (Path(places["mp"]).parent / "mp2").mkdir()
    for line in (
        [places["src"], places["mp"]],
        [places["src"], f"{places['mp']}2"],
        [f"{places['mp']}2", "--state", entry.state],
    ):
        result = run("mount", *line, *vault)
        assert result.exit_code == 4, result.stderr
    assert started == []


def test_a_mount_whose_daemon_is_gone_says_how_to_clear_it(
    places: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mount, "mounted_types", lambda _: ["fuse.vdiskfs"])
    result = run("mount", places["mp"], "--vault", places["vault"])
    assert result.exit_code == 4
    assert f"vdiskfs umount {places['mp']}" in result.stderr


def test_what_only_root_may_is_refused_to_others(
    places: dict[str, str], started: list[MountSettings], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("vdiskfs.registry._check_private", lambda _: None)
    monkeypatch.setattr("vdiskfs_tools.checks.allows_other_users", lambda: False)
    line = ["mount", places["src"], places["mp"], "--vault", places["vault"]]
    assert run(*line, "--over").exit_code == 7
    refused = run(*line, "--allow-other")
    assert refused.exit_code == 7
    assert "user_allow_other" in refused.stderr
    assert started == []


def test_an_unreadable_source_is_refused(
    places: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _mode: path != places["src"])
    result = run("mount", places["src"], places["mp"], "--vault", places["vault"])
    assert result.exit_code == 7


def test_the_site_is_the_hosts_name(
    places: dict[str, str],
    started: list[MountSettings],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "KVM1")
    run("mount", places["mp"], "--vault", places["vault"])
    assert started[0].site == "kvm1"
