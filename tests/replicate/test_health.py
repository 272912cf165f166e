"""Waiting and trying again: the table, the countdown, what cuts it short, what does not."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import pytest
import trio
from trio.testing import MockClock

from vdiskfs.errors import LocalError, RefusedError, VaultUnreachableError, VdiskfsError
from vdiskfs.health import RETRY_MINUTES, Health, Level
from vdiskfs.window import Window

AWAY = VaultUnreachableError("no answer")


class Action:
    """Fails as often as it has errors, and notes when it was called."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.called_at: list[float] = []

    async def __call__(self) -> str:
        await trio.lowlevel.checkpoint()
        self.called_at.append(trio.current_time())
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    @property
    def waits_s(self) -> list[float]:
        return [b - a for a, b in zip(self.called_at, self.called_at[1:], strict=False)]


@pytest.mark.parametrize(("chance", "factor"), [(0.0, 0.9), (0.5, 1.0), (1.0, 1.1)])
async def test_the_waits_are_those_of_the_table_with_jitter(
    autojump_clock: MockClock, expect_log: Callable[[str], None], chance: float, factor: float
) -> None:
    expect_log("no answer")
    health = Health("web01", lambda: chance)
    action = Action(*[AWAY] * 8)
    assert await health.until_done("uploading", action) == "done"
    minutes = [*RETRY_MINUTES, RETRY_MINUTES[-1], RETRY_MINUTES[-1]]
    assert action.waits_s == pytest.approx([60 * factor * one for one in minutes])
    assert health.level is Level.NORMAL
    assert health.last_error is None


async def test_the_countdown_counts_down(
    mock_clock: MockClock, nursery: trio.Nursery, expect_log: Callable[[str], None]
) -> None:
    expect_log("no answer")
    expect_log("no room")
    health = Health("web01", lambda: 0.5)
    action = Action(AWAY, AWAY)
    nursery.start_soon(health.until_done, "uploading", action)
    await trio.testing.wait_all_tasks_blocked()
    assert health.level is Level.WARNING
    assert health.is_vault_away
    assert health.next_retry_s == pytest.approx(60)
    mock_clock.jump(25)
    assert health.next_retry_s == pytest.approx(35)
    assert health.last_error == "no answer"
    health.local_failed(LocalError("no room"))
    assert health.last_error == "no answer; and: no room"
    health.local_works()
    assert health.retry_now()
    await trio.testing.wait_all_tasks_blocked()
    assert health.next_retry_s == pytest.approx(120)
    mock_clock.jump(121)
    await trio.testing.wait_all_tasks_blocked()
    assert len(action.called_at) == 3
    assert health.next_retry_s is None
    assert not health.retry_now()


async def test_an_answer_cuts_a_wait_short_once(
    mock_clock: MockClock, nursery: trio.Nursery, expect_log: Callable[[str], None]
) -> None:
    expect_log("no answer")
    health = Health("web01", lambda: 0.5)
    action = Action(*[AWAY] * 5)
    nursery.start_soon(health.until_done, "uploading", action)

    async def answers(calls: int) -> None:
        await trio.testing.wait_all_tasks_blocked()
        health.vault_answers()
        await trio.testing.wait_all_tasks_blocked()
        assert len(action.called_at) == calls

    await answers(2)
    await answers(2)  # it answers others, and not us: the table holds
    health.vault_is_silent()
    await answers(3)
    await answers(3)
    mock_clock.jump(241)
    await answers(4)


@pytest.mark.parametrize("error", [RefusedError("the key is wrong", hint="check it")])
async def test_what_time_does_not_mend_waits_for_the_user(
    mock_clock: MockClock, nursery: trio.Nursery, expect_log: Callable[[str], None],
    error: VdiskfsError,
) -> None:  # fmt: skip
    expect_log("will not be tried again by itself")
    health = Health("web01")
    action = Action(error)
    nursery.start_soon(health.until_done, "uploading", action)
    await trio.testing.wait_all_tasks_blocked()
    health.vault_answers()
    mock_clock.jump(86400)
    await trio.testing.wait_all_tasks_blocked()
    assert len(action.called_at) == 1
    assert health.level is Level.CRITICAL
    assert health.next_retry_s is None
    assert health.last_error == "the key is wrong; check it; then: vdiskfs disk retry web01"
    assert health.retry_now()
    await trio.testing.wait_all_tasks_blocked()
    assert len(action.called_at) == 2
    assert health.last_error is None


async def test_a_longer_retry_after_is_honoured(
    autojump_clock: MockClock, expect_log: Callable[[str], None]
) -> None:
    expect_log("busy")
    health = Health("web01", lambda: 0.5)
    action = Action(VaultUnreachableError("busy", retry_after_s=600), AWAY)
    expect_log("no answer")
    await health.until_done("uploading", action)
    assert action.waits_s == pytest.approx([600, 120])


@pytest.mark.parametrize("error", [LocalError("no space"), OSError(28, "No space left on device")])
async def test_trouble_of_this_host_is_tried_again(
    autojump_clock: MockClock, expect_log: Callable[[str], None], error: Exception
) -> None:
    expect_log("(?i)no space")
    health = Health("web01", lambda: 0.5)
    action = Action(error)
    await health.until_done("joining", action)
    assert action.waits_s == pytest.approx([60])


async def test_two_troubles_do_not_hide_each_other(
    mock_clock: MockClock, nursery: trio.Nursery, expect_log: Callable[[str], None]
) -> None:
    expect_log("no answer")
    expect_log("the key is wrong")
    health = Health("web01", lambda: 0.5)
    nursery.start_soon(health.until_done, "uploading", Action(AWAY))
    nursery.start_soon(health.until_done, "renaming", Action(RefusedError("the key is wrong")))
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(61)
    await trio.testing.wait_all_tasks_blocked()
    assert health.level is Level.CRITICAL
    assert "the key is wrong" in str(health.last_error)
    assert health.next_retry_s is None


@pytest.mark.parametrize(
    ("now", "opens_s", "closes_s"),
    [
        ("21:00", 3600, 9 * 3600),
        ("22:00", 0, 8 * 3600),
        ("23:59", 0, 6 * 3600 + 60),
        ("00:00", 0, 6 * 3600),
        ("05:59", 0, 60),
        ("06:00", 16 * 3600, 24 * 3600),
    ],
)
def test_a_window_may_go_over_midnight(now: str, opens_s: int, closes_s: int) -> None:
    window = Window.parse("22:00-06:00")
    assert window is not None
    moment = datetime.fromisoformat(f"2026-11-21T{now}:00+01:00")
    assert window.opens_in_s(moment) == opens_s
    assert window.closes_in_s(moment) == closes_s


def test_a_window_by_day() -> None:
    window = Window.parse("08:30-17:15")
    assert window is not None
    assert window.opens_in_s(datetime.fromisoformat("2026-11-21T08:29:59+00:00")) == 1
    assert window.opens_in_s(datetime.fromisoformat("2026-11-21T12:00:00+00:00")) == 0
    assert window.opens_in_s(datetime.fromisoformat("2026-11-21T17:15:00+00:00")) == 15.25 * 3600


@pytest.mark.parametrize(
    "text", ["22-06", "24:00-06:00", "22:00-22:00", "22:00", "a", "22:60-01:00"]
)
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="window"):
        Window.parse(text)
