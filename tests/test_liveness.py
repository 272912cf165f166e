"""Whether another process writes as an owner: processes of this kernel, heartbeats of others."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from tests.catalog.memory import MemoryStore
from vdiskfs.catalog import Owner, SiteRecord, Vault
from vdiskfs.liveness import MISSED, Liveness, _process, own_process
from vdiskfs.units import NS, format_time

OWNER = Owner("berlin", "a" * 32, "n", "2026-11-21T01:00:00Z")


def sign(process: str, age_s: float = 0) -> SiteRecord:
    moment = format_time(time.time_ns() - int(age_s * NS))
    return SiteRecord("berlin", "h", moment, "1", (), 7, "t", OWNER.writer, process, 10)


async def asked(
    record: SiteRecord | None, meanwhile: Callable[[Vault, float], Awaitable[None]] | None = None
) -> tuple[bool, float]:
    """Return the answer, and how long was waited for it."""
    vault = await Vault.init(cast("Any", MemoryStore()))
    if record is not None:
        await vault.write_site(record)
    waited = [0.0]

    async def sleep(seconds: float) -> None:
        waited[0] += seconds
        if meanwhile is not None:
            await meanwhile(vault, waited[0])

    live = Liveness(vault, sleep)
    answer = await live.is_alive(OWNER)
    before = waited[0]
    assert await live.is_alive(OWNER) is answer
    assert waited[0] == before  # once is enough for all disks
    return answer, before


async def test_an_owner_that_never_gave_a_sign_is_dead() -> None:
    assert await asked(None) == (False, 0)


async def test_a_process_of_this_kernel_is_looked_up_and_not_waited_for() -> None:
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    try:
        running = _process(child.pid)
        assert await asked(sign(running)) == (True, 0)
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait()
    assert await asked(sign(running)) == (False, 0)
    # Another process may have its number by now.
    other = own_process().rsplit(":", 1)[0] + ":1"
    assert await asked(sign(other)) == (False, 0)


async def test_this_process_is_not_another_one() -> None:
    assert await asked(sign(own_process())) == (False, 0)


@pytest.mark.parametrize("process", ["", "another-boot:1:2:3", "nonsense", ":::"])
async def test_a_heartbeat_that_changes_is_alive(process: str) -> None:
    async def beat(vault: Vault, waited: float) -> None:
        if waited >= 5:
            await vault.write_site(replace(sign(process), started=str(waited)))

    alive, waited = await asked(sign(process), beat)
    assert alive
    assert waited <= 10


async def test_a_heartbeat_that_does_not_change_is_dead_after_its_time() -> None:
    alive, waited = await asked(sign("another-boot:1:2:3"))
    assert not alive
    assert MISSED * 10 <= waited + 1 <= MISSED * 10 + 2


async def test_an_old_heartbeat_is_not_waited_for_and_one_of_tomorrow_is() -> None:
    assert await asked(sign("another-boot:1:2:3", 3600)) == (False, 0)
    alive, waited = await asked(sign("another-boot:1:2:3", -3600))
    assert not alive
    assert waited >= MISSED * 10
    nonsense = replace(sign("another-boot:1:2:3"), time="yesterday")
    assert (await asked(nonsense))[1] >= MISSED * 10
