"""vdiskfs_tools.main: global options, errors, exit codes, and misuse."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import trio
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vdiskfs import errors
from vdiskfs_tools import checks, launch, main
from vdiskfs_tools.call import GlobalOption
from vdiskfs_tools.checks import Finding
from vdiskfs_tools.main import cli

Run = Callable[..., Result]

CODES = {0, 1, 2, 3, 4, 5, 6, 7, 130}


def program(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the program as a process of its own."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-m", "vdiskfs_tools", *args],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **more,
    )


def commands() -> list[list[str]]:
    found = []
    for name, command in cli.commands.items():
        inner = command.commands if isinstance(command, click.Group) else {}
        found += [[name, *path] for path in ([], *([inner_name] for inner_name in inner))]
    return found


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make ``vdiskfs completion bash`` raise what a test wants."""

    def fail_with(error: BaseException) -> None:
        def body(**_: object) -> None:
            raise error

        monkeypatch.setattr(cli.commands["completion"], "callback", body)

    return fail_with


TABLE = [
    (errors.VdiskfsError("x"), 1),
    (errors.LocalError("x"), 1),
    (errors.ImageReadError("x"), 1),
    (errors.UsageError("x"), 2),
    (errors.NotFoundError("x"), 3),
    (errors.StateError("x"), 4),
    (errors.AlreadyExistsError("x"), 4),
    (errors.ConflictError("x"), 4),
    (errors.BusyError("x"), 4),
    (errors.WrongVaultError("x"), 4),
    (errors.PassStoppedError("x"), 4),
    (errors.VaultUnreachableError("x"), 5),
    (errors.DamagedError("x"), 6),
    (errors.FormatError("x"), 6),
    (errors.SegmentsGoneError("x"), 6),
    (errors.RefusedError("x"), 7),
    (errors.KeyNeededError("x"), 7),
    (PermissionError(13, "Permission denied", "/f"), 7),
    (OSError(28, "No space left on device", "/f"), 1),
    (click.UsageError("x"), 2),
    (click.Abort(), 130),
    (KeyboardInterrupt(), 130),
    (ZeroDivisionError("x"), 1),
    (trio.TooSlowError("x"), 1),
    (BaseExceptionGroup("g", [ValueError("x"), errors.RefusedError("y")]), 7),
    (BaseExceptionGroup("g", [ExceptionGroup("h", [errors.DamagedError("y")])]), 6),
    (BaseExceptionGroup("g", [errors.RefusedError("y"), KeyboardInterrupt()]), 130),
    (BaseExceptionGroup("g", [ValueError("x")]), 1),
]


@pytest.mark.parametrize(("error", "code"), TABLE, ids=lambda value: type(value).__name__)
def test_each_error_is_one_line_and_its_code(
    failing: Callable[[BaseException], None], run: Run, error: BaseException, code: int
) -> None:
    failing(error)
    result = run("completion", "bash")
    assert result.exit_code == code
    assert result.stdout == ""
    assert re.fullmatch(r"\n?vdiskfs: .+\n", result.stderr)


def test_the_table_has_every_class_of_error() -> None:
    kinds = [getattr(errors, name) for name in dir(errors)]
    known = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception)}
    assert known <= {type(error) for error, _ in TABLE}
    assert {code for _, code in TABLE} == CODES - {0, 5} | {5}


def test_debugging_shows_where(failing: Callable[[BaseException], None], run: Run) -> None:
    failing(errors.NotFoundError("no such thing"))
    assert "Traceback" not in run("completion", "bash").stderr
    result = run("completion", "bash", "--debug")
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("vdiskfs: no such thing\n")
    assert result.exit_code == 3


@pytest.mark.parametrize("flag", ["--json", "--quiet", "-q", "--verbose", "-v", "--debug"])
def test_a_global_option_stands_before_or_after(run: Run, flag: str) -> None:
    for line in ([flag, "disk", "list"], ["disk", flag, "list"], ["disk", "list", flag]):
        assert run(*line).exit_code == 3


def test_an_option_of_the_command_line_is_found_wherever_it_stands(run: Run) -> None:
    for line in (
        ["--json", "completion", "bash"],
        ["completion", "--json", "bash"],
        ["completion", "bash", "--json"],
    ):
        assert json.loads(run(*line).stdout)["shell"] == "bash"


def test_a_call_does_not_know_the_options_of_the_one_before(run: Run) -> None:
    run("completion", "bash", "--json")
    assert not run("completion", "bash").stdout.startswith("{")


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_each_command_has_help(run: Run, path: list[str]) -> None:
    for flag in ("-h", "--help"):
        result = run(*path, flag)
        assert result.exit_code == 0
        assert result.stdout.startswith(f"Usage: vdiskfs {' '.join(path)} ")


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_each_command_takes_the_global_options(path: list[str]) -> None:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    names = {param.name for param in command.params if isinstance(param, GlobalOption)}
    assert names == {"mount", "vault", "key_file", "json", "quiet", "verbose", "debug", "version"}


@pytest.mark.parametrize(
    "line",
    [
        ["nonsense"],
        ["--nonsense"],
        ["disk", "nonsense"],
        ["disk", "show"],
        ["disk", "show", "a", "b"],
        ["point", "list", "a", "--limit", "many"],
        ["-m"],
        ["completion"],
        ["--json"],
        [""],
        ["status", "extra"],
    ],
)
def test_wrong_use_is_one_line_and_exit_2(run: Run, line: list[str]) -> None:
    result = run(*line)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.fullmatch(r"vdiskfs: .*'vdiskfs[a-z ]* --help'\.\n", result.stderr)


