"""Who is told of events: each in its own time, tried again, bounded; what each is sent."""

from __future__ import annotations

import errno
import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.e2e.listeners import mail_server, web_server
from vdiskfs.config import Config, MountSettings
from vdiskfs.errors import RefusedError, UsageError
from vdiskfs.events import Event, EventLevel, Events, code_of
from vdiskfs.sinks import Sinks
from vdiskfs.sinks.journal import JournalSink, datagram
from vdiskfs.sinks.mail import MailSink
from vdiskfs.sinks.queue import SinkError, SinkQueue
from vdiskfs.sinks.webhook import SIGNATURE, WebhookSink, signature
from vdiskfs.watchsettings import MailConfig, WebhookConfig, listen_address, secret


def event(code: str = "rpo.warning", subject: str = "web01", text: str = "late") -> Event:
    known = code_of(code)
    return Event(
        code, known.level, subject, subject, text, known.todo, "Warning", 1, 10**18, 10**18,
        is_open=False,
    )  # fmt: skip


class Listener:
    """A sink that fails as often as it has errors."""

    name = "listener"
    gather_s = 0.0
    batch = 3

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.heard: list[list[str]] = []
        self.dropped: list[int] = []
        self.tried_at: list[float] = []

    async def deliver(self, events: list[Event], dropped: int) -> str:
        await trio.lowlevel.checkpoint()
        self.tried_at.append(trio.current_time())
        if self.errors:
            raise self.errors.pop(0)
        self.heard.append([one.text for one in events])
        self.dropped.append(dropped)
        return "heard"


def queue_of(sink: Listener, level: EventLevel = EventLevel.INFO, limit: int = 500) -> SinkQueue:
    return SinkQueue(sink, level, failed=lambda *_: None, limit=limit)


async def settle(queue: SinkQueue, nursery: trio.Nursery) -> None:
    nursery.start_soon(queue.run)
    while len(queue):  # noqa: ASYNC110 (the clock jumps)
        await trio.sleep(1)
    nursery.cancel_scope.cancel()


async def test_what_waits_is_delivered_in_order_and_in_batches(autojump_clock: MockClock) -> None:
    sink = Listener()
    queue = queue_of(sink)
    for number in range(7):
        queue.offer(event(text=str(number)))
    async with trio.open_nursery() as nursery:
        await settle(queue, nursery)
    assert sink.heard == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    assert queue.delivered == 7


async def test_what_was_not_taken_is_tried_again_in_growing_waits(
    autojump_clock: MockClock, expect_log: Callable[[str], None]
) -> None:
    expect_log("listener does not take events: no")
    sink = Listener(*[SinkError("no")] * 11)
    queue = queue_of(sink)
    queue.offer(event())
    async with trio.open_nursery() as nursery:
        await settle(queue, nursery)
    waits = [b - a for a, b in zip(sink.tried_at, sink.tried_at[1:], strict=False)]
    assert waits == pytest.approx([1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300])
    assert sink.heard == [["late"]]
    assert queue.failures == 11


async def test_a_host_without_descriptors_is_a_trouble_like_others(
    autojump_clock: MockClock, expect_log: Callable[[str], None]
) -> None:
    expect_log("listener does not take events: .*Too many open files")
    sink = Listener(OSError(errno.EMFILE, "Too many open files"))
    queue = queue_of(sink)
    queue.offer(event())
    async with trio.open_nursery() as nursery:
        await settle(queue, nursery)
    assert (sink.heard, queue.failures) == ([["late"]], 1)


async def test_a_trouble_is_told_once_until_it_is_over(
    autojump_clock: MockClock, expect_log: Callable[[str], None]
) -> None:
    expect_log("listener does not take events: no")
    told: list[tuple[str, str]] = []
    sink = Listener(SinkError("no"), SinkError("no"))
    queue = SinkQueue(sink, EventLevel.INFO, failed=lambda *what: told.append(what))
    queue.offer(event())
    async with trio.open_nursery() as nursery:
        await settle(queue, nursery)
    assert told == [("listener", "no")]


async def test_what_a_sink_never_takes_is_dropped_and_counted(
    autojump_clock: MockClock, expect_log: Callable[[str], None]
) -> None:
    expect_log("never")
    sink = Listener(SinkError("never", final=True))
    queue = queue_of(sink)
    for number in range(4):
        queue.offer(event(text=str(number)))
    async with trio.open_nursery() as nursery:
        await settle(queue, nursery)
    assert sink.heard == [["3"]]
    assert sink.dropped == [3]
    assert queue.dropped == 3


