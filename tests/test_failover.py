"""Failovers without a mount: records, names, and which step follows which."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
import trio

from tests.store.memory import MemoryStore
from vdiskfs.catalog import DiskRecord
from vdiskfs.config import MachinesConfig
from vdiskfs.errors import (
    DamagedError,
    LocalError,
    StateError,
    UsageError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.failover import (
    Failover,
    FailoverRecord,
    Kind,
    Member,
    State,
    Step,
    after,
    failover_document,
)
from vdiskfs.failover.bootblocks import (
    BYTES_MAX,
    RUNS_MAX,
    boot_name,
    joined,
    read_boot,
    write_boot,
)
from vdiskfs.failover.choose import file_of, path_of
from vdiskfs.failover.drills import check_gone
from vdiskfs.failover.failovers import Failovers, apart
from vdiskfs.failover.homecoming import Homecomings
from vdiskfs.failover.homeimage import HomeImages
from vdiskfs.failover.jobs import check_same
from vdiskfs.failover.machine import FailoverMachine
from vdiskfs.failover.ownmachines import OwnMachines, note_kept
from vdiskfs.failover.record import Health, Job, check_name
from vdiskfs.failover.relocation import Relocations
from vdiskfs.failover.states import TABLE
from vdiskfs.homeward.note import prepare_home, read_home
from vdiskfs.machines import parse_machine
from vdiskfs.units import CHUNK_SIZE

T = TypeVar("T")
RECORD = FailoverRecord(
    "a" * 32, "t1", Kind.TEST, State.TEST_FAILOVER, 17, notes="fine",
    members=(Member("web01", "b" * 32, "web01.img", 2, 99, 16, 1 << 42),),
)  # fmt: skip


def test_a_record_is_read_as_it_was_written() -> None:
    assert FailoverRecord.from_body(RECORD.to_body(), "here") == RECORD


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"state": "Elsewhere"}, {"members": [{"disk": "web01"}]}, {"members": 7},
     {"created_ns": "now"}, {"kind": None}],
)  # fmt: skip
def test_what_is_no_record_is_damage_and_names_the_place(change: dict[str, Any]) -> None:
    with pytest.raises(DamagedError, match=r"/state/failovers/x/record\.json"):
        FailoverRecord.from_body({**RECORD.to_body(), **change}, "/state/failovers/x/record.json")


@pytest.mark.parametrize("name", ["", ".", "..", ".t", "a/b", "a\n", "-t", "é", "a" * 65, "a b"])
def test_a_name_that_is_no_directorys_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name"):
        check_name(name)


@pytest.mark.parametrize("name", ["t", "web01-test-1", "A.b_c-9", "9" * 64])
def test_other_names_are_taken(name: str) -> None:
    check_name(name)


def test_a_step_that_is_not_in_the_table_is_refused_and_says_where_it_stands() -> None:
    for state in State:
        for step in Step:
            if (state, step) in TABLE:
                assert after("t1", state, step) in State
            else:
                with pytest.raises(StateError, match=f"t1: {step} is not possible in .*{state}"):
                    after("t1", state, step)


@pytest.mark.parametrize(
    ("asked", "said"),
    [({}, ""), ({"name": "t1", "spec": 7}, ""), ({"spec": "latest"}, ""),
     ({"name": "t2"}, "not t2"), ({"spec": 8}, "at epoch 7, not 8"),
     ({"vm": False}, "with its machine"), ({"full": True}, "in mode minimize-downtime")],
)  # fmt: skip
def test_a_command_that_goes_on_does_not_ask_for_another_failover(
    asked: dict[str, Any], said: str
) -> None:
    record = replace(RECORD, name="t1", kind=Kind.UNPLANNED, state=State.STARTING, machine="x",
                     members=(replace(RECORD.members[0], epoch=7),))  # fmt: skip
    failover = Failover(record, Path(), {})
    if not said:
        check_same(failover, **asked)
        return
    with pytest.raises(StateError, match=f"t1: is under way in state Starting, {said}") as found:
        check_same(failover, **asked)
    assert "vdiskfs failover rollback t1" in str(found.value.hint)


def test_a_clean_up_is_possible_from_everywhere_and_never_undone() -> None:
    assert replace(RECORD, state=after("t1", RECORD.state, Step.CLEANUP)).state is State.REMOVING
    assert after("t1", State.REMOVING, Step.CLEANUP) is State.REMOVING


async def test_what_is_told_of_a_failover_is_of_one_instant(tmp_path: Path) -> None:
    """A job that is done never goes with the state that it has left."""
    job = Job("a-1", Step.START, 1)
    starting = replace(RECORD, kind=Kind.PLANNED, state=State.STARTING, jobs=(job,))

    class Machine(FailoverMachine):
        async def state(self) -> str:
            done = replace(job, ended_ns=2)
            failover.record = replace(starting, state=State.FAILED_OVER, jobs=(done,))
            return "running"

    definition = parse_machine('memory = "64MiB"\n[[disks]]\ndisk = "web01"\n', name="shop")
    machine = Machine(definition, tmp_path, MachinesConfig())
    failover = Failover(starting, tmp_path, {}, machine)
    document = await failover_document(failover, tmp_path)
    found: Any = document["job"]
    assert (document["state"], found["state"]) == ("FailedOver", "done")


@pytest.mark.parametrize(("check", "again"), [(True, False), (True, True), (False, False)])
async def test_what_a_start_took_and_read_is_kept_of_the_first_one_that_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, check: bool, again: bool
) -> None:
    """A machine that is started again on its copy is warm; one without a check answers nobody."""
    text = 'memory = "64MiB"\n[[disks]]\ndisk = "web01"\n'
    text += '[health]\nkind = "agent"\n' if check else ""
    machine = FailoverMachine(parse_machine(text, name="shop"), tmp_path, MachinesConfig())
    healthy = Health(healthy=True, seconds=2.0, detail="it answers")
    monkeypatch.setattr(machine, "health", lambda: sleep(healthy))
    record = replace(RECORD, health=healthy if again else None)
    failover = Failover(record, tmp_path, {}, machine)
    kept: list[str] = []

    async def note(*_: object) -> None:
        kept.append("recovery")

    async def remember(_: object) -> None:
        kept.append("boot")

    async def write(_: object, **changes: object) -> None:
        failover.record = replace(failover.record, **changes)  # type: ignore[arg-type]

    monkeypatch.setattr("vdiskfs.failover.failovers.note_recovery", note)
    fake = SimpleNamespace(_remember_boot=remember, write=write, vault=None)
    await Failovers.judge(cast("Any", fake), failover)
    assert failover.record.health == healthy
    assert kept == (["boot", "recovery"] if check and not again else [])


@pytest.mark.parametrize("error", [LocalError("no room"), OSError(28, "no room")])
async def test_what_is_done_beside_all_else_ends_nothing_else(
    error: Exception, expect_log: Callable[[str], None]
) -> None:
    expect_log("failover t1: .*no room")

    async def fail(_: int) -> None:
        raise error

    await apart("t1", fail, 7)


def test_what_a_start_reads_is_kept_once_in_order_and_bounded() -> None:
    assert joined([(5, 2), (7, 1), (1, 1), (6, 3), (0, 1)]) == [(5, 3), (1, 1), (8, 1), (0, 1)]
    assert joined([]) == []
    much = joined([(0, 1 << 40)])
    assert sum(count for _, count in much) == BYTES_MAX // CHUNK_SIZE
    assert len(joined([(2 * number, 1) for number in range(RUNS_MAX + 5)])) == RUNS_MAX


async def test_what_is_kept_in_the_vault_is_added_to_and_damage_is_no_obstacle(
    expect_log: Callable[[str], None],
) -> None:
    expect_log("replaced: .*a run that no disk has")
    store = MemoryStore()
    assert await read_boot(store, "a") == []
    assert await write_boot(store, "a", [(3, 2)])
    assert await write_boot(store, "a", [(9, 1)])
    assert not await write_boot(store, "a", [(3, 1)])
    assert await read_boot(store, "a") == [(3, 2), (9, 1)]
    for bad in (b"", b"{}", b'{"format": 1, "runs": [[0, -1]]}', b'{"format": 1, "runs": [["a"]]}'):
        _, info = await store.read(boot_name("a"))
        await store.replace(boot_name("a"), bad, etag=info.etag)
        assert await read_boot(store, "a") == []
    assert await write_boot(store, "a", [(4, 1)])
    assert await read_boot(store, "a") == [(4, 1)]
    store.away = True
    assert await read_boot(store, "a") == []


class Refusing:
    """Stand in for a copy's image."""

    cookie = 1
    refuses = False

    def refuse_writes(self, refuse: bool) -> None:
        self.refuses = refuse


