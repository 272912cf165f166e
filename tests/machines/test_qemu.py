"""qemu: processes that outlive whoever started them, are found again, and never mistaken."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.machines.harness import BARE, end, environ, make_disk, runner, started, stranger
from vdiskfs.config import MachinesConfig
from vdiskfs.errors import (
    BusyError,
    DamagedError,
    LocalError,
    NotFoundError,
    RefusedError,
    VdiskfsError,
)
from vdiskfs.machines import (
    HealthCheck,
    Isolated,
    MachineDisk,
    Network,
    find_running,
    launch,
    qemuline,
    qemurunning,
    qmp,
    wait_healthy,
)
from vdiskfs.machines.process import Process, boot_id
from vdiskfs.machines.qemu import QemuRunner
from vdiskfs.machines.qemurunning import QemuRunning
from vdiskfs.machines.qmp import connected

pytestmark = pytest.mark.guest


async def test_a_machine_is_started_found_by_others_and_killed(tmp_path: Path) -> None:
    """Another runner finds it, a second start is refused, after a kill the directory is free."""
    # Deeper than the address of a socket has room for.
    directory = tmp_path / ("deep" * 20) / ("er" * 30) / "machine"
    disk = make_disk(tmp_path)
    for _ in range(2):
        async with started(directory, disks={"disk": disk}) as running:
            found = await find_running(directory, MachinesConfig())
            assert isinstance(found, QemuRunning)
            assert (found.pid, found.name) == (running.pid, "bare")
            assert await found.is_up()
            assert 0 <= found.age_s() < 3600
            with pytest.raises(BusyError, match="one runs in"):
                await runner().start(BARE, {"disk": disk}, directory, Isolated())
            assert await running.is_up()
            await found.kill()
            assert not await running.is_up()
            assert await find_running(directory, MachinesConfig()) is None
            assert "signal 9" in await running.wait_status()
    assert directory.stat().st_mode & 0o777 == 0o700


async def test_of_many_starts_at_once_one_starts(tmp_path: Path) -> None:
    """However the starts fall together, one process has the disk and the others are refused."""
    directory, disk = tmp_path / "m", make_disk(tmp_path)
    outcomes: list[str] = []

    async def start() -> None:
        try:
            await runner().start(BARE, {"disk": disk}, directory, Isolated())
        except BusyError:
            outcomes.append("busy")
        else:
            outcomes.append("started")

    try:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(start)
        assert sorted(outcomes) == ["busy", "busy", "busy", "started"]
    finally:
        await end(directory)


STARTER = """
import os, sys, trio
from pathlib import Path
from tests.machines.harness import BARE, runner
from vdiskfs.machines import Isolated
disks = {"disk": Path(sys.argv[1])}
running = trio.run(runner().start, BARE, disks, Path(sys.argv[2]), Isolated())
print(running.pid, flush=True)
os.kill(os.getpid(), 9)
"""


async def test_a_machine_outlives_whoever_started_it(tmp_path: Path) -> None:
    """After kill -9 of its starter it runs on, is found, its QMP answers, and it can be ended."""
    directory, disk = tmp_path / "m", make_disk(tmp_path)
    try:
        done = await trio.run_process(
            [sys.executable, "-c", STARTER, str(disk), str(directory)],
            capture_stdout=True, check=False, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL
        found = await runner().find(directory)
        assert found is not None
        assert found.pid == int(done.stdout)
        async with connected(directory / "qmp.sock", what="test") as qmp:
            assert (await qmp.execute("query-status"))["status"] == "running"
        await found.kill()
        assert not Path(f"/proc/{found.pid}").exists() or not await found.is_up()
    finally:
        await end(directory)


@pytest.mark.parametrize("step", ["prepared", "launched", "ready"])
async def test_a_starter_that_dies_at_any_step_leaves_none_or_one(
    tmp_path: Path, step: str
) -> None:
    """Whoever comes next finds the machine, or starts it: exactly one runs in the end."""
    directory, disk = tmp_path / "m", make_disk(tmp_path)
    try:
        done = await trio.run_process(
            [sys.executable, "-c", STARTER, str(disk), str(directory)],
            capture_stdout=True, check=False, cwd=Path(__file__).parents[2],
            env={**os.environ, "VDISKFS_CRASH": f"machine.{step}:1"},
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")
        found = await runner().find(directory)
        assert (found is None) == (step == "prepared")
        if found is None:
            found = await runner().start(BARE, {"disk": disk}, directory, Isolated())
        await found.wait_ready()
        with pytest.raises(BusyError):
            await runner().start(BARE, {"disk": disk}, directory, Isolated())
        assert await found.state() == "running"
    finally:
        await end(directory)


async def test_a_process_with_the_same_number_is_not_the_machine(tmp_path: Path) -> None:
    """A record whose number another process has now is no machine, and that one is left alone."""
    directory = tmp_path / "m"
    async with started(directory) as running, stranger() as pid:
        await running.kill()
        record = json.loads((directory / "record.json").read_bytes())
        (directory / "record.json").write_text(json.dumps(record | {"pid": pid}))
        assert await find_running(directory, MachinesConfig()) is None
        # One that somebody still holds, of a process that is gone by now:
        process = Process(pid, record["pid_start"])
        held = QemuRunning(directory, record, process, process)
        assert not await held.is_up()
        await held.kill()
        await held.wait()
        assert await held.shut_down(1)


async def test_a_record_of_another_boot_is_no_machine_and_no_hindrance(tmp_path: Path) -> None:
    """What a host that stopped has left (record, sockets, logs) is passed over by a start."""
    directory = tmp_path / "m"
    directory.mkdir(mode=0o700)
    for name in ("qmp.sock", "agent.sock"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(directory / name))
    (directory / "serial.log.1").write_text("of before")
    own = {"pid": os.getpid(), "pid_start": 1, "console": os.getpid(), "console_start": 1}
    record = {"runner": "qemu", "name": "bare", "boot_id": "0" * 36, **own}
    (directory / "record.json").write_text(json.dumps(record))
    assert boot_id() != record["boot_id"]
    assert await runner().find(directory) is None
    async with started(directory) as running:
        assert await running.is_up()
        assert b"of before" not in running.console()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"runner": "qemu"}', '{"runner": "qemu", "pid": -1}']
)
async def test_a_damaged_record_is_never_taken_for_no_machine(tmp_path: Path, text: str) -> None:
    """Something may run there: that is an error, not an answer."""
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(DamagedError):
        await runner().find(tmp_path)


async def test_an_empty_or_absent_directory_holds_no_machine(tmp_path: Path) -> None:
    assert await find_running(tmp_path, MachinesConfig()) is None
    assert await find_running(tmp_path / "absent", MachinesConfig()) is None


async def test_a_console_that_is_killed_takes_no_machine_along(tmp_path: Path) -> None:
    """Without its console a machine runs on, is found, and can be killed."""
    directory = tmp_path / "m"
    async with started(directory) as running:
        console = json.loads((directory / "record.json").read_bytes())["console"]
        os.kill(console, signal.SIGKILL)
        found = await runner().find(directory)
        assert found is not None
        async with connected(directory / "qmp.sock", what="test") as qmp:
            await qmp.execute("query-status")
        await found.kill()
        assert not await running.is_up()
        assert await running.wait_status() == "it ended, nobody saw how"


async def test_a_start_that_is_cancelled_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU runs already when the start is cancelled; afterwards it does not."""
    reached: list[int] = []

    async def wait_ready(self: QemuRunning) -> None:
        reached.append(self.pid)
        assert await self.is_up()
        scope.cancel()
        await trio.sleep_forever()

    monkeypatch.setattr(QemuRunning, "wait_ready", wait_ready)
    directory = tmp_path / "m"
    with trio.CancelScope() as scope:
        await runner().start(BARE, {"disk": make_disk(tmp_path)}, directory, Isolated())
    assert scope.cancelled_caught
    assert reached
    assert not Process(reached[0], 0).is_alive()
    assert await runner().find(directory) is None


