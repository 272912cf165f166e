"""What a machine is: its disks, its size, its networks, how it is started and judged.

Plain values. ``definition`` reads and writes them, ``permission`` says what of them this host
lets a definition do, ``runner`` makes them run.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from hashlib import blake2b

BUSES = ("virtio", "ide", "scsi")
FORMATS = ("raw", "qcow2")
FIRMWARES = ("bios", "uefi")
RUNNERS = ("qemu", "hooks")
ACCELERATORS = ("auto", "kvm", "tcg")
MODELS = ("virtio", "e1000")
CHECKS = ("agent", "tcp", "serial", "command")
HEALTH_LIMIT_S = 300.0

_NAMESPACE = uuid.UUID("6f1f5ac8-6f37-4b0e-9a3c-0f1c8a3d7e52")


@dataclass(frozen=True, slots=True)
class MachineDisk:
    """A disk of the vault, as the machine sees it.

    ``boot`` is its place in the boot order (1 is first), None: not booted from. ``format`` is
    that of the file; None: by the file's name. It is never guessed from the bytes, which a
    guest writes.
    """

    disk: str
    bus: str = "virtio"
    boot: int | None = None
    format: str | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """A network card, on a network by its name at the source.

    What that network is on a host is the host's own configuration; ``attach`` is used where it
    says nothing: ``none``, ``user``, ``bridge:NAME`` or ``tap:NAME`` (see ``permission``).
    ``address`` is what the machine has there: ADDRESS or ADDRESS/PREFIX.
    """

    name: str
    attach: str = "none"
    mac: str | None = None
    address: str | None = None
    model: str = "virtio"


@dataclass(frozen=True, slots=True)
class DirectBoot:
    """A kernel that is started without firmware: names of files in this host's boot directory."""

    kernel: str
    initrd: str | None = None
    append: str = ""


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """When a started machine counts as up: ``kind`` is one of ``CHECKS``.

    ``tcp`` has a port, ``serial`` a text that the serial console prints, ``command`` the name
    of a program in this host's hooks directory, and its arguments.
    """

    kind: str
    limit_s: float = HEALTH_LIMIT_S
    port: int = 0
    text: str = ""
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hooks:
    """Commands that start, stop, kill and look at a machine: a program's name, then arguments.

    Programs are found in this host's hooks directory alone.
    """

    start: tuple[str, ...]
    stop: tuple[str, ...]
    kill: tuple[str, ...]
    status: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine. ``memory`` is bytes, a multiple of 1 MiB; ``disks`` is never empty."""

    name: str
    memory: int
    disks: tuple[MachineDisk, ...]
    processors: int = 1
    firmware: str = "bios"
    networks: tuple[Network, ...] = ()
    boot: DirectBoot | None = None
    runner: str = "qemu"
    hooks: Hooks | None = None
    health: HealthCheck | None = None
    accel: str = "auto"

    @property
    def id(self) -> str:
        """The machine's own number (SMBIOS), the same wherever it is started."""
        return str(uuid.uuid5(_NAMESPACE, self.name))

    def mac(self, number: int) -> str:
        """Return the address of a network card: the one that is set, or always the same one."""
        given = self.networks[number].mac
        if given is not None:
            return given
        digest = blake2b(f"{number} {self.name}".encode(), digest_size=3).digest()
        return "52:54:00:" + digest.hex(":")

    def to_toml(self) -> str:
        """Write the definition as ``definition.parse_machine`` reads it back."""
        # Below, not above: definition builds machines.
        from vdiskfs.machines.definition import to_toml  # noqa: PLC0415

        return to_toml(self)