@pytest.mark.parametrize("kind", [Kind.TEST, Kind.PLANNED, Kind.UNPLANNED])
def test_a_copy_that_is_to_replicate_takes_no_writes_before_it_is_tracked(kind: Kind) -> None:
    """What a job that stands still, or a crash, leaves shown is written to by nobody."""
    record = replace(RECORD, kind=kind)
    copy = SimpleNamespace(image=Refusing())
    failover = SimpleNamespace(record=record, copies={"1": copy})
    Failovers.enter(cast("Any", SimpleNamespace(_by_id={}, _by_cookie={})), cast("Any", failover))
    assert copy.image.refuses == (kind is not Kind.TEST)


@pytest.mark.parametrize("ours", [False, True])
async def test_a_released_disk_that_is_kept_is_not_tidied_up(ours: bool) -> None:
    record = replace(RECORD, kind=Kind.PLANNED, state=State.HANDED_OVER)
    taken = SimpleNamespace(is_ours=ours, member=record.members[0])
    failover = cast("Any", SimpleNamespace(record=record, taken={"1": taken}))
    written: list[State] = []

    async def write(_: object, *, state: State) -> None:
        written.append(state)

    if ours:
        with pytest.raises(StateError, match="is this site's"):
            check_gone(failover)
    else:
        check_gone(failover)
    await note_kept(cast("Any", SimpleNamespace(write=write)), failover)
    assert written == ([State.FAILBACK_READY] if ours else [])


