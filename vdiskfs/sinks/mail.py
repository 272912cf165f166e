"""Mail by SMTP: one message for what comes at once, in a thread of its own."""

from __future__ import annotations

import smtplib
import socket
import ssl
from email.message import EmailMessage
from email.utils import formatdate, make_msgid

import trio

from vdiskfs.events import Event
from vdiskfs.sinks.queue import SinkError
from vdiskfs.units import format_time
from vdiskfs.watchsettings import MailConfig


class MailSink:
    """Sends mail."""

    name = "mail"
    batch = 100

    def __init__(self, config: MailConfig, password: str, site: str) -> None:
        """Take the settings; nothing is sent yet."""
        self.gather_s = config.gather_s
        self._config = config
        self._password = password
        self._site = site
        # Its own: a server that hangs takes no thread away from disks.
        self._limiter = trio.CapacityLimiter(1)

    async def deliver(self, events: list[Event], dropped: int) -> str:
        """See `Sink`."""
        message = compose(events, dropped, self._site, self._config)
        return await trio.to_thread.run_sync(
            self._send, message, abandon_on_cancel=True, limiter=self._limiter
        )

    def _send(self, message: EmailMessage) -> str:
        config = self._config
        where = f"{config.host}:{config.port}"
        try:
            with smtplib.SMTP(config.host, config.port, timeout=config.timeout_s) as server:
                if config.starttls:
                    server.starttls(context=ssl.create_default_context())
                if config.user:
                    server.login(config.user, self._password)
                refused = server.send_message(message)
        except smtplib.SMTPNotSupportedError as error:
            raise SinkError(f"{where}: {error}") from None
        except smtplib.SMTPResponseException as error:
            raise SinkError(f"{where}: {_text(error.smtp_code, error.smtp_error)}") from None
        except smtplib.SMTPRecipientsRefused as error:
            raise SinkError(f"{where}: {_refusals(error.recipients)}") from None
        except (smtplib.SMTPException, OSError, ValueError) as error:
            raise SinkError(f"{where}: {str(error) or type(error).__name__}") from None
        # Some of them have it: sending it again would be worse.
        return f"taken by {where}" + (f", but {_refusals(refused)}" if refused else "")


def _text(code: int, answer: bytes | str) -> str:
    text = answer.decode(errors="replace") if isinstance(answer, bytes) else answer
    return " ".join(f"{code} {text}".split())[:300]


def _refusals(refused: dict[str, tuple[int, bytes]]) -> str:
    return "; ".join(f"{who} is refused: {_text(*why)}" for who, why in refused.items())[:500]


def compose(events: list[Event], dropped: int, site: str, config: MailConfig) -> EmailMessage:
    """Return the message for these events: the worst one is its subject."""
    worst = max(events, key=lambda event: event.level.rank)
    more = f" and {len(events) - 1} more" if len(events) > 1 else ""
    message = EmailMessage()
    message["From"] = config.sender
    message["To"] = ", ".join(config.to)
    message["Date"] = formatdate(localtime=False)
    message["Message-ID"] = make_msgid(domain=config.sender.rpartition("@")[2])
    subject = " ".join(f"[vdiskfs {site}] {worst.level}: {worst.subject}: {worst.text}".split())
    message["Subject"] = (subject if len(subject) <= 150 else f"{subject[:147]}...") + more
    message["Auto-Submitted"] = "auto-generated"
    message["X-Vdiskfs-Codes"] = " ".join(sorted({event.code for event in events}))
    lines = [_paragraph(event) for event in events]
    if dropped:
        lines.insert(0, f"{dropped} older events are not here: vdiskfs event list")
    lines.append(f"-- \nvdiskfs at site {site}, host {socket.gethostname()}")
    message.set_content("\n\n".join(lines) + "\n")
    return message


def _paragraph(event: Event) -> str:
    rows = [
        ("", f"{event.level.upper()}  {event.subject}: {event.text}"),
        ("time", format_time(event.first_ns)),
        ("code", event.code),
        ("disk", event.disk),
        ("health", event.health),
        ("to do", event.todo),
    ]
    return "\n".join(f"  {name}: {value}" if name else value for name, value in rows if value)
