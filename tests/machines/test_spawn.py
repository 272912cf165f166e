"""spawn: children with the priority of this process, whichever thread has stepped back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.machines.harness import environ, started
from vdiskfs.errors import LocalError
from vdiskfs.machines import spawn as spawn_module
from vdiskfs.machines.hookrun import run_program
from vdiskfs.machines.spawn import spawn

OWN = os.getpriority(os.PRIO_PROCESS, 0)


@pytest.fixture
def stepped_back() -> Iterator[list[int]]:
    """Threads that a test lets step back; they have their priority again at its end."""
    threads: list[int] = []
    yield threads
    for thread in threads:
        os.setpriority(os.PRIO_PROCESS, thread, OWN)


async def step_back(threads: list[int]) -> None:
    """Let the worker that trio takes next step back, further than a capture does."""

    def work() -> None:
        threads.append(threading.get_native_id())
        os.setpriority(os.PRIO_PROCESS, threads[-1], 19)

    await trio.to_thread.run_sync(work)


@pytest.mark.root
@pytest.mark.guest
async def test_a_machine_has_the_priority_of_the_daemon(
    tmp_path: Path, stepped_back: list[int]
) -> None:
    """A worker thread that has captured pages, as trio reuses them, starts none."""
    await step_back(stepped_back)
    done = await trio.run_process(["nice"], capture_stdout=True)
    assert int(done.stdout) == 19, "trio starts it elsewhere now: spawn is not needed any more"
    await step_back(stepped_back)
    async with started(tmp_path / "m") as running:
        assert os.getpriority(os.PRIO_PROCESS, running.pid) == OWN
    await step_back(stepped_back)
    outcome = await run_program(["nice"], environ=environ(), directory=tmp_path, limit_s=30)
    assert int(outcome.output) == OWN


async def test_a_child_s_status_is_returned_as_often_as_it_is_asked() -> None:
    child = await spawn([sys.executable, "-c", "raise SystemExit(7)"])
    assert [await child.wait(), await child.wait()] == [7, 7]
    await child.end()
    assert child.has_ended


async def test_what_cannot_be_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="absent: No such file"):
        await spawn([str(tmp_path / "absent")])


async def test_a_child_that_does_not_heed_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM first, and the signal that nobody can ignore after its time; cancelled or not."""
    monkeypatch.setattr(spawn_module, "END_S", 0.1)
    deaf = "import os, signal; signal.signal(15, signal.SIG_IGN); os.write(1, b'x'); signal.pause()"
    for code, expected in [(deaf, signal.SIGKILL), (deaf.replace("SIG_IGN", "SIG_DFL"), 15)]:
        reading, writing = os.pipe()
        child = await spawn([sys.executable, "-c", code], stdout=writing, stdin=subprocess.DEVNULL)
        os.close(writing)
        async with trio.lowlevel.FdStream(reading) as stream:
            assert await stream.receive_some(10) == b"x"
        with trio.CancelScope() as scope:
            scope.cancel()
            await child.end()
        assert await child.wait() == -expected