@pytest.mark.parametrize("ours", [(True, True), (True, False)])
async def test_a_machine_is_started_again_once_all_of_its_disks_are_back(
    ours: tuple[bool, ...],
) -> None:
    """It was stopped for a site that has called its request off, disk by disk."""
    machine = SimpleNamespace(state=lambda: sleep("down"))
    taken = {str(n): SimpleNamespace(is_ours=one) for n, one in enumerate(ours)}
    failover = SimpleNamespace(record=RECORD, taken=taken, machine=machine)
    started: list[object] = []

    async def ensure(one: object, _: object) -> None:
        started.append(one)

    own = OwnMachines(
        cast("Any", SimpleNamespace(all=lambda: [failover], ensure_machine=ensure)),
        MachinesConfig(),
    )
    assert await own.runs_on("9") is None
    assert await own.runs_on("0") is False
    assert await own.start_for("0") is all(ours)
    assert started == ([failover] if all(ours) else [])


@pytest.mark.parametrize("obeys", [True, False])
async def test_a_machine_that_does_not_turn_itself_off_in_time_is_ended(
    expect_log: Callable[[str], None], *, obeys: bool
) -> None:
    """Its disk is asked for: otherwise it would be waited for as long as it likes."""
    done: list[object] = []

    async def shut_down(limit_s: float) -> bool:
        done.append(limit_s)
        return obeys

    async def end() -> None:
        done.append("ended")

    named = SimpleNamespace(name="shop")
    machine = SimpleNamespace(machine=named, shut_down=shut_down, end=end)
    failover = SimpleNamespace(record=RECORD, taken={"1": None}, machine=machine)
    own = OwnMachines(
        cast("Any", SimpleNamespace(all=lambda: [failover])), MachinesConfig(shutdown_s=7)
    )
    await own.stop_for("1")
    assert done == ([7] if obeys else [7, "ended"])
    if not obeys:
        expect_log("did not turn itself off within 7 s")


async def sleep(value: T) -> T:
    await trio.lowlevel.checkpoint()
    return value


async def test_a_change_of_the_point_that_stands_still_does_not_go_on_by_a_dry_run() -> None:
    job = Job("a-1", Step.CHANGE_POINT, 1, error="no room")
    record = replace(RECORD, kind=Kind.PLANNED, state=State.CHANGING_POINT, jobs=(job,))
    failover = Failover(record, Path("/nowhere"), {})
    again: list[Step] = []

    async def restart(_: object, kind: Step) -> None:
        again.append(kind)

    relocations = cast("Any", SimpleNamespace(
        _restart=restart,
        _failovers=SimpleNamespace(changing=trio.Lock(), find=lambda _: failover),
    ))  # fmt: skip
    for dry_run in (True, False):
        assert await Relocations.change_point(relocations, "t1", 5, dry_run=dry_run) == record
        assert again == ([] if dry_run else [Step.CHANGE_POINT])


