"""How a disk is finalized: what fails is tried again, and never more than the disk can bear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from vdiskfs.diskjobs import DiskJobs
from vdiskfs.errors import DamagedError, StateError, VaultUnreachableError
from vdiskfs.events import Events
from vdiskfs.health import Health, Level, State
from vdiskfs.jobs import JobKind, Jobs

DISK = "a" * 32


class Scene:
    """A disk whose first point is stored, and what each try to finalize it comes to."""

    def __init__(self, tmp_path: Path) -> None:
        self.note = tmp_path / "unfinished"
        self.note.touch()
        self.jobs = Jobs(tmp_path)
        self.health = Health("web01", lambda: 0.5)
        self.health.finalizing = True
        self.health.pass_finished()
        end = SimpleNamespace(epoch=1, time_ns=0)
        suspects = SimpleNamespace(needed=False, resync=SimpleNamespace(cancelled=False))
        self.disk: Any = SimpleNamespace(
            name="web01", disk_id=DISK, health=self.health, started=True,
            line=SimpleNamespace(displaced=None),
            replicator=SimpleNamespace(stored=end, end=end, suspects=suspects),
            site=SimpleNamespace(state=SimpleNamespace(
                disk=lambda _: SimpleNamespace(unfinished=self.note))),
        )  # fmt: skip
        self.failures: list[Exception] = []
        self.tried: list[float] = []
        self.follower = DiskJobs(self.jobs, Events(tmp_path))
        self.follower._finalizer = self  # type: ignore[assignment]

    async def run(self, *_: object) -> str:
        """Be the finalizer."""
        self.tried.append(trio.current_time())
        if self.failures:
            raise self.failures.pop(0)
        return "all is well"

    async def begin(self, nursery: trio.Nursery, *failures: Exception) -> None:
        """Follow the disk for a second; the first tries to finalize it fail so."""
        self.failures += failures
        nursery.start_soon(self.follower.follow, self.disk)
        await trio.sleep(1)

    @property
    def job(self) -> dict[str, object]:
        [job] = [one for one in self.jobs.all() if one.kind is JobKind.FINALIZE]
        return self.jobs.document(job)

    async def wait_finalized(self) -> None:
        while self.health.finalizing:  # noqa: ASYNC110 (nobody tells)
            await trio.sleep(1)
        await trio.sleep(1)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def test_what_fails_is_tried_again_as_the_retry_table_says(
    autojump_clock: MockClock, scene: Scene, nursery: trio.Nursery,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    expect_log("cannot be finalized: (it is rotten|it failed|rotten)")
    expect_log("finalizing failed")
    await scene.begin(
        nursery, DamagedError("it is rotten"), KeyError("a mistake"), DamagedError("rotten")
    )
    assert (scene.job["state"], scene.health.level) == ("failed", Level.WARNING)
    assert scene.health.shown_state is State.PROTECTED
    assert "finalize.failed" in scene.health.conditions()
    await scene.wait_finalized()
    gaps = [round((b - a) / 60) for a, b in zip(scene.tried, scene.tried[1:], strict=False)]
    assert gaps == [1, 2, 4]
    assert (scene.job["state"], scene.job["outcome"]) == ("done", "all is well")
    assert (scene.health.level, scene.health.conditions()) == (Level.NORMAL, {})
    assert not scene.note.exists()


async def test_the_user_may_ask_for_the_next_try(
    autojump_clock: MockClock, scene: Scene, nursery: trio.Nursery,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    expect_log("cannot be finalized")
    await scene.begin(nursery, DamagedError("it is rotten"))
    assert scene.health.retry_now()
    await scene.wait_finalized()
    assert scene.tried[1] - scene.tried[0] < 5


async def test_a_vault_that_is_away_for_seconds_is_no_failure(
    autojump_clock: MockClock, scene: Scene, nursery: trio.Nursery
) -> None:
    await scene.begin(
        nursery, VaultUnreachableError("no answer"), VaultUnreachableError("no answer")
    )
    assert (scene.job["state"], scene.job["waits_for"]) == ("running", "no answer")
    assert (scene.health.shown_state, scene.health.level) == (State.FINALIZING, Level.NORMAL)
    await scene.wait_finalized()
    assert (scene.health.shown_state, len(scene.tried)) == (State.PROTECTED, 3)


async def test_a_disk_that_another_site_has_is_left_alone(
    autojump_clock: MockClock, scene: Scene, nursery: trio.Nursery,
    expect_log: Callable[[str], None],
) -> None:  # fmt: skip
    expect_log("cannot be finalized")
    await scene.begin(nursery, DamagedError("it is rotten"))
    scene.disk.line.displaced = object()
    await scene.wait_finalized()
    assert (len(scene.tried), scene.job["state"]) == (1, "cancelled")
    assert scene.health.conditions() == {}
    assert scene.note.exists()  # should it come back, the next start looks again


async def test_the_jobs_of_a_disk_that_was_stopped_hold_nothing_of_it(
    autojump_clock: MockClock, scene: Scene, expect_log: Callable[[str], None]
) -> None:
    expect_log("cannot be finalized")
    async with trio.open_nursery() as nursery:
        await scene.begin(nursery, DamagedError("it is rotten"))
        nursery.cancel_scope.cancel()
    assert (scene.job["ended"], scene.job["waits_for"]) == (None, "the disk to be taken up")
    with pytest.raises(StateError, match="cannot be cancelled"):
        await scene.jobs.cancel(str(scene.job["id"]))
