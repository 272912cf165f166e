"""What Prometheus reads: the names are those of vdiskfs-monitoring(7), and stay.

Computed when it is asked for, from what is in memory. Trio thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vdiskfs.disk import ProtectedDisk
from vdiskfs.events import Events
from vdiskfs.health import Level
from vdiskfs.monitor import disk_document
from vdiskfs.native import CoreCounts
from vdiskfs.running import VERSION
from vdiskfs.sinks import Sinks
from vdiskfs.store import Store
from vdiskfs.units import PAGE_SIZE
from vdiskfs.watchsettings import RpoThresholds

Rows = Iterable[tuple[Sequence[str], float | None]]


@dataclass
class Watched:
    """What is measured."""

    site: str
    disks: Callable[[], Sequence[ProtectedDisk]]
    thresholds: Callable[[ProtectedDisk], RpoThresholds]
    counts: Callable[[], CoreCounts]
    store: Store
    vault_error: Callable[[], str | None]
    events: Events
    sinks: Sinks
    more: list[Callable[[], Iterable[Metric]]] = field(default_factory=list)
    """What other modules measure."""


class Metrics:
    """The metrics of one mount: a collector of prometheus-client."""

    def __init__(self, watched: Watched) -> None:
        """Take what is measured."""
        self._watched = watched
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        watched = self._watched
        yield _gauge("info", "the daemon", ("site", "version"), [((watched.site, VERSION), 1)])
        up = 0 if watched.vault_error() else 1
        yield _gauge("vault_up", "1: the last heartbeat reached the vault", (), [((), up)])
        disks = list(watched.disks())
        yield from self._health(disks)
        yield from _sizes(disks)
        yield from _replicated(disks)
        yield from self._requests()
        yield from self._told()
        for others in watched.more:
            yield from others()

    def _health(self, disks: Sequence[ProtectedDisk]) -> Iterator[Metric]:
        levels = tuple(Level)
        yield _gauge(
            "disk_health", "0: Normal, 1: Warning, 2: Critical", ("disk",),
            [((one.name,), levels.index(one.health.level)) for one in disks],
        )  # fmt: skip
        yield _gauge(
            "disk_state", "1: the disk is in this state", ("disk", "state"),
            [((one.name, str(one.health.shown_state)), 1) for one in disks],
        )  # fmt: skip
        yield _gauge(
            "disk_next_retry_seconds", "until what failed is tried again", ("disk",),
            [((one.name,), one.health.next_retry_s) for one in disks],
        )  # fmt: skip
        limits = [(one.name, self._watched.thresholds(one)) for one in disks]
        yield _gauge(
            "disk_rpo_threshold_seconds", "what the shipped lag may be", ("disk", "level"),
            [((name, level), seconds or None) for name, limit in limits
             for level, seconds in (("warning", limit.warning_s), ("error", limit.error_s))],
        )  # fmt: skip
        yield _counter(
            "disk_errors", "what failed", ("disk", "code"),
            [((one.name, code), count) for one in disks
             for code, count in sorted(one.health.errors.items())],
        )  # fmt: skip
        yield _counter(
            "disk_retries", "waits for another try, of minutes", ("disk",),
            [((one.name,), one.health.retries) for one in disks],
        )  # fmt: skip

    def _requests(self) -> Iterator[Metric]:
        counts, store = self._watched.counts(), self._watched.store
        names = ("reads", "writes", "syncs", "discards", "seeks", "names")
        yield _counter(
            "guest_requests", "requests to the file system", ("operation",),
            [((name,), getattr(counts, name)) for name in names],
        )  # fmt: skip
        yield _counter(
            "guest_bytes", "bytes that were read and written", ("direction",),
            [(("read",), counts.read_bytes), (("write",), counts.write_bytes)],
        )  # fmt: skip
        yield _counter("vault_requests", "requests to the vault", (), [((), store.requests)])
        yield _counter("vault_sent_bytes", "sent to the vault", (), [((), store.bytes_sent)])
        yield _counter(
            "vault_received_bytes", "received from the vault", (), [((), store.bytes_received)]
        )
        retries = getattr(store, "retries", 0)  # a folder is never asked again
        yield _counter("vault_retries", "requests made again, in seconds", (), [((), retries)])

    def _told(self) -> Iterator[Metric]:
        counts, queues = self._watched.events.counts, self._watched.sinks.queues
        yield _counter(
            "events", "events, with repeats", ("level",),
            [((str(level),), count) for level, count in counts.items()],
        )  # fmt: skip
        for name, what, field_name in (
            ("sink_delivered", "events that were told", "delivered"),
            ("sink_failures", "tries that failed", "failures"),
            ("sink_dropped", "events that were not told", "dropped"),
        ):
            rows = [((one.sink.name,), getattr(one, field_name)) for one in queues]
            yield _counter(name, what, ("sink",), rows)
        waiting = [((one.sink.name,), len(one)) for one in queues]
        yield _gauge("sink_waiting", "events that wait to be told", ("sink",), waiting)


_SIZES = (
    ("shipped_lag_seconds", "how far the vault lags behind", "shipped_lag_s"),
    ("usable_point_age_seconds", "age of the newest usable point", "usable_point_age_s"),
    ("proven_point_age_seconds", "age of the newest proven point", "proven_point_age_s"),
    ("size_bytes", "the disk's size", "size"),
    ("dirty_bytes", "changed since the last capture", "dirty_bytes"),
    ("spooled_bytes", "captured and not in the vault", "spooled_bytes"),
    ("points_waiting", "points that are not in the vault", "points_waiting"),
    ("epoch", "the newest epoch in the vault", "epoch"),
    ("generation", "the generation that is written", "generation"),
)


def _sizes(disks: Sequence[ProtectedDisk]) -> Iterator[Metric]:
    rows = [(disk.name, disk_document(disk)) for disk in disks]
    for name, what, key in _SIZES:
        found = [((disk,), _number(row[key])) for disk, row in rows]
        yield _gauge(f"disk_{name}", what, ("disk",), found)
    suspect = [
        ((one.name,), one.replicator.live.counts().suspect_pages * PAGE_SIZE) for one in disks
    ]
    yield _gauge("disk_suspect_bytes", "not known to be in the vault", ("disk",), suspect)
    paused = [((one.name,), int(one.replicator.paused)) for one in disks]
    yield _gauge("disk_paused", "1: replication is paused", ("disk",), paused)


def _replicated(disks: Sequence[ProtectedDisk]) -> Iterator[Metric]:
    for name, what, key in (
        ("epochs_sealed", "epochs that were captured", "added"),
        ("epochs_shipped", "epochs that the vault has taken", "left"),
        ("shipped_bytes", "bytes of these epochs in the vault", "left_bytes"),
    ):
        rows = [((one.name,), getattr(one.replicator.spool, key)) for one in disks]
        yield _counter(f"disk_{name}", what, ("disk",), rows)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _gauge(name: str, what: str, labels: Sequence[str], rows: Rows) -> Metric:
    family = GaugeMetricFamily(f"vdiskfs_{name}", what, labels=labels)
    for values, number in rows:
        if number is not None:
            family.add_metric(values, number)
    return family


def _counter(name: str, what: str, labels: Sequence[str], rows: Rows) -> Metric:
    family = CounterMetricFamily(f"vdiskfs_{name}", what, labels=labels)
    for values, number in rows:
        if number is not None:
            family.add_metric(values, number)
    return family
