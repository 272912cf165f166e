"""Directories that never change: the root of the mount, and `failovers/`."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from vdiskfs.tree.listing import NameListing
from vdiskfs.tree.node import Attributes, Node, Nodes, directory_attributes, refusal


@dataclass(frozen=True, slots=True)
class Owner:
    """Who mounted, and when: the owner and the times of what is nobody else's."""

    uid: int
    gid: int
    time_ns: int

    def directory(self, time_ns: int | None = None) -> Attributes:
        """Return the attributes of a directory that nobody may change."""
        when = self.time_ns if time_ns is None else time_ns
        return directory_attributes(self.uid, self.gid, when)


class StaticDirectory(Node):
    """A directory with names that are given once."""

    is_directory = True

    def __init__(
        self, nodes: Nodes, owner: Owner, children: Mapping[bytes, Node], number: int | None = None
    ) -> None:
        super().__init__(nodes, number)
        self._owner = owner
        self._children = children
        self.pins += 1  # as long as the mount
        for child in children.values():
            child.pins += 1

    async def getattr(self) -> Attributes:
        """Return the attributes."""
        return self._owner.directory()

    async def child(self, name: bytes) -> Node:
        """Return the node of the name."""
        node = self._children.get(name)
        if node is None:
            raise refusal(errno.ENOENT)
        return node

    async def listing(self) -> NameListing:
        """Return the names; attributes are read when they are given."""
        attributes = {name: await node.getattr() for name, node in self._children.items()}
        return NameListing(
            (name, partial(_found, node, attributes[name])) for name, node in self._children.items()
        )


def _found(node: Node, attributes: Attributes) -> tuple[Node, Attributes]:
    return node, attributes
