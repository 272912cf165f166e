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


DYING = """
    import time
    if not kept:
        store.push("connection", os.memfd_create("kept"))
    plain = os.environ.get("VDISKFS_PLAIN", "")
    number = sum(name.startswith("life") for name in kept)
    note(plain=plain, number=number)
    store.push(f"life{number}", os.memfd_create("kept"))
    store.ready("serves")
"""


def test_after_the_third_death_the_plain_one_is_started_and_hands_over(
    keep: Callable[[str], subprocess.Popen[str]],
) -> None:
    process = keep(f"""{DYING}
    if number == 2:
        store.failed("ValueError: too\\nhostile")
        sys.exit(1)
    sys.exit({{3: 75, 5: 75, 7: 0}}.get(number, 1))
    """)
    out, log = process.communicate(timeout=60)
    found = [str(one["plain"]) for one in notes(out)]
    often = "the daemon died 3 times within 60 s; the last one ended with status 1"
    assert found == [
        "", "", "", f"600 {often}: ValueError: too hostile",
        # It hands over. The next daemon is on trial: it dies once.
        "", "1200 the daemon died again; the last one ended with status 1",
        "", "2400 the daemon died again; the last one ended with status 1",
    ]  # fmt: skip
    assert process.returncode == 0
    assert log.count("again now") == 2
    assert log.count("CRITICAL") == 3
    assert "served plainly, untracked, for 600 s or until vdiskfs upgrade" in log


def test_a_plain_one_that_dies_stays_plain_and_pauses(
    keep: Callable[[str], subprocess.Popen[str]],
) -> None:
    process = keep(f"""{DYING}
    note(at=time.monotonic())
    sys.exit(0 if number == 6 else 1)
    """)
    out, log = process.communicate(timeout=60)
    found = notes(out)
    assert [bool(one["plain"]) for one in found[::2]] == [False] * 3 + [True] * 4
    times = [float(str(one["at"])) for one in found[1::2]]
    assert times[6] - times[5] >= 1.0
    assert log.count("the plain daemon ended with status 1; it is started again in 1 s") == 1


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


def test_a_burst_waits_for_a_keeper_that_has_no_processor(
    keep: Callable[[str], subprocess.Popen[str]],
) -> None:
    process = keep("""
        import threading
        if not kept:
            store.push("connection", os.memfd_create("kept"))
            store.ready("serves")
            os.kill(os.getppid(), signal.SIGSTOP)
            threading.Timer(0.2, os.kill, (os.getppid(), signal.SIGCONT)).start()
            note(all=all(store.push(f"file{n}", 2) for n in range(40)))
            os.kill(os.getpid(), signal.SIGKILL)
        note(count=len(kept))
    """)
    out, _ = process.communicate(timeout=60)
    assert notes(out) == [{"all": True, "start": 0}, {"count": 41, "start": 41}]


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