async def test_the_machine_is_ended_before_what_it_runs_on_is_thrown_away(tmp_path: Path) -> None:
    done: list[str] = []

    def act(word: str) -> Callable[..., Awaitable[None]]:
        async def note(*_: object) -> None:
            done.append(word)

        return note

    failover = Failover(RECORD, tmp_path, {}, cast("Any", SimpleNamespace(end=act("ended"))))
    failovers = SimpleNamespace(check_unused=act("unused"), discard_copies=act("discarded"))
    relocations = SimpleNamespace(_failovers=failovers, _forget=act("forgotten"))
    await Relocations._end(cast("Any", relocations), failover)
    assert done == ["ended", "unused", "discarded", "forgotten"]


class Taken:
    """Stand in for a disk that is taken; the vault may be away."""

    disk: object = None

    def __init__(self, errors: list[VdiskfsError]) -> None:
        self.tries = 0
        self._errors = errors

    async def take(self, _: object) -> None:
        self.tries += 1
        if self._errors:
            raise self._errors.pop()
        self.disk = object()


async def test_a_disk_that_was_taken_is_not_started_again_where_another_one_failed() -> None:
    """Two replicators of one disk would write one spool."""
    members = [SimpleNamespace(disk_id=one) for one in "ab"]
    taken = {"a": Taken([]), "b": Taken([VaultUnreachableError("away")])}
    failover = cast("Any", SimpleNamespace(record=SimpleNamespace(members=members), taken=taken))

    async def disk(_: str) -> None:
        return None

    site = SimpleNamespace(vault=SimpleNamespace(disk=disk))
    relocations = cast("Any", SimpleNamespace(_site=site, _fork=lambda *_: None))
    with pytest.raises(VaultUnreachableError):
        await Relocations._take(relocations, failover)
    await Relocations._take(relocations, failover)
    assert [one.tries for one in taken.values()] == [1, 2]


async def test_an_image_is_shipped_and_synced_before_it_counts_as_parked(tmp_path: Path) -> None:
    """A host that dies before that loses what the image had not durably: it is compared again."""
    done: list[str] = []
    paths = SimpleNamespace(parked=tmp_path / "parked", directory=tmp_path)
    member = replace(RECORD.members[0], epoch=7)
    failover = SimpleNamespace(record=SimpleNamespace(members=(replace(member, epoch=3),)))
    # What an earlier run had noted, before its host died.
    prepare_home(tmp_path / "notes", member.disk_id, (2, 3))

    async def ship(_: object) -> None:
        done.append("shipped")
        failover.record.members = (member,)

    async def park(_: object) -> None:
        done.append("parked")

    def sync() -> None:
        assert not paths.parked.exists()
        done.append("synced")

    disk = SimpleNamespace(
        disk_id=member.disk_id, image=SimpleNamespace(sync_internal=sync)
    )  # fmt: skip
    images = HomeImages(
        cast("Any", SimpleNamespace(state=SimpleNamespace(disk=lambda _: paths))),
        cast("Any", SimpleNamespace(disks=lambda: [disk], adopted=(), park=park)),
    )
    fake = SimpleNamespace(
        _ship_own=ship, _notes=lambda *_: tmp_path / "notes", _images=images
    )  # fmt: skip
    await Homecomings._park(cast("Any", fake), cast("Any", failover))
    assert done == ["shipped", "synced", "parked"]
    assert paths.parked.exists()
    assert read_home(tmp_path / "notes").at == (2, 7)


@pytest.mark.parametrize("file", ["../../etc/passwd", "..", "", "a/../b", "/abs/x", "a//b"])
def test_a_path_of_the_vault_never_leads_out_of_the_source(file: str) -> None:
    record = DiskRecord("b" * 32, "web01", "then", "a", file, 1)
    for found in (path_of(record), file_of(record)):
        assert not found.startswith("/")
        assert not {"", ".", ".."} & set(found.split("/"))
    assert path_of(replace(record, file="vms/web01.img")) == "vms/web01.img"
    assert file_of(replace(record, file="vms/web01.img"), ["web01.img"]) == f"{'b' * 32}-web01.img"
