"""The sinks of one mount: made from its settings, each with a task of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping

import trio

from vdiskfs.config import Config, MountSettings
from vdiskfs.errors import RefusedError, UsageError
from vdiskfs.events import Event, EventLevel, Events, code_of
from vdiskfs.sinks.journal import JournalSink
from vdiskfs.sinks.mail import MailSink
from vdiskfs.sinks.queue import Sink, SinkError, SinkQueue
from vdiskfs.sinks.webhook import WebhookSink
from vdiskfs.watchsettings import check_login, secret

log = logging.getLogger(__name__)

RESTART_S = 5.0


class Sinks:
    """Tells of events while its `run` runs. Trio thread only."""

    def __init__(self, settings: MountSettings, events: Events) -> None:
        """Prepare; `open` makes those that the settings ask for."""
        self.queues: list[SinkQueue] = []
        self._settings = settings
        self._events = events
        self._webhook: WebhookSink | None = None

    def open(self, *, strict: bool, environ: Mapping[str, str] = os.environ) -> None:
        """Make what the settings ask for, and listen to the events.

        Args:
            strict: else a sink that cannot be used is left out, with an event.
            environ: may hold secrets.

        Raises:
            RefusedError: a secret's file cannot be read, or others may read it.
            UsageError: a password would go in clear.
        """
        options, site = self._settings.options, self._settings.site
        if options.watch.journal_socket:
            journal = JournalSink(options.watch.journal_socket, site)
            self._add(journal, options.watch.journal_level)
        for name, add in (("mail", self._add_mail), ("webhook", self._add_webhook)):
            try:
                add(options, site, environ)
            except (RefusedError, UsageError) as error:
                if strict:
                    raise
                log.error("%s is not used: %s", name, error)
                self._events.tell("watch.sink", name, f"is not used: {error}")
        self._events.listeners.append(self.offer)

    def _add_mail(self, options: Config, site: str, environ: Mapping[str, str]) -> None:
        if options.mail.host:
            check_login(options.mail)
            word = secret(options.mail.password_file, "VDISKFS_MAIL_PASSWORD", environ)
            self._add(MailSink(options.mail, word, site), options.mail.level)

    def _add_webhook(self, options: Config, site: str, environ: Mapping[str, str]) -> None:
        if options.webhook.url:
            key = secret(options.webhook.secret_file, "VDISKFS_WEBHOOK_SECRET", environ)
            self._webhook = WebhookSink(options.webhook, key, site)
            self._add(self._webhook, options.webhook.level)

    def _add(self, sink: Sink, level: str) -> None:
        self.queues.append(SinkQueue(sink, EventLevel(level), failed=self._failed))

    def offer(self, event: Event) -> None:
        """Let each sink know, in its own time."""
        for queue in self.queues:
            queue.offer(event)

    def _failed(self, name: str, why: str) -> None:
        self._events.tell("watch.sink", name, f"does not take events: {why}", fold="")

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with contextlib.AsyncExitStack() as stack:
            if self._webhook is not None:
                await stack.enter_async_context(self._webhook)
            async with trio.open_nursery() as nursery:
                for queue in self.queues:
                    nursery.start_soon(_keep_delivering, queue)
                await trio.sleep_forever()

    async def test(self) -> list[dict[str, object]]:
        """Send one event through every sink, past what waits; return what each answered."""
        now, code = time.time_ns(), code_of("watch.test")
        event = Event(
            code.name, code.level, "test", "", "this is a test of vdiskfs", "", "", 1, now, now,
            is_open=False,
        )  # fmt: skip
        rows: list[dict[str, object]] = []
        for queue in self.queues:
            try:
                answer, ok = await queue.sink.deliver([event], 0), True
            except SinkError as error:
                answer, ok = str(error), False
            rows.append({
                "sink": queue.sink.name, "ok": ok, "answer": answer, "waiting": len(queue),
                "delivered": queue.delivered, "dropped": queue.dropped,
            })  # fmt: skip
        self._events.tell("watch.test", "test", "vdiskfs event test was run")
        return rows


async def _keep_delivering(queue: SinkQueue) -> None:
    """Deliver; whatever a sink's own fault is ends no other one."""
    while True:
        try:
            await queue.run()
        except Exception:
            log.exception("%s failed; it is started again", queue.sink.name)
            await trio.sleep(RESTART_S)
