"""Which line of the vault a disk writes here, and by what right.

The vault's record of a disk names its owner: a state directory, by its writer id, and that
directory's last start, by a random number. A start that finds another writer there is
refused, or takes over if it is forced; one that finds its own writer and another number runs
on a copy, or on an older state, of a directory: if the other one lives it is refused, else
it goes on in the next generation. A writer that learns from the store that it was displaced
goes on in a branch, so that nothing it captured is lost and nothing is mixed.

What survives this process lies in ``owner.json`` of the disk's directory, written before
and after each swap in the vault. Trio thread only; local files are read and written in
threads. vdiskfs-internals(7), "Two writers".
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import trio

from vdiskfs.catalog import Branch, DiskLog, DiskRecord, Owner, Tip, Vault
from vdiskfs.catalog.moves import Fork, catch_up, fork_off, is_forked
from vdiskfs.catalog.owners import add_branch, fence, next_generation, take_over
from vdiskfs.catalog.publish import is_stored
from vdiskfs.catalog.vault import now_text
from vdiskfs.crash import hook
from vdiskfs.delta import Spooled, remove_spooled
from vdiskfs.delta.rehead import rehead
from vdiskfs.errors import ConflictError, NotFoundError, StateError, VdiskfsError
from vdiskfs.image import ChainEnd
from vdiskfs.leftovers import advance, after, begun, parent_of, set_aside, ship, spooled_deltas
from vdiskfs.lineclaims import LineClaims
from vdiskfs.liveness import Liveness
from vdiskfs.ownernote import (
    Displaced,
    Remembered,
    Start,
    place_of,
    read_note,
    refusal,
    rolled_back,
)
from vdiskfs.state import DiskPaths, LastEnd

log = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""How long an owner that meets a fence waits for the takeover to be finished."""

_TRIES = 20


