"""vdiskfs_tools.launch: a daemon is started, waited for, and ended when it cannot be."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vdiskfs.config import MountSettings
from vdiskfs.errors import BusyError, LocalError
from vdiskfs_tools import launch

PRELUDE = """
import argparse, json, os, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--settings-fd", type=int)
parser.add_argument("--ready-fd", type=int)
parser.add_argument("--foreground", action="store_true")
given = parser.parse_args()
settings = json.load(os.fdopen(given.settings_fd))
def say(document):
    os.write(given.ready_fd, (json.dumps(document) + "\\n").encode())
"""


@pytest.fixture
def settings(tmp_path: Path) -> MountSettings:
    state = tmp_path / "a" / "state"
    return MountSettings("/srv", "/mnt/vd", "file:///v", "here", str(state))


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program that is started in the place of the daemon."""
    path = tmp_path / "program.py"

    def command(descriptor: int) -> list[str]:
        return [sys.executable, str(path), "--settings-fd", str(descriptor)]

    monkeypatch.setattr(launch, "_command", command)
    return path


def write(path: Path, body: str) -> None:
    path.write_text(PRELUDE + textwrap.dedent(body))


def test_it_gets_its_settings_and_goes_on(
    program: Path, settings: MountSettings, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    write(program, f"""
        open({str(seen)!r}, "w").write(json.dumps([settings, os.getcwd(), os.getsid(0)]))
        say({{"ok": True, "pid": os.getpid()}})
        print("in the background")
    """)  # fmt: skip
    pid = launch.start(settings)
    os.waitpid(pid, 0)
    got, place, session = json.loads(seen.read_text())
    assert MountSettings.from_json(json.dumps(got)) == settings
    assert (place, session) == ("/", pid)
    assert Path(settings.state, "daemon.log").read_text() == "in the background\n"
    assert Path(settings.state).stat().st_mode & 0o777 == 0o700


def test_its_error_keeps_its_class(program: Path, settings: MountSettings) -> None:
    write(program, """
        say({"error": {"kind": "BusyError", "message": "m", "hint": "h", "exit_code": 4}})
    """)  # fmt: skip
    with pytest.raises(BusyError, match="m; h"):
        launch.start(settings)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit(3)", "ended with status 3"),
        ("sys.exit('the core is missing')", "the core is missing"),
        ("raise RuntimeError('deep')", "RuntimeError: deep"),
        ("say(None)", "gives no reason"),
        ("os.write(given.ready_fd, b'{\\n')", "gives no reason"),
        ("os.kill(os.getpid(), 9)", "status -9"),
        ("os.write(given.ready_fd, b'no end of the line')", "ended with status 0"),
    ],
)
def test_an_end_without_a_word_is_one_line(
    program: Path, settings: MountSettings, body: str, said: str
) -> None:
    write(program, body)
    with pytest.raises(LocalError, match=said) as caught:
        launch.start(settings)
    assert "\n" not in str(caught.value)


def test_an_older_log_is_not_quoted(program: Path, settings: MountSettings) -> None:
    write(program, "sys.exit('first')")
    with pytest.raises(LocalError, match="first"):
        launch.start(settings)
    write(program, "sys.exit(1)")
    with pytest.raises(LocalError) as caught:
        launch.start(settings)
    assert "first" not in str(caught.value)


def test_a_state_that_is_a_file_is_one_line(
    program: Path, settings: MountSettings, tmp_path: Path
) -> None:
    write(program, "")
    (tmp_path / "a").mkdir()
    Path(settings.state).write_text("")
    with pytest.raises(LocalError, match="not a directory"):
        launch.start(settings)


def test_an_interruption_ends_it(settings: MountSettings, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    write(program, f"""
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        os.kill(os.getppid(), 2)
        time.sleep(60)
    """)  # fmt: skip
    starter = textwrap.dedent(f"""
        import sys
        from vdiskfs.config import MountSettings
        from vdiskfs_tools import launch
        launch._command = lambda fd: [sys.executable, {str(program)!r}, "--settings-fd", str(fd)]
        try:
            launch.start(MountSettings.from_json({settings.to_json()!r}))
        except KeyboardInterrupt:
            sys.exit(130)
    """)
    paths = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-c", starter],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 130, result.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


def test_in_the_foreground_it_is_the_same_process(settings: MountSettings, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    write(program, """
        print(json.dumps([os.getpid(), settings["site"], given.foreground, given.ready_fd]))
        sys.exit(4)
    """)  # fmt: skip
    starter = textwrap.dedent(f"""
        import sys
        from vdiskfs.config import MountSettings
        from vdiskfs_tools import launch
        launch._command = lambda fd: [sys.executable, {str(program)!r}, "--settings-fd", str(fd)]
        launch.run_in_place(MountSettings.from_json({settings.to_json()!r}))
    """)
    paths = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        [sys.executable, "-c", starter],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
    ) as process:
        out, _ = process.communicate(timeout=60)
    assert json.loads(out) == [process.pid, "here", True, None]
    assert process.returncode == 4


def test_settings_are_in_no_argument_list() -> None:
    assert launch._command(7)[1:] == ["-m", "vdiskfs.keeper", "--settings-fd", "7"]
