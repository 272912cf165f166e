"""Whether the writer that owns a disk still runs: a courtesy, never what safety rests on.

A process that ran on this very kernel is looked up. Of another one the heartbeat is watched:
it is alive if the heartbeat changes, and taken for dead if that is old by this host's clock.
A wrong answer costs a branch, never a byte: the store decides who may write.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from vdiskfs.catalog import Owner, SiteRecord, Vault
from vdiskfs.units import NS, parse_time

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MISSED = 1.5
"""How many intervals of its heartbeat a writer may be silent before it is taken for dead."""


def own_process() -> str:
    """Name this process: the kernel's boot, the process namespace, its number, its start."""
    return _process(os.getpid())


class Liveness:
    """Asks the vault about owners; each answer is found out once."""

    def __init__(
        self, vault: Vault, sleep: Callable[[float], Awaitable[None]] = trio.sleep
    ) -> None:
        self._vault = vault
        self._sleep = sleep
        self._answers: dict[tuple[str, str], bool] = {}
        self._lock = trio.Lock()

    async def last_sign(self, owner: Owner) -> SiteRecord | None:
        """Return the owner's last heartbeat."""
        return await self._vault.site(owner.site, owner.writer)

    async def is_alive(self, owner: Owner) -> bool:
        """Say whether another process writes as this owner; may take a heartbeat's time."""
        key = (owner.site, owner.writer)
        async with self._lock:
            if key not in self._answers:
                self._answers[key] = await self._find_out(owner)
        return self._answers[key]

    async def _find_out(self, owner: Owner) -> bool:
        first = await self.last_sign(owner)
        if first is None:
            return False
        here = _runs_here(first.process)
        if here is not None:
            return here
        window = MISSED * first.interval_s + 1
        age = age_s(first)
        left = window if age < 0 else window - age
        while left > 0:
            step = min(left, max(0.25, first.interval_s / 4))
            await self._sleep(step)
            left -= step
            if await self.last_sign(owner) != first:
                return True
        return False


def age_s(sign: SiteRecord) -> float:
    """Return how old a heartbeat is by this host's clock, in seconds."""
    try:
        return (time.time_ns() - parse_time(sign.time, 0)) / NS
    except (ValueError, OverflowError):
        return -1.0


def _runs_here(process: str) -> bool | None:
    """Say whether a process of this kernel runs and is not this one; None: not to be known."""
    own = own_process().split(":")
    parts = process.split(":")
    if len(parts) != len(own) or parts[:2] != own[:2] or not parts[2].isdigit():
        return None
    if parts == own:
        return False
    try:
        return _process(int(parts[2])) == process
    except OSError:
        return False


def _process(pid: int) -> str:
    # Field 22 of proc(5)'s stat, counted after the name, which may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    namespace = Path("/proc/self/ns/pid").readlink().name.strip("pid:[]")
    state, started = fields[0], fields[19]
    boot = _BOOT_ID.read_text().strip()
    return f"{boot}:{namespace}:{pid}:{started if state not in 'ZX' else 'ended'}"
