"""The whole tree of a mount: its root, and what stands there."""

from __future__ import annotations

import os
import time

from vdiskfs import native
from vdiskfs.tree.disks import Disks
from vdiskfs.tree.failovers import FailoversDirectory, Shared
from vdiskfs.tree.handover import Handover
from vdiskfs.tree.hooks import DiskHooks, FailoverSource, PointSource
from vdiskfs.tree.node import DISKS_ID, FAILOVERS_ID, POINTS_ID, ROOT_ID, Node, Nodes
from vdiskfs.tree.pointnode import Points
from vdiskfs.tree.points import PointsDirectory
from vdiskfs.tree.static import Owner, StaticDirectory


class Namespace:
    """`disks/`, `recovery-points/` and `failovers/`.

    Args:
        core: the data plane; images are attached to its nodes.
        source: the descriptor of `open_source`, owned from here on; None on a recovery
            site, where `disks/` is an empty directory that nobody can write.
        hooks: told of what happens to the files of the source.
        points: gives the recovery points.
        failovers: gives the writable copies; None: there are none.
        descriptors: how many descriptors unused nodes of the source may keep open; 0: a
            quarter of what the process may open, at most 4096.
        handover: what a predecessor left of its names, loaded, and what a successor gets.
    """

    def __init__(
        self, core: native.Core, source: int | None, hooks: DiskHooks, points: PointSource,
        *, failovers: FailoverSource | None = None, descriptors: int = 0,
        handover: Handover | None = None,
    ) -> None:  # fmt: skip
        self.nodes = Nodes(handover)
        owner = Owner(os.getuid(), os.getgid(), time.time_ns())
        self.disks: Disks | None = None
        if source is not None:
            self.disks = Disks(self.nodes, core, hooks, source, descriptors=descriptors)
        live: Node = (
            StaticDirectory(self.nodes, owner, {}, DISKS_ID)
            if self.disks is None
            else self.disks.root
        )
        children = {
            b"disks": live,
            b"recovery-points": PointsDirectory(Points(self.nodes, core, points, owner), POINTS_ID),
            b"failovers": StaticDirectory(self.nodes, owner, {}, FAILOVERS_ID)
            if failovers is None
            else FailoversDirectory(Shared(self.nodes, core, failovers, owner)),
        }
        self.root = StaticDirectory(self.nodes, owner, children, ROOT_ID)
        self.nodes.handover.begin(self.nodes.records)

    def statfs(self) -> os.statvfs_result:
        """Return how full the source's file system is; the root's where there is no source."""
        return os.statvfs("/") if self.disks is None else self.disks.statfs()

    async def close(self) -> None:
        """The mount is gone: detach what is attached, tell the hooks, close every descriptor."""
        await self.nodes.forget_all()
        self.nodes.handover.close()
        if self.disks is not None:
            self.disks.close()
