"""Failback without a mount: which steps may follow, and who moves an image when."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from tests.test_failover import RECORD
from vdiskfs.config import MachinesConfig
from vdiskfs.errors import StateError
from vdiskfs.failover import Failover, FailoverRecord, Kind, State, Step
from vdiskfs.failover import bringing as module
from vdiskfs.failover.drills import may_be_removed
from vdiskfs.failover.homecoming import Homecomings
from vdiskfs.failover.jobs import begin
from vdiskfs.failover.record import Job
from vdiskfs.ratelimit import RateLimiter

BEGUN = replace(RECORD, kind=Kind.FAILBACK, state=State.FAILING_BACK)


class Fixed:
    """Stand in for the failovers of a mount: one, whose record is changed in memory."""

    def __init__(self, record: FailoverRecord) -> None:
        self.changing = trio.Lock()
        self.failover = Failover(record, Path("/nowhere"), {})
        self.events = SimpleNamespace(tell=lambda *_, **__: None)

    def all(self) -> list[Failover]:
        return [self.failover]

    def has(self, _: str) -> bool:
        return True

    async def write(self, failover: Failover, **changes: Any) -> None:
        await trio.lowlevel.checkpoint()
        failover.record = replace(failover.record, **changes)


@asynccontextmanager
async def homecomings(record: FailoverRecord) -> AsyncIterator[tuple[Homecomings, Failover]]:
    """Give what brings home the one disk of a record; nothing runs afterwards."""
    fixed = Fixed(record)
    async with trio.open_nursery() as nursery:
        nothing = cast("Any", SimpleNamespace())
        yield (
            Homecomings(
                cast("Any", fixed), nothing, nothing, nursery, host=MachinesConfig(),
                limiter=RateLimiter(),
            ),
            fixed.failover,
        )  # fmt: skip
        nursery.cancel_scope.cancel()


async def test_what_follows_the_other_site_writes_nothing_any_more_when_it_was_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its threads cannot be cancelled: they are waited for."""
    monkeypatch.setattr(module, "KEEP_UP_S", 0)
    done: list[str] = []
    writing = trio.Event()

    def write() -> None:
        time.sleep(0.1)
        done.append("written")

    async def move(_: Failover) -> None:
        writing.set()
        await trio.to_thread.run_sync(write)

    async with homecomings(BEGUN) as (own, failover):
        monkeypatch.setattr(own._bringing, "move", move)
        own._bringing.follow(failover)
        await writing.wait()
        # Who asked for it has gone meanwhile, and asks again.
        with trio.move_on_after(0):
            await own._bringing.stop(failover)
        await own._bringing.stop(failover)
        assert done == ["written"]


async def test_what_follows_the_other_site_never_leads_an_image_back() -> None:
    """It has seen the newest point when a job moves on to a newer one."""
    tips = iter((5, 6))
    moved: list[int] = []

    async def move(place: tuple[int, int]) -> None:
        await trio.sleep(0.01 if place[1] == 6 else 0.05)
        moved.append(place[1])

    mover = SimpleNamespace(move=move, progress=SimpleNamespace(fetched_bytes=0))

    async def answer(value: object) -> object:
        await trio.lowlevel.checkpoint()
        return value

    class Points:
        async def tip(self) -> object:
            return await answer(SimpleNamespace(epoch=next(tips)))

        async def find(self, epoch: int) -> object:
            return await answer(SimpleNamespace(generation=2, epoch=epoch))

    disk = SimpleNamespace(moved=None)
    vault = SimpleNamespace(disk=lambda _: answer(disk), log=lambda _: Points())
    async with homecomings(BEGUN) as (own, failover):
        own._bringing._site = cast("Any", SimpleNamespace(vault=vault))
        own._bringing.mover = cast("Any", lambda *_: mover)  # type: ignore[method-assign]
        async with trio.open_nursery() as both:
            for _ in range(2):
                both.start_soon(own._bringing.move, failover)
        assert moved == [5, 6]


JOB = Job("a-1", Step.FAILBACK, 1)
WRONG = "failover t1: complete is not possible in state FailingBack"


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("jobs", "says", "hint"),
    [
        ((), "failback has not begun", "vdiskfs failback start web01"),
        ((JOB,), "failback is under way", "vdiskfs job wait a-1"),
        ((replace(JOB, ended_ns=2), replace(JOB, id="a-2")), "under way", "job wait a-2"),
        (
            (replace(JOB, error="no room"),),
            "failback stands still: no room",
            "vdiskfs failback start web01",
        ),
    ],
)
async def test_a_failback_is_completed_once_its_disks_were_moved(
    jobs: tuple[Job, ...], says: str, hint: str, dry_run: bool
) -> None:
    """The machine is not stopped at the other site for hours before it can run here."""
    async with homecomings(replace(BEGUN, jobs=jobs)) as (own, failover):
        with pytest.raises(StateError) as info:
            await own.complete("web01", dry_run=dry_run)
        assert info.value.exit_code == 4
        assert info.value.message.startswith(WRONG)
        assert says in info.value.message
        assert hint in str(info.value.hint)
        assert failover.record == replace(BEGUN, jobs=jobs)


async def test_no_job_takes_the_place_of_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps would be noted as the other one's."""
    going = trio.Event()

    async def act(_: Failover) -> None:
        going.set()
        await trio.sleep_forever()

    async with homecomings(BEGUN) as (own, failover):
        monkeypatch.setattr(own, "_steps", lambda *_: [("shipped", act)])
        await own._go(failover, Step.FAILBACK)
        await going.wait()
        before = failover.record
        await own._go(failover, Step.FAILBACK)  # the same again is no other one
        with pytest.raises(StateError, match="failback is under way in state FailingBack") as info:
            await own._go(failover, Step.COMPLETE)
        assert info.value.hint == f"vdiskfs job wait {before.jobs[-1].id}, then the same again"
        with pytest.raises(StateError, match="under way"):
            begin(failover, Step.COMPLETE)
        with pytest.raises(StateError, match="under way"):
            may_be_removed(failover)
        assert failover.record == before


async def test_a_failback_is_made_final_when_its_job_has_ended() -> None:
    """What goes on with the job after a restart would lead it back to where it was."""
    jobs = (replace(JOB, kind=Step.COMPLETE, done=("over",), error="no room"),)
    record = replace(BEGUN, state=State.FAILBACK_UNCOMMITTED, jobs=jobs)
    async with homecomings(record) as (own, failover):
        with pytest.raises(StateError, match="stands still: no room") as info:
            await own.commit("web01", dry_run=True)
        assert info.value.hint == "vdiskfs failback complete web01 goes on with it"
        assert failover.record == record
