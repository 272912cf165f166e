"""A freeze that fails: everything is thawed at the limit or sooner, and the point says so."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.fakeagent import FakeAgent
from tests.e2e.mounted import MountedSite
from tests.e2e.resting import SIZES, Writers, on_disk, unclean

pytestmark = [pytest.mark.e2e, pytest.mark.root]
LIMIT_S = 2.0
HOLDER = (sys.executable, "-m", "vdiskfs.quiesce.holder")
COMMAND = ("point", "create", "web01", "--consistency", "application", "--wait")


def options(agent: FakeAgent | None, more: str = "") -> str:
    line = "" if agent is None else f'agent = "{agent.path}"\n'
    return (
        f"epoch_interval_s = 0.2\nfreeze_limit_s = {LIMIT_S}\n"
        f"[quiesce.web01]\nfilesystem = true\n{line}{more}"
    )


@contextlib.contextmanager
def site_with_writers(
    directory: Path, agent: FakeAgent | None, more: str = "", crash: str = "", deaths: int = 1000
) -> Iterator[tuple[MountedSite, Writers]]:
    """A mount with an ext4 on its disk, and writers in that, at work."""
    environ = {"VDISKFS_DEATHS": str(deaths)} | ({"VDISKFS_CRASH": crash} if crash else {})
    with MountedSite(directory, options=options(agent, more), environ=environ) as site:
        site.add_image("web01", SIZES["ext4"])
        site.init().mount()
        site.wait_shipped("web01")
        with on_disk(site, "ext4", directory / "fs") as root, Writers(root) as writers:
            writers.wait_more(5)
            yield site, writers


def create(site: MountedSite, code: int) -> str:
    return site.run("-m", site.mountpoint, *COMMAND, code=code).stderr


def newest(site: MountedSite) -> str:
    """The consistency of the newest point of those that were asked for."""
    consistency: str = site.points("web01")[-1]["consistency"]
    return consistency


def events(site: MountedSite, kind: str) -> list[str]:
    found = site.json("event", "list")["events"]
    return [one["text"] for one in found if one["kind"] == kind]


def wait_no_note(site: MountedSite) -> None:
    """Wait until nothing is noted to be frozen."""
    site.wait("nothing is frozen", lambda: not list((site.state / "quiesce").iterdir()))


@pytest.mark.slow
def test_a_guest_that_hangs_in_freeze_is_thawed_at_the_limit(tmp_path: Path) -> None:
    """Writes resume, the point says crash-consistent, an event says why; later all is well."""
    with FakeAgent() as agent, site_with_writers(tmp_path, agent) as (site, writers):
        agent.freezing.clear()
        writers.longest_s = 0.0
        said = create(site, code=1)
        assert "crash-consistent only" in said
        assert "no answer in time" in said
        assert said.count("\n") == 1
        # Writers are held up for the limit, not for as long as the guest hangs.
        writers.wait_more(10)
        assert LIMIT_S / 2 < writers.longest_s < LIMIT_S + 15
        assert not any(one["consistency"] == "application" for one in site.points("web01"))
        assert any("crash-consistent: guest agent" in one for one in events(site, "point"))
        # Nobody knows yet whether the guest froze: another point does not freeze it anew.
        assert "has not said that it is thawed" in create(site, code=1)
        assert agent.asked.count("guest-fsfreeze-freeze") == 1
        # It wakes up, freezes late, and finds that it was told to thaw meanwhile.
        agent.freezing.set()
        agent.wait_asked("guest-fsfreeze-thaw")
        wait_no_note(site)
        assert not agent.frozen
        assert create(site, code=0) == ""
        assert agent.asked.count("guest-fsfreeze-freeze") == 2
        assert not agent.frozen


@pytest.mark.slow
def test_a_guest_that_never_answers_costs_no_more_than_the_limit(tmp_path: Path) -> None:
    with (
        FakeAgent(deaf=("guest-fsfreeze-freeze",)) as agent,
        site_with_writers(tmp_path, agent) as (site, writers),
    ):
        create(site, code=1)
        writers.wait_more(10)
        began = time.monotonic()
        writers.wait_more(10)
        assert time.monotonic() - began < 30
        assert [one for one in site.points("web01") if one["consistency"] == "application"] == []
        assert events(site, "point")


@pytest.mark.slow
def test_an_agent_that_is_away_or_freezes_nothing_makes_no_label(tmp_path: Path) -> None:
    """Nobody listens; the agent is deaf; it finds nothing to freeze: each is said."""
    with FakeAgent() as agent, site_with_writers(tmp_path, agent) as (site, writers):
        agent.count = 0
        assert "no file system that it can freeze" in create(site, code=1)
        agent.path.rename(agent.path.with_suffix(".away"))
        assert "nobody listens" in create(site, code=1)
        agent.path.with_suffix(".away").rename(agent.path)
        agent.count = 3
        assert create(site, code=0) == ""
        writers.wait_more(5)


@pytest.mark.slow
def test_a_guest_that_somebody_thaws_before_the_seal_gets_no_label(tmp_path: Path) -> None:
    """What counts is the status before the thaw."""
    with FakeAgent() as agent, site_with_writers(tmp_path, agent) as (site, _):
        # The second answer to a question for the status: as if it was thawed meanwhile.
        act = agent._act
        asked: list[str] = []

        def thawed_meanwhile(command: str, arguments: dict[str, object]) -> dict[str, object]:
            if command == "guest-fsfreeze-status":
                asked.append(command)
                if len(asked) == 2:
                    agent.frozen = False
            return act(command, arguments)

        agent._act = thawed_meanwhile  # type: ignore[method-assign]
        assert "somebody else thawed it" in create(site, code=1)
        assert not any(one["consistency"] == "application" for one in site.points("web01"))
        assert create(site, code=0) == ""


@pytest.mark.slow
def test_hooks_run_around_the_freeze_and_one_that_hangs_is_ended(tmp_path: Path) -> None:
    """The order is before, freeze, thaw, after; what they are told; a failure makes no label."""
    told = tmp_path / "told"
    hook = tmp_path / "hook"
    hook.write_text(
        "#!/bin/sh\n"
        f'echo "$VDISKFS_HOOK $VDISKFS_DISK $VDISKFS_POINT $VDISKFS_CONSISTENCY" >>{told}\n'
        f"env | grep -q AZURE && echo credentials >>{told}\n"
        f"[ ! -e {tmp_path}/hang ] || [ $VDISKFS_HOOK = after ] || exec sleep 1000\n"
        f"[ ! -e {tmp_path}/fail ] || [ $VDISKFS_HOOK = before ] || {{ echo no disk; exit 3; }}\n"
    )
    hook.chmod(0o755)
    more = f'before = ["{hook}"]\nafter = ["{hook}", "x"]\nhook_limit_s = 2\n'
    with (
        FakeAgent() as agent,
        site_with_writers(tmp_path, agent, more) as (site, writers),
    ):
        create(site, code=0)
        wait_no_note(site)
        epoch = [one for one in site.points("web01") if one["consistency"] == "application"][-1]
        assert told.read_text().splitlines() == [
            "before web01  ", f"after web01 web01@#{epoch['epoch']} application",
        ]  # fmt: skip
        told.unlink()
        (tmp_path / "hang").touch()
        assert "hook before: not done within 2 s" in create(site, code=1)
        writers.wait_more(10)
        wait_no_note(site)
        assert told.read_text().splitlines() == ["before web01  ", "after web01  crash"]
        assert agent.asked.count("guest-fsfreeze-freeze") == 1
        (tmp_path / "hang").unlink()
        (tmp_path / "fail").touch()
        # What comes after says nothing of the point; it is an event.
        assert create(site, code=0) == ""
        wait_no_note(site)
        assert any("hook after: exit 3: no disk" in one for one in events(site, "quiesce"))


HOOKS = (
    "quiesce.noted", "quiesce.frozen", "quiesce.sealed", "quiesce.thawed", "quiesce.captured",
    "holder.taken", "holder.frozen", "holder.thawed", "holder.over",
)  # fmt: skip
LATE = ("quiesce.captured", "holder.over")
"""Passed when the point is made and nothing is frozen any more."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("who", ["quiesce", "holder"])
def test_whoever_dies_the_file_system_and_the_guest_are_thawed(tmp_path: Path, who: str) -> None:
    """The daemon or the holder is killed at each step: writes go on, and the next point is well.

    One daemon after the other; each takes over the mount with the next hook to die at.
    """
    hooks = [name for name in HOOKS if name.startswith(who)]
    crash = ",".join(f"{name}:1" for name in hooks)
    with FakeAgent() as agent, site_with_writers(tmp_path, agent, crash=crash) as (site, writers):
        for name in hooks:
            before, count = site.pid, len(rested(site))
            status = site.run_any("-m", site.mountpoint, *COMMAND)
            assert (status == 0) == (name == "holder.over"), name
            writers.wait_more(20)
            agent.wait_thawed()
            if who == "holder":
                assert site.json("status")["pid"] == before
                wait_no_note(site)
                site.kill_daemon()
            else:
                site.wait_successor(before, {"web01"})
                wait_no_note(site)
            # Epochs are shipped in order: what was made before a later one is there by then.
            seen = site.points("web01")[-1]["epoch"]
            site.wait("later points", lambda: site.points("web01")[-1]["epoch"] > seen + 2)
            made = rested(site)[count:]
            assert len(made) == (name in LATE), (name, made)
            assert all(unclean("ext4", one, tmp_path) == "" for one in made)
        create(site, code=0)
        assert unclean("ext4", rested(site)[-1], tmp_path) == ""