async def test_a_full_queue_drops_the_oldest(autojump_clock: MockClock) -> None:
    sink = Listener()
    queue = queue_of(sink, limit=2)
    for number in range(5):
        queue.offer(event(text=str(number)))
    async with trio.open_nursery() as nursery:
        await settle(queue, nursery)
    assert (sink.heard, sink.dropped) == ([["3", "4"]], [3])


async def test_the_end_of_a_condition_goes_to_who_was_told_of_its_beginning() -> None:
    queues = {level: queue_of(Listener(), level) for level in EventLevel}
    for code in ("rpo.warning", "rpo.warning.over", "rpo.error", "rpo.error.over", "disk.asked"):
        for queue in queues.values():
            queue.offer(event(code))
    assert [len(queue) for queue in queues.values()] == [5, 4, 2]


# ---- the journal --------------------------------------------------------------------------


async def test_the_journal_gets_its_native_protocol(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        assert await JournalSink(path, "here").deliver([event("rpo.error")], 0) == "sent"
        lines = journal.recv(65536).decode().splitlines()
    fields = dict(line.split("=", 1) for line in lines)
    assert fields["MESSAGE"] == "web01: late"
    assert fields["PRIORITY"] == "3"
    assert fields["SYSLOG_IDENTIFIER"] == "vdiskfs"
    assert fields["VDISKFS_CODE"] == "rpo.error"
    assert fields["VDISKFS_DISK"] == "web01"
    assert fields["VDISKFS_SITE"] == "here"


def test_a_line_break_cannot_add_a_field_to_the_journal() -> None:
    data = datagram(event(subject="a\nPRIORITY=0"), "here")
    message = b"a\nPRIORITY=0: late"
    assert b"MESSAGE\n" + struct.pack("<Q", len(message)) + message + b"\n" in data


async def test_where_there_is_no_journal_nobody_is_told_and_nothing_fails(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert "not used" in await JournalSink(str(path), "here").deliver([event()], 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(path))
    with pytest.raises(SinkError, match="nobody listens"):
        await JournalSink(str(path), "here").deliver([event()], 0)


# ---- mail -----------------------------------------------------------------------------------


def mail_config(port: int, **more: object) -> MailConfig:
    return MailConfig(
        host="127.0.0.1", port=port, sender="a@example.org", to=("b@example.org",),
        **more,  # type: ignore[arg-type]
    )  # fmt: skip


async def test_several_events_are_one_mail_with_the_worst_as_its_subject() -> None:
    with mail_server() as mailbox:
        sink = MailSink(mail_config(mailbox.port), "", "here")
        some = [event(), event("rpo.error", text="very late\r\nBcc: x@example.org"), event()]
        assert await sink.deliver(some, 4) == f"taken by 127.0.0.1:{mailbox.port}"
    [mail] = mailbox.messages
    assert mail["Subject"] == (
        "[vdiskfs here] error: web01: very late Bcc: x@example.org and 2 more"
    )
    assert mail["Bcc"] is None
    assert mail["X-Vdiskfs-Codes"] == "rpo.error rpo.warning"
    body = str(mail.get_payload())
    assert "4 older events are not here" in body
    assert body.count("code: rpo.warning") == 2


async def test_a_mail_server_that_refuses_says_why() -> None:
    with mail_server() as mailbox:
        mailbox.refuse = 1
        sink = MailSink(mail_config(mailbox.port), "", "here")
        with pytest.raises(SinkError, match="451 try again later"):
            await sink.deliver([event()], 0)
        config = mail_config(mailbox.port, starttls=True)
        with pytest.raises(SinkError, match="STARTTLS"):
            await MailSink(config, "", "here").deliver([event()], 0)
        config = mail_config(mailbox.port, user="me")
        with pytest.raises(SinkError, match="AUTH"):
            await MailSink(config, "secret", "here").deliver([event()], 0)
    with pytest.raises(SinkError, match="refused"):
        await sink.deliver([event()], 0)


async def test_a_mail_server_is_told_user_and_password() -> None:
    seen: list[tuple[bytes, bytes]] = []

    def check(
        server: object, session: object, envelope: object, mechanism: str, data: object
    ) -> object:
        from aiosmtpd.smtp import AuthResult, LoginPassword

        assert isinstance(data, LoginPassword)
        seen.append((data.login, data.password))
        return AuthResult(success=data.password == b"secret", handled=False)

    with mail_server(authenticator=check, auth_require_tls=False) as mailbox:
        config = mail_config(mailbox.port, user="me")
        await MailSink(config, "secret", "here").deliver([event()], 0)
        with pytest.raises(SinkError, match="535"):
            await MailSink(config, "wrong", "here").deliver([event()], 0)
    assert seen[0] == (b"me", b"secret")
    assert len(mailbox.messages) == 1


# ---- the webhook ----------------------------------------------------------------------------


async def test_a_webhook_gets_a_signed_document() -> None:
    with web_server() as web:
        config = WebhookConfig(url=f"http://127.0.0.1:{web.port}/hook")
        async with WebhookSink(config, "key", "here") as sink:
            assert await sink.deliver([event("rpo.error")], 2) == "answered 204"
    [body], [headers] = web.bodies, web.headers
    document = json.loads(body)
    assert (document["version"], document["site"], document["dropped"]) == (1, "here", 2)
    assert document["event"]["code"] == "rpo.error"
    assert headers[SIGNATURE] == signature(b"key", body)
    assert headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("status", "final"), [(500, False), (429, False), (404, True), (301, True)]
)
async def test_what_a_webhook_answers_says_whether_to_try_again(status: int, final: bool) -> None:
    with web_server() as web:
        web.statuses = [status]
        config = WebhookConfig(url=f"http://127.0.0.1:{web.port}/hook")
        async with WebhookSink(config, "", "here") as sink:
            with pytest.raises(SinkError, match=str(status)) as caught:
                await sink.deliver([event()], 0)
    assert caught.value.final is final


async def test_a_webhook_that_does_not_answer_is_left() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        async with WebhookSink(WebhookConfig(url=url, timeout_s=0.2), "", "here") as sink:
            with pytest.raises(SinkError, match=r"no answer in 0\.2 s"):
                await sink.deliver([event()], 0)


# ---- together, and settings -----------------------------------------------------------------


def settings(tmp_path: Path, **tables: object) -> MountSettings:
    options = Config.from_dict(tables, where="test")
    return MountSettings(None, "/mnt", "file:///v", "here", str(tmp_path), options=options)


async def test_one_that_hangs_holds_up_no_other(tmp_path: Path) -> None:
    events = Events(tmp_path)
    with web_server() as web, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        mail = {"host": "127.0.0.1", "port": silent.getsockname()[1], "sender": "a@b", "to": ["c@d"],
                "gather_s": 0, "timeout_s": 1}  # fmt: skip
        sinks = Sinks(
            settings(tmp_path, mail=mail, webhook={"url": f"http://127.0.0.1:{web.port}/"}), events
        )
        sinks.open(strict=True)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sinks.run)
                for number in range(20):
                    events.tell("rpo.warning", f"web{number}", "late")
                while len(web.bodies) < 20:  # noqa: ASYNC110 (another thread's)
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
            # The thread that was left behind ends by its own timeout.
            mail_sink = next(one.sink for one in sinks.queues if one.sink.name == "mail")
            assert isinstance(mail_sink, MailSink)
            while mail_sink._limiter.borrowed_tokens:  # noqa: ASYNC110 (threads set no event)
                await trio.sleep(0.01)
    assert [one["subject"] for one in web.events()] == [f"web{number}" for number in range(20)]


