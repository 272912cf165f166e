"""What the tests of machines share: hosts, disks, and machines that end with their test."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from vdiskfs.config import MachinesConfig
from vdiskfs.machines import Attach, Isolated, Machine, MachineDisk
from vdiskfs.machines.qemu import QemuRunner
from vdiskfs.machines.qemurunning import QemuRunning

HOST = MachinesConfig()
# No system on its disk: its firmware looks for one and finds none. QEMU itself is up in a second.
BARE = Machine("bare", 64 << 20, (MachineDisk("disk"),), accel="tcg")
# As what a machine sees of the environment, and the mark by which a test finds what it left.
ENVIRON = ("PATH", "HOME", "TMPDIR", "VDISKFS_TEST_MARK")


def environ() -> dict[str, str]:
    """Return the environment of a test's machines."""
    return {key: os.environ[key] for key in ENVIRON if key in os.environ}


def runner(host: MachinesConfig = HOST) -> QemuRunner:
    """Return a runner as a daemon makes it."""
    return QemuRunner(host, environ())


def make_disk(directory: Path, name: str = "disk.img") -> Path:
    """Make an empty disk of 1 MiB."""
    path = directory / name
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return path


@asynccontextmanager
async def started(
    directory: Path, *, machine: Machine = BARE, disks: Mapping[str, Path] | None = None,
    network: Attach | None = None, host: MachinesConfig = HOST,
) -> AsyncIterator[QemuRunning]:  # fmt: skip
    """Have a machine over the block; whatever runs in the directory then is killed."""
    if disks is None:
        directory.parent.mkdir(parents=True, exist_ok=True)
        disks = {disk.disk: make_disk(directory.parent) for disk in machine.disks}
    try:
        yield await runner(host).start(machine, disks, directory, network or Isolated())
    finally:
        await end(directory)


async def end(directory: Path) -> None:
    """Kill what runs in a machine's directory."""
    with trio.CancelScope(shield=True):
        left = await runner().find(directory)
        if left is not None:
            await left.kill()


@asynccontextmanager
async def stranger() -> AsyncIterator[int]:
    """Have a process that is no machine over the block; it must live to its end."""
    process = subprocess.Popen(["sleep", "1000"])
    try:
        yield process.pid
        assert process.poll() is None, "it was killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
