"""What brings the images of a failback to the other site's newest point, again and again.

Trio thread only.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from vdiskfs.catalog import DiskLog
from vdiskfs.disk import Site
from vdiskfs.errors import VdiskfsError
from vdiskfs.failover.failovers import Failover, Failovers
from vdiskfs.failover.homeimage import HomeImages
from vdiskfs.failover.known import is_taken
from vdiskfs.failover.record import Member
from vdiskfs.failover.states import State
from vdiskfs.homeward import HomeMover, MoveProgress
from vdiskfs.ratelimit import RateLimiter

log = logging.getLogger(__name__)

KEEP_UP_S = 10.0
"""Seconds between two looks whether the other site has newer points, until it is completed."""


class Bringing:
    """Moves the images of failbacks."""

    def __init__(
        self, failovers: Failovers, site: Site, images: HomeImages, nursery: trio.Nursery, *,
        limiter: RateLimiter, notes: Callable[[Failover, Member], Path],
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            failovers: the mount's.
            site: the mount's.
            images: what is moved.
            nursery: where images are kept up with the other site.
            limiter: bounds what is fetched.
            notes: gives where it lies what is known of an image on its way.
        """
        self._failovers = failovers
        self._site = site
        self._images = images
        self._nursery = nursery
        self._limiter = limiter
        self._notes = notes
        self._coming: dict[str, HomeMover] = {}
        self._following: dict[str, tuple[trio.CancelScope, trio.Event]] = {}
        self._moving: dict[str, trio.Lock] = defaultdict(trio.Lock)

    def progress(self, failover: Failover) -> dict[str, MoveProgress]:
        """Return how far the moving of each disk is, by the disk's name."""
        return {
            member.disk: self._coming[key].progress
            for member in failover.record.members
            if (key := f"{failover.record.id}/{member.disk_id}") in self._coming
        }

    def forget(self, failover: Failover, member: Member) -> None:
        """Forget what moves an image: it has come, or is left."""
        self._coming.pop(f"{failover.record.id}/{member.disk_id}", None)

    def mover(self, failover: Failover, member: Member) -> HomeMover:
        """Return what moves the image of a member."""
        key = f"{failover.record.id}/{member.disk_id}"
        if key not in self._coming:
            mover = HomeMover(
                self._images.path(member), self._notes(failover, member),
                partial(self._log, member.disk_id),
                limiter=self._limiter, is_away=self._failovers.is_away, verify=True,
            )  # fmt: skip
            self._coming[key] = mover
        return self._coming[key]

    async def _log(self, disk_id: str, generation: int) -> DiskLog:
        record = await self._site.vault.disk(disk_id)
        return self._site.vault.log(record, generation)

    async def move(self, failover: Failover) -> None:
        """Bring each image to the newest point of the other site."""
        # What follows it does not lead an image back that has come further meanwhile.
        async with self._moving[failover.record.id]:
            for member in failover.record.members:
                await self._move_one(failover, member)

    async def _move_one(self, failover: Failover, member: Member) -> None:
        record = await self._site.vault.disk(member.disk_id)
        if is_taken(record, member):
            return
        points = self._site.vault.log(record)
        tip = await points.tip()
        point = await points.find(tip.epoch)
        failover.says = f"disk {member.disk}: is brought to epoch {tip.epoch}"
        mover = self.mover(failover, member)
        await mover.move((point.generation, tip.epoch))
        log.info("disk %s: is at epoch %d of the other site; %d bytes fetched", member.disk,
                 tip.epoch, mover.progress.fetched_bytes)  # fmt: skip

    def follow(self, failover: Failover) -> None:
        """Keep the images up with the other site, until `stop`."""
        if failover.record.id not in self._following:
            scope, ended = trio.CancelScope(), trio.Event()
            self._following[failover.record.id] = scope, ended
            self._nursery.start_soon(self._keep_up, failover, scope, ended)

    async def _keep_up(
        self, failover: Failover, scope: trio.CancelScope, ended: trio.Event
    ) -> None:
        """Move what is new at the other site, until the failback is completed."""
        try:
            with scope:
                while failover.record.state is State.FAILING_BACK:
                    await trio.sleep(KEEP_UP_S)
                    await self._follow_once(failover)
        finally:
            ended.set()

    async def _follow_once(self, failover: Failover) -> None:
        try:
            await self.move(failover)
        except (VdiskfsError, OSError) as error:
            log.warning("failback %s: %s", failover.record.name, error)
        finally:
            failover.says = None

    async def stop(self, failover: Failover) -> None:
        """End that, and wait until none of its threads writes any more."""
        if failover.record.id in self._following:
            scope, ended = self._following[failover.record.id]
            scope.cancel()
            await ended.wait()
            del self._following[failover.record.id]