async def test_a_test_goes_through_each_and_says_what_it_answered(tmp_path: Path) -> None:
    with web_server() as web, mail_server() as mailbox:
        web.statuses = [503]
        mail = {"host": "127.0.0.1", "port": mailbox.port, "sender": "a@b", "to": ["c@d"]}
        events = Events(tmp_path)
        sinks = Sinks(
            settings(tmp_path, mail=mail, webhook={"url": f"http://127.0.0.1:{web.port}/"},
                     watch={"journal_socket": ""}), events,
        )  # fmt: skip
        sinks.open(strict=True)
        rows = await sinks.test()
        for queue in sinks.queues:
            if isinstance(queue.sink, WebhookSink):
                await queue.sink.__aexit__(None, None, None)
    assert [(row["sink"], row["ok"]) for row in rows] == [("mail", True), ("webhook", False)]
    assert "503" in str(rows[1]["answer"])
    assert mailbox.codes() == ["watch.test"]


async def test_a_secret_that_others_may_read_is_refused_unless_machines_run(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    key.chmod(0o644)
    chosen = settings(tmp_path, webhook={"url": "http://127.0.0.1:1/", "secret_file": str(key)})
    with pytest.raises(RefusedError, match="other users may read"):
        Sinks(chosen, Events(tmp_path)).open(strict=True)
    expect_log("webhook is not used")
    events = Events(tmp_path)
    sinks = Sinks(chosen, events)
    sinks.open(strict=False)
    assert [one.sink.name for one in sinks.queues] == ["journal"]
    assert [one.code for one in events.since(0, 10)] == ["watch.sink"]
    key.chmod(0o600)
    assert secret(str(key), "NOT_SET", {}) == "secret"
    assert secret(str(key), "SET", {"SET": "other"}) == "other"


@pytest.mark.parametrize(
    ("mail", "used"),
    [
        ({"host": "mx.example.org", "user": "me"}, False),
        ({"host": "127.0.0.1.example.org", "user": "me"}, False),
        ({"host": "mx.example.org", "user": "me", "starttls": True}, True),
        ({"host": "mx.example.org"}, True),
        ({"host": "localhost", "user": "me"}, True),
        ({"host": "127.0.0.1", "user": "me"}, True),
    ],
)
def test_no_password_goes_through_the_network_in_clear(
    tmp_path: Path, expect_log: Callable[[str], None], mail: dict[str, object], used: bool
) -> None:
    """Refused at the mount; where machines run the mail alone is left out."""
    chosen = settings(tmp_path, mail={**mail, "sender": "a@b", "to": ["c@d"]})
    if not used:
        with pytest.raises(UsageError, match="in clear") as raised:
            Sinks(chosen, Events(tmp_path)).open(strict=True)
        assert raised.value.exit_code == 2
        expect_log("mail is not used")
    sinks = Sinks(chosen, Events(tmp_path))
    sinks.open(strict=used)
    assert ("mail" in [one.sink.name for one in sinks.queues]) == used


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"watch": {"rpo_warning": 60, "rpo_error": "30s"}}, "rpo_error: must not be below"),
        ({"watch": {"rpo_warning": "soon"}}, "rpo_warning: not a span"),
        ({"watch": {"metrics_listen": "0.0.0.0:9469"}}, "metrics_listen: must be a loopback"),
        ({"watch": {"metrics_listen": "127.0.0.1:x"}}, "metrics_listen: must be a loopback"),
        ({"watch": {"lag": 1}}, "unknown key 'lag' in [watch]"),
        ({"mail": {"host": "mx"}}, "sender is missing"),
        ({"mail": {"host": "mx", "sender": "a@b", "to": ["c"]}}, "to: must be a mail address"),
        ({"mail": {"port": 0}}, "port: must be a port"),
        ({"mail": {"password": "x"}}, "unknown key 'password'"),
        ({"webhook": {"url": "ftp://x/"}}, "url: must be a URL"),
        ({"webhook": {"url": "https://u:p@x/"}}, "url: must not hold a user"),
        ({"webhook": {"level": "bad"}}, "level: must be one of"),
        ({"webhook": 1}, "must be a table"),
    ],
)
def test_settings_that_cannot_be_used_are_one_clear_line(
    tables: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        Config.from_dict(tables, where="vdiskfs.conf")
    assert said in caught.value.message
    assert caught.value.message.startswith("vdiskfs.conf: ")


def test_settings_go_to_the_daemon_and_come_back_equal() -> None:
    tables = {"watch": {"rpo_warning": "5m", "rpo_error": 900, "metrics_listen": "[::1]:9469"},
              "mail": {"host": "mx", "sender": "a@b", "to": ["c@d"], "starttls": True},
              "webhook": {"url": "https://x/"}}  # fmt: skip
    config = Config.from_dict(tables, where="test")
    assert config.watch.thresholds.warning_s == 300
    assert listen_address(config.watch.metrics_listen) == ("::1", 9469)
    chosen = MountSettings(None, "/mnt", "file:///v", "here", "/s", options=config)
    assert MountSettings.from_json(chosen.to_json()) == chosen
    chosen = MountSettings(None, "/mnt", "file:///v", "here", "/s")
    assert MountSettings.from_json(chosen.to_json()) == chosen
