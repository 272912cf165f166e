"""vdiskfs machine: definitions in a vault, with nothing but the vault."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import Result

from tests.vaults import put_object, read_object
from vdiskfs.machines import parse_machine
from vdiskfs_tools.main import cli

Run = Callable[..., Result]
TEXT = 'memory = "1GiB"\n[[disks]]\ndisk = "web01"\n[[networks]]\nname = "lan"\n'


@pytest.fixture
def definition(tmp_path: Path) -> str:
    path = tmp_path / "web.toml"
    path.write_text(TEXT)
    return str(path)


def test_a_machine_is_set_shown_and_listed(
    history: Any, run: Run, run_json: Callable[..., Any], definition: str, tmp_path: Path
) -> None:
    """What is shown can be set again; replacing says so; no mount is needed for any of it."""
    vault = ("--vault", history.url)
    assert run_json("machine", "list", *vault) == {"machines": []}
    first = run("machine", "set", "web01", "--file", definition, *vault)
    assert (first.exit_code, first.stdout) == (0, "")
    assert first.stderr == f"web01: added in {history.url}\n"
    shown = run("machine", "show", "web01", *vault).stdout
    assert parse_machine(shown) == parse_machine(TEXT, name="web01")
    copy = tmp_path / "copy.toml"
    copy.write_text(shown.replace("1024MiB", "2GiB"))
    document = run_json("machine", "set", "web01", "--file", str(copy), *vault)
    assert document["replaced"] is True
    assert document["memory"] == 2 << 30
    assert run_json("machine", "show", "web01", *vault)["memory"] == 2 << 30
    (listed,) = run_json("machine", "list", *vault)["machines"]
    assert (listed["name"], listed["error"]) == ("web01", None)
    table = run("machine", "list", *vault).stdout.split("\n")
    assert table[1].split() == ["web01", "qemu", "2.0", "GiB", "1", "web01", "lan"]


def test_a_definition_comes_from_standard_input_too(history: Any, run: Run) -> None:
    result = run("machine", "set", "a", "--file", "-", "--vault", history.url, input=TEXT)
    assert result.exit_code == 0, result.stderr


def test_a_dry_run_checks_everything_and_writes_nothing(
    history: Any, run_json: Callable[..., Any], definition: str
) -> None:
    vault = ("--vault", history.url)
    document = run_json("machine", "set", "web01", "--file", definition, "--dry-run", *vault)
    assert document["dry_run"] is True
    assert document["replaced"] is False
    assert run_json("machine", "list", *vault) == {"machines": []}


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("x", 2, "web.toml: not TOML"),
        (TEXT + "colour = 1\n", 2, r"networks\[0\]: unknown key 'colour'"),
        ('name = "other"\n' + TEXT, 2, "another machine's"),
        (TEXT.replace("web01", "absent"), 3, "the vault has no disk 'absent'"),
        (None, 3, "no such file"),
        (b"\xff\xfe", 2, "not UTF-8"),
    ],
)
def test_what_is_wrong_is_one_line(
    history: Any, run: Run, tmp_path: Path, *, text: str | bytes | None, code: int, message: str
) -> None:
    path = tmp_path / "web.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run("machine", "set", "web01", "--file", str(path), "--vault", history.url)
    assert result.exit_code == code
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr), result.stderr
    assert run("machine", "show", "web01", "--vault", history.url).exit_code == 3


def test_a_disk_belongs_to_one_machine(history: Any, run: Run, definition: str) -> None:
    vault = ("--vault", history.url)
    assert run("machine", "set", "web01", "--file", definition, *vault).exit_code == 0
    result = run("machine", "set", "web02", "--file", definition, *vault)
    assert result.exit_code == 2
    assert "disk web01 belongs to machine web01" in result.stderr


@pytest.mark.parametrize("name", ["", "a/b", "a\x1b[1m", "a" * 241])
def test_a_name_that_is_none_is_wrong_use(
    history: Any, run: Run, definition: str, name: str
) -> None:
    for line in (["machine", "show", name], ["machine", "set", name, "--file", definition]):
        result = run(*line, "--vault", history.url)
        assert result.exit_code == 2, line
        assert "\x1b" not in result.stderr


def test_a_damaged_machine_hides_no_other(
    history: Any, run: Run, run_json: Callable[..., Any], definition: str
) -> None:
    """It is listed as damaged with the reason, and can be set anew."""
    vault = ("--vault", history.url)
    run("machine", "set", "web01", "--file", definition, *vault)
    good = read_object(history.directory, "machines/web01.json")
    damaged = good.replace(b'"web01"', b'"we\x1b01"')
    assert damaged != good
    put_object(history.directory, "machines/bad.json", damaged)
    shown = run("machine", "list", *vault)
    assert shown.exit_code == 0
    assert [line.split()[:2] for line in shown.stdout.splitlines()[1:]] == [
        ["bad", "damaged"], ["web01", "qemu"],
    ]  # fmt: skip
    assert "bad: " in shown.stderr
    rows = run_json("machine", "list", *vault)["machines"]
    assert [row["error"] is None for row in rows] == [False, True]
    assert run("machine", "show", "bad", *vault).exit_code == 6


def test_names_are_completed_from_the_vault(
    history: Any, run: Run, definition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vdiskfs_tools import completion

    monkeypatch.setattr(completion, "ANSWER_S", 30)
    run("machine", "set", "web01", "--file", definition, "--vault", history.url)
    shell = ShellComplete(cli, {}, "vdiskfs", "_VDISKFS_COMPLETE")
    line = ["--vault", history.url, "machine", "show"]
    assert [item.value for item in shell.get_completions(line, "w")] == ["web01"]
    assert shell.get_completions(line, "x") == []
    assert shell.get_completions(["machine", "show"], "") == []
