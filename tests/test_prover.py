"""When a point is proven in the background: what was only read back does not count as checked."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.catalog.harness import bench
from vdiskfs import prover, proving
from vdiskfs.catalog.proofs import Proof, read_proofs, write_proof
from vdiskfs.config import Config
from vdiskfs.errors import LocalError
from vdiskfs.events import Events
from vdiskfs.jobs import Jobs
from vdiskfs.prover import Prover
from vdiskfs.proving import Finding
from vdiskfs.units import NS

HASHED = Proof("hashed", "pass", "", "2026-11-22T00:00:00Z", 1.5, "here", 4096)
CHECKED = replace(HASHED, level="checked")
UNSURE = replace(CHECKED, outcome="inconclusive", reason="no file system")
FAILED = replace(CHECKED, outcome="fail", reason="disk (ext4) DAMAGED")


class Copies:
    """No copies of points: what a check finds is up to the test."""

    async def make(self, *_: object) -> Path:
        return Path("copy.img")

    async def remove(self, _: str) -> None:
        pass


async def look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, known: dict[int, list[Proof]]
) -> list[str]:
    """Look once at a disk whose newest point, the fifth, is a second old; return its proofs.

    It is proven once an hour.
    """

    async def check_image(_: Path) -> list[Finding]:
        return [Finding("disk", "ext4", True, "")]

    async def prove_point(*arguments: Any, rest: float, **more: Any) -> Any:
        assert rest >= 1, "it reads while it should rest"
        return await proving.prove_point(*arguments, rest=0.0, **more)

    monkeypatch.setattr(prover, "check_image", check_image)
    monkeypatch.setattr(prover, "prove_point", prove_point)
    options = Config(prove_interval_s=3600, prove_level=level)
    async with bench() as test:
        await test.churn(5)
        newest_ns = (await test.log.find("latest")).time_ns
        monkeypatch.setattr(time, "time_ns", lambda: newest_ns + NS)
        for epoch, proofs in known.items():
            for proof in proofs:
                await write_proof(test.store, test.record.id, (1, epoch), proof)
        disk: Any = SimpleNamespace(
            name="web01", disk_id=test.record.id, proven_ns=None,
            line=SimpleNamespace(points=test.log, displaced=None),
        )  # fmt: skip
        site: Any = SimpleNamespace(name="there")
        copies: Any = Copies()
        one = Prover(
            site, lambda: [disk], copies, options=options, events=Events(tmp_path),
            jobs=Jobs(tmp_path),
        )  # fmt: skip
        await one._look(disk)
        kept = await read_proofs(test.store, test.record.id, (1, 5))
    return [f"{proof.level} {proof.outcome} {proof.site}" for proof in kept]


PROVEN = ["hashed pass there", "checked pass there"]


@pytest.mark.parametrize(
    ("level", "known", "found"),
    [
        ("checked", {}, PROVEN),
        ("checked", {5: [HASHED]}, PROVEN),
        ("checked", {4: [HASHED, FAILED], 5: [HASHED]}, PROVEN),
        ("checked", {5: [HASHED, FAILED]}, PROVEN),
        ("checked", {5: [HASHED, CHECKED]}, ["hashed pass here", "checked pass here"]),
        ("checked", {5: [HASHED, UNSURE]}, ["hashed pass here", "checked inconclusive here"]),
        ("checked", {4: [HASHED, CHECKED], 5: [HASHED]}, ["hashed pass here"]),
        ("checked", {4: [HASHED, UNSURE]}, []),
        ("hashed", {}, ["hashed pass there"]),
        ("hashed", {5: [HASHED]}, ["hashed pass here"]),
        ("hashed", {4: [CHECKED]}, []),
    ],
)
async def test_a_point_is_due_for_its_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, known: Any, found: list[str]
) -> None:
    assert await look(tmp_path, monkeypatch, level, known) == found


async def test_a_check_that_this_host_cannot_do_is_inconclusive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    expect_log("checked: inconclusive: no loop device")

    async def remove(*_: object) -> None:
        raise LocalError("no loop device")

    monkeypatch.setattr(Copies, "remove", remove)
    found = await look(tmp_path, monkeypatch, "checked", {})
    assert found == ["hashed pass there", "checked inconclusive there"]
