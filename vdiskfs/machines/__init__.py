"""Virtual machines: what the vault says of them, and what runs them on this host.

machine      Machine and its parts            definition, rules   as TOML and as a table, checked
vaulted      machines/NAME.json in the vault  permission   what a definition may do here
runner       the seam: Runner, Running, Isolated, Mapped
qemu, qemurunning   plain QEMU processes      qemuline     their command line
launch       starts one that outlives us      process      finds it again
qmp, agent   asks QEMU, and its guest         reach        whether a port answers
hooks        this host's own programs         hookrun      runs one of them
directory    what lies in a machine's own     spawn        starts processes of our own priority
health       waits until a machine is of use

    runner = runner_for(machine.runner, config.machines)
    running = await runner.start(machine, disks, directory, Isolated())
    health = await wait_healthy(running, machine, config.machines)
    ...
    running = await find_running(directory, config.machines)    # in another process, later
"""

from pathlib import Path

from vdiskfs.config import MachinesConfig
from vdiskfs.machines.definition import parse_machine
from vdiskfs.machines.health import Health, wait_healthy
from vdiskfs.machines.hooks import HooksRunner
from vdiskfs.machines.machine import (
    DirectBoot,
    HealthCheck,
    Hooks,
    Machine,
    MachineDisk,
    Network,
)
from vdiskfs.machines.qemu import QemuRunner
from vdiskfs.machines.runner import Attach, Isolated, Mapped, Runner, Running
from vdiskfs.machines.vaulted import (
    Listed,
    list_machines,
    machine_names,
    machine_of,
    read_machine,
    write_machine,
)

__all__ = [
    "Attach",
    "DirectBoot",
    "Health",
    "HealthCheck",
    "Hooks",
    "Isolated",
    "Listed",
    "Machine",
    "MachineDisk",
    "Mapped",
    "Network",
    "Runner",
    "Running",
    "find_running",
    "list_machines",
    "machine_names",
    "machine_of",
    "parse_machine",
    "read_machine",
    "runner_for",
    "wait_healthy",
    "write_machine",
]


def runner_for(kind: str, host: MachinesConfig) -> Runner:
    """Return what runs machines of a kind: ``qemu`` or ``hooks``."""
    return HooksRunner(host) if kind == "hooks" else QemuRunner(host)


async def find_running(directory: Path, host: MachinesConfig) -> Running | None:
    """Return the machine that runs in a directory, whichever runner started it, or None.

    Raises:
        DamagedError: something was started there, and what cannot be read.
        LocalError: whether it runs cannot be told.
    """
    for runner in (QemuRunner(host), HooksRunner(host)):
        found: Running | None = await runner.find(directory)
        if found is not None:
            return found
    return None
