"""Watching one mount: its events, who is told of them, and its metrics, put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import trio

from vdiskfs.config import MountSettings
from vdiskfs.disk import ProtectedDisk
from vdiskfs.errors import UsageError
from vdiskfs.events import EventLevel, Events, event_document
from vdiskfs.exporter import metrics_route, serve_metrics
from vdiskfs.metrics import Metrics, Watched
from vdiskfs.native import CoreCounts
from vdiskfs.protection import Protection
from vdiskfs.serving import keep_running
from vdiskfs.sinks import Sinks
from vdiskfs.store import Store
from vdiskfs.units import parse_time
from vdiskfs.watch import PLAIN, Watch
from vdiskfs.watchsettings import RpoThresholds, listen_address

MOST = 1000
"""Events that are returned at once unless the asker says how many."""


class Watching:
    """What is told of one mount. Trio thread only."""

    def __init__(self, settings: MountSettings) -> None:
        """Prepare; nothing runs yet, and nobody is told."""
        self.events = Events(Path(settings.state))
        self.sinks = Sinks(settings, self.events)
        self._settings = settings
        self._metrics: Metrics | None = None

    def check(self, *, strict: bool) -> None:
        """Read the secrets; from now on the sinks hear of events.

        Args:
            strict: a secret that cannot be read is an error; else that sink is left out, with
                an event: machines run on the mount already.

        Raises:
            RefusedError: a secret's file cannot be read, or others may read it.
        """
        self.sinks.open(strict=strict)

    def begin(
        self, nursery: trio.Nursery, protection: Protection, store: Store,
        counts: Callable[[], CoreCounts], vault_error: Callable[[], str | None],
    ) -> None:  # fmt: skip
        """Watch until the nursery is cancelled."""
        config = self._settings.options.watch
        disks = protection.disks
        watch = Watch(
            self.events, disks, protection.early, thresholds=self.thresholds, hold_s=config.hold_s
        )
        self._metrics = Metrics(Watched(
            self._settings.site, disks, self.thresholds, counts, store, vault_error,
            self.events, self.sinks,
        ))  # fmt: skip
        nursery.start_soon(keep_running, "keeping events", self.events.run)
        nursery.start_soon(keep_running, "telling of events", self.sinks.run)
        nursery.start_soon(keep_running, "watching the disks", watch.run)
        if config.metrics_listen:
            host, port = listen_address(config.metrics_listen)
            route = metrics_route(self._metrics.render)

            async def listen() -> None:
                await serve_metrics(host, port, route)

            nursery.start_soon(keep_running, "the metrics' port", listen)

    async def tell_plain(self, text: str, disks: str) -> None:
        """Tell that no daemon serves the mount; keep events until cancelled, watch no disk."""
        self.events.tell(PLAIN, self._settings.mountpoint, text, disk=disks)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.events.run)
            nursery.start_soon(self.sinks.run)

    def thresholds(self, disk: ProtectedDisk) -> RpoThresholds:
        """Return what the shipped lag of a disk may be: as its policy says, or the mount."""
        found = self._settings.options.watch.thresholds
        if disk.policy is None:
            return found
        warning, error = disk.policy.rpo_s
        return RpoThresholds(
            found.warning_s if warning is None else warning,
            found.error_s if error is None else error,
        )

    # ---- what the control socket offers ----------------------------------------------------

    def render(self) -> bytes:
        """Return the metrics, as Prometheus reads them."""
        return b"" if self._metrics is None else self._metrics.render()

    async def listed(
        self, since: str, limit: int | None, *, after: int, level: str, disk: str
    ) -> Mapping[str, object]:
        """Return what has happened, the newest last, and the number to go on ``after``.

        Raises:
            UsageError: a time or a level cannot be used.
        """
        try:
            since_ns = parse_time(since, time.time_ns()) if since else 0
        except ValueError as error:
            raise UsageError(f"since: {error}") from None
        if level not in tuple(EventLevel):
            raise UsageError(f"level: {level!r} is not one of {', '.join(EventLevel)}")

        def read() -> list[dict[str, object]]:
            found = self.events.since(
                since_ns, limit or MOST, after=after, level=EventLevel(level), disk=disk
            )
            return [{**event_document(one), "number": one.number} for one in found]

        rows = await trio.to_thread.run_sync(read)
        return {"events": rows}

    async def test(self) -> Mapping[str, object]:
        """Send an event through every sink, and return what each answered."""
        return {"sinks": await self.sinks.test()}
