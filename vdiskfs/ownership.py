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
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import trio

from vdiskfs import native
from vdiskfs.catalog import Branch, DiskLog, DiskRecord, IndexCache, Owner, Tip, Vault
from vdiskfs.catalog.owners import Claim, add_branch, claim, next_generation, take_over
from vdiskfs.catalog.publish import is_stored
from vdiskfs.catalog.vault import now_text
from vdiskfs.crash import hook
from vdiskfs.delta import Spooled, open_spooled, remove_spooled
from vdiskfs.delta.rehead import rehead
from vdiskfs.errors import (
    ConflictError,
    DamagedError,
    FormatError,
    NotFoundError,
    StateError,
    VdiskfsError,
)
from vdiskfs.image import ChainEnd
from vdiskfs.liveness import Liveness, age_s
from vdiskfs.state import LastEnd, read_record, sync_directory, write_record

log = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""How long an owner that meets a fence waits for the takeover to be finished."""

_TRIES = 20


@dataclass(frozen=True, slots=True)
class Remembered:
    """The newest epoch that this site knows the vault to hold; epoch 0: none."""

    generation: int
    epoch: int
    digest: str

    def __str__(self) -> str:
        """As a note has it."""
        return f"{self.generation}:{self.epoch}:{self.digest}"


@dataclass(frozen=True, slots=True)
class Start:
    """How a disk is to be started: how its last run ended, what the user allows."""

    last_end: LastEnd = LastEnd.CLEAN
    force: bool = False
    accept_rollback: bool = False


@dataclass(frozen=True, slots=True)
class Displaced:
    """Another writer has taken the disk over: who, since when; where our writes are kept."""

    by: str
    since: str
    branch: str

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"displaced by {self.by} since {self.since}; what is written here is kept as "
            f"branch {self.branch}"
        )


@dataclass(frozen=True, slots=True)
class Note:
    """What owner.json says.

    ``start`` is the number in the vault that is ours, ``pending`` one that may have got
    there; ``token`` marks a branch that is being made, ``line`` is the branch that is
    written, 0 the main line; ``spent`` is the newest stored epoch when the spool was emptied
    into a branch; ``place`` is the directory that wrote this.
    """

    start: str = ""
    pending: str = ""
    place: str = ""
    token: str = ""
    line: int = 0
    spent: str = ""
    by: str = ""
    since: str = ""


class DiskLine:
    """One disk's line: found by `start`, used by `publish`."""

    def __init__(
        self, *, vault: Vault, name: str, disk_id: str, directory: Path, site: str, writer: str,
        liveness: Liveness, sleep: Callable[[float], Awaitable[None]] = trio.sleep,
    ) -> None:  # fmt: skip
        """Prepare; ``directory`` is the disk's, with ``spool/`` in it."""
        self.name = name
        self.displaced: Displaced | None = None
        self.moved = False  # the directory is a copy of the one that was written
        self.on_displaced: Callable[[Displaced], None] = lambda _: None
        self._vault = vault
        self._disk_id = disk_id
        self._directory = directory
        self._spool = directory / "spool"
        self._site = site
        self._writer = writer
        self._liveness = liveness
        self._sleep = sleep
        self._note = Note()
        self._points: DiskLog | None = None
        self._stored: ChainEnd | None = None
        self._turn = trio.Lock()

    @property
    def points(self) -> DiskLog:
        """The line that is written, with its ancestors; once started."""
        if self._points is None:
            raise RuntimeError(f"disk {self.name} is not started")
        return self._points

    @property
    def _end(self) -> ChainEnd:
        """The newest epoch that the line holds."""
        if self._stored is None:
            raise RuntimeError(f"disk {self.name} is not started")
        return self._stored

    # ---- start -------------------------------------------------------------------------

    async def start(self, last: Remembered, how: Start) -> tuple[ChainEnd, bool]:
        """Find the line to write; return where it ends, and whether this site knows that end.

        If it does not, the spool is empty on return: what was in it is in a branch.

        Raises:
            StateError: another writer owns the disk, or the vault lacks what it had.
        """
        self._note = await trio.to_thread.run_sync(_read_note, self._directory)
        for _ in range(_TRIES):
            try:
                self._stored, known = await self._start(last, how)
                return self._stored, known
            except ConflictError as error:
                log.info("disk %s: looks again: %s", self.name, error)
        raise ConflictError(f"disk {self.name}: its owner changes all the time")

    async def _start(self, last: Remembered, how: Start) -> tuple[ChainEnd, bool]:
        note = self._note
        self.moved = note.place not in ("", _place(self._directory))
        survived = how.last_end is LastEnd.DAEMON_DIED and not self.moved
        record = await self._record(last, how)
        owner = record.owner
        displaced = owner is not None and (
            note.line > 0 or (owner.writer != self._writer and note.start != "")
        )
        if displaced and survived and not how.force:
            # Programs may have the image open still: they go on, in a branch.
            return await self._go_on_displaced(record, last)
        if owner is not None and owner.writer != self._writer:
            if not how.force:
                await self._keep_quietly(record, last)
                raise await self._refused(record, owner, "owns it")
            return await self._take_over(record, last)
        ours = self._claim(record).is_of(owner)
        sure = ours and (survived or how.last_end in (LastEnd.CLEAN, LastEnd.NONE))
        if owner is not None and not sure and await self._liveness.is_alive(owner):
            if not how.force:
                raise await self._refused(record, owner, "uses a copy of this state directory")
            return await self._take_over(record, last)
        if not ours:
            log.warning(
                "disk %s: this state directory is not the last one that wrote it: "
                "going on in a new generation", self.name,
            )  # fmt: skip
            return await self._take_over(record, last)
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
            held = await self._holds(record, last)
            if not held and not how.accept_rollback:
                raise _rolled_back(self.name, last, tip.epoch)
            empty = tip.epoch == record.base(record.generation) and not tip.fenced
            if held and empty and last.generation != record.generation:
                # A takeover of ours that was cut off after its last step.
                return await self._settle(await self._claimed(record), tip, last, known=False)
            log.warning(
                "disk %s: the vault's epoch %d is not the one that this site knows: "
                "going on in a new generation", self.name, tip.epoch,
            )  # fmt: skip
        return await self._take_over(record, last)

    async def _take_over(self, record: DiskRecord, last: Remembered) -> tuple[ChainEnd, bool]:
        wanted = await self._new_claim(record)
        before = record.owner
        record, tip = await take_over(self._vault, record, wanted, self._log)
        await self._write(start=wanted.start, pending="", token="", line=0, by="", since="")
        hook("owner.kept")
        if before is not None:
            with contextlib.suppress(VdiskfsError):
                await self._vault.touch_site(before.site, before.writer)
        return await self._settle(record, tip, last, known=await self._is_known(tip, last))

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
        last = await self._advance(last)
        if self._note.line not in record.branches:
            await self._branch_off(record, (last.generation, last.epoch))
        points = self.points_of_branch(await self._vault.disk(self._disk_id))
        tip = await points.tip()
        known = await self._is_known(tip, last)
        if not known or tip.fenced:
            await self._keep_spool(record, last)
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
                raise _rolled_back(self.name, last, None) from None
        return await self._vault.create_disk(
            self.name, file=f"{self.name}.img", size=0, site=self._site, disk_id=self._disk_id
        )

    async def _holds(self, record: DiskRecord, last: Remembered) -> bool:
        """Say whether the vault has what this site knows it had."""
        if last.epoch == 0:
            return True
        if last.generation not in record.parents:
            return False
        found = await self._log(record, last.generation).place(last.epoch)
        return found is not None and found[1].hex() == last.digest

    async def _is_known(self, tip: Tip, last: Remembered) -> bool:
        """Say whether the spool and the bitmaps are all that changed since the tip."""
        if self._note.spent == str(last):
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

    async def publish(self, spooled: Spooled) -> Spooled:
        """Store a delta that follows the newest stored epoch; return it as it was stored.

        A writer that finds itself displaced goes on in a branch.

        Raises:
            VaultUnreachableError, DamagedError: as `DiskLog.publish`.
        """
        # Invariant: nobody changes the line between a slot that is filled and `_stored`.
        async with self._turn:
            for _ in range(_TRIES):
                spooled = await self._fit(spooled)
                try:
                    await self.points.publish(spooled)
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
            if self.displaced is None and not self._is_mine(await self._vault.disk(self._disk_id)):
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
        if await self._is_unfinished(record):
            # A takeover is under way, or died half-way: it gets a moment to finish.
            await self._sleep(PATIENCE_S)
            record = await self._vault.disk(self._disk_id)
            if await self._is_unfinished(record):
                await self._pass_fence(record)
                return
        await self._branch_off(record, (self._end.generation, self._end.epoch))
        self._tell_displaced(self.points_of_branch(await self._vault.disk(self._disk_id)))

    async def _is_unfinished(self, record: DiskRecord) -> bool:
        """Say whether only a fence stands in our way."""
        if not self._is_mine(record) or record.generation != self.points.generation:
            return False
        tip = await self._log(record).tip()
        return tip.fenced and tip.digest == self._end.digest

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

    def _is_mine(self, record: DiskRecord) -> bool:
        owner = record.owner
        if owner is None or owner.writer != self._writer:
            return owner is None
        return owner.start in (self._note.start, self._note.pending)

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
        _, number = await add_branch(self._vault, record.id, parent, branch)
        return number

    def points_of_branch(self, record: DiskRecord) -> DiskLog:
        """Return the branch that is written."""
        return self._log(record, self._note.line)

    def _tell_displaced(self, points: DiskLog) -> None:
        self._points = points
        name = points.record.branches[points.generation].name
        self.displaced = Displaced(self._note.by, self._note.since, name)
        log.error("disk %s: %s", self.name, self.displaced)
        self.on_displaced(self.displaced)

    async def _keep_quietly(self, record: DiskRecord, last: Remembered) -> None:
        try:
            await self._keep_spool(record, last)
        except (VdiskfsError, OSError) as error:
            log.warning("disk %s: what was not shipped stays in the spool: %s", self.name, error)

    async def _keep_spool(self, record: DiskRecord, last: Remembered) -> None:
        """Ship the spool into a branch of its own: it does not follow what we go on from."""
        # Nothing is removed before all of it is stored: a delta that is shows where those
        # after it belong.
        waiting = await trio.to_thread.run_sync(spooled_deltas, self._spool)
        if waiting:
            # What leaves the spool is in no bitmap: nothing may be built upon `last` again.
            await self._write(spent=str(last))
        kept = []
        while waiting and await is_stored(self._vault.store, waiting[0].head):
            last = _after(waiting[0])
            kept.append(waiting.pop(0))
        if waiting:
            number = await self._begun(record, waiting[0], last)
            if number is None:
                await self._write(token="")
                parent = await self._parent(record, waiting[0], last)
                number = None if parent is None else await self._branch(record, parent)
            if number is not None:
                points = self._log(await self._vault.disk(record.id), number)
                kept += await self._ship(waiting, points)
                await self._write(token="")
        for spooled in kept:
            await trio.to_thread.run_sync(remove_spooled, spooled)
        await trio.to_thread.run_sync(self._set_aside)

    async def _begun(self, record: DiskRecord, first: Spooled, last: Remembered) -> int | None:
        """Return a branch that was begun for this delta, and has what comes before it."""
        for number, branch in record.branches.items():
            if branch.token == self._note.token:
                tip = await self._log(record, number).tip()
                if tip.epoch == first.head.from_epoch and (
                    tip.digest == first.head.from_digest or tip.digest.hex() == last.digest
                ):
                    return number
        return None

    async def _ship(self, waiting: list[Spooled], points: DiskLog) -> list[Spooled]:
        tip = await points.tip()
        epoch, digest = tip.epoch, tip.digest
        kept = []
        for spooled in waiting:
            if spooled.head.from_epoch != epoch:
                break
            moved = await trio.to_thread.run_sync(rehead, spooled, points.generation, digest)
            await points.publish(moved)
            hook("branch.shipped")
            kept.append(moved)
            epoch, digest = moved.head.to_epoch, moved.head.to_digest
        name = points.record.branches[points.generation].name
        log.warning("disk %s: what was not shipped is kept as branch %s", self.name, name)
        return kept

    async def _parent(
        self, record: DiskRecord, first: Spooled, last: Remembered
    ) -> tuple[int, int] | None:
        """Return the epoch of the vault that a delta follows, with its generation."""
        head = first.head
        for generation, digest in (
            (last.generation, last.digest if last.epoch == head.from_epoch else ""),
            (head.generation, head.from_digest.hex()),
        ):
            if generation not in record.parents:
                continue
            found = await self._log(record, generation).place(head.from_epoch)
            if found is not None and (found[1].hex() == digest or not head.from_epoch):
                return found[0], head.from_epoch
        return None

    def _set_aside(self) -> None:
        """Keep what follows nothing that the vault has, where nobody takes it for the spool."""
        left = sorted(self._spool.iterdir()) if self._spool.exists() else []
        left = [path for path in left if path.suffix in (".delta", ".segment")]
        if left:
            aside = self._directory / "set-aside" / f"{time.time_ns():020d}"
            aside.mkdir(mode=0o700, parents=True)
            for path in left:
                path.rename(aside / path.name)
            sync_directory(aside)
            sync_directory(self._spool)
            log.error("disk %s: deltas that follow nothing in the vault are in %s",
                      self.name, aside)  # fmt: skip

    async def _advance(self, last: Remembered) -> Remembered:
        """Pass deltas of the spool that were stored, though the answer never came."""
        for spooled in await trio.to_thread.run_sync(spooled_deltas, self._spool):
            if spooled.head.from_epoch == last.epoch and await is_stored(
                self._vault.store, spooled.head
            ):
                last = _after(spooled)
        return last

    # ---- claims and notes --------------------------------------------------------------

    def _log(self, record: DiskRecord, generation: int | None = None) -> DiskLog:
        cache = IndexCache(self._directory / "indexes")
        return self._vault.log(record, generation, cache=cache)

    def _claim(self, record: DiskRecord, start: str = "") -> Claim:
        known = {self._note.start, self._note.pending} - {""}
        return Claim(self._site, self._writer, start, known)

    async def _new_claim(self, record: DiskRecord) -> Claim:
        """Return a claim whose number is known here before the vault can know it."""
        before = self._claim(record)
        start = secrets.token_hex(16)
        own = record.owner.start if record.owner is not None else ""
        kept = own if own in before.known else self._note.start
        await self._write(start=kept, pending=start)
        hook("owner.noted")
        return replace(before, start=start)

    async def _claimed(self, record: DiskRecord) -> DiskRecord:
        wanted = await self._new_claim(record)
        record = await claim(self._vault, record, wanted)
        await self._write(start=wanted.start, pending="", token="", line=0, by="", since="")
        hook("owner.kept")
        return record

    async def _write(self, **changes: Any) -> None:
        note = replace(self._note, place=_place(self._directory), **changes)
        path = self._directory / "owner.json"
        await trio.to_thread.run_sync(write_record, path, {"format": 1, **asdict(note)})
        self._note = note