@pytest.mark.parametrize("line", [[], ["disk"], ["point"], ["vault"]])
def test_a_group_alone_shows_its_help(run: Run, line: list[str]) -> None:
    result = run(*line)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Commands:" in result.stderr


def test_what_help_imports_is_little() -> None:
    check = (
        "import sys; from vdiskfs_tools.main import main\n"
        "sys.argv = ['vdiskfs', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "slow = {'rich', 'httpx', 'trio', 'numpy', 'azure', 'asyncio', 'starlette', 'msgpack',"
        " 'zstandard', 'logging', 'subprocess', 'tomllib', 'vdiskfs.native', 'vdiskfs.catalog'}\n"
        "print(len(sys.modules), sorted(slow & set(sys.modules)), file=sys.stderr)"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-S", "-c", check],
        env={"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    count, _, slow = result.stderr.strip().partition(" ")
    assert slow == "[]"
    # 141 when this was written; httpx alone brings 300 more.
    assert int(count) < 200


def test_the_version_is_printed(run: Run) -> None:
    for line in (["--version"], ["disk", "list", "--version"]):
        result = run(*line)
        assert result.exit_code == 0
        assert result.stdout.startswith("vdiskfs")


def test_the_program_is_a_process_too() -> None:
    result = program("status", "-m", "/nowhere")
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr == "vdiskfs: /nowhere: no mount of vdiskfs runs there\n"


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        process = subprocess.run(
            [sys.executable, "-m", "vdiskfs_tools", "completion", "zsh"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=tmp_path,
        )
    finally:
        os.close(writing)
    assert process.stderr == ""
    assert process.returncode in CODES


def test_an_interruption_is_130(daemon: Any, tmp_path: Path) -> None:
    daemon.answer("GET", "/status", "hang")
    starter = (
        "import sys, pathlib\n"
        "from vdiskfs import registry\n"
        f"registry.registry_directory = lambda: pathlib.Path({str(tmp_path / 'registry')!r})\n"
        "from vdiskfs_tools.main import main\n"
        "sys.argv = ['vdiskfs', 'status']\n"
        "main()"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        [sys.executable, "-c", starter],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert daemon.wait_asked(30)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "\nvdiskfs: interrupted\n"


def test_warnings_of_the_library_are_shown(
    monkeypatch: pytest.MonkeyPatch, run: Run, expect_log: Callable[..., None]
) -> None:
    expect_log("slow")
    logger = logging.getLogger("vdiskfs.test")
    before = len(logging.getLogger("vdiskfs").handlers)

    def body(**_: object) -> None:
        logger.warning("slow \x1b[1mvault")
        logger.info("detail")
        logger.debug("more")

    monkeypatch.setattr(cli.commands["completion"], "callback", body)
    shown = {flags: run("completion", "bash", *flags).stderr for flags in [(), ("-q",), ("-v",)]}
    assert shown[()] == "vdiskfs: slow vault\n"
    assert shown[("-q",)] == ""
    assert shown[("-v",)] == "vdiskfs: slow vault\nvdiskfs: detail\n"
    assert len(logging.getLogger("vdiskfs").handlers) == before


WORDS = [
    *{word for path in commands() for word in path},
    *{name for command in cli.commands.values() for param in command.params for name in param.opts},
    *("--dry-run", "--force", "--watch", "--limit", "--since", "--until", "--label", "--wait"),
    *("--read-data", "--disk", "--consistency", "crash", "bash", "--", "-", "", "=", "--json=1"),
    *("web01", "web01@latest", "web01@-15m", "web01@#1", "@", "a/b", "\0", "\ud800", "\x1b[2J"),
    *("-15m", "999999999999999999999", "-1", "file:///nowhere/at/all", "azure://x", "azure://aaa"),
    *("/nowhere", "/proc", "out.img", "."),
]


@pytest.fixture
def harmless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no misuse reach this host: no daemon starts, no file outside is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "start", lambda _: 1)
    monkeypatch.setattr(launch, "run_in_place", lambda _: sys.exit(0))
    monkeypatch.setattr(checks, "host_findings", lambda _: [Finding("kernel", "ok", "6")])
    for name in list(os.environ):
        if name.startswith(("AZURE_", "VDISKFS_MOUNT")):
            monkeypatch.delenv(name)
    real_mkdir = os.mkdir

    def mkdir(path: Any, *args: Any, **more: Any) -> None:
        if os.fspath(path).startswith("/nowhere"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        real_mkdir(path, *args, **more)

    monkeypatch.setattr(os, "mkdir", mkdir)


@pytest.mark.usefixtures("harmless")
@settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=6))
def test_misuse_is_a_code_of_the_table_and_never_a_traceback(line: list[str]) -> None:
    result = CliRunner().invoke(cli, line)
    assert result.exit_code in CODES
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "a fault of vdiskfs itself" not in result.stderr
    if "--debug" not in line:
        assert "Traceback" not in result.output
    if "--json" in line and result.exit_code == 0 and not {"-h", "--help", "--version"} & set(line):
        json.loads(result.stdout)


def test_the_entry_point_is_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vdiskfs", "completion", "fish"])
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 0
    assert "complete" in capsys.readouterr().out


def test_no_command_leaves_a_core_file() -> None:
    """Keys are in its memory. The soft limit of this process is raised for it, where it may be."""
    code = (
        "import resource as r; hard = r.getrlimit(r.RLIMIT_CORE)[1];"
        "r.setrlimit(r.RLIMIT_CORE, (hard, hard));"
        "from vdiskfs_tools import main; main.cli.main = lambda **_: "
        "print(hard != 0, r.getrlimit(r.RLIMIT_CORE)); main.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    assert done.stdout in ("True (0, 0)\n", "False (0, 0)\n")
