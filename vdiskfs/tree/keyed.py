"""Nodes that are known by what they show: made when they are asked for, one for each key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from vdiskfs import native
from vdiskfs.tree.handover import Identity
from vdiskfs.tree.node import Node, Nodes
from vdiskfs.tree.static import Owner

NodeT = TypeVar("NodeT", bound="KeyedNode")


class KeyedNodes:
    """What the nodes of one part of the mount share: who is known."""

    def __init__(self, nodes: Nodes, core: native.Core, owner: Owner) -> None:
        self.nodes = nodes
        self.core = core
        self.owner = owner
        self._by_key: dict[Identity, KeyedNode] = {}

    def node(self, key: Identity, make: Callable[[], NodeT]) -> NodeT:
        """Return the node of the key, made if it is not known. A key belongs to one class."""
        found = self._by_key.get(key)
        if found is not None:
            return cast("NodeT", found)
        node = self.nodes.make(key, make)
        node.key = key
        self._by_key[key] = node
        return node

    def dropped(self, node: KeyedNode) -> None:
        """The node is gone."""
        self._by_key.pop(node.key, None)


class KeyedNode(Node):
    """A node that its key tells from every other, for a successor too."""

    def __init__(self, shared: KeyedNodes, number: int | None = None) -> None:
        super().__init__(shared.nodes, number)
        self._shared = shared
        self.key: Identity = ()

    def gone(self) -> None:
        """Nobody needs the node: it is made anew when somebody does."""
        self._shared.dropped(self)

    @property
    def known_by(self) -> Identity:
        """What the node shows."""
        return self.key

    def place(self) -> tuple[int, Any]:
        """Return the directory above, and what `revive` needs besides the identity."""
        return (self.parent_id, None)
