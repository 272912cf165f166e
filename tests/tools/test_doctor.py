"""vdiskfs doctor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from vdiskfs.errors import RefusedError
from vdiskfs.registry import MountEntry
from vdiskfs_tools import checks
from vdiskfs_tools.checks import Finding

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What is found of the host; a test adds to it."""
    found = [Finding("kernel", "ok", "6.18")]
    monkeypatch.setattr(checks, "host_findings", lambda _state: list(found))
    return found


def test_a_host_that_has_all_is_exit_0(
    run: Run, run_json: Callable[..., Any], host: list[Finding]
) -> None:
    host.append(Finding("clock", "warning", "not synchronized", "run chrony"))
    assert run("doctor").exit_code == 0
    document = run_json("doctor")
    assert document["ok"] is True
    assert document["checks"][1] == {
        "name": "clock",
        "status": "warning",
        "detail": "not synchronized",
        "fix": "run chrony",
    }


def test_what_is_missing_is_exit_1_with_the_fix(run: Run, host: list[Finding]) -> None:
    host.append(Finding("fuse device", "missing", "is not there", "modprobe fuse"))
    result = run("doctor")
    assert result.exit_code == 1
    assert "fix: modprobe fuse" in result.stdout
    quiet = run("doctor", "--quiet", "--json")
    assert quiet.exit_code == 1
    assert '"ok": false' in quiet.stdout


def test_the_real_host_is_looked_at(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert len(checks.host_findings(Path("/"))) == 9


def statuses(document: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in document["checks"]}


def test_a_vault_is_tried(run: Run, run_json: Callable[..., Any], tmp_path: Path) -> None:
    url = f"file://{tmp_path}/v"
    run("vault", "init", "--encryption", "none", url)
    document = run_json("doctor", "--vault", url)
    assert statuses(document)["vault"] == "ok"
    assert "vault folder" in statuses(document)
    left = [path for path in (tmp_path / "v").rglob("*probe*/*") if path.is_file()]
    assert left + list((tmp_path / "v").glob("probe-*")) == []


def test_a_token_that_has_expired_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_BLOB_ENDPOINT", "http://127.0.0.1:1/acc")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=1&se=2020-01-01&sig=SECRET")
    monkeypatch.setattr("vdiskfs_tools.doctor.VAULT_LIMIT_S", 0.2)
    document = json.loads(run("doctor", "--vault", "azure://box", "--json").stdout)
    said = [one["detail"] for one in document["checks"] if one["name"] == "vault token"]
    name = "AZURE_STORAGE_SAS_TOKEN"
    assert said == [
        f"{name}: has expired at 2020-01-01T00:00:00Z", f"{name}: is valid for http, too",
    ]  # fmt: skip
    assert statuses(document)["vault token"] == "warning"
    assert "SECRET" not in json.dumps(document)


def test_a_vault_that_is_not_there_is_missing(run: Run, tmp_path: Path) -> None:
    result = run("doctor", "--vault", f"file://{tmp_path}/v")
    assert result.exit_code == 1
    assert "vdiskfs vault init" in result.stdout


def test_a_key_that_may_not_delete_is_fine(
    run: Run, run_json: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vdiskfs.store.local import LocalStore

    async def refuse(*_: object) -> None:
        raise RefusedError("may not delete")

    url = f"file://{tmp_path}/v"
    run("vault", "init", "--encryption", "none", url)
    monkeypatch.setattr(LocalStore, "delete", refuse)
    assert statuses(run_json("doctor", "--vault", url))["vault key"] == "ok"


def test_a_mounts_daemon_and_vault_are_tried(daemon: Any, run: Run) -> None:
    daemon.answer("GET", "/status", {"plain": None})
    assert run("vault", "init", "--encryption", "none", daemon.entry.vault).exit_code == 0
    result = run("doctor")
    assert result.exit_code == 0, result.stdout
    assert "daemon: " in result.stdout
    assert "reachable and writable" in result.stdout


def test_a_mount_that_is_served_plainly_is_no_good(daemon: Any, run: Run) -> None:
    daemon.answer("GET", "/status", {"plain": {"reason": "it died", "again_s": 5.0}})
    assert run("vault", "init", "--encryption", "none", daemon.entry.vault).exit_code == 0
    result = run("doctor")
    assert result.exit_code == 1
    assert "missing  daemon: the mount is served untracked: it died" in result.stdout
    assert f"vdiskfs upgrade -m {daemon.entry.mountpoint}" in result.stdout


def test_a_daemon_that_does_not_answer_is_missing(entry: MountEntry, run: Run) -> None:
    result = run("doctor", "-m", entry.mountpoint)
    assert result.exit_code == 1
    assert "missing  daemon" in result.stdout


def test_a_mount_that_is_not_there_is_exit_3(run: Run) -> None:
    assert run("doctor", "-m", "/nowhere").exit_code == 3
