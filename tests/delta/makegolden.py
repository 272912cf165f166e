"""Writes a golden vault of the format as it is now: ``python -m tests.delta.makegolden NUMBER``.

Only ever a new one: a vault that is there was written by the program of its time, and stays.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from tests.catalog.harness import Bench, bench, content_at
from vdiskfs.delta import Flags

GOLDEN = Path(__file__).parent.parent / "golden"
PAGE = 4096


async def fill(test: Bench) -> None:
    """Make 18 points: all kinds of pages and sizes, a label, a segment, a join, a fence."""
    rng, model = random.Random(2), test.model
    for epoch in range(1, 19):
        if epoch == 1:
            model.write(0, rng.randbytes(6 * PAGE) + b"text " * 5000)
            model.truncate(40 * PAGE + 100)
        elif epoch == 8:
            model.discard(PAGE, PAGE)
        elif epoch == 9:
            model.truncate(20 * PAGE + 7)
        elif epoch == 10:
            model.truncate(60 * PAGE)
        elif epoch == 18:
            model.writer_options = {"inline_limit": 0}
            model.write(50 * PAGE, rng.randbytes(PAGE) * 4)
        elif epoch != 17:
            model.write(rng.randrange(50) * PAGE + 99, bytes([epoch]) * 9000)
        flags = Flags.APPLICATION if epoch == 12 else Flags(0)
        await test.publish(flags=flags, label="vor dem Umzug ✓" if epoch == 7 else "")
        await test.log.publish_joins()
    facts = model.facts(flags=Flags.FENCE)
    await test.log.publish(model.writer().finish(replace(facts, to_epoch=facts.from_epoch)))


async def make(number: int) -> None:
    """Write the vault, and what is true of it."""
    root = GOLDEN / f"vault-{number}"
    root.mkdir()
    async with bench() as test:
        await fill(test)
        points = await test.fresh_log().points()
        said: dict[str, Any] = {
            "disk": test.record.id, "tip": (await test.fresh_log().tip()).digest.hex(),
            "points": {}, "metadata": {},
        }  # fmt: skip
        for point in points:
            data = await content_at(test.fresh_log(), point.epoch)
            assert data == test.model.states[point.epoch]
            said["points"][str(point.epoch)] = {
                "sha256": hashlib.sha256(data).hexdigest(), "size": point.size, "time": point.time,
                "label": point.label, "consistency": point.consistency,
                "changed": point.changed_bytes, "stored": point.stored_bytes,
            }  # fmt: skip
        for name, (data, metadata, _) in sorted(test.store.objects.items()):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            if metadata:
                said["metadata"][name] = metadata
    (GOLDEN / f"vault-{number}.json").write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    trio.run(make, int(sys.argv[1]))
