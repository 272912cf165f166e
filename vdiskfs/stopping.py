"""Stops the machine that this host runs on a disk of its source, as the host's owner has set.

Such a machine is not ours: libvirt's, or a script's. ``stop_command`` of the configuration is
the only word we have with it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from vdiskfs.config import MachinesConfig
from vdiskfs.errors import LocalError
from vdiskfs.machines.hookrun import run_program

log = logging.getLogger(__name__)


class MachineStopper:
    """Runs the host's ``stop_command``."""

    def __init__(self, host: MachinesConfig, directory: Path) -> None:
        """Take the configuration, and the directory in which the command runs."""
        self._host = host
        self._directory = directory

    @property
    def is_set(self) -> bool:
        """Whether this host has said how its machines are stopped."""
        return bool(self._host.stop_command)

    async def stop(self, disk: str, path: str, reason: str) -> None:
        """Run the command for a disk; nothing where none is set. It may be run again.

        Args:
            disk: its name.
            path: of its image in the mount.
            reason: ``handover`` or ``displaced``.

        Raises:
            LocalError: it failed, or did not end in time.
        """
        if not self._host.stop_command:
            return
        environ = {
            **os.environ, "VDISKFS_DISK": disk, "VDISKFS_IMAGE": path, "VDISKFS_REASON": reason,
        }  # fmt: skip
        done = await run_program(
            list(self._host.stop_command), environ=environ, directory=self._directory,
            limit_s=self._host.shutdown_s,
        )  # fmt: skip
        if done.code != 0:
            how = f"did not end within {self._host.shutdown_s:.0f} s" if done.code is None \
                else f"ended with {done.code}"  # fmt: skip
            raise LocalError(f"disk {disk}: stop_command {how}{done.last_line}")
        log.warning("disk %s: its machine was stopped (%s)", disk, reason)
