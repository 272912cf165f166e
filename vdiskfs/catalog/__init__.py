"""What the vault holds: disks, sites, points. Reading, publishing, joining, checking.

vault      Vault: identity, disks and names, sites        anchor   that it is still the same
log        DiskLog: the points of a disk: list, find, open, publish
line       what the vault lists of a generation         tables   points inside a delta
publish    segments, then the slot                      joins    joined deltas
owners     who writes: claims, fences, generations, branches
check      what is damaged, and whom it hurts
repair     and put together anew: healer one object, draft its bytes, reindex, reframe, rejoin
references what deltas say of a damaged object          copies        its pages once more
beside     the deltas before and behind a damaged one   named         what was thinned meanwhile
lostdocuments, lostrecords  what no delta tells of, put back    keptdocuments  this host's copies
differences  where two points of a disk differ, in whichever lines
points     Point, and the ways to name one              records, documents   JSON objects
groups     consistency groups                       grouppoints   points that disks share
policy     replication policies                     retention     which points a ladder keeps
ledger     what a thinned line has                  leaves        deltas between kept states
thinning   from points that stay to a new ledger    remains       and of what failed, taken up
garbage    deleting what is doomed                  rewriting     what is moved, so that little is
indexes    large ones, in parts, for joining        ways          few deltas to any leaf
leases     points that are open somewhere           upkeep     a line thinned, collected; holds
batches    segments that come before their delta    abandoned  those whose delta never comes
swap       a disk's record, changed
"""

from vdiskfs.catalog.anchor import Anchor
from vdiskfs.catalog.check import check
from vdiskfs.catalog.differences import Differences, open_differences
from vdiskfs.catalog.grouppoints import group_points, shared_points
from vdiskfs.catalog.groups import Group, group_members
from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.catalog.log import DiskLog
from vdiskfs.catalog.points import Point, Tip
from vdiskfs.catalog.policy import Policy
from vdiskfs.catalog.records import Branch, DiskRecord, Owner, SiteRecord
from vdiskfs.catalog.repair import repair
from vdiskfs.catalog.report import CheckReport, Problem, RepairReport, repair_document
from vdiskfs.catalog.vault import Vault

__all__ = [
    "Anchor",
    "Branch",
    "CheckReport",
    "Differences",
    "DiskLog",
    "DiskRecord",
    "Group",
    "IndexCache",
    "Owner",
    "Point",
    "Policy",
    "Problem",
    "RepairReport",
    "SiteRecord",
    "Tip",
    "Vault",
    "check",
    "group_members",
    "group_points",
    "open_differences",
    "repair",
    "repair_document",
    "shared_points",
]
