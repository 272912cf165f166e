"""What a definition may do on this host.

A definition comes from the vault, and whoever can write there can write definitions. So one
never names a path, a program, an option of QEMU or an interface of this host that the host's
own configuration, the ``[machines]`` table of vdiskfs.conf(5), has not named first:

- hooks and commands are programs in ``hooks_directory``, kernels are files in
  ``boot_directory``, each by its bare name; without the directory there are none;
- a network is what ``networks`` says of it; what a definition asks for itself is granted if it
  is nothing (``none``) or among what ``networks`` has for any other network;
- options of QEMU beyond those that are made here are ``qemu_arguments`` alone;
- disks are the files that the caller gives.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from vdiskfs.config import MachinesConfig
from vdiskfs.errors import NotFoundError, RefusedError
from vdiskfs.machines.machine import Machine
from vdiskfs.machines.runner import Attach, Isolated

_TABLE = "[machines] in vdiskfs.conf(5)"


def hook_command(host: MachinesConfig, words: Sequence[str], *, what: str) -> list[str]:
    """Return a command of a definition as this host runs it: a path, then the arguments.

    Raises:
        RefusedError: this host lets definitions run nothing, or anybody could have put the
            program there.
        NotFoundError: there is no such program.
    """
    if host.hooks_directory is None:
        raise RefusedError(
            f"{what}: this host runs no programs for machines",
            hint=f"put {words[0]} into a directory, and set hooks_directory, {_TABLE}",
        )
    path = _inside(host.hooks_directory, words[0], what)
    if not os.access(path, os.X_OK):
        raise RefusedError(f"{what}: {path}: not executable", hint="chmod 755 it")
    return [str(path), *words[1:]]


def boot_file(host: MachinesConfig, name: str, *, what: str) -> Path:
    """Return a kernel or an initramfs that a definition names.

    Raises:
        RefusedError: this host has no directory for them, or anybody could have put it there.
        NotFoundError: there is no such file.
    """
    if host.boot_directory is None:
        raise RefusedError(
            f"{what}: this host has no kernels for machines",
            hint=f"put {name} into a directory, and set boot_directory, {_TABLE}",
        )
    return _inside(host.boot_directory, name, what)


def attachments(machine: Machine, network: Attach) -> tuple[str, ...]:
    """Return what each network card of a machine is attached to, or ``isolated``.

    Raises:
        RefusedError: the definition asks for what this host has not named.
    """
    if isinstance(network, Isolated):
        return ("isolated",) * len(machine.networks)
    found = []
    for card in machine.networks:
        target = network.targets.get(card.name, card.attach)
        if target != "none" and target not in network.targets.values():
            raise RefusedError(
                f"machine {machine.name}: network {card.name}: this host has not allowed {target}",
                hint=f'set {card.name} = "{target}" in networks of {_TABLE}, or start it isolated',
            )
        found.append(target)
    return tuple(found)


def reached_addresses(machine: Machine, attached: Sequence[str]) -> tuple[str, ...]:
    """Return the addresses at which a machine is reached from this host, without prefixes.

    Of an isolated one none: at its address the original may answer, and must not be taken
    for it.
    """
    pairs = zip(machine.networks, attached, strict=True)
    return tuple(
        card.address.partition("/")[0]
        for card, target in pairs
        if card.address and target.startswith(("bridge:", "tap:"))
    )


def _inside(directory: str, name: str, what: str) -> Path:
    """Return a file of a directory that only root and this user can write to."""
    # The definition was checked to hold a bare name; a mistake here must not become a path.
    assert "/" not in name, name
    assert not name.startswith("."), name
    path = Path(directory) / name
    try:
        infos = [Path(directory).stat(), path.stat()]
    except FileNotFoundError:
        raise NotFoundError(f"{what}: there is no {path}", hint="put it there") from None
    except OSError as error:
        raise RefusedError(f"{what}: {path}: {error.strerror}") from None
    if not stat.S_ISREG(infos[1].st_mode):
        raise NotFoundError(f"{what}: {path} is not a file")
    for info in infos:
        if info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o022:
            raise RefusedError(
                f"{what}: others can write to {path}", hint="chmod go-w it and its directory"
            )
    return path
