"""Failovers: writable copies of recovery points, and what is done with them.

record     what is known of a failover, on this host
states     which step follows which
copy       one disk's writable copy: absent bytes come from the vault, written ones stay
targets    which disks, at which points
failovers  all of a mount's; documents: what scripts get of them
"""

from vdiskfs.failover.copy import WritableCopy
from vdiskfs.failover.documents import failover_document, record_document
from vdiskfs.failover.failovers import Failover, Failovers
from vdiskfs.failover.record import FailoverRecord, Member
from vdiskfs.failover.states import Kind, State, Step, after

__all__ = [
    "Failover",
    "FailoverRecord",
    "Failovers",
    "Kind",
    "Member",
    "State",
    "Step",
    "WritableCopy",
    "after",
    "failover_document",
    "record_document",
]
