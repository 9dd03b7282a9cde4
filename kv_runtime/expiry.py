"""When a cached prefix has not been used for too long."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from ..errors import KVCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from .node import Node


class Expiry:
    """Nodes of one tree by their last use, a node always before its parent; they expire `ttl_s` seconds after it.

    Every operation is O(1) per node. `clock` gives seconds, never less than before.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._used_at: OrderedDict[Node, float] = OrderedDict()

    def touch(self, path: list[Node]) -> None:
        """Note that the nodes, a child of the root first, are used now."""
        used_at, now = self._used_at, self._clock()
        for node in reversed(path):
            used_at[node] = now
            used_at.move_to_end(node)

    def forget(self, node: Node) -> None:
        """The node is no longer in the tree."""
        del self._used_at[node]

    def clear(self) -> None:
        """No node is."""
        self._used_at.clear()

    def expired(self) -> list[Node]:
        """Return the nodes that have expired, children before their parents."""
        oldest, nodes = self._clock() - self._ttl_s, []
        for node, used_at in self._used_at.items():
            if used_at > oldest:
                break
            nodes.append(node)
        return nodes

    def check(self, nodes: Collection[Node]) -> None:
        """Verify that `nodes`, the tree's, are listed in order.

        Raises:
            KVCacheError: naming the first one that is out of place.
        """
        if self._used_at.keys() != set(nodes):
            raise KVCacheError(f"{len(self._used_at)} nodes are listed by their last use, the tree has {len(nodes)}")
        newest, seen = float("-inf"), set()
        for node, used_at in self._used_at.items():
            if used_at < newest or node.parent in seen:
                raise KVCacheError(f"tree node {node} was used before the one, or after the parent, that it follows")
            newest = used_at
            seen.add(node)
