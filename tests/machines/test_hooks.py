"""hooks: this host's own programs start, stop, kill and look at a machine."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.machines.harness import environ, make_disk
from vdiskfs.config import MachinesConfig
from vdiskfs.errors import BusyError, LocalError, NotFoundError, RefusedError
from vdiskfs.machines import (
    Attach,
    HealthCheck,
    Hooks,
    Isolated,
    Machine,
    MachineDisk,
    Mapped,
    Network,
    wait_healthy,
)
from vdiskfs.machines import hooks as hooks_module
from vdiskfs.machines.hooks import HooksRunner
from vdiskfs.machines.process import Process
from vdiskfs.registry import process_start
from vdiskfs.stopping import MachineStopper

# A machine that is a file: there is one while it runs. Each hook does as its argument says.
PROGRAM = r"""#!/bin/sh
echo "$VDISKFS_HOOK $*" >> "$VDISKFS_DIRECTORY/calls"
case $1 in
start) env | grep ^VDISKFS_ | sort > "$VDISKFS_DIRECTORY/environ"; : > "$VDISKFS_DIRECTORY/up" ;;
stop | kill) rm -f "$VDISKFS_DIRECTORY/up" ;;
status) if [ -e "$VDISKFS_DIRECTORY/up" ]; then exit 0; else exit 3; fi ;;
refuse) echo "first"; echo "no room for it" >&2; exit 9 ;;
hang) sleep 1000 & echo $! > "$VDISKFS_DIRECTORY/child"; wait ;;
nothing) ;;
esac
"""


def hooks(**other: str) -> Hooks:
    words = {name: name for name in ("start", "stop", "kill", "status")} | other
    return Hooks(**{name: ("vm", word) for name, word in words.items()})


MACHINE = Machine(
    "web, 01", 64 << 20, (MachineDisk("web01", "scsi", 1), MachineDisk("data")), runner="hooks",
    hooks=hooks(), networks=(Network("lan", mac="52:54:00:00:00:09", address="192.0.2.9/24"),),
)  # fmt: skip


@pytest.fixture
def host(tmp_path: Path) -> MachinesConfig:
    directory = tmp_path / "hooks"
    directory.mkdir(mode=0o755)
    (directory / "vm").write_text(PROGRAM)
    (directory / "vm").chmod(0o755)
    return MachinesConfig(hooks_directory=str(directory))


@pytest.fixture
def disks(tmp_path: Path) -> dict[str, Path]:
    return {"web01": make_disk(tmp_path, "web01.qcow2"), "data": make_disk(tmp_path, "data.img")}


async def test_hooks_run_a_machine_from_start_to_stop(
    tmp_path: Path, host: MachinesConfig, disks: dict[str, Path]
) -> None:
    """It is found by another runner, a second start is refused, and stop ends it."""
    directory = tmp_path / "m"
    runner = HooksRunner(host, environ())
    running = await runner.start(MACHINE, disks, directory, Isolated())
    assert await running.is_up()
    assert 0 <= running.age_s() < 3600
    found = await HooksRunner(host, environ()).find(directory)
    assert found is not None
    assert found.name == MACHINE.name
    with pytest.raises(BusyError, match="runs already"):
        await runner.start(MACHINE, disks, directory, Isolated())
    assert await found.shut_down(30)
    assert not await running.is_up()
    assert await runner.find(directory) is None
    calls = (directory / "calls").read_text().split("\n")
    assert calls[:3] == ["status status", "start start", "status status"]
    assert "stop stop" in calls
    assert "kill kill" not in calls


@pytest.mark.parametrize("stop", ["refuse", "nothing", "hang"])
async def test_a_machine_that_goes_on_is_never_said_to_be_gone(
    tmp_path: Path, host: MachinesConfig, disks: dict[str, Path], stop: str
) -> None:
    machine = replace(MACHINE, hooks=hooks(stop=stop, kill="nothing"))
    running = await HooksRunner(host, environ()).start(machine, disks, tmp_path / "m", Isolated())
    if stop == "refuse":
        with pytest.raises(LocalError, match="hook stop ended with 9: no room for it$"):
            await running.shut_down(30)
    else:
        assert not await running.shut_down(0.3)
    with pytest.raises(LocalError, match="hook kill .*, and it runs on$"):
        await running.kill()


@pytest.mark.parametrize(
    ("command", "match"),
    [(("sleep", "60"), "did not end within 0 s$"), (("false",), "ended with 1$")],
)
async def test_a_host_whose_stop_command_fails_says_so(
    tmp_path: Path, command: tuple[str, ...], match: str
) -> None:
    host = MachinesConfig(stop_command=command, shutdown_s=0.3)
    with pytest.raises(LocalError, match=f"disk web01: stop_command {match}"):
        await MachineStopper(host, tmp_path).stop("web01", "/mnt/web01.img", "handover")


async def test_hooks_are_told_all_that_there_is_to_know(
    tmp_path: Path, host: MachinesConfig, disks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disks with their paths and formats, networks with what they are here; no credentials."""
    monkeypatch.setenv("AZURE_STORAGE_KEY", "secret")
    directory = tmp_path / "m"
    network = Mapped({"lan": "bridge:br7"})
    await HooksRunner(host).start(MACHINE, disks, directory, network)
    told = dict(
        line.split("=", 1) for line in (directory / "environ").read_text().splitlines()
    )  # fmt: skip
    assert told == {
        "VDISKFS_HOOK": "start", "VDISKFS_MACHINE": "web, 01", "VDISKFS_ID": MACHINE.id,
        "VDISKFS_DIRECTORY": str(directory), "VDISKFS_MEMORY": str(64 << 20),
        "VDISKFS_PROCESSORS": "1", "VDISKFS_FIRMWARE": "bios", "VDISKFS_ISOLATED": "0",
        "VDISKFS_DISKS": "2", "VDISKFS_NETWORKS": "1",
        "VDISKFS_DISK_0_NAME": "web01", "VDISKFS_DISK_0_PATH": str(disks["web01"]),
        "VDISKFS_DISK_0_FORMAT": "qcow2", "VDISKFS_DISK_0_BUS": "scsi", "VDISKFS_DISK_0_BOOT": "1",
        "VDISKFS_DISK_1_NAME": "data", "VDISKFS_DISK_1_PATH": str(disks["data"]),
        "VDISKFS_DISK_1_FORMAT": "raw", "VDISKFS_DISK_1_BUS": "virtio", "VDISKFS_DISK_1_BOOT": "",
        "VDISKFS_NETWORK_0_NAME": "lan", "VDISKFS_NETWORK_0_TARGET": "bridge:br7",
        "VDISKFS_NETWORK_0_MAC": "52:54:00:00:00:09", "VDISKFS_NETWORK_0_MODEL": "virtio",
        "VDISKFS_NETWORK_0_ADDRESS": "192.0.2.9/24",
    }  # fmt: skip