async def test_a_disk_that_another_machine_has_is_refused(tmp_path: Path) -> None:
    """Two machines never write to one disk: the second ends before its guest runs, exit 4."""
    disks = {"disk": make_disk(tmp_path)}
    async with started(tmp_path / "a", disks=disks) as running:
        with pytest.raises(BusyError, match=r"a disk is in use: .*disk\.img") as caught:
            await runner().start(BARE, disks, tmp_path / "b", Isolated())
        assert "\n" not in str(caught.value)
        assert await runner().find(tmp_path / "b") is None
        assert await running.state() == "running"


async def test_a_start_that_fails_does_not_touch_the_machine_that_runs_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks in a second start, the first one's machine is not taken for its own."""
    directory = tmp_path / "m"
    async with started(directory) as running:
        with monkeypatch.context() as patch:
            patch.setattr(launch, "__file__", str(tmp_path / "absent.py"))
            with pytest.raises(LocalError, match="absent.py"):
                await runner().start(BARE, {"disk": make_disk(tmp_path)}, directory, Isolated())
        assert await running.state() == "running"


async def test_what_cannot_be_started_says_why_in_one_line(tmp_path: Path) -> None:
    """A disk that is missing, is none, or an option that QEMU refuses; nothing is left running."""
    disk = make_disk(tmp_path)
    qcow2 = replace(BARE, disks=(MachineDisk("disk", format="qcow2"),))
    refused = MachinesConfig(qemu_arguments=("-no-such-option",))
    absent = MachinesConfig(qemu="qemu-absent")
    cases: list[tuple[MachinesConfig, object, Path, type[VdiskfsError], str]] = [
        (MachinesConfig(), BARE, tmp_path / "gone.img", LocalError, "gone.img: No such file"),
        (MachinesConfig(), BARE, tmp_path, LocalError, "is no file"),
        (MachinesConfig(), qcow2, disk, LocalError, "is not a qcow2 file"),
        (refused, BARE, disk, LocalError, "QEMU ended.*: -no-such-option: invalid option"),
        (absent, BARE, disk, NotFoundError, "qemu-absent: .*apt-get install qemu-system-x86"),
    ]
    for number, (host, machine, path, kind, message) in enumerate(cases):
        directory = tmp_path / f"m{number}"
        assert machine in (BARE, qcow2)
        with pytest.raises(kind, match=message) as caught:
            await runner(host).start(
                qcow2 if machine is qcow2 else BARE, {"disk": path}, directory, Isolated()
            )
        assert "\n" not in str(caught.value)
        assert await runner().find(directory) is None


