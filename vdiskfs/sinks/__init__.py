"""Who is told of events: the journal, mail, a webhook.

queue     what waits for one of them, and the waits between tries
journal, mail, webhook
          how each is told
sinks     those of one mount

No guest, no disk and no other sink waits for any of them.
"""

from vdiskfs.sinks.sinks import Sinks

__all__ = ["Sinks"]
