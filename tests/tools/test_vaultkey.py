"""vdiskfs vault init and vault key, with passphrases and key files."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from vdiskfs.crypto import slots
from vdiskfs.errors import VaultUnreachableError
from vdiskfs_tools import keys

Run = Callable[..., Result]
Json = Callable[..., Any]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of the user who runs the tests, and cheap passphrases."""
    for name in ("PASSPHRASE", "PASSPHRASE_FILE", "KEY_FILE"):
        monkeypatch.delenv(f"VDISKFS_{name}", raising=False)
    monkeypatch.setattr(slots, "SCRYPT_N", 1 << 10)


def test_without_a_key_and_a_terminal_all_ways_are_named(run: Run, tmp_path: Path) -> None:
    result = run("vault", "init", f"file://{tmp_path}/v")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    for way in ("VDISKFS_PASSPHRASE", "VDISKFS_PASSPHRASE_FILE", "--key-file", "--encryption none"):
        assert way in result.stderr
    assert not (tmp_path / "v").exists()


def test_a_key_file_is_made_with_the_vault_and_only_with_it(run: Run, tmp_path: Path) -> None:
    key, url = tmp_path / "key", f"file://{tmp_path}/v"
    assert run("vault", "init", url, "--key-file", str(key), "--dry-run").exit_code == 0
    assert not key.exists()
    result = run("vault", "init", url, "--key-file", str(key), "--json")
    document = json.loads(result.stdout)
    assert (document["encryption"], document["key_file"]) == ("aes-256-gcm", str(key))
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    again = run("vault", "init", url, "--key-file", str(tmp_path / "second"))
    assert again.exit_code == 4
    assert not (tmp_path / "second").exists()
    assert key.exists()