NO_KVM = """#!/bin/sh
for word in "$@"; do
    [ "$word" != kvm ] || { echo "qemu-system-x86_64: KVM: not today" >&2; exit 1; }
done
exec qemu-system-x86_64 "$@"
"""


async def test_where_kvm_does_not_work_auto_goes_on_without_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    """/dev/kvm is there, and QEMU fails with it: the machine runs all the same, slowly."""
    program = tmp_path / "qemu"
    program.write_text(NO_KVM)
    program.chmod(0o755)
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(qemuline, "_KVM", tmp_path / "kvm")
    host = MachinesConfig(qemu=str(program))
    directory = tmp_path / "m"
    with pytest.raises(LocalError, match="QEMU ended: KVM: not today"):
        disks = {"disk": make_disk(tmp_path)}
        await runner(host).start(replace(BARE, accel="kvm"), disks, directory, Isolated())
    expect_log("KVM: not today; trying without KVM")
    async with started(directory, machine=replace(BARE, accel="auto"), host=host) as running:
        assert await running.state() == "running"


async def test_a_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    """Its sockets are the machine's power button."""
    directory = tmp_path / "m"
    directory.mkdir(mode=0o755)
    with pytest.raises(RefusedError, match="chmod 700"):
        await runner().start(BARE, {"disk": make_disk(tmp_path)}, directory, Isolated())


