"""What begins to be wrong with a disk, and what is over: once each, at its threshold, no flapping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from vdiskfs.catalog import Policy
from vdiskfs.catalog.policy import PRESETS
from vdiskfs.disk import ProtectedDisk
from vdiskfs.earlydisk import EarlyDisk
from vdiskfs.errors import LocalError, RefusedError, VaultUnreachableError
from vdiskfs.events import Events
from vdiskfs.health import Health, State
from vdiskfs.watch import ABSENT_S, Watch
from vdiskfs.watching import Watching
from vdiskfs.watchsettings import RpoThresholds


class Scene:
    """Disks whose lag the test sets, a watch over them, and what was told."""

    def __init__(self, state: Path, hold_s: float = 30.0) -> None:
        self.lag = 0.0
        self.health = Health("web01", lambda: 0.5)
        self.health.state = State.PROTECTED
        replicator = SimpleNamespace(lag_s=lambda: self.lag)
        self.disk = SimpleNamespace(name="web01", health=self.health, replicator=replicator)
        self.here = [self.disk]
        self.early: list[EarlyDisk] = []
        self.limits = RpoThresholds(60, 300)
        self.events = Events(state)
        self.told: list[tuple[str, float]] = []
        self.events.listeners.append(
            lambda event: self.told.append((event.code, trio.current_time()))
        )
        self.watch = Watch(
            self.events, lambda: cast("list[ProtectedDisk]", self.here), lambda: self.early,
            thresholds=lambda _: self.limits, hold_s=hold_s,
        )  # fmt: skip

    async def lags(self, seconds: float) -> None:
        """Let the vault lag behind, by a second each second."""
        for _ in range(int(seconds)):
            await trio.sleep(1)
            self.lag += 1

    def codes(self) -> list[str]:
        return [code for code, _ in self.told]


@pytest.fixture
async def scene(tmp_path: Path, nursery: trio.Nursery) -> Scene:
    made = Scene(tmp_path)
    nursery.start_soon(made.watch.run)
    return made


async def test_a_lag_is_told_at_each_threshold_once_and_when_it_is_over(
    autojump_clock: MockClock, scene: Scene
) -> None:
    await trio.sleep(0.5)
    began = trio.current_time()
    await scene.lags(59)
    assert str(scene.health.level) == "Normal"
    await scene.lags(600)
    assert scene.codes() == ["rpo.warning", "rpo.error"]
    warned, failed = (at - began for _, at in scene.told)
    assert 60 <= warned <= 62
    assert 300 <= failed <= 302
    assert str(scene.health.level) == "Critical"
    assert "above rpo_error (5 min)" in str(scene.health.last_error)
    scene.lag = 0
    await trio.sleep(29)
    assert len(scene.told) == 2
    assert str(scene.health.level) == "Normal"
    await trio.sleep(5)
    assert scene.codes()[2:] == ["rpo.warning.over", "rpo.error.over"]
    await trio.sleep(3600)
    assert len(scene.told) == 4


async def test_a_lag_that_flaps_is_one(autojump_clock: MockClock, scene: Scene) -> None:
    for _ in range(100):
        scene.lag = 70
        await trio.sleep(10)
        scene.lag = 50
        await trio.sleep(20)
    assert scene.codes() == ["rpo.warning"]
    await trio.sleep(60)
    assert scene.codes() == ["rpo.warning", "rpo.warning.over"]


async def test_each_disk_may_have_thresholds_of_its_own_and_none(
    autojump_clock: MockClock, scene: Scene
) -> None:
    scene.limits = RpoThresholds(0, 0)
    scene.lag = 10**6
    await trio.sleep(10)
    assert scene.codes() == []
    scene.limits = RpoThresholds(0, 100)
    await trio.sleep(10)
    assert scene.codes() == ["rpo.error"]


@pytest.mark.parametrize("state", [State.ENABLING, State.INITIAL_REPLICATION])
async def test_before_the_first_point_nothing_lags(
    autojump_clock: MockClock, scene: Scene, state: State
) -> None:
    scene.health.state = state
    await scene.lags(400)
    assert scene.codes() == []


@pytest.mark.parametrize("handed", [False, True])
async def test_a_disk_that_another_site_has_does_not_lag(
    autojump_clock: MockClock, scene: Scene, handed: bool
) -> None:
    scene.health.displaced("site b has it", handed=handed)
    await scene.lags(400)
    assert scene.codes() == ([] if handed else ["disk.displaced"])


async def test_what_fails_is_a_condition_until_it_works(
    autojump_clock: MockClock, scene: Scene, nursery: trio.Nursery,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    expect_log("no answer")
    expect_log("no room")
    works = False

    async def action() -> None:
        await trio.lowlevel.checkpoint()
        if not works:
            raise VaultUnreachableError("no answer")

    nursery.start_soon(scene.health.until_done, "uploading", action)
    scene.health.local_failed(LocalError("no room"))
    await trio.sleep(600)
    assert scene.codes() == ["vault.away", "host.trouble"]
    works = True
    scene.health.local_works()
    assert scene.health.retry_now()
    await trio.sleep(40)
    assert sorted(scene.codes()[2:]) == ["host.trouble.over", "vault.away.over"]


@pytest.mark.parametrize("error", [RefusedError("wrong key", hint="mend it"), LocalError("space")])
async def test_the_event_says_what_to_do_and_the_health_with_it(
    autojump_clock: MockClock, scene: Scene, nursery: trio.Nursery, error: Any,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    expect_log(error.message)

    async def action() -> None:
        await trio.lowlevel.checkpoint()
        raise error

    nursery.start_soon(scene.health.until_done, "uploading", action)
    await trio.sleep(2)
    [event] = await trio.to_thread.run_sync(scene.events.open_conditions)
    refused = isinstance(error, RefusedError)
    assert event.code == ("vault.refused" if refused else "host.trouble")
    assert event.health == ("Critical" if refused else "Warning")
    assert "vdiskfs disk retry" in event.todo
    assert error.message in event.text


async def test_a_daemon_that_is_replaced_tells_nothing_twice(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    before = Scene(tmp_path)
    before.lag = 100
    with trio.move_on_after(5):
        await before.watch.run()
    assert before.codes() == ["rpo.warning"]
    await trio.to_thread.run_sync(before.events.flush)
    after = Scene(tmp_path)
    after.lag = 100
    async with trio.open_nursery() as nursery:
        nursery.start_soon(after.watch.run)
        await trio.sleep(100)
        assert after.codes() == []
        after.lag = 0
        await trio.sleep(40)
        assert after.codes() == ["rpo.warning.over"]
        nursery.cancel_scope.cancel()


async def test_conditions_of_a_disk_that_is_gone_end(
    autojump_clock: MockClock, scene: Scene
) -> None:
    scene.lag = 100
    await trio.sleep(5)
    scene.here.clear()
    await trio.sleep(ABSENT_S - 10)
    assert scene.codes() == ["rpo.warning"]
    await trio.sleep(20)
    assert scene.codes() == ["rpo.warning", "rpo.warning.over"]


def test_a_policy_has_thresholds_of_its_own() -> None:
    options = SimpleNamespace(watch=SimpleNamespace(thresholds=RpoThresholds(300, 1800)))
    watching = cast("Any", SimpleNamespace(_settings=SimpleNamespace(options=options)))

    def of(policy: Policy | None) -> RpoThresholds:
        return Watching.thresholds(watching, cast("Any", SimpleNamespace(policy=policy)))

    assert of(None) == of(Policy("p")) == RpoThresholds(300, 1800)
    assert of(Policy("p", rpo_warning="1m")) == RpoThresholds(60, 1800)
    assert of(PRESETS["asr-standard"]) == RpoThresholds(900, 1800)


async def test_a_disk_that_waits_to_be_started_is_told_of_and_nothing_of_it_is_over(
    autojump_clock: MockClock, scene: Scene
) -> None:
    """A daemon was replaced while the vault was away: that it is away is not over."""
    await scene.lags(400)
    record = cast("Any", SimpleNamespace(name="web01"))
    early = EarlyDisk(cast("Any", None), record)
    scene.here, scene.early = [], [early]
    await trio.sleep(2 * ABSENT_S)
    assert scene.codes() == ["rpo.warning", "rpo.error"]
    early.error = VaultUnreachableError("the vault is away")
    await trio.sleep(2 * ABSENT_S)
    assert scene.codes() == ["rpo.warning", "rpo.error", "vault.away"]
    scene.here, scene.early, scene.lag = [scene.disk], [], 0
    await trio.sleep(60)
    assert sorted(scene.codes()[3:]) == [
        "rpo.error.over", "rpo.warning.over", "vault.away.over",
    ]  # fmt: skip
