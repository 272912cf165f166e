"""Shipping one disk's deltas: from the spool into the vault, in order.

A task of the replicator's. Before a delta is sent, the newest one that the vault has
accepted is looked at, so that nothing is ever sent to another vault of the same name. What
fails waits in `vdiskfs.health`; what can be stopped at any moment is stopped by `stop`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from vdiskfs.catalog import Anchor, DiskLog
from vdiskfs.catalog.publish import check_segments, segment_refs, upload_segments
from vdiskfs.crash import hook
from vdiskfs.delta import Spooled, remove_spooled
from vdiskfs.delta.refs import ObjectRef
from vdiskfs.errors import (
    DamagedError,
    LocalError,
    NotFoundError,
    SegmentsGoneError,
    is_disk_error,
)
from vdiskfs.health import Health
from vdiskfs.ownership import DiskLine
from vdiskfs.ratelimit import RateLimiter
from vdiskfs.spool import Spool, bytes_here

log = logging.getLogger(__name__)

NOTE_AGAIN_S = 5.0
"""Seconds between tries of noting, on this host, what the vault has taken."""

JOIN_AGAIN_S = 60.0
"""Seconds until deltas that are damaged are joined again, as far as they can be."""

ASIDE_BYTES = 256 << 10
"""What thinning takes of the bandwidth at once."""

CHECK_S = 1.0
"""A vault that took a delta so recently is not asked again whether it is still the same."""


class Shipper:
    """Ships one disk's spool while its `run` runs.

    ``limiter`` bounds what it uploads, ``shared`` (the mount's) what all disks do together.
    """

    def __init__(
        self, *, spool: Spool, line: DiskLine, health: Health,
        published: Callable[[Spooled], None], announce: Callable[[], None],
    ) -> None:  # fmt: skip
        """Prepare; no task runs yet.

        Args:
            spool: what is shipped.
            line: where deltas are published; it knows the disk's tip.
            health: is told of errors, and waits for the next try.
            published: is told, in a thread, of each delta that the vault holds, before it
                leaves the spool.
            announce: is called when the spool has lost a delta.
        """
        self.limiter = RateLimiter()
        self.shared = RateLimiter()
        self._line = line
        self._spool = spool
        self._health = health
        self._published = published
        self._announce = announce
        self._anchor = _anchor_of(line.points)
        self._checked_at = float("-inf")
        self._go = trio.Event()
        self._go.set()
        self._join_after = -math.inf
        self._scope: trio.CancelScope | None = None
        self._idle = trio.Event()
        self._idle.set()
        self._news = trio.Event()
        self.gone: SegmentsGoneError | None = None
        """Why the spool's first delta cannot be stored any more: it is to be given back."""
        # The delta, by its epoch, whose slot was asked for; that of which this is not known.
        self._offered: int | None = None
        self._doubtful: int | None = None

    async def run(self) -> None:
        """Ship until cancelled."""
        while True:
            await self._go.wait()
            self._idle = trio.Event()
            try:
                with trio.CancelScope() as self._scope:
                    await self._ship_all()
            finally:
                self._idle.set()

    def stop(self) -> None:
        """Let nothing be sent until `go`. What the vault is just taking may still arrive."""
        if self._go.is_set():
            self._go = trio.Event()
        if self._scope is not None:
            self._scope.cancel()

    def go(self) -> None:
        """Ship again."""
        self._go.set()

    @asynccontextmanager
    async def quiet(self, goes_on: Callable[[], bool]) -> AsyncIterator[None]:
        """Let nothing be sent inside, and the spool be changed; then `go`, if it ``goes_on``."""
        self.stop()
        try:
            await self._idle.wait()
            yield
        finally:
            if goes_on():
                self.go()

    def loaded(self) -> None:
        """The spool is that of an earlier run: it is not known what that has offered."""
        self._doubtful = self._spool.first.head.to_epoch if len(self._spool) else None

    @property
    def is_offered(self) -> bool:
        """Whether the vault may hold the spool's first delta in its slot."""
        asked = (self._doubtful, self._offered)
        return len(self._spool) > 0 and self._spool.first.head.to_epoch in asked

    @property
    def has_stored_first(self) -> bool:
        """Whether the vault has all segments of the spool's first delta."""
        return len(self._spool) > 0 and self._spool.first.head.to_epoch == self._offered

    def wake(self) -> None:
        """The spool has gained a delta."""
        self._news.set()
        self._news = trio.Event()

    async def _ship_all(self) -> None:
        while True:
            while not len(self._spool):
                await self._news.wait()
            spooled = await self._health.until_done("uploading", self._publish)
            if spooled is None:
                self._announce()
                await trio.sleep_forever()  # who gives it back stops this, and lets it go on
            await self._shipped(spooled)
            await self._health.until_done("joining", self._join)

    async def _join(self) -> None:
        """Join what is due. Damage to what was stored long ago holds up nothing that is new."""
        if trio.current_time() < self._join_after:
            return
        try:
            await self._line.points.publish_joins()
        except (DamagedError, NotFoundError) as error:
            self._join_after = trio.current_time() + JOIN_AGAIN_S
            self._health.chain_is_damaged(error)
        else:
            self._health.chain_is_damaged(None)

    async def _publish(self) -> Spooled | None:
        """Publish the spool's first delta; None: it is `gone`."""
        if trio.current_time() - self._checked_at >= CHECK_S:
            await self.check_vault()
        waiting = self._spool.first
        await self._take(waiting.head.object_size + bytes_here(waiting))
        began = trio.current_time()
        self.gone = None
        try:
            spooled = await self._line.publish(waiting, self._offer)
        except SegmentsGoneError as error:
            self.gone = error
            return None
        except LocalError as error:
            if is_disk_error(error):
                error.hint = "if it stays so: vdiskfs upgrade; what it held is compared then"
            raise
        self._spool.replace_first(spooled)
        self._checked_at = trio.current_time()
        head = spooled.head
        log.debug("epoch %d of %s was uploaded in %.3f s: %d bytes", head.to_epoch, head.disk_id,
                  self._checked_at - began, head.stored_bytes)  # fmt: skip
        return spooled

    def _offer(self) -> None:
        self._offered = self._spool.first.head.to_epoch

    async def _take(self, size: int) -> None:
        """Wait until so many bytes may be uploaded."""
        await self.shared.take(size)
        await self.limiter.take(size)

    @property
    def is_bounded(self) -> bool:
        """Tell whether uploads are held to a bandwidth."""
        return self.limiter.limit > 0 or self.shared.limit > 0

    async def take_aside(self, size: int) -> None:
        """Wait until so many bytes may be uploaded that no point waits for: deltas go between."""
        for start in range(0, size, ASIDE_BYTES):
            await self._take(min(ASIDE_BYTES, size - start))

    async def check_vault(self) -> None:
        """Check that the vault holds what it has taken.

        Raises:
            NotFoundError: there is no vault any more.
            WrongVaultError: it is another one, or an older state of it.
        """
        await self._anchor.check()

    async def _shipped(self, spooled: Spooled) -> None:
        self._anchor.note(spooled.head)
        while True:
            try:
                await self._note(spooled)
                break
            except (LocalError, OSError) as error:
                # Others go on meanwhile: they may say better what this host's disk lacks.
                self._health.local_failed(error, "noting")
            await trio.sleep(NOTE_AGAIN_S)
        self._health.local_works("noting")
        self._spool.shipped()
        self._announce()

    async def _note(self, spooled: Spooled) -> None:
        # Known durably before the spool lets go of it. A cancel must not come in between.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._published, spooled)
            hook("publish.noted")
            await trio.to_thread.run_sync(remove_spooled, spooled)
            hook("spool.emptied")

    async def claim_parts(self, batch: str, parts: Sequence[Spooled]) -> bool:
        """Claim a batch; say whether all of it is there that parts have given away."""
        points = self._line.points
        refs = await trio.to_thread.run_sync(_given_away, parts)

        async def claim() -> bool:
            await self.check_vault()
            try:
                await points.claims.need([batch])
                await check_segments(points.store, points.record.id, refs)
            except SegmentsGoneError as error:
                log.info("disk %s: %s", points.record.name, error)
                return False
            return True

        return await self._health.until_done("uploading", claim)

    async def upload_part(self, part: Spooled) -> None:
        """Store a part's segments, and give their room back; what is stored already is left."""
        points = self._line.points
        here = [segment for segment in part.segments if segment.path.exists()]

        async def upload() -> None:
            await self.check_vault()
            await upload_segments(points.store, points.record.id, here)

        await self._take(sum(segment.size for segment in here))
        await self._health.until_done("uploading", upload)
        for segment in here:
            segment.path.unlink(missing_ok=True)
            hook("part.uploaded")


def _given_away(parts: Sequence[Spooled]) -> list[ObjectRef]:
    """Return the segments of parts that are not here any more."""
    return [
        ref for part in parts for ref in segment_refs(part.path)
        if not part.path.with_name(f"{ref.segment_id}.segment").exists()
    ]  # fmt: skip


def _anchor_of(points: DiskLog) -> Anchor:
    """Begin with what was read when the disk was started."""
    store, vault_id = points.store, points.vault_id
    cover = points.line.cover
    if cover:
        return Anchor(store, vault_id, cover[-1].name, f"epoch {cover[-1].to_epoch}")
    # disk.json was just read; it is replaced now and then, and never removed.
    name = f"disks/{points.record.id}/disk.json"
    return Anchor(store, vault_id, name, f"disk {points.record.name}")
