"""The taker's side of a handover: a planned failover asks the site that has the disk to let go.

The request stands in the disk's record in the vault, and so does the answer
(`vdiskfs.catalog.moves`); the other side is `vdiskfs.handovers`.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace

import trio

from vdiskfs.catalog import DiskRecord, Point
from vdiskfs.catalog.moves import REFUSED, RELEASED, ask_for, withdraw
from vdiskfs.catalog.records import Handover
from vdiskfs.catalog.vault import now_text
from vdiskfs.disk import Site
from vdiskfs.errors import StateError, VaultUnreachableError
from vdiskfs.failover.failovers import Failover, Failovers
from vdiskfs.failover.known import is_taken
from vdiskfs.failover.record import Member
from vdiskfs.failover.states import Kind, Step
from vdiskfs.liveness import age_s

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""Seconds between two looks at what the other site answers."""

SILENT_S = 60.0
"""A site that has given no sign for so long is said to be silent."""


class Asking:
    """Asks for the disks of a failover. Trio thread only."""

    def __init__(self, failovers: Failovers, site: Site) -> None:
        """Take the mount's."""
        self._failovers = failovers
        self._site = site

    async def ask(self, failover: Failover) -> None:
        """Ask for each disk that an earlier run has not taken."""
        for member in failover.record.members:
            if is_taken(await self._site.vault.disk(member.disk_id), member):
                continue
            request = Handover(
                failover.record.id, self._site.name, self._site.state.writer_id, now_text()
            )
            await ask_for(self._site.vault, member.disk_id, request)

    async def wait(self, failover: Failover) -> None:
        """Wait until all are released, and note their last points.

        One that an earlier run has taken, before another site took the next, is left as it is.

        Raises:
            StateError: the other site refuses, and says why.
        """
        # Again, where an earlier run was refused.
        await self.ask(failover)
        members = []
        for member in failover.record.members:
            await self._wait_one(failover, member)
        for member in failover.record.members:
            record = await self._site.vault.disk(member.disk_id)
            if is_taken(record, member):
                members.append(member)
                continue
            points = self._site.vault.log(record)
            tip = await points.tip()
            if not tip.fenced or tip.epoch == 0:
                raise StateError(f"disk {member.disk}: was released, and its line is not ended")
            point: Point = await points.find(tip.epoch)
            members.append(replace(
                member, generation=point.generation, epoch=tip.epoch, time_ns=tip.time_ns,
                size=tip.size, digest=tip.digest.hex(), current=record.generation,
            ))  # fmt: skip
        await self._failovers.write(failover, members=tuple(members))

    async def _wait_one(self, failover: Failover, member: Member) -> None:
        while True:
            try:
                record = await self._site.vault.disk(member.disk_id)
            except VaultUnreachableError as error:
                failover.says = str(error)
                await trio.sleep(max(LOOK_S, error.retry_after_s or 0.0))
                continue
            if is_taken(record, member):
                return
            asked = record.handover
            if asked is None or asked.id != failover.record.id:
                raise StateError(
                    f"disk {member.disk}: the request was withdrawn",
                    hint="the same command asks again",
                )
            if asked.step == REFUSED:
                # The others go on there, too: a machine that lacks one disk stands still.
                for one in failover.record.members:
                    await withdraw(self._site.vault, one.disk_id, failover.record.id)
                raise StateError(
                    f"disk {member.disk}: site {record.site} does not let it go: {asked.said}",
                    hint="mend that, and give the same command again; or: vdiskfs failover "
                    f"{self._way_back(failover)} {failover.record.name}",
                )
            if asked.step == RELEASED:
                return
            failover.says = await self._what_for(failover, member, record, asked)
            await trio.sleep(LOOK_S)

    def _way_back(self, failover: Failover) -> Step:
        return Step.CLEANUP if failover.record.kind is Kind.FAILBACK else Step.ROLLBACK

    async def _what_for(
        self, failover: Failover, member: Member, record: DiskRecord, asked: Handover
    ) -> str:
        said = asked.said or "has not answered yet"
        text = f"disk {member.disk}: site {record.site}: {said}"
        if record.owner is not None and not asked.said:
            sign = await self._site.liveness.last_sign(record.owner)
            if sign is None or age_s(sign) > SILENT_S:
                text += "; it has given no sign of life for long: if it is gone, "
                text += (f"vdiskfs failback complete {shlex.quote(member.disk)} --unplanned"
                         if failover.record.kind is Kind.FAILBACK
                         else "roll back, and fail over unplanned")  # fmt: skip
        return text
