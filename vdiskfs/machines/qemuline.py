"""The command line of QEMU for a machine. Builds texts, starts nothing."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdiskfs.config import MachinesConfig
from vdiskfs.errors import NotFoundError, RefusedError, UsageError
from vdiskfs.machines.machine import Machine, MachineDisk, Network
from vdiskfs.machines.permission import boot_file, reached_addresses

QMP_SOCKET = "qmp.sock"
AGENT_SOCKET = "agent.sock"
FIRMWARE_VARIABLES = "uefi-variables.fd"
USER_NETWORK = "10.0.2.15/24"
"""The address that a machine gets in a user network unless its definition says another."""

_KVM = Path("/dev/kvm")
_UEFI = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
)
_SANDBOX = "on,obsolete=deny,resourcecontrol=deny,elevateprivileges={0},spawn={0}"


@dataclass(frozen=True, slots=True)
class Line:
    """A command line, and what has to be there before it is run.

    ``disks`` has for each disk its name, its file and its format. ``copies`` has files that
    are copied into the machine's directory unless they are there. ``forwarded`` is the port of
    the guest that a port of this host's loopback leads to, 0: none. ``addresses`` are those that
    the machine has on networks of this host.
    """

    command: tuple[str, ...]
    disks: tuple[tuple[str, str, str], ...]
    copies: tuple[tuple[str, str], ...]
    forwarded: int
    addresses: tuple[str, ...]


def command_line(
    machine: Machine,
    disks: Mapping[str, Path],
    attached: Sequence[str],
    *,
    program: str,
    accel: str,
    host: MachinesConfig,
) -> Line:
    """Return how QEMU is called, in the machine's directory as its working directory.

    Args:
        machine: the definition.
        disks: paths by the disks' names.
        attached: what each network card is attached to (``permission.attachments``).
        program: QEMU's path.
        accel: one of ``accelerators``.
        host: what this host allows.

    Raises:
        NotFoundError, RefusedError, UsageError: a disk or a file is missing, or not allowed.
    """
    missing = [disk.disk for disk in machine.disks if disk.disk not in disks]
    if missing:
        raise NotFoundError(f"machine {machine.name}: no file is given for its disk {missing[0]}")
    # QEMU works in the machine's directory.
    files = {name: path.absolute() for name, path in disks.items()}
    bridged = any(target.startswith("bridge:") for target in attached)
    words = [program, "-name", f"guest={machine.name.replace(',', ',,')}", "-uuid", machine.id]
    words += ["-nodefaults", "-no-user-config", "-display", "none", "-vga", "std"]
    # A bridge is joined by QEMU's helper, a program of its own; else QEMU starts nothing.
    words += ["-sandbox", _SANDBOX.format("allow" if bridged else "deny")]
    words += ["-msg", "timestamp=off", "-rtc", "base=utc", "-device", "virtio-rng-pci"]
    words += ["-m", f"{machine.memory >> 20}M", "-smp", str(machine.processors)]
    words += ["-machine", "pc" if _has(machine, "ide") else "q35", "-cpu", "max"]
    words += ["-accel", accel]
    words += ["-chardev", f"socket,id=qmp,path={QMP_SOCKET},server=on,wait=off"]
    words += ["-mon", "chardev=qmp,mode=control"]
    words += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
    words += ["-chardev", f"socket,id=agent,path={AGENT_SOCKET},server=on,wait=off"]
    words += ["-device", "virtio-serial-pci"]
    words += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    firmware, copies = _firmware(machine)
    words += firmware + _kernel(machine, host) + _disks(machine, files)
    port = machine.health.port if machine.health is not None else 0
    forwarded = 0
    for number, target in enumerate(attached):
        forwards = bool(port) and not forwarded and target in ("isolated", "user")
        words += _network(machine, number, target, port if forwards else 0)
        forwarded = port if forwards else forwarded
    kinds = [(one.disk, os.fspath(files[one.disk]), disk_format(one, files[one.disk]))
             for one in machine.disks]  # fmt: skip
    reachable = reached_addresses(machine, attached)
    return Line((*words, *host.qemu_arguments), tuple(kinds), copies, forwarded, reachable)


def accelerators(machine: Machine) -> tuple[str, ...]:
    """Return what a machine may be run with, the best first.

    Raises:
        RefusedError: it wants KVM, which this user cannot use.
    """
    usable = os.access(_KVM, os.R_OK | os.W_OK)
    if machine.accel == "kvm" and not usable:
        raise RefusedError(
            f"machine {machine.name}: this user cannot use {_KVM}",
            hint='load KVM and join its group, or set accel = "tcg", which is slow',
        )
    if machine.accel == "auto":
        return ("kvm", "tcg") if usable else ("tcg",)
    return (machine.accel,)


def disk_format(disk: MachineDisk, path: Path) -> str:
    """Return the format of a disk's file: as defined, else by its name, never by its bytes.

    A guest could write the head of a qcow2 file to its raw disk, which names other files of
    this host.
    """
    return disk.format or ("qcow2" if path.suffix == ".qcow2" else "raw")


def _has(machine: Machine, bus: str) -> bool:
    return any(disk.bus == bus for disk in machine.disks)


def _firmware(machine: Machine) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    if machine.firmware == "bios":
        return [], ()
    found = next((pair for pair in _UEFI if all(Path(one).is_file() for one in pair)), None)
    if found is None:
        raise NotFoundError(
            f"machine {machine.name}: this host has no UEFI firmware for QEMU",
            hint="apt-get install ovmf",
        )
    flash = "if=pflash,format=raw,unit={},readonly={},file={}"
    words = ["-drive", flash.format(0, "on", found[0])]
    words += ["-drive", flash.format(1, "off", FIRMWARE_VARIABLES)]
    return words, ((found[1], FIRMWARE_VARIABLES),)


def _kernel(machine: Machine, host: MachinesConfig) -> list[str]:
    boot = machine.boot
    if boot is None:
        return []
    what = f"machine {machine.name}: boot"
    words = ["-kernel", str(boot_file(host, boot.kernel, what=what))]
    if boot.initrd is not None:
        words += ["-initrd", str(boot_file(host, boot.initrd, what=what))]
    return words + (["-append", boot.append] if boot.append else [])


def _disks(machine: Machine, disks: Mapping[str, Path]) -> list[str]:
    words = ["-device", "virtio-scsi-pci,id=scsi0"] if _has(machine, "scsi") else []
    orders = {disk.disk: disk.boot for disk in machine.disks if disk.boot is not None}
    orders = orders or {machine.disks[0].disk: 1}
    for number, disk in enumerate(machine.disks):
        node = f"disk{number}"
        words += ["-blockdev", json.dumps(_node(node, disk, disks[disk.disk]))]
        kind = {"virtio": "virtio-blk-pci", "ide": "ide-hd", "scsi": "scsi-hd,bus=scsi0.0"}
        order = orders.get(disk.disk)
        index = f",bootindex={order}" if order is not None else ""
        words += ["-device", f"{kind[disk.bus]},drive={node}{index}"]
    return words


def _node(node: str, disk: MachineDisk, path: Path) -> dict[str, Any]:
    """Return a disk's block node. The page cache is used once, below the mount.

    The mount takes direct I/O from threads; the kernel's own asynchronous I/O gains nothing
    through FUSE, and where it is not allowed QEMU would not start.
    """
    cache = {"direct": True, "no-flush": False}
    file = {"driver": "file", "filename": os.fspath(path), "aio": "threads", "cache": cache,
            "discard": "unmap"}  # fmt: skip
    table = {"node-name": node, "driver": disk_format(disk, path), "discard": "unmap",
             "cache": cache, "file": file}  # fmt: skip
    # An overlay was refused already; should its head change meanwhile, nothing is opened.
    return table | ({"backing": None} if table["driver"] == "qcow2" else {})


def _network(machine: Machine, number: int, target: str, port: int) -> list[str]:
    card = machine.networks[number]
    kind, _, name = target.partition(":")
    if kind == "none":
        return []
    if kind in ("isolated", "user"):
        options = [f"user,id=net{number}", f"restrict={'on' if kind == 'isolated' else 'off'}"]
        options += _user_network(machine, card)
        # Port 0: the kernel gives one that is free.
        options += [f"hostfwd=tcp:127.0.0.1:0-:{port}"] if port else []
        backend = ",".join(options)
    elif kind == "bridge":
        backend = f"bridge,id=net{number},br={name}"
    else:
        backend = f"tap,id=net{number},ifname={name},script=no,downscript=no"
    model = {"virtio": "virtio-net-pci", "e1000": "e1000"}[card.model]
    return ["-netdev", backend, "-device", f"{model},netdev=net{number},mac={machine.mac(number)}"]


def _user_network(machine: Machine, card: Network) -> list[str]:
    """Return QEMU's own network around the machine's address, which its DHCP gives first."""
    address = ipaddress.ip_interface(card.address or USER_NETWORK)
    if address.version != 4:
        return []  # QEMU's own DHCP is for IPv4; the guest sets the other by itself
    prefix = address.network.prefixlen if "/" in (card.address or USER_NETWORK) else 24
    network = ipaddress.ip_network(f"{address.ip}/{prefix}", strict=False)
    if network.num_addresses < 8:
        raise UsageError(
            f"machine {machine.name}: network {card.name}: too small for a network of QEMU's own",
            hint="use a prefix of at most 29",
        )
    first = network.network_address + 2
    gateway, dns = [one for one in (first, first + 1, first + 2) if one != address.ip][:2]
    return [f"net={network}", f"host={gateway}", f"dns={dns}", f"dhcpstart={address.ip}"]
