"""The heartbeat of one mount: tells the vault that the site is alive, and that it is the vault.

One small object for each site, written every few seconds; of a vault in two containers the one
of the data is asked for something, too. An answer after silence ends the
waits of all disks. Where the object is not what this site wrote last, what answers may be
another vault, or an older state of it: then each disk looks whether what it shipped is
there, and a disk that misses something is Critical.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence

import trio

from vdiskfs.catalog import SiteRecord
from vdiskfs.config import MountSettings
from vdiskfs.disk import ProtectedDisk, Site
from vdiskfs.errors import NotFoundError, VaultUnreachableError, VdiskfsError, WrongVaultError
from vdiskfs.liveness import own_process
from vdiskfs.running import VERSION
from vdiskfs.store import is_split
from vdiskfs.units import format_time

log = logging.getLogger(__name__)


class Heartbeat:
    """Beats while its `run` runs. ``vault_error`` says why the last beat failed, or None."""

    def __init__(
        self, settings: MountSettings, site: Site, disks: Callable[[], Sequence[ProtectedDisk]],
        learn: Callable[[], Awaitable[None]],
        *,
        uses: Callable[[], Sequence[tuple[str, int, int]]] = tuple,
        touched: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            settings: the mount's.
            site: what its disks share.
            disks: gives those protected here.
            learn: reads what others may have changed in the vault.
            uses: gives the points (disk id, generation, epoch) that are open here.
            touched: is called when somebody wants this site to look at the vault.
        """
        self.vault_error: str | None = None
        self._settings = settings
        self._site = site
        self._vault = site.vault
        self._disks = disks
        self._learn = learn
        self._uses = uses
        self._touched = touched
        self._started = format_time(time.time_ns())
        self._process = own_process()
        self._due = False
        self._is_split = is_split(site.vault.store)

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            await self.beat()
            await trio.sleep(self._settings.options.heartbeat_s)

    async def beat(self) -> None:
        """Write the site's record once, and let the disks know how that went."""
        try:
            self._due |= await self._vault.write_site(self._record(), self._look)
            if self._due:  # until all of them have looked
                for disk in self._disks():
                    await disk.line.look()
                self._touched()
                self._due = False
            await self._learn()
            if self._is_split:
                await self._ask_data()
        except VdiskfsError as error:
            if self.vault_error is None:
                log.warning("the vault does not answer: %s", error)
            self.vault_error = str(error)
            for disk in self._disks():
                disk.health.vault_is_silent()
            if isinstance(error, WrongVaultError | NotFoundError):
                self._tell_all(error)
        else:
            self.vault_error = None
            self._tell_all(None)
            for disk in self._disks():
                disk.health.vault_answers()

    async def _ask_data(self) -> None:
        """See that the data container answers, too; the next sign of life does not wait for it."""
        limit_s = self._settings.options.heartbeat_s
        with trio.move_on_after(limit_s) as scope:
            await self._vault.ask_data()
        if scope.cancelled_caught:
            where = self._vault.store.describe()
            raise VaultUnreachableError(f"{where}: no answer where the data lies for {limit_s:g} s")

    def _record(self) -> SiteRecord:
        return SiteRecord(
            site=self._settings.site, host=socket.gethostname(),
            time=format_time(time.time_ns()), version=VERSION,
            disks=tuple(disk.disk_id for disk in self._disks()),
            pid=os.getpid(), started=self._started, writer=self._site.state.writer_id,
            process=self._process, interval_s=math.ceil(self._settings.options.heartbeat_s),
            states={disk.disk_id: str(disk.health.shown_state) for disk in self._disks()},
            healths={disk.disk_id: str(disk.health.level) for disk in self._disks()},
            uses=tuple(sorted(set(self._uses()))),
        )  # fmt: skip

    async def _look(self) -> None:
        """See that the vault is the one that was mounted, and lacks nothing.

        Raises:
            NotFoundError, WrongVaultError: it is not; its site's record is left alone.
        """
        await self._vault.check_identity()
        for disk in self._disks():
            await disk.replicator.shipper.check_vault()

    def _tell_all(self, error: VdiskfsError | None) -> None:
        for disk in self._disks():
            disk.health.vault_is_wrong(error)