async def test_a_machine_sees_no_credentials_and_runs_in_the_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What opens the vault is not in QEMU's environment, nor are our files; seccomp is on."""
    monkeypatch.setenv("AZURE_STORAGE_KEY", "secret")
    monkeypatch.setenv("NOTIFY_SOCKET", "@x")
    default = QemuRunner(MachinesConfig())
    assert "PATH" in default._environ
    assert not [key for key in default._environ if key.startswith(("AZURE", "NOTIFY"))]
    async with started(tmp_path / "m") as running:
        proc = Path(f"/proc/{running.pid}")
        assert b"secret" not in (proc / "environ").read_bytes()
        assert "Seccomp:\t2" in (proc / "status").read_text()
        files = set()
        for fd in (proc / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # a connection that is just closed
                files.add(str(fd.readlink()))
        assert str(tmp_path / "disk.img") in files
        assert str(tmp_path / "m" / "lock") in files
        sid = (proc / "stat").read_text().rpartition(")")[2].split()[3]
        assert int(sid) == running.pid  # nobody's terminal


async def test_a_raw_disk_with_the_head_of_a_qcow2_is_raw_to_qemu(tmp_path: Path) -> None:
    """A guest that writes such a head, with a backing file, opens nothing of this host by it."""
    secret = tmp_path / "secret.img"
    secret.write_bytes(b"s" * 65536)
    disk = tmp_path / "disk.img"
    backing = ["-b", str(secret), "-F", "raw"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, disk, "64k"], check=True)
    size = disk.stat().st_size
    async with (
        started(tmp_path / "m", disks={"disk": disk}),
        connected(tmp_path / "m" / "qmp.sock", what="test") as qmp,
    ):
        (block,) = [row for row in await qmp.execute("query-block") if "inserted" in row]
    inserted = block["inserted"]
    assert inserted["drv"] == "raw"
    assert inserted["image"]["virtual-size"] == -(-size // 512) * 512
    assert "secret" not in json.dumps(inserted)


async def test_every_bus_and_card_is_known_to_qemu(tmp_path: Path) -> None:
    """A machine with disks on all buses, qcow2 among them, and all cards starts."""
    qcow2 = tmp_path / "b.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, "1M"], check=True)
    disks = {"a": make_disk(tmp_path, "a.img"), "b": qcow2, "c": make_disk(tmp_path, "c.img")}
    machine = replace(
        BARE, disks=(MachineDisk("a", "ide", 2), MachineDisk("b", "scsi", 1), MachineDisk("c")),
        networks=(Network("a, b=c"), Network("d", model="e1000", address="192.0.2.2/24")),
        health=HealthCheck("tcp", port=80), processors=2, name='a "machine", with=signs',
    )  # fmt: skip
    async with started(tmp_path / "m", machine=machine, disks=disks) as running:
        async with connected(tmp_path / "m" / "qmp.sock", what="test") as qmp:
            rows = await qmp.execute("query-block")
            assert [row["inserted"]["drv"] for row in rows if "inserted" in row] == [
                "raw", "qcow2", "raw",
            ]  # fmt: skip
            name = (await qmp.execute("query-name"))["name"]
        assert name == machine.name
        assert running.name == machine.name


async def test_a_machine_that_stands_still_says_so_and_goes_on(tmp_path: Path) -> None:
    """It is up all the while; its state is QEMU's word, until it is let go on."""
    async with started(tmp_path / "m") as running:
        assert await running.state() == "running"
        async with connected(tmp_path / "m" / "qmp.sock", what="test") as qmp:
            await qmp.execute("stop")
        assert await running.state() == "paused"
        assert await running.is_up()
        await running.resume()
        assert await running.state() == "running"
        await running.kill()
        assert await running.state() == "down"
        with pytest.raises(LocalError):
            await running.resume()


async def test_many_may_ask_a_machine_at_once(tmp_path: Path) -> None:
    """QEMU serves one after the other, and its queue is short: each gets its answer."""
    states: list[str] = []
    async with started(tmp_path / "m") as running:

        async def ask() -> None:
            states.append(await running.state())

        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(ask)
    assert states == ["running"] * 12


async def test_a_machine_that_does_not_listen_goes_on_after_the_limit(tmp_path: Path) -> None:
    """Firmware without a system does not hear the power button: it says so, and can be killed."""
    async with started(tmp_path / "m") as running:
        assert await running.shut_down(1) is False
        assert await running.is_up()


async def test_a_qemu_that_hangs_is_waited_for_as_a_guest_that_does_not_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    """Whoever wants its disk ends it then, as a power cut does."""
    expect_log("machine bare: QEMU does not answer")
    async with started(tmp_path / "m") as running:
        monkeypatch.setattr(qmp, "ANSWER_S", 0.1)
        os.kill(running.pid, signal.SIGSTOP)
        assert await running.shut_down(0.5) is False
        with pytest.raises(LocalError, match="does not answer"):
            await running.state()
        await running.kill()
        assert await running.state() == "down"


async def test_a_port_that_qemu_takes_and_the_guest_does_not_is_not_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's own network accepts for a guest without a system; the check does not believe it."""
    monkeypatch.setattr(qemurunning, "TCP_S", 1.0)
    machine = replace(
        BARE, networks=(Network("lan"),), health=HealthCheck("tcp", limit_s=2, port=22)
    )
    async with started(tmp_path / "m", machine=machine) as running:
        async with connected(tmp_path / "m" / "qmp.sock", what="test") as qmp:
            text = await qmp.execute("human-monitor-command", **{"command-line": "info usernet"})
        (port,) = [int(line.split()[3]) for line in text.splitlines() if "HOST_FORWARD" in line]
        async with await trio.open_tcp_stream("127.0.0.1", port):
            pass  # accepted, by QEMU alone
        assert not await running.answers_tcp(22)
        health = await wait_healthy(running, machine, MachinesConfig())
        assert not health.healthy
        assert "not passed within 2 s" in health.detail
        assert await running.is_up()
        with pytest.raises(LocalError, match="no address of its own is known for port 80"):
            await running.answers_tcp(80)


async def test_a_machine_that_ends_fails_its_check_at_once(tmp_path: Path) -> None:
    """The check does not wait for its limit, and says how the machine ended."""
    machine = replace(BARE, health=HealthCheck("serial", limit_s=3600, text="never"))
    async with started(tmp_path / "m", machine=machine) as running:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.kill)
            health = await wait_healthy(running, machine, MachinesConfig())
        assert not health.healthy
        assert "signal 9" in health.detail


async def test_uefi_firmware_starts_with_variables_of_its_own(tmp_path: Path) -> None:
    """OVMF speaks on the serial console; what it remembers lies in the machine's directory."""
    machine = replace(BARE, firmware="uefi", health=HealthCheck("serial", 60, text="BdsDxe"))
    async with started(tmp_path / "m", machine=machine) as running:
        health = await wait_healthy(running, machine, MachinesConfig())
        assert health.healthy, running.console()
        assert (tmp_path / "m" / "uefi-variables.fd").stat().st_mode & 0o777 == 0o600


def test_the_environment_of_a_test_s_machines_has_its_mark() -> None:
    """Else what a test leaves running would not be found."""
    assert "VDISKFS_TEST_MARK" in environ()
