"""Stops the machine that this host runs on a disk of its source, and starts it again.

Such a machine is not ours: libvirt's, or a script's. ``stop_command`` and ``start_command`` of
the configuration are the only words we have with it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from vdiskfs.config import MachinesConfig
from vdiskfs.crash import hook
from vdiskfs.errors import LocalError
from vdiskfs.machines.directory import passed_environ
from vdiskfs.machines.hookrun import run_program
from vdiskfs.state import sync_directory

log = logging.getLogger(__name__)


STOPPED = "machine-stopped"
"""A file in a disk's directory: the machine on it was stopped, and is to run where the disk is."""


def note_stopped(directory: Path) -> None:
    """Note that the machine on a disk is about to be stopped. Durable on return; blocks."""
    (directory / STOPPED).touch(mode=0o600)
    sync_directory(directory)
    hook("machine.noted")


def was_stopped(directory: Path) -> bool:
    """Say whether the machine on a disk was stopped, and not started again."""
    return (directory / STOPPED).exists()


def forget_stopped(directory: Path) -> None:
    """Note that it runs again, or is left to the user. Durable on return; blocks."""
    (directory / STOPPED).unlink(missing_ok=True)
    sync_directory(directory)
    hook("machine.forgotten")


class MachineStopper:
    """Runs the host's ``stop_command`` and ``start_command``."""

    def __init__(self, host: MachinesConfig, directory: Path) -> None:
        """Take the configuration, and the directory in which the commands run."""
        self._host = host
        self._directory = directory

    @property
    def can_start(self) -> bool:
        """Whether this host has said how its machines are started again."""
        return bool(self._host.start_command)

    async def stop(self, disk: str, path: str, reason: str) -> None:
        """Run the command for a disk; nothing where none is set. It may be run again.

        Args:
            disk: its name.
            path: of its image in the mount.
            reason: ``handover`` or ``displaced``.

        Raises:
            LocalError: it failed, or did not end in time.
        """
        if self._host.stop_command:
            await self._run("stop_command", self._host.stop_command, disk, path, reason)
            log.warning("disk %s: its machine was stopped (%s)", disk, reason)

    async def start(self, disk: str, path: str) -> None:
        """Run the command that starts the machine on a disk which this host has again.

        Raises:
            LocalError: it failed, or did not end in time.
        """
        if self._host.start_command:
            await self._run("start_command", self._host.start_command, disk, path, "returned")
            log.warning("disk %s: its machine was started again", disk)

    async def _run(
        self, what: str, command: Sequence[str], disk: str, path: str, reason: str
    ) -> None:
        environ = {
            **passed_environ(None),
            "VDISKFS_DISK": disk, "VDISKFS_IMAGE": path, "VDISKFS_REASON": reason,
        }  # fmt: skip
        done = await run_program(
            list(command), environ=environ, directory=self._directory,
            limit_s=self._host.shutdown_s,
        )  # fmt: skip
        if done.code != 0:
            how = f"did not end within {self._host.shutdown_s:.0f} s" if done.code is None \
                else f"ended with {done.code}"  # fmt: skip
            raise LocalError(f"disk {disk}: {what} {how}{done.last_line}")