async def refusal(liveness: Liveness, record: DiskRecord, owner: Owner, what: str) -> StateError:
    """Return the error that says who owns a disk, since when, and what can be done."""
    sign = await liveness.last_sign(owner)
    seen = "no sign of life"
    if sign is not None:
        age = max(0.0, age_s(sign))
        seen = f"last sign of life {sign.time} ({age:.0f} s ago) from host {sign.host}"
    return StateError(
        f"disk {record.name}: site {owner.site} {what} since {owner.since}; {seen}",
        hint="stop it there, or take the disk over with --force "
        "(what it has not shipped becomes a branch)",
    )


def spooled_deltas(spool: Path) -> list[Spooled]:
    """Return the deltas of a spool in order, up to the first that is damaged; in a thread."""
    found = []
    for path in sorted(spool.glob("*.delta")):
        try:
            found.append(open_spooled(path))
        except FormatError:
            break
    return found


def _after(spooled: Spooled) -> Remembered:
    head = spooled.head
    return Remembered(head.generation, head.to_epoch, head.to_digest.hex())


def _rolled_back(name: str, last: Remembered, found: int | None) -> StateError:
    has = "does not know the disk" if found is None else f"ends at epoch {found}"
    return StateError(
        f"disk {name}: the vault {has}, and lacks epoch {last.epoch} of generation "
        f"{last.generation}, which it had: it was rolled back, or is another one",
        hint="find the vault that has it, or go on without with --accept-rollback",
    )


def _read_note(directory: Path) -> Note:
    try:
        body = read_record(directory / "owner.json")
    except NotFoundError:
        return Note()
    body.pop("format", None)
    try:
        return Note(**body)
    except TypeError:
        raise DamagedError(f"{directory / 'owner.json'}: not the note of an owner") from None


def _place(directory: Path) -> str:
    """Name a directory so that a copy of it has another name: inode and time of birth."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        identity = native.file_identity(fd)
    finally:
        os.close(fd)
    return f"{identity.inode}:{identity.birth_ns}"
