"""What the daemon makes of a dry run: it goes all the way down, and nothing is changed there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import trio

from tests.catalog.memory import MemoryStore
from tests.test_failover import RECORD
from tests.test_homecoming import Fixed
from vdiskfs.api import application
from vdiskfs.catalog import Vault
from vdiskfs.control import MountControl
from vdiskfs.failover import Kind, State, Step, homecoming, relocation
from vdiskfs.failover.homecoming import Homecomings
from vdiskfs.failover.record import Job
from vdiskfs.failover.relocation import Relocations
from vdiskfs.failovercontrol import FailoverControl
from vdiskfs.groups import Groups
from vdiskfs.jobcontrol import JobControl

ENDED = Job("a-1", Step.FAILBACK, 1, ended_ns=2)


class Recorder:
    """Stand in for what does the work: note what is asked of it."""

    def __init__(self, kind: Kind = Kind.PLANNED) -> None:
        self.calls: list[tuple[str, object]] = []
        self._record = replace(RECORD, kind=kind)

    def find(self, _: str) -> object:
        return SimpleNamespace(record=self._record)

    def all(self) -> list[object]:
        return []

    def document(self, _: object) -> dict[str, object]:
        return {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def act(*_: object, **more: object) -> object:
            await trio.lowlevel.checkpoint()
            self.calls.append((name, more.get("dry_run")))
            return {} if name in ("run", "change_group") else self._record

        return act


ASKED: dict[str, tuple[dict[str, object], str, bool | None]] = {
    "/failovers": ({"disk": "web01"}, "plan_test", None),
    "/failovers/start": ({"disk": "web01"}, "plan_start", None),
    "/failovers/t1/change-point": ({"point": "9"}, "change_point", True),
    "/failovers/t1/commit": ({}, "commit", True),
    "/failovers/t1/rollback": ({}, "roll_back", True),
    "/failovers/t1/cleanup": ({}, "plan_cleanup", None),
    "/reprotect/web01": ({}, "reprotect", True),
    "/failbacks/web01": ({}, "start", True),
    "/failbacks/web01/complete": ({}, "complete", True),
    "/failbacks/web01/commit": ({}, "commit", True),
    "/jobs/a-1/cancel": ({}, "cancel", True),
    "/repairs": ({"disks": ["web01"]}, "run", True),
    "/groups": ({"name": "shop", "disks": ["web01"]}, "change_group", True),
    "/groups/shop/add": ({"disks": ["web01"]}, "change_group", True),
    "/groups/shop/delete": ({}, "change_group", True),
}  # fmt: skip


async def answered(control: object, path: str, body: dict[str, object]) -> dict[str, Any]:
    transport = httpx.ASGITransport(application(cast("Any", control)))
    async with httpx.AsyncClient(transport=transport, base_url="http://x/v1") as client:
        document: dict[str, Any] = (await client.post(path, json=body)).json()
    return document


@pytest.mark.parametrize("path", [*ASKED, "a failback's clean-up"])
async def test_a_dry_run_goes_down_to_what_does_the_work(path: str) -> None:
    body, call, dry = ASKED.get(path, ({}, "cleanup", True))
    does = Recorder(Kind.PLANNED if path in ASKED else Kind.FAILBACK)
    failovers = FailoverControl(
        *cast("Any", [does] * 4), shown_in=Path("/"), changed=lambda: does.calls.append(("!", 0))
    )
    control = SimpleNamespace(
        failovers=failovers, jobs=JobControl(cast("Any", does), cast("Any", does)), repairs=does,
        change_group=does.change_group,
    )  # fmt: skip
    path = path if path in ASKED else "/failovers/t1/cleanup"
    document = await answered(control, path, {**body, "dry_run": True})
    assert does.calls == [(call, dry)]
    if "failovers" in path or "failback" in path:
        assert document["dry_run"] is True


async def test_a_dry_run_changes_no_group(tmp_path: Path) -> None:
    store = MemoryStore()
    vault = await Vault.init(store)
    for name in ("web01", "db01"):
        await vault.create_disk(name, file=name, size=4096, site="here")
    groups = Groups(vault, tmp_path / "groups.json", 1)
    control = cast("Any", SimpleNamespace(_groups=groups))
    groups.members = lambda _: []  # type: ignore[assignment, method-assign]

    async def change(act: str, name: str, *disks: str, dry_run: bool) -> None:
        before = dict(store.objects)
        document = await MountControl.change_group(control, name, act, list(disks), dry_run=dry_run)
        assert (before == store.objects) is dry_run
        assert bool(document.get("dry_run")) is dry_run

    for steps in (("create", "shop", "web01"), ("add", "shop", "db01"),
                  ("remove", "shop", "db01"), ("delete", "shop")):  # fmt: skip
        for dry_run in (True, False):
            await change(*steps, dry_run=dry_run)


@pytest.mark.parametrize(
    ("step", "state"),
    [
        ("commit", State.FAILED_OVER), ("roll_back", State.FAILED_OVER),
        ("roll_back", State.STARTING), ("roll_back", State.ROLLING_BACK),
        ("reprotect", State.COMMITTED), ("reprotect", State.REPROTECTING),
    ],
)  # fmt: skip
async def test_a_dry_run_changes_no_failover(step: str, state: State) -> None:
    does, fixed = Recorder(), Fixed(replace(RECORD, kind=Kind.PLANNED, state=state))
    own = SimpleNamespace(
        _failovers=fixed, _runner=does, _restart=does.restart, _tell=does.tell,
        _check_idle=Recorder().check_idle, of_disk=lambda _: fixed.failover,
    )  # fmt: skip
    fixed.find = lambda _: fixed.failover  # type: ignore[attr-defined]
    before = fixed.failover.record
    assert await getattr(Relocations, step)(own, "t1", dry_run=True) == before
    assert (fixed.failover.record, does.calls) == (before, [])
    await getattr(Relocations, step)(own, "t1", dry_run=False)
    assert fixed.failover.record != before or does.calls


@pytest.mark.parametrize(
    ("step", "state", "more"),
    [
        ("start", State.FAILING_BACK, {"full": False, "create": False, "vm": True}),
        ("complete", State.FAILING_BACK, {}),
        ("complete", State.COMPLETING, {"unasked": "latest"}),
        ("commit", State.FAILBACK_UNCOMMITTED, {}),
        ("cleanup", State.FAILING_BACK, {"notes": "x"}),
    ],
)  # fmt: skip
async def test_a_dry_run_changes_no_failback(step: str, state: State, more: dict[str, Any]) -> None:
    kind = Step.COMPLETE if state is State.FAILBACK_UNCOMMITTED else Step.FAILBACK
    jobs = (replace(ENDED, kind=kind),)
    does, fixed = Recorder(), Fixed(replace(RECORD, kind=Kind.FAILBACK, state=state, jobs=jobs))
    disk = SimpleNamespace(moved=None, generation=1)

    async def found(_: str) -> object:
        await trio.lowlevel.checkpoint()
        return disk

    own = SimpleNamespace(
        _failovers=fixed, _runner=does, _bringing=does, _go=does.go, _remove=does.remove,
        _let_be=does.let_be, _is_overtaken=does.is_overtaken,
        of_disk=lambda *_: fixed.failover, _of_disk=lambda _: fixed.failover,
        _site=SimpleNamespace(vault=SimpleNamespace(disk=found)),
    )  # fmt: skip
    fixed.find = lambda _: fixed.failover  # type: ignore[attr-defined]
    before = fixed.failover.record
    act = getattr(Homecomings, step)
    assert await act(own, "t1", **more, dry_run=True) == before
    assert (fixed.failover.record, does.calls) == (before, [])
    await act(own, "t1", **more, dry_run=False)
    assert fixed.failover.record != before or does.calls


async def test_a_dry_run_begins_no_failback(monkeypatch: pytest.MonkeyPatch) -> None:
    does = Recorder()

    async def new(*_: object, **__: object) -> object:
        await trio.lowlevel.checkpoint()
        return RECORD, SimpleNamespace(names=["web01"])

    async def make(record: object) -> object:
        await does.make()
        return SimpleNamespace(record=record)

    monkeypatch.setattr(homecoming, "new_record", new)
    own = SimpleNamespace(
        _failovers=SimpleNamespace(changing=trio.Lock(), make=make), _go=does.go,
        _of_disk=lambda _: None, _member=Recorder().member,
    )  # fmt: skip
    for dry_run, calls in ((True, []), (False, ["make", "go"])):
        await Homecomings.start(
            cast("Any", own), "web01", full=False, create=False, vm=True, dry_run=dry_run
        )
        assert [name for name, _ in does.calls] == calls


async def test_a_dry_run_changes_no_point(monkeypatch: pytest.MonkeyPatch) -> None:
    does, fixed = Recorder(), Fixed(replace(RECORD, kind=Kind.PLANNED, state=State.FAILED_OVER))

    async def choose(*_: object) -> object:
        await trio.lowlevel.checkpoint()
        return [replace(RECORD.members[0], epoch=7)], {}

    monkeypatch.setattr(relocation, "choose", choose)
    monkeypatch.setattr(relocation, "with_tokens", lambda members, _: tuple(members))
    monkeypatch.setattr(relocation, "logs_of", lambda *_: None)
    own = SimpleNamespace(
        _failovers=fixed, _restart=does.restart, _check_idle=Recorder().check_idle,
        _site=SimpleNamespace(vault=SimpleNamespace(disk=Recorder().disk)),
    )  # fmt: skip
    fixed.find = lambda _: fixed.failover  # type: ignore[attr-defined]
    before = fixed.failover.record
    planned = await Relocations.change_point(cast("Any", own), "t1", 7, dry_run=True)
    assert planned.members[0].epoch == 7
    assert (fixed.failover.record, does.calls) == (before, [])
