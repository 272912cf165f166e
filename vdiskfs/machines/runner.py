"""What runs machines: the seam between failover and QEMU, hooks, or what comes later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vdiskfs.machines.machine import Machine


@dataclass(frozen=True, slots=True)
class Isolated:
    """Each network card is alone in a network of its own: nothing comes out of the machine."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """Networks are what this host's configuration says of them, by their source name."""

    targets: Mapping[str, str] = field(default_factory=dict)


Attach = Isolated | Mapped


class Running(Protocol):
    """A machine that was started, by this process or by one before it."""

    @property
    def name(self) -> str:
        """The machine's name."""
        ...

    @property
    def directory(self) -> Path:
        """Where its record, its console and its sockets lie."""
        ...

    def age_s(self) -> float:
        """Return the seconds since it was started; suspends of the host count."""
        ...

    async def is_up(self) -> bool:
        """Tell whether it runs. A guest that has crashed in it runs, too."""
        ...

    async def state(self) -> str:
        """Say how it does: ``running``, ``down``, or in its runner's words why it stands still.

        QEMU stops a machine (``io-error``) when there is no space for what it writes.
        """
        ...

    async def resume(self) -> None:
        """Let a machine that stands still go on.

        Raises:
            LocalError: it cannot.
        """
        ...

    async def shut_down(self, timeout_s: float) -> bool:
        """Ask the guest to turn itself off; tell whether it is gone.

        Nothing of it writes any more when this returns True. False: the time is over and it
        runs on.

        Raises:
            LocalError: the command of this host that asks it has failed.
        """
        ...

    async def kill(self) -> None:
        """End it as a power cut does. On return nothing of it writes any more.

        Raises:
            LocalError: it does not end.
        """
        ...

    async def wait(self) -> None:
        """Wait until it is gone, for whatever reason."""
        ...

    async def wait_status(self) -> str:
        """Wait until it is gone; say how it ended, for people."""
        ...

    def console(self) -> bytes:
        """Return the newest output of its serial console, bounded."""
        ...

    async def answers_agent(self) -> bool:
        """Tell whether the guest agent in it answers now; may take seconds."""
        ...

    async def answers_tcp(self, port: int) -> bool:
        """Tell whether it takes connections on a port now; may take seconds."""
        ...


class Runner(Protocol):
    """Starts machines of one kind, and finds them again."""

    async def start(
        self, machine: Machine, disks: Mapping[str, Path], directory: Path, network: Attach
    ) -> Running:
        """Start a machine on these disks, and return when it runs.

        It outlives this process. A record in ``directory`` is durable before its first
        instruction; whoever comes later finds it there with ``find``. When this raises, or is
        cancelled, nothing runs.

        Args:
            machine: checked, and still a stranger's wish.
            disks: the file of each of the machine's disks, by the disk's name.
            directory: the machine's own; made if it is absent.
            network: what its network cards see.

        Raises:
            BusyError: one runs in that directory, or another process has one of the disks.
            NotFoundError: a disk, a program or a file is missing.
            RefusedError: this host does not allow what the definition asks for.
            LocalError: it cannot be started; says why.
        """
        ...

    async def find(self, directory: Path) -> Running | None:
        """Return the machine that runs in a directory; None: none does (any more).

        Raises:
            DamagedError: something was started there, and what cannot be read.
        """
        ...