class DiskLine(LineClaims):
    """One disk's line: found by `start`, used by `publish`."""

    def __init__(
        self, *, vault: Vault, name: str, disk_id: str, directory: Path, site: str, writer: str,
        liveness: Liveness, sleep: Callable[[float], Awaitable[None]] = trio.sleep,
    ) -> None:  # fmt: skip
        """Prepare; ``directory`` is the disk's, with ``spool/`` in it."""
        super().__init__(
            vault=vault, name=name, disk_id=disk_id, directory=directory, site=site, writer=writer
        )
        self.moved = False  # the directory is a copy of the one that was written
        self.on_displaced: Callable[[Displaced], None] = lambda _: None
        self.on_returned: Callable[[], None] = lambda: None
        self._spool = directory / "spool"
        self._liveness = liveness
        self._sleep = sleep
        self._turn = trio.Lock()

    # ---- start -------------------------------------------------------------------------

    async def start(self, last: Remembered, how: Start) -> tuple[ChainEnd, bool]:
        """Find the line to write; return where it ends, and whether this site knows that end.

        If it does not, the spool is empty on return: what was in it is in a branch.

        Raises:
            StateError: another writer owns the disk, or the vault lacks what it had.
        """
        self._note = await trio.to_thread.run_sync(read_note, self._directory)
        for _ in range(_TRIES):
            try:
                self._stored, known = await self._start(last, how)
                return self._stored, known
            except ConflictError as error:
                log.info("disk %s: looks again: %s", self.name, error)
        raise ConflictError(f"disk {self.name}: its owner changes all the time")

    async def _start(self, last: Remembered, how: Start) -> tuple[ChainEnd, bool]:
        note = self._note
        self.moved = note.place not in ("", place_of(self._directory))
        survived = how.last_end is LastEnd.DAEMON_DIED and not self.moved
        record = await self._record(last, how)
        owner = record.owner
        self.asked = record.handover
        if how.fork is not None and not is_forked(record, how.fork):
            return await self._fork(record, last, how.fork)
        if note.handed and not how.force and self._is_away(record):
            return await self._stay_away(record, last)
        displaced = (
            owner is not None
            and not self._is_returned(record)
            and (note.line > 0 or (owner.writer != self._writer and note.start != ""))
        )
        # Programs may have the image open still, or it was failed over: what was written
        # here goes on, in a branch.
        moved = record.moved is not None and owner is not None and owner.writer != self._writer
        if displaced and (survived or moved) and not how.force:
            return await self._go_on_displaced(record, last)
        if owner is not None and owner.writer != self._writer:
            if not how.force:
                await self._keep_quietly(record, last)
                raise await self._refused(record, owner, "owns it")
            return await self._take_over(record, last, how)
        ours = self._claim(record).is_of(owner)
        sure = ours and (survived or how.last_end in (LastEnd.CLEAN, LastEnd.NONE))
        if owner is not None and not sure and await self._liveness.is_alive(owner):
            if not how.force:
                raise await self._refused(record, owner, "uses a copy of this state directory")
            return await self._take_over(record, last, how)
        if not ours:
            taken = await self._take_over(record, last, how)
            log.warning(
                "disk %s: this state directory is not the last one that wrote it: "
                "goes on in a new generation", self.name,
            )  # fmt: skip
            return taken
        return await self._go_on(record, last, how)

    async def _go_on(
        self, record: DiskRecord, last: Remembered, how: Start
    ) -> tuple[ChainEnd, bool]:
        """Go on as the owner that this site is."""
        points = self._log(record)
        tip = await points.tip()
        known = await self._is_known(tip, last)
        if known and not tip.fenced:
            return await self._settle(await self._claimed(record), tip, last, known=True)
        if not known:
            empty = tip.epoch == record.base(record.generation) and not tip.fenced
            if empty and last.generation != record.generation and await self._holds(record, last):
                # A takeover of ours that was cut off after its last step.
                return await self._settle(await self._claimed(record), tip, last, known=False)
        taken = await self._take_over(record, last, how)
        if not known:
            log.warning(
                "disk %s: the vault's epoch %d is not the one that this site knows: "
                "goes on in a new generation", self.name, tip.epoch,
            )  # fmt: skip
        return taken

    async def _fork(
        self, record: DiskRecord, last: Remembered, fork: Fork
    ) -> tuple[ChainEnd, bool]:
        """Take the disk at a point, which is what the image holds."""
        wanted = await self._new_claim(record)
        scratch = DiskPaths(self._directory).fence
        before = record.owner
        record = await fork_off(self._vault, record, fork, wanted, log=self._log, scratch=scratch)
        await self._own(wanted)
        await self._draw_attention(before)
        tip = await self._log(record).tip()
        log.warning(
            "disk %s: taken from site %s at epoch %d; generation %d", self.name,
            fork.moved.source.site, fork.epoch, record.generation,
        )  # fmt: skip
        return await self._settle(record, tip, last, known=True)

    async def _take_over(
        self, record: DiskRecord, last: Remembered, how: Start
    ) -> tuple[ChainEnd, bool]:
        if not how.accept_rollback and not await self._holds(record, last):
            raise rolled_back(self.name, last)
        wanted = await self._new_claim(record)
        before = record.owner
        scratch = DiskPaths(self._directory).fence
        record, tip = await take_over(self._vault, record, wanted, self._log, scratch)
        await self._own(wanted)
        if before is not None and before.writer != self._writer:
            log.warning(
                "disk %s: taken over from site %s, owner since %s; generation %d, from epoch %d",
                self.name, before.site, before.since, record.generation, tip.epoch,
            )  # fmt: skip
        await self._draw_attention(before)
        return await self._settle(record, tip, last, known=await self._is_known(tip, last))

    async def _draw_attention(self, before: Owner | None) -> None:
        """Let who owned the disk look at its next heartbeat."""
        if before is not None and before.writer != self._writer:
            with contextlib.suppress(VdiskfsError):
                await self._vault.touch_site(before.site, before.writer)

    async def _settle(
        self, record: DiskRecord, tip: Tip, last: Remembered, *, known: bool
    ) -> tuple[ChainEnd, bool]:
        if not known:
            await self._keep_spool(record, last)
            record = await self._vault.disk(self._disk_id)
        self._points = self._log(record)
        self.displaced = None
        end = ChainEnd(record.generation, tip.epoch, tip.digest, tip.size, tip.time_ns)
        return end, known

    async def _go_on_displaced(self, record: DiskRecord, last: Remembered) -> tuple[ChainEnd, bool]:
        before, last = last, await advance(self._vault.store, self._spool, last)
        if self._note.line not in record.branches:
            await self._branch_off(record, (last.generation, last.epoch))
            record = await self._vault.disk(self._disk_id)
        points = self.points_of_branch(record)
        tip = await points.tip()
        known = await self._is_known(tip, last)
        if not known or tip.fenced:
            await self._keep_spool(record, last, before)
            await self._branch_off(record, (tip.generation, tip.epoch))
            points = self.points_of_branch(await self._vault.disk(self._disk_id))
        self._tell_displaced(points)
        end = ChainEnd(points.generation, tip.epoch, tip.digest, tip.size, tip.time_ns)
        return end, known

    async def _record(self, last: Remembered, how: Start) -> DiskRecord:
        try:
            return await self._vault.disk(self._disk_id)
        except NotFoundError:
            if not how.accept_rollback:
                raise rolled_back(self.name, last) from None
        return await self._vault.create_disk(
            self.name, file=f"{self.name}.img", size=0, site=self._site, disk_id=self._disk_id
        )

    async def _holds(self, record: DiskRecord, last: Remembered) -> bool:
        """Say whether the vault has what this site knows it had."""
        if last.epoch == 0:
            return True
        if last.generation not in record.parents:
            return False
        points = self._log(record, last.generation)
        found = await points.place(last.epoch)
        if found is None:
            return points.is_below(last.generation, last.epoch)  # it may be thinned away
        return found[1].hex() == last.digest

    async def _is_known(self, tip: Tip, last: Remembered) -> bool:
        """Say whether the spool and the bitmaps are all that changed since the tip."""
        if self._note.has_spent(last):
            return False
        if tip.epoch == 0:
            return last.epoch == 0
        if (tip.epoch, tip.digest.hex()) == (last.epoch, last.digest):
            return True
        # A delta of ours that was stored, but whose answer never came, is still in the spool.
        heads = await trio.to_thread.run_sync(spooled_deltas, self._spool)
        return any(one.head.to_digest == tip.digest for one in heads)

    async def _refused(self, record: DiskRecord, owner: Owner, what: str) -> StateError:
        return await refusal(self._liveness, record, owner, what)

    # ---- publishing --------------------------------------------------------------------

    async def publish(
        self, spooled: Spooled, offered: Callable[[], None] = lambda: None
    ) -> Spooled:
        """Store a delta that follows the newest stored epoch; return it as it was stored.

        A writer that finds itself displaced goes on in a branch.

        Raises:
            VaultUnreachableError, DamagedError: as `DiskLog.publish`.
        """
        # Invariant: nobody changes the line between a slot that is filled and `_stored`.
        async with self._turn:
            if self._stored == ChainEnd.of(spooled.head):
                return spooled  # stored by an earlier call; only noting that has failed
            for _ in range(_TRIES):
                spooled = await self._fit(spooled)
                try:
                    await self.points.publish(spooled, offered=offered)
                except ConflictError as error:
                    log.info("disk %s: %s", self.name, error)
                    await self._left_behind()
                else:
                    self._stored = ChainEnd.of(spooled.head)
                    return spooled
        raise ConflictError(f"disk {self.name}: displaced again and again")

    async def look(self) -> None:
        """Look whether another writer has taken the disk over; follow if so."""
        async with self._turn:
            record = await self._vault.disk(self._disk_id)
            self.points.learned(record)
            mine = self._is_mine(record)
            self.asked = record.handover if mine else None
            if self._note.handed and self._is_away(record):
                if not mine and self.displaced is None:
                    self._tell_handed(record)
            elif mine and (self.displaced is not None or self._note.handed):
                await self._come_back(record)
            elif not mine and self.displaced is None:
                await self._left_behind()

    async def _fit(self, spooled: Spooled) -> Spooled:
        """Move a delta into the line that is written now, if it was captured for another."""
        head, digest = spooled.head, self._end.digest
        if (head.generation, head.from_digest) == (self.points.generation, digest):
            return spooled
        moved = await trio.to_thread.run_sync(rehead, spooled, self.points.generation, digest)
        hook("branch.moved")
        return moved

    async def _left_behind(self) -> None:
        """The slot that we need is taken: find out by whom, and where we go on."""
        record = await self._vault.disk(self._disk_id)
        # Invariant: the fence of a release is not passed as long as the disk is promised.
        if not self._is_promised(record) and await self._is_unfinished(record):
            # A takeover is under way, or died half-way: it gets a moment to finish.
            await self._sleep(PATIENCE_S)
            record = await self._vault.disk(self._disk_id)
            if await self._is_unfinished(record):
                await self._pass_fence(record)
                return
        if self._is_mine(record) and record.generation != self.points.generation:
            await self._come_back(record)
            return
        await self._branch_off(record, (self._end.generation, self._end.epoch))
        with contextlib.suppress(ConflictError):  # the next try finds that it is ours again
            self._tell_displaced(self.points_of_branch(await self._vault.disk(self._disk_id)))

    async def _pass_fence(self, record: DiskRecord) -> None:
        wanted = await self._new_claim(record)
        tip = await self._log(record).tip()
        try:
            record = await next_generation(self._vault, record, tip, wanted)
        except ConflictError:
            return  # the takeover was finished after all: the next try finds out
        await self._write(start=wanted.start, pending="")
        self._points = self._log(record)
        log.warning(
            "disk %s: a takeover was begun and never finished; going on in generation %d",
            self.name, record.generation,
        )  # fmt: skip

    # ---- handing over ------------------------------------------------------------------

    async def release(self, handover: str) -> None:
        """End the line, for another site to take it: all that was written is stored.

        From here on the disk is not written here, also after a crash, until it is given back.

        Raises:
            ConflictError: the disk was taken over meanwhile.
        """
        async with self._turn:
            if self.displaced is not None and self.displaced.branch:
                raise ConflictError(f"disk {self.name}: {self.displaced}")
            await self._write(handed=handover)
            hook("handover.noted")
            tip = await fence(self.points, self._writer, DiskPaths(self._directory).fence)
            if tip.digest != self._end.digest:
                raise ConflictError(f"disk {self.name}: another writer has added to its line")

    async def keep(self) -> None:
        """Take `release` back, unless the disk is another site's by now."""
        async with self._turn:
            if self._note.handed and self._is_mine(await self._vault.disk(self._disk_id)):
                await self._write(handed="")

    async def _stay_away(self, record: DiskRecord, last: Remembered) -> tuple[ChainEnd, bool]:
        """Go on as who has released the disk: nothing is written here."""
        points = self._log(record, last.generation)
        tip = await points.tip()
        if not await self._is_known(tip, last):
            return await self._go_on_displaced(record, last)
        self._points = points
        self._tell_handed(record)
        end = ChainEnd(points.generation, tip.epoch, tip.digest, tip.size, tip.time_ns)
        return end, True

    def _tell_handed(self, record: DiskRecord) -> None:
        owner, asked = record.owner, record.handover
        by, since = ("another site", now_text())
        if owner is not None and not self._is_mine(record):
            by, since = f"site {owner.site}", owner.since
        elif asked is not None:
            by, since = f"site {asked.site}", asked.asked
        self.displaced = Displaced(by, since, "")
        self.on_displaced(self.displaced)

    async def _come_back(self, record: DiskRecord) -> None:
        """The disk is ours again: go on, if its line holds what we have."""
        tip = await self._log(record).tip()
        if tip.digest != self._end.digest and self._note.line in record.branches:
            # Written here while the disk was promised: it goes on from the tip, or it does not.
            with contextlib.suppress(ConflictError):
                record = await catch_up(self._vault, record, self._note.line, tip.epoch)
                tip = await self._log(record).tip()
        if tip.digest != self._end.digest:
            log.error("disk %s: was given back at another point than it is here: mount it anew",
                      self.name)  # fmt: skip
            return
        if tip.fenced:
            wanted = await self._new_claim(record)
            try:
                record = await next_generation(self._vault, record, tip, wanted)
            except ConflictError:
                return  # another one begins the next generation: the next try finds out
            await self._own(wanted)
        else:
            await self._write(token="", line=0, by="", since="", handed="")
        self._points = self._log(record)
        self._stored = replace(self._end, generation=record.generation)
        self.displaced = None
        log.warning("disk %s: is back; generation %d", self.name, record.generation)
        self.on_returned()

    # ---- branches ----------------------------------------------------------------------

    async def _branch_off(self, record: DiskRecord, parent: tuple[int, int]) -> None:
        """Start a branch for what is written here from now on, or find the one begun."""
        number = await self._branch(record, parent)
        owner = record.owner
        other = owner is not None and owner.writer != self._writer
        await self._write(
            line=number, token="", since=owner.since if owner is not None else now_text(),
            by=f"site {owner.site}" if owner is not None and other
            else "a copy of this state directory",
        )  # fmt: skip
        hook("branch.noted")

    async def _branch(self, record: DiskRecord, parent: tuple[int, int]) -> int:
        if not self._note.token:
            # Known here before it is known there: a crash in between finds it again.
            await self._write(token=secrets.token_hex(16))
        branch = Branch(self._site, self._site, self._writer, self._note.token, now_text())
        while True:
            if parent[1] and not await self._log(record, parent[0]).leads_to(*parent):
                raise StateError(
                    f"disk {self.name}: its branch would begin at epoch {parent[1]}, which was "
                    "thinned away: what was written here stays in the spool, and in the image",
                    hint="copy the image, then: vdiskfs disk unprotect",
                )
            try:
                return (await add_branch(self._vault, record, parent, branch))[1]
            except ConflictError:
                record = await self._vault.disk(record.id)

    def points_of_branch(self, record: DiskRecord) -> DiskLog:
        """Return the branch that is written."""
        return self._log(record, self._note.line)

    def _tell_displaced(self, points: DiskLog) -> None:
        branch = points.record.branches.get(points.generation)
        if branch is None:
            raise ConflictError(f"disk {self.name}: was given back meanwhile, with its branch")
        self._points = points
        self.displaced = Displaced(self._note.by, self._note.since, branch.name)
        log.error("disk %s: %s", self.name, self.displaced)
        self.on_displaced(self.displaced)

    async def _keep_quietly(self, record: DiskRecord, last: Remembered) -> None:
        try:
            await self._keep_spool(record, last)
        except (VdiskfsError, OSError) as error:
            log.warning("disk %s: what was not shipped stays in the spool: %s", self.name, error)

    async def _keep_spool(self, record: DiskRecord, *known: Remembered) -> None:
        """Ship the spool into a branch of its own: it does not follow what we go on from."""
        # Nothing is removed before all of it is stored: a delta that is shows where those
        # after it belong.
        waiting = await trio.to_thread.run_sync(spooled_deltas, self._spool)
        if waiting:
            # What leaves the spool is in no bitmap: nothing may be built upon these again.
            await self._write(spent=self._note.spend(*known))
        last, kept = known[0], []
        while waiting:
            if await is_stored(self._vault.store, waiting[0].head):
                last = after(waiting[0])
                kept.append(waiting.pop(0))
                continue
            number = await begun(self._log, record, self._note.token, waiting[0], last)
            if number is None:
                await self._write(token="")
                parent = await parent_of(self._log, record, waiting[0], last)
                if parent is None:
                    break
                number = await self._branch(record, parent)
            record = await self._vault.disk(record.id)
            stored = await ship(self.name, waiting, self._log(record, number))
            # Invariant: none stored means that a copy of this directory, which has the same
            # token, was first in that branch; the next one has a token of its own.
            kept, waiting = kept + stored, waiting[len(stored) :]
            await self._write(token="")
        for spooled in kept:
            await trio.to_thread.run_sync(remove_spooled, spooled)
        await trio.to_thread.run_sync(set_aside, self.name, self._directory)
