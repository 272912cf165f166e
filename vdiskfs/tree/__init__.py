"""The names of the mount: what is where, and what it stands for.

    node       a node answers for itself; the table of nodes
    listing    directories that are read piece by piece
    static     the root                         keyed  nodes known by what they show
    source, sourcefile, directory, disks        `disks/`, the source directory passed through
    pointnames, pointnode, points               `recovery-points/`
    failovers                                   `failovers/`
    hooks      what is asked of the daemon
    handover   what a successor of the daemon must know of it
    namespace  all of it

Bytes of files never come here (the data plane has them), nor do FUSE's own terms (``fs``
has those). Everything runs in the trio thread.
"""

from __future__ import annotations

from vdiskfs.tree.disks import Disks, open_source
from vdiskfs.tree.handover import REQUEST, RESENT, Handover
from vdiskfs.tree.hooks import (
    Access,
    CopyRef,
    DiskHooks,
    DiskName,
    FailoverRef,
    FailoverSource,
    OpenCopy,
    OpenPoint,
    PointFacts,
    PointKind,
    PointRef,
    PointSource,
)
from vdiskfs.tree.namespace import Namespace
from vdiskfs.tree.node import Attributes, Caller, Changes, Node, Nodes
from vdiskfs.tree.pointnames import plain_name
from vdiskfs.tree.sourcefile import SourceFile

__all__ = [
    "REQUEST", "RESENT", "Access", "Attributes", "Caller", "Changes", "CopyRef", "DiskHooks",
    "DiskName", "Disks", "FailoverRef", "FailoverSource", "Handover", "Namespace", "Node", "Nodes",
    "OpenCopy", "OpenPoint", "PointFacts", "PointKind",
    "PointRef", "PointSource", "SourceFile", "open_source", "plain_name",
]  # fmt: skip