def test_what_opens_it_and_what_does_not(
    run: Run, run_json: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/v"
    monkeypatch.setenv("VDISKFS_PASSPHRASE", "the right one")
    assert run("vault", "init", url).exit_code == 0
    assert run_json("vault", "info", "--vault", url)["encryption"] == "aes-256-gcm"
    for wrong in ("the wrong one", None):
        if wrong is None:
            monkeypatch.delenv("VDISKFS_PASSPHRASE")
        else:
            monkeypatch.setenv("VDISKFS_PASSPHRASE", wrong)
        for command in (["vault", "info"], ["vault", "check"], ["disk", "list"], ["point", "list", "x"],
                        ["vault", "key", "list"], ["machine", "list"]):  # fmt: skip
            result = run(*command, "--vault", url)
            assert result.exit_code == 7, command
            assert result.stderr.count("\n") == 1
            assert "one" not in result.stderr.replace("right one", "").replace("none", "")


def test_a_key_for_a_vault_that_has_none_is_refused(run: Run, tmp_path: Path) -> None:
    """Somebody may have put it in the place of the encrypted one."""
    url = f"file://{tmp_path}/v"
    assert run("vault", "init", "--encryption", "none", url).exit_code == 0
    key = tmp_path / "key"
    run("vault", "init", f"file://{tmp_path}/other", "--key-file", str(key))
    result = run("vault", "info", "--vault", url, "--key-file", str(key))
    assert result.exit_code == 7
    assert "not encrypted" in result.stderr


def test_keys_come_change_and_go(run: Run, run_json: Json, tmp_path: Path) -> None:
    """Each opens the vault as long as it is there; the last one stays."""
    url, first, second, third = f"file://{tmp_path}/v", *(str(tmp_path / n) for n in "abc")
    run("vault", "init", url, "--key-file", first)

    def opens(key: str) -> bool:
        return run("vault", "info", "--vault", url, "--key-file", key).exit_code == 0

    added = run_json("vault", "key", "add", "--vault", url, "--key-file", first,
                     "--new-key-file", second, "--label", "for the other site")["key"]  # fmt: skip
    assert (added["kind"], added["label"]) == ("key-file", "for the other site")
    assert opens(first)
    assert opens(second)
    changed = run_json("vault", "key", "change", "--vault", url, "--key-file", second,
                       "--new-key-file", third)["key"]  # fmt: skip
    assert opens(third)
    assert not opens(second)
    keys = run_json("vault", "key", "list", "--vault", url, "--key-file", third)["keys"]
    assert [key["label"] for key in keys] == ["first", "for the other site"]
    shown = run("vault", "key", "list", "--vault", url, "--key-file", third).stdout
    assert changed["id"] in shown
    remove = ("vault", "key", "remove", "--vault", url, "--key-file", third)
    assert run(*remove, "00000000").exit_code == 3
    assert run(*remove, keys[0]["id"]).exit_code == 0
    assert not opens(first)
    assert run(*remove, changed["id"]).exit_code == 4
    assert opens(third)


def test_a_key_of_file_and_passphrase_needs_both(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, key = f"file://{tmp_path}/v", str(tmp_path / "key")
    words = tmp_path / "words"
    words.touch(0o600)
    words.write_text("open sesame\n")
    monkeypatch.setenv("VDISKFS_PASSPHRASE_FILE", str(words))
    assert run("vault", "init", url, "--key-file", key).exit_code == 0
    assert run("vault", "info", "--vault", url, "--key-file", key).exit_code == 0
    assert run("vault", "info", "--vault", url).exit_code == 7
    monkeypatch.delenv("VDISKFS_PASSPHRASE_FILE")
    assert run("vault", "info", "--vault", url, "--key-file", key).exit_code == 7


def words(path: Path, text: str) -> str:
    path.touch(0o600)
    path.write_text(text + "\n")
    return str(path)


def test_the_key_that_goes_is_of_the_new_ones_kind_and_never_guessed(
    run: Run, run_json: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key file of the configuration opens the vault too: it stays."""
    url, file = f"file://{tmp_path}/v", str(tmp_path / "key")
    first, second = words(tmp_path / "p1", "one"), words(tmp_path / "p2", "two")
    run("vault", "init", url, "--key-file", file)
    monkeypatch.setenv("VDISKFS_KEY_FILE", file)
    run("vault", "key", "add", "--vault", url, "--new-passphrase-file", first)
    change = ("vault", "key", "change", "--vault", url, "--new-passphrase-file", second)

    def keys() -> dict[str, str]:
        return {key["kind"]: key["id"] for key in run_json("vault", "key", "list", "--vault", url)["keys"]}  # fmt: skip

    before = keys()
    refused = run(*change)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert f"{before['key-file']} (key-file)" in refused.stderr
    assert "vault key change KEY" in refused.stderr
    assert keys() == before
    monkeypatch.setenv("VDISKFS_PASSPHRASE_FILE", first)
    assert run_json(*change)["replaced"]["id"] == before["passphrase"]
    assert keys()["key-file"] == before["key-file"]
    monkeypatch.delenv("VDISKFS_KEY_FILE")
    assert run("vault", "info", "--vault", url).exit_code == 7
    monkeypatch.setenv("VDISKFS_PASSPHRASE_FILE", second)
    assert run("vault", "info", "--vault", url).exit_code == 0
    # Two of one kind: only a name tells them apart.
    run("vault", "key", "add", "--vault", url, "--new-passphrase-file", second)
    refused = run("vault", "key", "change", "--vault", url, "--new-passphrase-file", first)
    assert refused.exit_code == 2
    assert refused.stderr.count("(passphrase)") == 2
    gone = keys()["passphrase"]
    named = run_json(*change[:3], gone, *change[3:5], "--new-key-file", str(tmp_path / "new"))
    assert (named["replaced"]["id"], named["key"]["kind"]) == (gone, "key-file")
    assert run(*change[:3], "00000000", *change[3:]).exit_code == 3


def test_a_passphrase_is_asked_for_where_a_key_file_is_set_up(
    run: Run, run_json: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, file = f"file://{tmp_path}/v", str(tmp_path / "key")
    run("vault", "init", url, "--key-file", file)
    monkeypatch.setenv("VDISKFS_KEY_FILE", file)
    run("vault", "key", "add", "--vault", url, "--new-passphrase-file", words(tmp_path / "p", "1"))
    typed = {False: "1", True: "2"}
    monkeypatch.setattr(keys, "can_ask", lambda: True)
    monkeypatch.setattr(keys, "ask_passphrase", lambda *, new=False: typed[new])
    changed = run_json("vault", "key", "change", "--vault", url)
    assert changed["replaced"]["kind"] == changed["key"]["kind"] == "passphrase"
    assert run("vault", "info", "--vault", url, "--key-file", file).exit_code == 0


def test_a_key_that_the_vault_does_not_take_leaves_no_file(run: Run, tmp_path: Path) -> None:
    """Nor does one that is interrupted before anything was sent."""
    url, new = f"file://{tmp_path}/v", tmp_path / "new"
    file = str(tmp_path / "key")
    run("vault", "init", "--encryption", "none", f"file://{tmp_path}/plain")
    add = ("vault", "key", "add", "--new-key-file", str(new), "--vault")
    assert run(*add, f"file://{tmp_path}/plain").exit_code == 2
    assert not new.exists()
    run("vault", "init", url, "--key-file", file)
    for _ in range(7):
        run("vault", "key", "add", "--vault", url, "--key-file", file, "--new-key-file", file)
    full = run(*add, url, "--key-file", file)
    assert full.exit_code == 4
    assert not new.exists()
    assert run("vault", "key", "add", "--both", "--vault", url, "--key-file", file).exit_code == 2


@pytest.mark.parametrize("error", [VaultUnreachableError("lost"), KeyboardInterrupt()])
def test_a_key_that_the_vault_may_have_taken_keeps_its_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """The answer is lost on the way back: the old key is gone, the new one is all there is."""
    url, new, file = f"file://{tmp_path}/v", tmp_path / "new", str(tmp_path / "key")
    run("vault", "init", url, "--key-file", file)

    def lost(name: str) -> None:
        if name == "keys.changed":
            raise error

    monkeypatch.setattr("vdiskfs.catalog.keys.hook", lost)
    change = run("vault", "key", "change", "--new-key-file", str(new), "--vault", url,
                 "--key-file", file)  # fmt: skip
    assert change.exit_code in (5, 130)
    assert f"{new} is kept" in change.stderr
    assert run("vault", "info", "--vault", url, "--key-file", str(new)).exit_code == 0


@pytest.mark.parametrize("error", [VaultUnreachableError("lost"), KeyboardInterrupt()])
@pytest.mark.parametrize("broken", ["check_unclaimed", "VaultFile.encode", "Vault.open"])
def test_an_init_that_fails_keeps_the_key_file_of_what_it_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, broken: str
) -> None:  # fmt: skip
    """The key file goes only where no vault opens with it."""
    url, key = f"file://{tmp_path}/v", tmp_path / "key"

    def fail(*_: object) -> None:
        raise error

    kept = broken == "Vault.open"
    with monkeypatch.context() as patch:
        patch.setattr(f"vdiskfs.catalog.vault.{broken}", fail)
        failed = run("vault", "init", url, "--key-file", str(key))
    assert failed.exit_code in (5, 130)
    assert key.exists() == kept
    if kept:
        assert f"{key} is kept" in failed.stderr
        assert run("vault", "info", "--vault", url, "--key-file", str(key)).exit_code == 0
    else:
        assert run("vault", "init", url, "--key-file", str(key)).exit_code == 0


def test_a_dry_run_changes_no_key(
    run: Run, run_json: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = str(tmp_path / "first"), tmp_path / "second"
    where = ("--vault", f"file://{tmp_path}/v", "--key-file", first)
    assert run("vault", "init", where[1], "--key-file", first).exit_code == 0
    before = run_json("vault", "key", "list", *where)["keys"]
    new = ("--new-key-file", str(second), "--dry-run")
    assert run_json("vault", "key", "add", *new, *where)["would"] == "add"
    assert run_json("vault", "key", "change", *new, *where)["replaced"] == before[0]
    result = run("vault", "key", "remove", before[0]["id"], "--dry-run", *where)
    assert result.exit_code == 4, "it is the last one"
    assert run("vault", "key", "remove", "none", "--dry-run", *where).exit_code == 3
    assert not second.exists()
    assert run_json("vault", "key", "list", *where)["keys"] == before
    assert run("vault", "key", "add", "--new-key-file", str(second), *where).exit_code == 0
    removed = run_json("vault", "key", "remove", before[0]["id"], "--dry-run", *where)
    assert (removed["removed"], removed["dry_run"]) == (before[0]["id"], True)
    assert len(run_json("vault", "key", "list", *where)["keys"]) == 2
    monkeypatch.setattr("vdiskfs.catalog.keys.SLOTS_MAX", 2)
    assert run("vault", "key", "add", *new, *where).exit_code == 4


def test_a_dry_run_asks_for_no_passphrase(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vdiskfs_tools.keys.can_ask", lambda: True)
    monkeypatch.setattr("vdiskfs_tools.keys.ask_passphrase", None)
    assert run("vault", "init", f"file://{tmp_path}/v", "--dry-run").exit_code == 0
