"""vdiskfs.keeper: keeps what it is given, starts the next daemon, knows when to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PRELUDE = """
import argparse, json, os, signal, sys
from vdiskfs.fdstore import FdStore, take_descriptors
parser = argparse.ArgumentParser()
parser.add_argument("--settings-fd", type=int)
parser.add_argument("--ready-fd", type=int)
given = parser.parse_args()
store, kept = FdStore.take(), take_descriptors()
settings = os.fdopen(given.settings_fd).read()
def note(**what):
    print(json.dumps(what | {"start": len(kept)}), flush=True)
"""


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a keeper of a daemon with this body."""
    started = []

    def start(body: str) -> subprocess.Popen[str]:
        program = tmp_path / "daemon.py"
        program.write_text(PRELUDE + textwrap.dedent(body))
        settings = os.memfd_create("settings")
        os.write(settings, b"the settings")
        process = subprocess.Popen(
            [
                sys.executable, "-m", "vdiskfs.keeper", "--settings-fd", str(settings), "--",
                sys.executable, str(program),
            ],
            pass_fds=[settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(settings)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def notes(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


def test_what_it_was_given_the_next_one_finds(keep: Callable[[str], subprocess.Popen[str]]) -> None:
    process = keep("""
        if not kept:
            reading = os.memfd_create("connection")
            os.write(reading, b"from the dead")
            store.push("connection", reading)
            store.push("gone", reading)
            store.push("late", reading)
            store.remove("gone")
            store.ready("serves")
            store.push("last", reading)
            os.kill(os.getpid(), signal.SIGKILL)
        note(names=sorted(kept), text=os.pread(kept["connection"], 99, 0).decode(), settings=settings,
             environment=[key for key in os.environ if key.startswith(("LISTEN", "NOTIFY"))])
    """)
    out, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert notes(out) == [
        {
            "names": ["connection", "last", "late"], "text": "from the dead",
            "settings": "the settings", "environment": [], "start": 3,
        }
    ]  # fmt: skip
    assert "killed by signal 9; it is started again now" in log


def test_an_orderly_end_and_a_start_that_failed_are_the_end(
    keep: Callable[[str], subprocess.Popen[str]],
) -> None:
    for body, status in (("store.ready('serves')", 0), ("sys.exit(5)", 5)):
        process = keep(body)
        process.communicate(timeout=60)
        assert process.returncode == status
    process = keep("os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def test_handing_over_is_no_death(keep: Callable[[str], subprocess.Popen[str]]) -> None:
    process = keep("""
        store.push("connection" if not kept else "more", os.memfd_create("kept"))
        store.ready("serves")
        note()
        sys.exit(0 if "more" in kept else 75)
    """)
    out, log = process.communicate(timeout=60)
    assert [one["start"] for one in notes(out)] == [0, 1, 2]
    assert process.returncode == 0
    assert "again" not in log


def test_the_third_death_in_a_row_is_followed_by_a_pause(
    keep: Callable[[str], subprocess.Popen[str]],
) -> None:
    process = keep("""
        import time
        note(at=time.monotonic())
        store.push("connection" if not kept else "more", os.memfd_create("kept"))
        store.ready("serves")
        if len(kept) == 3:
            sys.exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    out, log = process.communicate(timeout=60)
    times = [float(str(one["at"])) for one in notes(out)]
    assert len(times) == 4
    assert times[3] - times[2] >= 1.0
    assert log.count("again now") == 2
    assert log.count("again in 1 s") == 1


def test_a_signal_reaches_the_daemon_once(keep: Callable[[str], subprocess.Popen[str]]) -> None:
    process = keep("""
        store.push("connection", os.memfd_create("kept"))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        store.ready("serves")
        note()
        first = signal.sigwait({signal.SIGINT, signal.SIGTERM})
        note(first=int(first), others=[int(one) for one in signal.sigpending()])
    """)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert notes(out) == [{"first": int(signal.SIGINT), "others": [], "start": 0}]
    assert process.returncode == 0


def test_a_daemon_that_left_no_connection_is_not_started_again(
    keep: Callable[[str], subprocess.Popen[str]],
) -> None:
    process = keep("""
        note()
        store.ready("serves")
        sys.exit(1)
    """)
    out, log = process.communicate(timeout=60)
    assert len(notes(out)) == 1
    assert "the mount is lost" in log
    assert process.returncode == 1


def test_only_the_daemon_is_listened_to(keep: Callable[[str], subprocess.Popen[str]]) -> None:
    process = keep("""
        if not kept:
            store.push("connection", os.memfd_create("kept"))
            store.ready("serves")
            if os.fork() == 0:
                store.push("foreign", 2)
                os._exit(0)
            os.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        note(names=sorted(kept))
    """)
    out, _ = process.communicate(timeout=60)
    assert notes(out)[0]["names"] == ["connection"]
