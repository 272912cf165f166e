"""Failovers: writable copies of recovery points, and what is done with them.

record      what is known of a failover, on this host
states      which step follows which           jobs      steps done once, over crashes
copy        one disk's writable copy: absent bytes come from the vault, written ones stay
taken       a disk that was failed over for good, over its copy (copyfile)
told        what is told of them
failovers   all of a mount's; documents: what scripts get of them; choose, targets: of which disks
drills      test failovers                     machine, bootblocks   what runs on them
free        may a disk be failed over here     known     of a disk, before it is taken
relocation  failovers for good                 asking    the other site is asked first
overdue     those that nobody commits are rolled back
homecoming  failback                           ownmachines  what runs here, when it is asked for
"""

from vdiskfs.failover.copy import WritableCopy
from vdiskfs.failover.documents import failover_document, job_document, record_document
from vdiskfs.failover.drills import Drills
from vdiskfs.failover.failovers import Failover, Failovers
from vdiskfs.failover.homecoming import Homecomings
from vdiskfs.failover.ownmachines import OwnMachines
from vdiskfs.failover.record import FailoverRecord, Member
from vdiskfs.failover.relocation import Relocations
from vdiskfs.failover.states import Kind, State, Step, after

__all__ = [
    "Drills",
    "Failover",
    "FailoverRecord",
    "Failovers",
    "Homecomings",
    "Kind",
    "Member",
    "OwnMachines",
    "Relocations",
    "State",
    "Step",
    "WritableCopy",
    "after",
    "failover_document",
    "job_document",
    "record_document",
]
