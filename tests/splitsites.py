"""The sites of `tests.splitbrain`: hosts of `tests.races` between which the disk moves.

The taker's steps are those of `vdiskfs.failover.relocation` and `homecoming`, in their order,
with their own functions where these need no mount; the owner's side is `Handovers` itself.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from tests.races import PAGES, Host, Local
from tests.splitowner import CutStore, Disk, Machines, Told
from vdiskfs.catalog import DiskRecord, Vault
from vdiskfs.catalog.moves import Fork, is_forked, note_move
from vdiskfs.delta import open_spooled
from vdiskfs.errors import StateError, VaultUnreachableError
from vdiskfs.failover.asking import Asking
from vdiskfs.failover.choose import unknown_members, with_tokens
from vdiskfs.failover.homecoming import Homecomings
from vdiskfs.failover.known import fork_of
from vdiskfs.failover.record import Member
from vdiskfs.failover.relocation import Relocations
from vdiskfs.failover.states import Kind, State, Step
from vdiskfs.handovers import Handovers
from vdiskfs.jobs import Jobs
from vdiskfs.ownernote import Displaced, Note, Remembered, read_note, write_note
from vdiskfs.state import LastEnd

if TYPE_CHECKING:
    from tests.splitbrain import Split

STEPS = 70

STEPS_OF = {
    Step.START: ("copies", "taken", "over"),
    Step.CHANGE_POINT: ("ended", "copies", "taken", "over"),
    Step.ROLLBACK: ("ended", "returned", "removed"),
    Step.REPROTECT: ("committed", "resumed", "shipped"),
    Step.COMPLETE: ("asked", "released", "copies", "taken", "home"),
}

TAKING = (Step.START, Step.CHANGE_POINT, Step.ROLLBACK)
"""Jobs during which what is here is not the disk, before it is taken and after."""


@dataclass
class Move:
    """What a site keeps of a failover or failback, over crashes."""

    id: str
    kind: Kind
    state: State
    members: tuple[Member, ...]
    job: Step | None
    done: set[str] = field(default_factory=set)
    name: str = "web01-failover"


class Site(Host):
    """A place where the disk may be; ``move`` is what a failover or failback keeps here."""

    def __init__(self, race: Split, name: str, writer: str) -> None:
        super().__init__(race, name, writer, Local())
        self.race: Split = race
        self.steps = STEPS
        self.cut = 0
        self.home = self.here = name == "a"
        self.paused = self.refusing = self.aged = False
        self.read_only = race.rng.random() < 0.5
        self.move: Move | None = None
        self.brought = b""
        self.gone = ""
        self.suspects = SimpleNamespace(needed=False, reason="")
        if self.here:
            (self.directory / "spool").mkdir(parents=True)

    def vault(self) -> Vault:
        return Vault(cast("Any", CutStore(self.race, self)), self.race.vault_id, "")

    # ---- what is done next ---------------------------------------------------------------

    def pick(self) -> Callable[[], Any]:
        rng, move, line = self.race.rng, self.move, self.line
        options: dict[Callable[[], Any], float] = {self.cut_off: 0.15, self.idle: 0.1}
        if move is not None and move.job is not None:
            options[self.go_on] = 8
            if move.job is Step.START:
                options[self.roll_back_move] = 1.5
        if move is not None and line is not None and move.state is State.FAILED_OVER:
            options |= {self.change_point: 1.5, self.roll_back_move: 1, self.reprotect: 3}
        if not self.here and move is None:
            options |= {self.fail_over: 0.3, self.idle: 2}
        elif line is None and self.may_start:
            options |= {self.start: 4, self.roll_back: 0.5}
            if self.home:
                options[self.force] = 1
        elif line is not None:
            options |= {self.write: 6, self.look: 1, self.stop: 0.5, self.kill: 0.5,
                        self.save: 0.5, self.cut_off: 0.6}  # fmt: skip
            if not self.paused:
                options |= {self.seal: 5, self.ship: 7}
            if line.asked is not None:
                options[self.hand_over] = 8
            if line.displaced is not None and (move is None or move.job is None):
                options[self.fail_over] = 1.5
        return rng.choices(list(options), list(options.values()))[0]

    @property
    def parked(self) -> bool:
        """Whether the image is being brought home."""
        return self.move is not None and self.move.kind is Kind.FAILBACK

    @property
    def may_start(self) -> bool:
        """Whether the disk is here to go on as it is; as `Relocations.resume` decides it."""
        move = self.move
        taking = move is not None and move.job in TAKING and "taken" not in move.done
        return self.here and not self.parked and not taking

    async def idle(self) -> None:
        return

    async def cut_off(self) -> None:
        self.cut = self.race.rng.randrange(1, 12)
        self.race.counts["cut off"] += 1

    async def act(self, action: Callable[[], Any]) -> None:
        try:
            await super().act(action)
        except StateError:
            # Who has asked for it sees why, and asks again, or for something else.
            self.race.counts["stood still"] += 1

    # ---- a disk ----------------------------------------------------------------------------

    async def start(self, *, force: bool = False, fork: Fork | None = None) -> None:
        await super().start(force=force, fork=fork)
        line = self.line
        if line is None:
            return
        line.on_displaced, line.on_returned = self.displaced, self.returned
        self.refusing = False
        self.note_kept()
        if line.displaced is not None:
            self.displaced(line.displaced)
            self.refusing = self.refusing or self.move is not None

    def displaced(self, _: Displaced) -> None:
        assert self.line is not None
        self.race.counts["displaced"] += 1
        self.refusing = self.read_only or self.line.handed

    def returned(self) -> None:
        self.race.counts["came back"] += 1
        self.refusing = False
        self.note_kept()

    def note_kept(self) -> None:
        """As `ownmachines.note_kept`."""
        line, move = self.line, self.move
        ours = line is not None and line.displaced is None and not line.handed
        if ours and move is not None and move.state is State.HANDED_OVER:
            move.state = State.FAILBACK_READY

    async def write(self) -> None:
        if self.refusing:
            return
        record = self.race.seen()
        if record.owner is not None and record.owner.writer != self.writer:
            self.race.counts["written while displaced"] += 1
            if record.moved is not None and record.moved.source.writer == self.writer:
                # An older state of the directory does not know it, and writes a branch.
                handed = self.race.released.get(record.moved.id)
                assert handed is None or self.aged, "written to behind a handover"
        await super().write()

    async def roll_back(self) -> None:
        before = self.saved
        await super().roll_back()
        self.aged = self.aged or self.saved is not before

    async def seal(self) -> None:
        if not self.paused:
            await super().seal()

    async def ship_all(self) -> None:
        while self.queue:
            try:
                await self.ship()
            except VaultUnreachableError:
                await self.race.sleep(0)

    async def hand_over(self) -> None:
        line = self.line
        assert line is not None
        asked = line.asked
        if asked is None:
            return
        handovers = Handovers(
            cast("Any", SimpleNamespace(vault=self.vault(), state=self.state)),
            cast("Any", SimpleNamespace(adopted=())), machines=Machines(self, asked.id),
            stopper=cast("Any", SimpleNamespace(stop=self.stop_machine)), mountpoint=Path("/nowhere"),
            events=cast("Any", Told()), jobs=Jobs(self.directory),
        )  # fmt: skip
        disk = cast("Any", Disk(self))
        if handovers._is_for_us(disk, asked):
            self.race.counts["handing over"] += 1
            await handovers._hand_over(disk, asked)

    def refuses(self) -> bool:
        """Whether it knows that another site has the disk."""
        return self.line is not None and self.line.displaced is not None

    @property
    def state(self) -> SimpleNamespace:
        return SimpleNamespace(writer_id=self.writer)

    async def stop_machine(self, *_: Any) -> None:
        return

    # ---- taking ------------------------------------------------------------------------------

    async def fail_over(self) -> None:
        """Begin a failover to here, or a failback."""
        rng, vault = self.race.rng, self.vault()
        record = await vault.disk(self.race.disk_id)
        if record.owner is None or record.owner.writer == self.writer:
            return
        if self.line is not None:
            # What was written here goes into its branch first.
            await super().seal()
            await self.ship_all()
            if self.local.dirty or self.queue:
                return
        moved = record.moved
        if moved is not None and moved.state != State.FAILBACK_READY:
            self.race.counts["failover refused"] += 1
            return
        if self.home:
            if moved is None:
                return
            self.leave(LastEnd.CLEAN)
            member = Member("web01", record.id, "web01.img", 0, 0, 0, 0, current=record.generation)
            self.move = Move(secrets.token_hex(16), Kind.FAILBACK, State.COMPLETING, (member,),
                             Step.COMPLETE)  # fmt: skip
            return
        if rng.random() < 0.5:
            kind, member = Kind.PLANNED, unknown_members([record])[0]
        else:
            found = await self.choose(vault, record, record.generation)
            if found is None:
                return
            kind, member = Kind.UNPLANNED, found
        self.discard()
        members = with_tokens((member,), (record,))
        self.move = Move(secrets.token_hex(16), kind, State.STARTING, members, Step.START)

    async def choose(self, vault: Vault, record: DiskRecord, generation: int) -> Member | None:
        log = vault.log(record, generation)
        points = await log.points()
        if not points:
            return None
        rng = self.race.rng
        point = points[-1] if rng.random() < 0.5 else rng.choice(points)
        self.race.counts["to the tip" if point is points[-1] else "to an older point"] += 1
        async with await log.open(point) as reader:
            digest = reader.digest.hex()
        return Member("web01", record.id, "web01.img", point.generation, point.epoch,
                      point.time_ns, point.size, digest)  # fmt: skip

    def asking(self) -> Asking:
        failovers = SimpleNamespace(write=self.write_move)
        site = SimpleNamespace(vault=self.vault(), name=self.name, state=self.state,
                               liveness=SimpleNamespace(last_sign=self.last_sign))  # fmt: skip
        return Asking(cast("Any", failovers), cast("Any", site))

    async def last_sign(self, _: Any) -> None:
        return None

    async def write_move(self, failover: Any, *, members: tuple[Member, ...]) -> None:
        failover.record.members = members

    def leave(self, last_end: LastEnd) -> None:
        self.line, self.last_end, self.queue = None, last_end, []

    def discard(self) -> None:
        """Throw away the copy, and what is known of the disk here."""
        for path in (self.directory / "spool").glob("*.delta"):
            self.race.thrown.add(open_spooled(path).head.time_ns)
            self.race.counts["thrown away"] += 1
        shutil.rmtree(self.directory, ignore_errors=True)
        self.leave(LastEnd.CLEAN)
        self.here = self.paused = self.refusing = False
        self.unsave()

    def unsave(self) -> None:
        """Forget the older state: it is of another copy."""
        if self.saved is not None:
            shutil.rmtree(self.saved[0])
            self.saved = None

    # ---- jobs --------------------------------------------------------------------------------

    async def go_on(self) -> None:
        move = self.move
        assert move is not None
        assert move.job is not None
        steps = STEPS_OF[move.job]
        if move.job is Step.START and move.kind is Kind.PLANNED:
            steps = ("asked", "released", *steps)
        failover = SimpleNamespace(record=move, says=None)
        taken = "taken" in move.done
        if move.kind is Kind.FAILBACK and not taken and await self.is_overtaken(failover):
            self.race.counts["failback begun anew"] += 1
            move.done = set()
        for step in steps:
            if step not in move.done:
                await getattr(self, f"step_{step}")(move, failover)
                self.race.maybe_crash(f"step {step}", 0.05)
                if self.move is None:
                    return
                move.done.add(step)
        self.race.counts[f"{move.kind} {move.job}"] += 1
        move.job = None

    def begin(self, job: Step, state: State) -> None:
        assert self.move is not None
        self.move.job, self.move.done, self.move.state = job, set(), state

    async def step_asked(self, _: Move, failover: Any) -> None:
        await self.asking().ask(failover)

    async def step_released(self, move: Move, failover: Any) -> None:
        await self.asking().wait(failover)
        if move.kind is Kind.FAILBACK:
            move.members = tuple(replace(one, token=secrets.token_hex(16)) for one in move.members)

    async def step_copies(self, move: Move, _: Any) -> None:
        member = move.members[0]
        log = self.vault().log(await self.vault().disk(member.disk_id), member.generation)
        async with await log.open(member.epoch) as reader:
            self.brought = bytes(await reader.read_pages(0, PAGES))
        assert self.brought == self.race.captured[member.time_ns], "another point"

    async def step_taken(self, move: Move, _: Any) -> None:
        member = move.members[0]
        fork = self.fork(move, member, await self.vault().disk(member.disk_id))
        if is_forked(await self.vault().disk(member.disk_id), fork):
            if self.line is None:
                await self.start(fork=fork if self.home else None)
        else:
            self.prepare(member)
            await self.start(fork=fork)
        if self.line is None:
            raise StateError("was refused")
        record = self.race.seen()
        if is_forked(record, fork):
            assert self.line.displaced is None or record.owner.writer != self.writer  # type: ignore[union-attr]
        self.race.counts[f"taken {move.kind}"] += 1
        if move.kind is not Kind.UNPLANNED and move.job is not Step.CHANGE_POINT:
            assert self.brought == self.race.released[move.id], "a handover lost a write"

    def fork(self, move: Move, member: Member, record: DiskRecord) -> Fork:
        state = State.FAILBACK_UNCOMMITTED if self.home else State.FAILED_OVER
        return fork_of(cast("Any", move), member, record, site=self.name, state=state)

    async def is_overtaken(self, failover: Any) -> bool:
        site = SimpleNamespace(name=self.name, vault=self.vault())
        fake = SimpleNamespace(_site=site, _fork=lambda _, *rest: self.fork(failover.record, *rest))
        return await Homecomings._is_overtaken(cast("Any", fake), failover)

    def prepare(self, member: Member) -> None:
        """As `TakenDisk` and `Homecomings` do."""
        note = read_note(self.directory) if self.directory.exists() else Note()
        left = [*(self.directory / "spool").glob("*.delta")]
        assert not left, left
        shutil.rmtree(self.directory, ignore_errors=True)
        (self.directory / "spool").mkdir(parents=True)
        write_note(self.directory, replace(note, place="", line=0, handed=""))
        last = Remembered(member.generation, member.epoch, member.digest)
        self.local = Local(last, self.brought, frozenset(), member.epoch + 1)
        self.last_end = LastEnd.CLEAN
        self.unsave()
        self.here, self.paused, self.aged = True, not self.home, False
        self.race.maybe_crash("prepared", 0.05)

    async def step_over(self, move: Move, _: Any) -> None:
        move.state = State.FAILED_OVER

    async def step_home(self, move: Move, _: Any) -> None:
        await note_move(self.vault(), self.race.disk_id, move.id, None)
        self.race.counts["failed back"] += 1
        self.move = None

    async def change_point(self) -> None:
        record = await self.vault().disk(self.race.disk_id)
        move = self.move
        if record.moved is None or move is None or record.moved.id != move.id:
            return
        member = await self.choose(self.vault(), record, record.moved.generation)
        assert member is not None
        move.members = with_tokens((member,), (record,))
        self.begin(Step.CHANGE_POINT, State.CHANGING_POINT)

    async def step_ended(self, _: Move, __: Any) -> None:
        self.discard()

    async def roll_back_move(self) -> None:
        self.begin(Step.ROLLBACK, State.ROLLING_BACK)

    async def step_returned(self, _: Move, failover: Any) -> None:
        fake = SimpleNamespace(_site=SimpleNamespace(vault=self.vault()))
        await Relocations._give_back(cast("Any", fake), failover)

    async def step_removed(self, _: Move, __: Any) -> None:
        self.race.counts["rolled back move"] += 1
        self.move = None

    async def reprotect(self) -> None:
        self.begin(Step.REPROTECT, State.REPROTECTING)

    async def tell(self, state: State) -> None:
        assert self.move is not None
        await note_move(self.vault(), self.race.disk_id, self.move.id, str(state))

    async def step_committed(self, _: Move, __: Any) -> None:
        await self.tell(State.COMMITTED)

    async def step_resumed(self, _: Move, __: Any) -> None:
        self.paused = False

    async def step_shipped(self, move: Move, _: Any) -> None:
        if self.line is None:
            raise StateError("not started yet")
        await self.seal()
        await self.ship_all()
        await self.tell(State.FAILBACK_READY)
        move.state = State.FAILBACK_READY

    # ---- the end -----------------------------------------------------------------------------

    async def settle(self) -> None:
        """Do what is left to do, as somebody who looks after it would."""
        self.cut = 0
        for _ in range(6):
            move = self.move
            if self.line is None and self.may_start:
                await self.act(self.start)
            if self.line is not None:
                await self.act(self.look)
                await self.act(self.hand_over)
            if move is not None and move.job is Step.START:
                self.begin(Step.ROLLBACK, State.ROLLING_BACK)
            if move is not None and move.job is None and move.state is State.FAILED_OVER:
                await self.act(self.race.rng.choice([self.roll_back_move, self.reprotect]))
            if move is not None and move.job is not None:
                await self.act(self.go_on)
            if self.line is not None:
                await self.act(self.ship_all)
                await self.act(self.remount)
            await self.race.turn()

    async def remount(self) -> None:
        """An older state of a directory does not know that the disk is its own again."""
        owner = self.race.seen().owner
        assert owner is not None
        if self.line is not None and self.line.displaced and owner.writer == self.writer:
            promised = self.race.seen().handover
            if not self.line.handed or promised is None:
                self.race.counts["remounted"] += 1
                await self.stop()

    async def finish(self) -> None:
        """Check that everybody knows where the disk is, and that its owner goes on."""
        record = await self.vault().disk(self.race.disk_id)
        assert record.owner is not None
        mine = record.owner.writer == self.writer
        if not mine:
            assert self.line is None or self.line.displaced is not None, f"{self.name}: unaware"
        else:
            assert self.line is not None, f"{self.name}: owns it and does not run"
            assert self.line.displaced is None, f"{self.name}: {self.line.displaced}"
            assert not self.refusing
            self.paused = False
            await self.write()
            await self.seal()
            await self.ship_all()
            assert self.line.points.generation == self.race.seen().generation
            self.race.counts["owner went on"] += 1
        if self.directory.exists():
            assert not list((self.directory / "spool").glob("*.delta")), self.name
            assert not (self.directory / "set-aside").exists(), self.name
