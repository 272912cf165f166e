"""One disk and its replicator without a mount, over a store that a test owns.

Real tracking, sealing, spooling and passes of a real file; the store is in memory unless
the test brings another one. Nothing sleeps but on trio's clock, so `MockClock` makes days
short.

    async with Rig(tmp_path, 4 << 20) as rig:
        async with rig.running():
            rig.write(0, b"...")
            await rig.wait(lambda: rig.is_settled)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import trio

from tests.store.memory import MemoryStore
from tests.vaults import given, newcomer
from vdiskfs import native
from vdiskfs.catalog import DiskLog, Vault
from vdiskfs.delta import DeltaWriter, Spooled
from vdiskfs.errors import NotFoundError
from vdiskfs.health import Health, Level
from vdiskfs.image import ChainEnd, LiveImage, open_track
from vdiskfs.ownership import DiskLine
from vdiskfs.replicator import Joint, Replicator
from vdiskfs.store import Store
from vdiskfs.store.retry import RetryingStore
from vdiskfs.stride import Pace
from vdiskfs.units import PAGE_SIZE

WRITER = "ab" * 16


class Line:
    """A line that nobody else writes."""

    handed = is_elsewhere = False

    def __init__(self, points: DiskLog) -> None:
        self.points = points

    async def publish(self, spooled: Spooled, offered: Callable[[], None]) -> Spooled:
        await self.points.publish(spooled, offered=offered)
        return spooled


class Rig:
    """A disk of ``size`` bytes; `open` takes it up, `close` leaves what a daemon leaves."""

    def __init__(
        self, root: Path, size: int, *, store: Store | None = None, pace: Pace | None = None,
        name: str = "web01",
    ) -> None:  # fmt: skip
        self.root = root
        self.memory = MemoryStore()
        self.store: Store = store or RetryingStore(self.memory)
        self.pace = pace or Pace(1.0, 64 << 20, 1)
        self.name = name
        self.joint: Joint | None = None
        self.file = root / f"{name}.img"
        self.directory = root / ("disk" if name == "web01" else name)
        self.directory.mkdir(exist_ok=True)
        if not self.file.exists():
            self.file.write_bytes(b"")
            os.truncate(self.file, size)
        self.snapshots: dict[bytes, int] = {}
        self.published = 0
        self._disk_id = ""
        self._core: native.Core | None = None
        self._image: native.Image | None = None
        self._replicator: Replicator | None = None
        self.vault: Vault | None = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    @property
    def image(self) -> native.Image:
        assert self._image is not None
        return self._image

    @property
    def replicator(self) -> Replicator:
        assert self._replicator is not None
        return self._replicator

    @property
    def health(self) -> Health:
        return self.replicator.health

    async def open(self) -> None:
        """Take the disk up, as after the end of a daemon on a host that lived on."""
        try:
            vault = await Vault.open(self.store, given())
        except NotFoundError:
            vault = await Vault.init(self.store, given())
        self.vault = vault
        try:
            self._disk_id = (await vault.find_disk(self.name)).id
        except NotFoundError:
            made = await vault.create_disk(self.name, file=f"{self.name}.img", size=0, site="site")
            self._disk_id = made.id
        points = vault.log(await vault.disk(self._disk_id))
        tip = await points.tip()
        end = ChainEnd(tip.generation, tip.epoch, tip.digest, tip.size, tip.time_ns)
        self._core = native.Core()
        descriptor = os.open(self.file, os.O_RDWR)
        try:
            self._image = native.Image(self._core, descriptor, native.ImageFlags.NONE, 1)
        finally:
            os.close(descriptor)
        (self.directory / "spool").mkdir(exist_ok=True)
        track, new = open_track(self.directory / "track", self._image.size())
        if new:
            track.set_epoch(end.epoch + 1, end.size)
        live = LiveImage(self._image, track)
        self._replicator = Replicator(
            name=self.name, live=live, line=cast("DiskLine", Line(points)), end=end, directory=self.directory,
            make_writer=self._make_writer, pace=self.pace, health=Health(self.name),
            published=self._note, joint=lambda: self.joint,
        )  # fmt: skip
        if new:
            self._replicator.suspects.distrust()
        self._replicator.load()
        self.remember()
        self._replicator.touched()

    def close(self) -> None:
        """End it without a word; bitmaps, spool and parts stay."""
        if self._replicator is not None and self._core is not None:
            self._replicator.live.close()
            self.image.close()
            self._core.close()
            self._replicator = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the replicator in the block."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.replicator.run)
            yield
            nursery.cancel_scope.cancel()

    def _make_writer(self, directory: Path, *, inside: bool, batch: str = "") -> DeltaWriter:
        limits = {} if inside else {"inline_limit": 0}
        assert self.vault is not None
        return DeltaWriter(
            directory, **limits, vault_id=self.vault.vault_id, disk_id=self._disk_id,
            writer_id=WRITER, batch=batch,
        )  # fmt: skip

    def _note(self, spooled: Spooled) -> None:
        self.published += 1

    # ---- the machine ---------------------------------------------------------------------

    def image_bytes(self, offset: int, data: bytes) -> None:
        """Write into the file before the disk is taken up for the first time."""
        with self.file.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def write(self, offset: int, data: bytes) -> None:
        """Write as one request, and remember what the disk is now."""
        self.image.write(offset, data)
        self.remember()
        self.replicator.touched()

    def truncate(self, size: int) -> None:
        """Set the size, and remember what the disk is now."""
        self.image.truncate(size)
        self.remember()
        self.replicator.touched()

    def remember(self) -> None:
        """A point of this moment is right."""
        self.snapshots.setdefault(digest_of(self.file.read_bytes()), len(self.snapshots))

    # ---- what is looked at -----------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether the vault holds all that was written, and nothing waits."""
        one = self.replicator
        counts = one.live.counts()
        if not one.hold().value:
            return False  # what is sealed may be on its way into the spool
        waits = counts.changed or counts.suspect_pages or counts.frozen or one.suspects.needed
        return not waits and not len(one.spool) and self.health.level is Level.NORMAL

    async def wait(self, is_true: Callable[[], bool], every_s: float = 1.0) -> None:
        """Wait on trio's clock."""
        while not is_true():  # noqa: ASYNC110 (the replicator tells nobody)
            await trio.sleep(every_s)

    def fresh_log(self) -> DiskLog:
        """A log that knows nothing yet, over the same store."""
        assert self.vault is not None
        return newcomer(self.vault).log(self.replicator.points.record)

    async def contents(self) -> dict[int, bytes]:
        """Return the digest of each point's bytes, by epoch; reads them all."""
        log = self.fresh_log()
        found = {}
        for point in await log.points():
            async with await log.open(point) as reader:
                data = await reader.read_pages(0, reader.pages)
                found[point.epoch] = digest_of(bytes(data[: reader.size]))
        return found

    async def check(self) -> int:
        """Check every point, and that the newest one is the disk; return how many there are."""
        found = await self.contents()
        moments = [self.snapshots[digest] for _, digest in sorted(found.items())]
        assert moments == sorted(moments), "points are not in the order of the writes"
        assert found[max(found)] == digest_of(self.file.read_bytes()), "the newest is not the disk"
        return len(found)


def page_of(seed: int) -> bytes:
    """Return a page that does not compress."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(PAGE_SIZE)


def digest_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
