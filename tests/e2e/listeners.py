"""Real listeners that events are sent to: a mail server and a web server, on the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session


class Mailbox:
    """What a mail server has taken; ``refuse`` makes it say no to so many messages."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.refuse = 0
        self.refused = 0
        self.port = 0

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Take one message (aiosmtpd's name)."""
        if self.refuse:
            self.refuse -= 1
            self.refused += 1
            return "451 try again later"
        assert isinstance(envelope.content, bytes)
        self.messages.append(message_from_bytes(envelope.content, policy=default))
        return "250 taken"

    def codes(self) -> list[str]:
        """Return the codes of all messages, in order."""
        return [code for one in self.messages for code in str(one["X-Vdiskfs-Codes"]).split()]


@contextlib.contextmanager
def mail_server(**options: Any) -> Iterator[Mailbox]:
    """Run a mail server on a port that the system gives."""
    mailbox = Mailbox()
    controller = _Controller(mailbox, hostname="127.0.0.1", port=0, **options)
    controller.start()
    try:
        mailbox.port = controller.port
        yield mailbox
    finally:
        controller.stop()


class _Controller(Controller):
    def _trigger_server(self) -> None:
        """Look whether it serves at the port that the system has given."""
        assert isinstance(self.server, asyncio.Server)
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()  # type: ignore[no-untyped-call]


class Web:
    """What a web server was sent; ``statuses`` are answered first, then 204."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.statuses: list[int] = []
        self.port = 0

    def events(self) -> list[dict[str, Any]]:
        """Return the events that were taken."""
        return [json.loads(body)["event"] for body in self.bodies]

    def codes(self) -> list[str]:
        """Return their codes, in order."""
        return [event["code"] for event in self.events()]


@contextlib.contextmanager
def web_server() -> Iterator[Web]:
    """Run a web server on a port that the system gives."""
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = web.statuses.pop(0) if web.statuses else 204
            if status < 300:
                web.headers.append(dict(self.headers))
                web.bodies.append(body)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="web server")
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
