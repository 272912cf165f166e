"""What Prometheus reads: the documented names and no others, at the socket and at the port."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from tests.replicate.rig import Rig
from tests.sinks.test_sinks import settings
from vdiskfs.errors import VaultUnreachableError
from vdiskfs.events import Events
from vdiskfs.exporter import metrics_route, serve_metrics
from vdiskfs.health import _Trouble
from vdiskfs.metrics import Metrics, Watched
from vdiskfs.native import CoreCounts
from vdiskfs.sinks import Sinks
from vdiskfs.store.retry import RetryingStore
from vdiskfs.watchsettings import RpoThresholds

PAGE = Path(__file__).parents[2] / "man/vdiskfs-monitoring.7"


def documented() -> dict[str, tuple[str, ...]]:
    """Return the labels of each metric in the page."""
    section = PAGE.read_text().split(".SH METRICS")[1].split(".SH ")[0]
    found = re.findall(r"(?m)^\.TP\n\.BR? (vdiskfs_\w+)(?: \{([\w,]+)\})?$", section)
    return {name: tuple(sorted(labels.split(","))) if labels else () for name, labels in found}


def metrics_of(tmp_path: Path, disks: list[Any], store: Any = None) -> Metrics:
    events = Events(tmp_path)
    sinks = Sinks(settings(tmp_path, webhook={"url": "http://127.0.0.1:1/"}), events)
    sinks.open(strict=True)
    counts = CoreCounts(*range(1, 1 + len(CoreCounts.__dataclass_fields__)))
    store = store or SimpleNamespace(requests=5, bytes_sent=6, bytes_received=7, retries=8)
    return Metrics(Watched(
        "here", lambda: disks, lambda _: RpoThresholds(60, 300), lambda: counts, store,
        lambda: None, events, sinks,
    ))  # fmt: skip


def exported(text: bytes) -> dict[str, tuple[str, ...]]:
    """Return the labels of each sample."""
    found: dict[str, tuple[str, ...]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found[sample.name] = tuple(sorted(sample.labels))
    return found


async def test_the_names_and_labels_are_those_of_the_page(tmp_path: Path) -> None:
    async with Rig(tmp_path, 1 << 20) as rig, rig.running():
        rig.write(0, b"x" * 4096)
        await rig.wait(lambda: rig.is_settled, 0.05)
        rig.health.errors["vault.away"] += 1
        rig.health._troubles.append(
            _Trouble(VaultUnreachableError("away"), trio.current_time() + 9)
        )
        disk = SimpleNamespace(
            name="web01", disk_id="ab", health=rig.health, replicator=rig.replicator,
            image=rig.image, proven_ns=1,
        )  # fmt: skip
        assert isinstance(rig.store, RetryingStore)
        text = metrics_of(tmp_path, [disk], rig.store).render()
        rig.health._troubles.clear()
    found, pages = exported(text), documented()
    assert found == pages
    assert b'vdiskfs_disk_epochs_sealed_total{disk="web01"}' in text
    assert b'vdiskfs_disk_errors_total{code="vault.away",disk="web01"} 1.0' in text


async def test_the_port_answers_prometheus(tmp_path: Path, nursery: trio.Nursery) -> None:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    route = metrics_route(metrics_of(tmp_path, []).render)
    nursery.start_soon(serve_metrics, "127.0.0.1", port, route)
    async with httpx.AsyncClient() as client:
        with trio.fail_after(60):
            while True:
                try:
                    answer = await client.get(f"http://127.0.0.1:{port}/metrics")
                    break
                except httpx.ConnectError:
                    await trio.sleep(0.01)
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert "vdiskfs_vault_requests_total 5.0" in answer.text
        assert (await client.get(f"http://127.0.0.1:{port}/v1/status")).status_code == 404


async def test_a_port_that_is_taken_is_said_once_and_tried_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, expect_log: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    expect_log("metrics_listen: 127.0.0.1 port .*in use")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        route = metrics_route(metrics_of(tmp_path, []).render)
        with trio.move_on_after(100):
            await serve_metrics("127.0.0.1", taken.getsockname()[1], route)
    assert caplog.text.count("metrics_listen") == 1
