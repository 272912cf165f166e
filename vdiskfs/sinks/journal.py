"""The journal of systemd, in its native protocol: one datagram of fields for each event.

Source: "Native Journal Protocol" of systemd. A value with a line break has its length before
it instead of an equals sign. Events are short, so no descriptor is ever passed.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

import trio

from vdiskfs.events import Event, EventLevel
from vdiskfs.sinks.queue import SinkError

_PRIORITY = {EventLevel.INFO: 6, EventLevel.WARNING: 4, EventLevel.ERROR: 3}


class JournalSink:
    """Sends to the journal's socket. Where there is none nobody is told, and nothing fails."""

    name = "journal"
    gather_s = 0.0
    batch = 50

    def __init__(self, path: str, site: str) -> None:
        """Take the path of the socket."""
        self._path = path
        self._site = site

    async def deliver(self, events: list[Event], dropped: int) -> str:
        """See `Sink`."""
        await trio.lowlevel.checkpoint()
        flags = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        with socket.socket(socket.AF_UNIX, flags) as sender:
            for event in events:
                try:
                    sender.sendto(datagram(event, self._site), self._path)
                except FileNotFoundError:
                    return f"there is no {self._path}: not used"
                except OSError as error:
                    if error.errno == errno.ECONNREFUSED:
                        raise SinkError(f"{self._path}: nobody listens") from None
                    raise SinkError(f"{self._path}: {error.strerror}") from None
        return "sent"


def datagram(event: Event, site: str) -> bytes:
    """Return the fields of an event as the journal takes them."""
    fields = {
        "MESSAGE": f"{event.subject}: {event.text}" if event.subject else event.text,
        "PRIORITY": str(_PRIORITY[event.level]),
        "SYSLOG_IDENTIFIER": "vdiskfs",
        "SYSLOG_PID": str(os.getpid()),
        "VDISKFS_CODE": event.code,
        "VDISKFS_LEVEL": str(event.level),
        "VDISKFS_SUBJECT": event.subject,
        "VDISKFS_DISK": event.disk,
        "VDISKFS_HEALTH": event.health,
        "VDISKFS_TODO": event.todo,
        "VDISKFS_SITE": site,
    }
    return b"".join(_field(name, value) for name, value in fields.items() if value)


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="replace")
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"
