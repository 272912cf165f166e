"""Groups at rest, points on schedule, and what the names of points mean then."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.e2e.fakeagent import FakeAgent
from tests.e2e.loopdev import run_tool
from tests.e2e.mounted import MountedSite
from tests.e2e.resting import SIZES, Writers, on_disk, unclean

pytestmark = [pytest.mark.e2e, pytest.mark.root]
NAMES = ("data", "logs")


def rested(site: MountedSite, name: str) -> list[dict[str, object]]:
    return [one for one in site.points(name) if one["consistency"] == "application"]


@pytest.mark.slow
def test_a_group_rests_as_a_whole_or_has_no_label(tmp_path: Path) -> None:
    """Two file systems and one guest: all frozen, one seal, all thawed; if one fails, no label."""
    with FakeAgent() as agent:
        # The guest has both disks; of the host each has a file system besides.
        conf = "epoch_interval_s = 0.2\nheartbeat_s = 1\nfreeze_limit_s = 5\n" + "".join(
            f'[quiesce.{name}]\nagent = "{agent.path}"\nfilesystem = true\n' for name in NAMES
        )
        with contextlib.ExitStack() as stack:
            site = stack.enter_context(MountedSite(tmp_path, options=conf))
            for name in NAMES:
                site.add_image(name, SIZES["ext4"])
            site.init().mount()
            for name in NAMES:
                site.wait_shipped(name)
            site.run("-m", site.mountpoint, "group", "create", "shop", *NAMES)
            writers = []
            for name in NAMES:
                root = stack.enter_context(on_disk(site, "ext4", tmp_path / name, name))
                writers.append(stack.enter_context(Writers(root, 1)))
            words = ("point", "create", "shop", "--consistency", "application", "--wait")
            for one in writers:
                one.wait_more(5)
            made = site.json(*words)
            assert [row["consistency"] for row in made["points"]] == ["application"] * 2
            assert made["fell_back"] is None
            assert agent.asked.count("guest-fsfreeze-freeze") == 1, "one guest, frozen once"
            [shared] = [row for row in site.points("shop") if row["consistency"] == "application"]
            epochs = {row["disk"]: row["epoch"] for row in shared["disks"]}
            assert epochs == {row["disk"]: row["epoch"] for row in made["points"]}
            for name in NAMES:
                image = site.point(name, "latest-application-consistent")
                assert unclean("ext4", image, tmp_path) == ""
                link = (site.mountpoint / "recovery-points" / name
                        / "latest-application-consistent").readlink()  # fmt: skip
                assert str(link).startswith("20")
            # A drill of the group starts at it, whatever is newer.
            for one in writers:
                one.wait_more(5)
            site.wait("newer points", lambda: site.points("data")[-1]["epoch"] > epochs["data"])
            drill = site.json("failover", "test", "shop", "--point",
                              "latest-application-consistent", "--name", "d", "--vm", "none")  # fmt: skip
            assert {row["disk"]: row["epoch"] for row in drill["disks"]} == epochs
            site.run("-m", site.mountpoint, "failover", "cleanup", "d")
            # One of three fails: nobody gets the label, everybody goes on.
            agent.count = 0
            assert "no file system" in site.run("-m", site.mountpoint, *words, code=1).stderr
            for one in writers:
                one.wait_more(5)
            assert [len(rested(site, name)) for name in NAMES] == [1, 1]
            wanted = site.point("logs", "latest-application-consistent")
            out = tmp_path / "restored.img"
            site.run("-m", site.mountpoint, "point", "restore",
                     "logs@latest-application-consistent", out)  # fmt: skip
            assert run_tool(["cmp", out, wanted]) == ""


@pytest.mark.slow
def test_points_are_made_on_schedule_and_not_of_what_nobody_can_bring_to_rest(
    tmp_path: Path,
) -> None:
    with FakeAgent() as agent:
        conf = (
            "epoch_interval_s = 0.2\nheartbeat_s = 1\napplication_interval_s = 10\n"
            f'[quiesce.data]\nagent = "{agent.path}"\n'
        )
        with MountedSite(tmp_path, options=conf) as site:
            for name in NAMES:
                site.add_image(name, 1 << 20)
            site.init().mount()
            for name in NAMES:
                site.wait_shipped(name)
            words = ("point", "create", "logs", "--consistency", "application")
            said = site.run("-m", site.mountpoint, *words, code=4).stderr
            assert "nothing says how it is brought to rest; add [quiesce.logs]" in said

            def write(number: int) -> None:
                for name in NAMES:
                    with site.image(name).open("r+b") as file:
                        file.write(bytes([number]) * 4096)

            for number in range(3):
                write(number)
                site.wait("a point on schedule", lambda: len(rested(site, "data")) > number, 90)
            asked = agent.asked.count("guest-fsfreeze-freeze")
            assert asked == 3
            assert rested(site, "logs") == []
            # A disk that nobody changes rests anyway: its guest is not disturbed for nothing.
            agent.changed.acquire()
            agent.changed.wait_for(lambda: len(agent.asked) > 10_000, 25)
            agent.changed.release()
            assert agent.asked.count("guest-fsfreeze-freeze") == asked
            # A group of which not all is known has none; an event says so.
            site.run("-m", site.mountpoint, "group", "create", "shop", *NAMES)

            def told() -> bool:
                events = site.json("event", "list")["events"]
                return any("not all of its disks" in one["text"] for one in events)

            site.wait("an event", told, 90)


@pytest.mark.slow
def test_a_guest_of_libvirt_is_asked_through_virsh(tmp_path: Path) -> None:
    """A virsh of ours passes on to an agent what libvirt's would."""
    tools = tmp_path / "bin"
    tools.mkdir()
    with FakeAgent() as agent:
        virsh = tools / "virsh"
        virsh.write_text(
            "#!/usr/bin/env python3\nimport json, socket, sys\n"
            "words = [word for word in sys.argv[1:] if word != '--quiet']\n"
            "if words[0] == 'domstate':\n    print('running'); sys.exit()\n"
            "assert words[:2] == ['qemu-agent-command', 'web'] and words[3] == '--timeout', words\n"
            f"line = socket.socket(socket.AF_UNIX); line.connect('{agent.path}')\n"
            "line.sendall(words[2].encode() + b'\\n'); answer = line.recv(65536)\n"
            "if b'error' in answer:\n"
            "    sys.exit('error: internal error: unable to execute QEMU agent command')\n"
            "print(answer.decode())\n"
        )
        virsh.chmod(0o755)
        conf = 'epoch_interval_s = 0.2\nfreeze_limit_s = 20\n[quiesce.data]\nlibvirt = "web"\n'
        import os

        environ = {"PATH": f"{tools}:{os.environ['PATH']}"}
        with MountedSite(tmp_path, options=conf, environ=environ) as site:
            site.add_image("data", 1 << 20)
            site.init().mount()
            site.wait_shipped("data")
            words = ("point", "create", "data", "--consistency", "application", "--wait")
            site.run("-m", site.mountpoint, *words)
            assert [one for one in agent.asked if "freeze" in one] == [
                "guest-fsfreeze-freeze", "guest-fsfreeze-status", "guest-fsfreeze-status",
                "guest-fsfreeze-thaw", "guest-fsfreeze-status",
            ]  # fmt: skip
            assert len(rested(site, "data")) == 1
            virsh.write_text("#!/bin/sh\necho 'shut off'\n")
            said = site.run("-m", site.mountpoint, *words, code=1).stderr
            assert "the domain is shut off" in said