def rested(site: MountedSite) -> list[Path]:
    """The images of the application-consistent points."""
    return [site.point("web01", "@" + one["time"]) for one in site.points("web01")
            if one["consistency"] == "application"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_when_daemon_and_holder_die_the_next_daemon_thaws(tmp_path: Path, plain: bool) -> None:
    """Nobody is left who knows, but the note; the next one may be the plain daemon."""
    with (
        FakeAgent() as agent,
        site_with_writers(tmp_path, agent, deaths=1 if plain else 1000) as (site, writers),
    ):
        agent.freezing.clear()  # the file system is frozen meanwhile
        asking = site.begin("-m", site.mountpoint, *COMMAND)
        agent.wait_asked("guest-fsfreeze-freeze")
        [holder] = holders(site)
        before = site.pid
        os.kill(before, signal.SIGSTOP)  # it shall not see that the holder dies
        os.kill(holder, signal.SIGKILL)
        assert list((site.state / "quiesce").iterdir()), "nothing was noted"
        os.kill(before, signal.SIGKILL)
        asking.wait()
        agent.freezing.set()
        writers.wait_more(20)
        agent.wait_thawed()
        wait_no_note(site)
        site.wait("a successor", lambda: site.json("status")["pid"] != before)
        site.pid = site.json("status")["pid"]
        assert (site.json("status")["plain"] is not None) == plain
        if not plain:
            assert any("nothing is frozen any more" in one for one in events(site, "quiesce"))


@pytest.mark.slow
def test_points_that_are_asked_for_at_once_wait_for_each_other(tmp_path: Path) -> None:
    """The second one finds the first at work, and its hooks; it is as good."""
    hook = tmp_path / "hook"
    hook.write_text("#!/bin/sh\nexec sleep 1\n")
    hook.chmod(0o755)
    more = f'before = ["/bin/true"]\nafter = ["{hook}"]\n'
    with FakeAgent() as agent, site_with_writers(tmp_path, agent, more) as (site, _):
        asking = [site.begin("-m", site.mountpoint, *COMMAND) for _ in range(3)]
        assert [one.wait(120) for one in asking] == [0, 0, 0]
        assert agent.asked.count("guest-fsfreeze-freeze") == 3


def holders(site: MountedSite) -> list[int]:
    """Return the processes that hold something frozen for a mount."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                if b"vdiskfs.quiesce.holder" in words and str(site.state).encode() in b" ".join(
                    words
                ):
                    found.append(int(path.name))
    return found


def test_what_nobody_tells_to_thaw_is_thawed_at_the_limit(tmp_path: Path) -> None:
    """The daemon lives, and its seal takes for ever."""
    note, limit_s = tmp_path / "1.json", 0.5
    with FakeAgent() as agent, contextlib.ExitStack() as stack:
        target = {"kind": "agent", "path": str(agent.path)}
        note.write_text(json.dumps(
            {"format": 1, "limit_s": limit_s, "label": "", "targets": [target], "disks": []}
        ))  # fmt: skip
        ours, theirs = (stack.enter_context(one) for one in socket.socketpair())
        holder = subprocess.Popen([*HOLDER, str(note)], stdin=theirs.fileno())
        stack.callback(holder.wait)
        stack.callback(holder.kill)
        said = stack.enter_context(ours.makefile("r"))
        assert json.loads(said.readline())["step"] == "ready"
        ours.sendall(b'{"do": "freeze"}\n')
        assert json.loads(said.readline())["step"] == "frozen"
        assert agent.frozen
        begin = time.monotonic()
        agent.wait_thawed()
        assert time.monotonic() - begin >= limit_s / 2
        verdict = json.loads(said.readline())
        assert (verdict["held"], verdict["why"]) == (
            False, "thawed after 0.5 s: it was not sealed by then",
        )  # fmt: skip
        assert holder.wait(60) == 0
        assert not note.exists()
