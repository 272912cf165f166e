"""Events: told without waiting, folded, bounded; a full disk and a damaged database hurt nobody."""

from __future__ import annotations

import errno
import json
import os
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.e2e.loopdev import file_system, make_image
from vdiskfs.events import CODES, OVER, Event, EventLevel, Events, code_of, event_document
from vdiskfs.events import log as events_log
from vdiskfs.events.database import Database
from vdiskfs.units import NS


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the clock of the events, in seconds."""

    def set_clock(seconds: float) -> None:
        monkeypatch.setattr("vdiskfs.events.log.time.time_ns", lambda: int(seconds * NS))

    set_clock(1000)
    return set_clock


def texts(events: Events, **asked: object) -> list[tuple[str, str, int]]:
    found = events.since(0, 2000, **asked)  # type: ignore[arg-type]
    return [(one.code, one.text, one.count) for one in found]


def test_an_event_has_what_its_code_says(tmp_path: Path) -> None:
    events = Events(tmp_path)
    events.tell(
        "rpo.error", "web01", "it lags\n9 s \x1b[31mbehind", disk="web01", health="Critical"
    )
    [one] = events.since(0, 10)
    document = event_document(one)
    assert document["level"] == "error"
    assert document["kind"] == "rpo"
    assert document["text"] == "it lags 9 s ?[31mbehind"
    assert document["todo"] == CODES["rpo.error"].todo
    assert document["health"] == "Critical"
    assert one.is_open
    assert one.number == 1


def test_repeats_are_one_event_with_their_number(
    tmp_path: Path, at: Callable[[float], None]
) -> None:
    events = Events(tmp_path)
    heard: list[Event] = []
    events.listeners.append(heard.append)
    for second in range(5):
        at(1000 + second)
        events.tell("epoch.given-up", "web01", "no room")
        events.tell("epoch.given-up", "db01", "no room")
    [web, db] = events.since(0, 10)
    assert (web.subject, web.count, db.subject, db.count) == ("web01", 5, "db01", 5)
    assert (web.first_ns, web.last_ns) == (1000 * NS, 1004 * NS)
    assert [one.subject for one in heard] == ["web01", "db01"]
    assert events.counts[EventLevel.WARNING] == 10
    at(1000 + events_log.FOLD_S)
    events.tell("epoch.given-up", "web01", "no room")
    assert [one.count for one in events.since(0, 10)] == [5, 5, 1]
    assert len(heard) == 3


def test_who_follows_sees_each_event_and_each_repeat_once(tmp_path: Path) -> None:
    events = Events(tmp_path)
    events.tell("disk.asked", "web01", "a")
    events.tell("disk.asked", "web01", "b")
    last = events.since(0, 10)[-1].number
    assert texts(events, after=last) == []
    events.tell("disk.asked", "web01", "a")
    assert texts(events, after=last) == [("disk.asked", "a", 2)]


def test_a_condition_that_is_over_begins_anew(tmp_path: Path) -> None:
    events = Events(tmp_path)
    heard: list[Event] = []
    events.listeners.append(heard.append)
    for _ in range(2):
        events.tell("vault.away", "web01", "no answer", fold="")
        assert [one.code for one in events.open_conditions()] == ["vault.away"]
        events.tell("vault.away", "web01", "still no answer", fold="")
        events.end("vault.away", "web01", "it is back")
        assert events.open_conditions() == []
    assert [one.code for one in heard] == ["vault.away", "vault.away.over"] * 2
    assert [row[2] for row in texts(events)] == [2, 1, 2, 1]


def test_a_condition_that_was_not_written_before_it_was_over_is_not_open(tmp_path: Path) -> None:
    events = Events(tmp_path)
    events.tell("vault.away", "web01", "no answer", fold="")
    events.end("vault.away", "web01", "it is back")
    assert events.open_conditions() == []


def test_the_oldest_go_but_what_goes_on_stays(tmp_path: Path) -> None:
    events = Events(tmp_path, limit=10)
    events.tell("vault.away", "web01", "no answer")
    for number in range(30):
        events.tell("disk.asked", "web01", f"by site {number}")
    events.flush()
    found = texts(events)
    assert found[0][0] == "vault.away"
    assert [row[1] for row in found[1:]] == [f"by site {number}" for number in range(20, 30)]


def test_events_are_chosen_by_time_level_and_disk(
    tmp_path: Path, at: Callable[[float], None]
) -> None:
    events = Events(tmp_path)
    events.tell("disk.asked", "web01", "one", disk="web01")
    at(2000)
    events.tell("rpo.warning", "db01", "two", disk="db01")
    events.tell("rpo.error", "shop", "three", disk="web01,db01")
    assert [row[1] for row in texts(events)] == ["one", "two", "three"]
    assert [one.text for one in events.since(1500 * NS, 10)] == ["two", "three"]
    assert [row[1] for row in texts(events, level=EventLevel.ERROR)] == ["three"]
    assert [row[1] for row in texts(events, disk="web01")] == ["one", "three"]
    assert [row[1] for row in texts(events, disk="eb01")] == []
    assert [one.text for one in events.since(0, 2)] == ["two", "three"]


def test_what_an_earlier_version_kept_is_taken_over(tmp_path: Path) -> None:
    old = [
        {"time_ns": 5 * NS, "kind": "failover", "subject": "f1", "text": "A -> B"},
        {"time_ns": 6 * NS, "kind": "disk", "subject": "web01", "text": "handed over"},
    ]
    (tmp_path / "events.jsonl.1").write_text(json.dumps(old[0]) + "\n")
    (tmp_path / "events.jsonl").write_text(json.dumps(old[1]) + '\n{"time_ns": 7, "ki')
    found = Events(tmp_path).since(0, 10)
    assert [(one.code, one.subject, one.text, one.last_ns) for one in found] == [
        ("failover.state", "f1", "A -> B", 5 * NS),
        ("event.other", "web01", "handed over", 6 * NS),
    ]
    assert not list(tmp_path.glob("events.jsonl*"))


@pytest.mark.parametrize("how", ["garbage", "version", "cut", "pages"])
def test_a_damaged_database_is_set_aside_with_one_line(
    tmp_path: Path, expect_log: Callable[[str], None], how: str
) -> None:
    events = Events(tmp_path)
    for number in range(200):
        events.tell("disk.asked", "web01", f"before {number} {'x' * 500}")
    events.flush()
    path = tmp_path / "events.db"
    data = bytearray(path.read_bytes())
    if how == "garbage":
        path.write_bytes(os.urandom(len(data)))
    elif how == "version":
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 99")
        database.close()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[4096:] = os.urandom(len(data) - 4096)
        path.write_bytes(data)
    expect_log(r"set aside as events\.db\.damaged")
    later = Events(tmp_path)
    later.tell("disk.asked", "web01", "after")
    assert texts(later)[-1][1] == "after"
    later.tell("disk.asked", "web01", "later")
    assert [row[1] for row in texts(later)][-2:] == ["after", "later"]
    assert (tmp_path / "events.db.damaged").exists()


@pytest.mark.root
def test_a_full_disk_fails_nobody_and_what_waits_is_written_later(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    image = tmp_path / "small.img"
    make_image(image, 4 << 20)
    with file_system("ext4", image, tmp_path / "small") as state:
        events = Events(state)
        events.tell("disk.asked", "web01", "before")
        events.flush()
        with (
            (state / "filler").open("wb") as filler,
            pytest.raises(OSError, match="No space") as caught,
        ):
            while True:
                filler.write(bytes(65536))
                filler.flush()
        assert caught.value.errno == errno.ENOSPC
        expect_log("events are not kept for now")
        for number in range(100):
            events.tell("disk.asked", "web01", f"{number} {'x' * 1500}")
            events.flush()
        assert (state / "events.db").stat().st_size < 100 * 1500
        (state / "filler").unlink()
        found = texts(events)
        assert [row[1].split()[0] for row in found] == ["before", *map(str, range(100))]


def test_what_waits_is_bounded_and_an_event_says_how_many_were_lost(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    state = tmp_path / "state"
    events = Events(state)
    expect_log("events are not kept for now")
    for number in range(events_log.WAITING + 7):
        events.tell("disk.asked", "web01", f"{number}")
    events.flush()
    events.tell("disk.asked", "web01", "last")
    state.mkdir()
    found = texts(events)
    assert found[0][1] == "8"
    assert found[-1] == ("watch.lost", "8 events were lost", 1)
    assert len(found) == events_log.WAITING + 1


async def test_the_task_writes_what_is_told_and_what_is_told_last(tmp_path: Path) -> None:
    events = Events(tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(events.run)
        events.tell("disk.asked", "web01", "one")
        with trio.fail_after(30):
            while not await trio.to_thread.run_sync(_kept, tmp_path):  # noqa: ASYNC110
                await trio.sleep(0.01)
        events.tell("mount.ended", "/mnt", "unmounted")
        nursery.cancel_scope.cancel()
    assert [one.code for one in _kept(tmp_path)] == ["disk.asked", "mount.ended"]


def _kept(state: Path) -> list[Event]:
    return Database(state).read(limit=100)


async def test_what_was_told_is_there_after_a_kill_once_it_was_waited_for(tmp_path: Path) -> None:
    """Whoever is killed leaves what is on the disk: that is what somebody else reads."""
    events, successor = Events(tmp_path), Events(tmp_path)
    events.tell("failover.state", "t1", "Starting -> FailedOver")
    assert successor.last_text("failover.state", "t1") == ""
    await events.wait_kept()
    assert successor.last_text("failover.state", "t1") == "Starting -> FailedOver"
    events.tell("failover.state", "t1", "FailedOver -> Committed")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(events.run)  # writes at the same time, or not
        await events.wait_kept()
        assert successor.last_text("failover.state", "t1") == "FailedOver -> Committed"
        nursery.cancel_scope.cancel()
    assert successor.last_text("failover.state", "t2") == ""


def test_the_table_of_codes_is_that_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "man/vdiskfs-monitoring.7").read_text()
    section = page.split(".SH CODES")[1].split(".SH ")[0].replace(r"\-", "-")
    shown = dict(re.findall(r'(?m)^\.TP\n\.BR (\S+) " \((info|warning|error)[^"]*"$', section))
    assert shown == {name: str(code.level) for name, code in CODES.items()}
    assert {code_of(f"{name}{OVER}").level for name in CODES} == {EventLevel.INFO}
    assert code_of("rpo.error.over").told_as is EventLevel.ERROR
    assert code_of("no.such").name == "event.other"


def test_each_code_that_is_told_is_in_the_table() -> None:
    """And each in the table is told somewhere."""
    library = Path(__file__).parents[2] / "vdiskfs"
    text = "".join(path.read_text() for path in library.rglob("*.py") if path.name != "codes.py")
    told = set(re.findall(r'(?:\btell|_event)\(\s*"([\w.-]+)"', text))
    assert told
    assert told <= set(CODES)
    assert [code for code in CODES if f'"{code}"' not in text and code != "event.other"] == []
