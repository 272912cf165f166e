"""What has happened at a mount: for people, their programs, and what they are told by.

codes     the table of codes: how bad each is, and what to do
log       the events of one state directory, and what is told of new ones
database  the same in SQLite: ``STATE/events.db``
shown     what programs see of one

The daemon decides nothing by them, but for one thing: which conditions were told already.
"""

from vdiskfs.events.codes import CODES, OVER, Code, EventLevel, code_of
from vdiskfs.events.database import Event
from vdiskfs.events.log import Events
from vdiskfs.events.shown import event_document

__all__ = ["CODES", "OVER", "Code", "Event", "EventLevel", "Events", "code_of", "event_document"]
