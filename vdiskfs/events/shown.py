"""An event as programs see it: ``event list --json``, and the body of a webhook."""

from __future__ import annotations

from vdiskfs.events.database import Event
from vdiskfs.units import format_time


def event_document(event: Event) -> dict[str, object]:
    """Return the document of one event; ``time`` is that of its last repeat."""
    return {
        "time": format_time(event.last_ns),
        "code": event.code,
        "level": str(event.level),
        "kind": event.code.partition(".")[0],
        "subject": event.subject,
        "disk": event.disk or None,
        "text": event.text,
        "todo": event.todo or None,
        "health": event.health or None,
        "count": event.count,
        "first": format_time(event.first_ns),
        "last": format_time(event.last_ns),
    }
