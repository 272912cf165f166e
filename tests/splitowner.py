"""What is seen of a site of `tests.splitbrain`: by the store, and by `Handovers`."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from tests.races import HostStore
from vdiskfs.errors import StateError, VaultUnreachableError
from vdiskfs.failover.states import State, Step, after

if TYPE_CHECKING:
    from tests.splitsites import Site

REQUESTS = ("create", "create_from_file", "replace", "read", "read_range", "stat")


class CutStore(HostStore):
    """A way to the store that is cut at times."""

    def __getattr__(self, name: str) -> Any:
        real = super().__getattr__(name)
        if name not in REQUESTS:
            return real

        async def call(*args: Any, **options: Any) -> Any:
            await self._cut()
            return await real(*args, **options)

        return call

    async def _cut(self) -> None:
        site = cast("Site", self._host)
        if site.cut > 0:
            site.cut -= 1
            await self._race.turn()
            self._race.counts["request while cut off"] += 1
            raise VaultUnreachableError("cut off")

    async def list(self, prefix: str) -> Any:
        await self._cut()
        async for info in super().list(prefix):
            yield info


class Told:
    """Stand in for the events of a mount: nobody listens."""

    def tell(self, *_: Any, **__: Any) -> None:
        return

    async def wait_kept(self) -> None:
        return


class Machines:
    """Stand in for `OwnMachines`."""

    def __init__(self, site: Site, request: str) -> None:
        self._site = site
        self._request = request

    async def runs_on(self, _: str) -> bool:
        return False

    async def stop_for(self, _: str) -> None:
        return

    async def start_for(self, _: str) -> bool:
        return True

    async def handed(self, _: str) -> None:
        site = self._site
        site.race.released[self._request] = site.local.data
        if site.move is not None:
            site.move.state = State.HANDED_OVER
        if site.race.rng.random() < 0.3:
            await site.look()  # the heartbeat's

    async def kept(self, _: str) -> None:
        self._site.note_kept()

    def check_may_go(self, _: str) -> None:
        if self._site.move is not None:
            after("web01", self._site.move.state, Step.HANDOVER)


class Disk:
    """Stand in for `ProtectedDisk`, as `Handovers` uses it."""

    spooled_bytes = 0
    ended = False

    def __init__(self, site: Site) -> None:
        self._site = site
        self.disk_id, self.name = site.race.disk_id, "web01"
        self.line = site.line
        self.replicator = self.live = self
        self.suspects = site.suspects
        self.health = SimpleNamespace(displaced=lambda *_, **__: None)
        self.file = SimpleNamespace(path="web01.img", is_open=False)

    def refuse_writes(self, refuse: bool) -> None:
        self._site.refusing = refuse

    def check_not_paused(self) -> None:
        if self._site.paused:
            raise StateError("paused")

    def hold(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def dirty_bytes(self) -> int:
        return 0

    def counts(self) -> SimpleNamespace:
        return SimpleNamespace(changed=bool(self._site.local.dirty))

    async def seal_if_changed(self) -> None:
        await self._site.seal()

    @property
    def waiting(self) -> int:
        return len(self._site.queue)

    async def wait_shipped(self) -> None:
        await self._site.ship_all()