async def test_a_start_that_fails_is_one_line_and_is_killed(
    tmp_path: Path, host: MachinesConfig, disks: dict[str, Path]
) -> None:
    """What the hook printed last is in the error; kill is run, so that nothing is half up."""
    directory = tmp_path / "m"
    machine = replace(MACHINE, hooks=hooks(start="refuse"))
    runner = HooksRunner(host, environ())
    with pytest.raises(LocalError, match="hook start ended with 9: no room for it$") as caught:
        await runner.start(machine, disks, directory, Isolated())
    assert "\n" not in str(caught.value)
    assert "kill kill" in (directory / "calls").read_text()
    with pytest.raises(LocalError, match="status says it is down"):
        nothing = replace(MACHINE, hooks=hooks(start="nothing"))
        await runner.start(nothing, disks, directory, Isolated())


async def test_a_hook_that_hangs_is_killed_with_all_of_its_group(
    tmp_path: Path, host: MachinesConfig, disks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its limit the program and what it started are gone."""
    monkeypatch.setattr(hooks_module, "START_S", 1.0)
    directory = tmp_path / "m"
    machine = replace(MACHINE, hooks=hooks(start="hang"))
    with pytest.raises(LocalError, match="hook start took longer than 1 s"):
        await HooksRunner(host, environ()).start(machine, disks, directory, Isolated())
    child = int((directory / "child").read_text())
    with trio.fail_after(30):
        await Process(child, process_start(child)).wait()


async def test_a_status_that_cannot_tell_is_never_taken_for_down(
    tmp_path: Path, host: MachinesConfig, disks: dict[str, Path]
) -> None:
    """Else the disks would be given to a second machine."""
    directory = tmp_path / "m"
    runner = HooksRunner(host, environ())
    await runner.start(MACHINE, disks, directory, Isolated())
    program = Path(str(host.hooks_directory)) / "vm"
    program.write_text("#!/bin/sh\necho 'no answer from the host'\nexit 1\n")
    with pytest.raises(LocalError, match="hook status ended with 1: no answer from the host"):
        await runner.find(directory)
    program.unlink()
    with pytest.raises(NotFoundError, match="put it there"):
        await runner.find(directory)


async def test_a_port_is_asked_at_an_address_that_is_surely_the_machine_s(
    tmp_path: Path, host: MachinesConfig, disks: dict[str, Path]
) -> None:
    """On a network of this host its own; in isolation nobody's: the original has it, too."""
    lan = (Network("lan", address="127.0.0.1/8"),)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    machine = replace(MACHINE, networks=lan, health=HealthCheck("tcp", 60, port=port))
    with listener:
        networks: list[Attach] = [Mapped({"lan": "bridge:br0"}), Isolated()]
        for number, network in enumerate(networks):
            runner = HooksRunner(host, environ())
            running = await runner.start(machine, disks, tmp_path / str(number), network)
            if isinstance(network, Mapped):
                assert (await wait_healthy(running, machine, host)).healthy
            else:
                with pytest.raises(LocalError, match="no address of its own"):
                    await wait_healthy(running, machine, host)
            await running.kill()


async def test_a_host_that_allows_none_runs_none(
    tmp_path: Path, host: MachinesConfig, disks: dict[str, Path]
) -> None:
    """A definition from the vault starts no program of a host that has named no directory."""
    directory = tmp_path / "m"
    with pytest.raises(RefusedError, match="set hooks_directory"):
        await HooksRunner(MachinesConfig()).start(MACHINE, disks, directory, Isolated())
    assert not directory.exists()
    # A network that this host has not named is refused before anything is run, too.
    asking = replace(MACHINE, networks=(Network("lan", "bridge:br0"),))
    with pytest.raises(RefusedError, match="has not allowed bridge:br0"):
        await HooksRunner(host, environ()).start(asking, disks, directory, Mapped())
    assert not directory.exists()


async def test_a_command_and_a_text_check_the_health_of_what_hooks_run(
    tmp_path: Path, host: MachinesConfig, disks: dict[str, Path]
) -> None:
    """The command sees the machine's directory; serial.log there is its console."""
    directory = tmp_path / "m"
    (tmp_path / "hooks" / "check").write_text('#!/bin/sh\n[ -e "$VDISKFS_DIRECTORY/serial.log" ]\n')
    (tmp_path / "hooks" / "check").chmod(0o755)
    command = replace(MACHINE, health=HealthCheck("command", 60, command=("check",)))
    running = await HooksRunner(host, environ()).start(command, disks, directory, Isolated())
    seconds = []

    async def check(machine: Machine) -> None:
        health = await wait_healthy(running, machine, host)
        assert health.healthy, health
        seconds.append(health.seconds)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(check, command)
        nursery.start_soon(
            check, replace(command, health=HealthCheck("serial", 60, text="login:"))
        )  # fmt: skip
        await trio.testing.wait_all_tasks_blocked()
        assert seconds == []
        (directory / "serial.log").write_text("Debian\r\nweb01 login: ")
    assert len(seconds) == 2
    (directory / "up").unlink()
    down = await wait_healthy(running, replace(command, health=HealthCheck("agent", 60)), host)
    assert not down.healthy
    assert "hook status says that it is down" in down.detail
