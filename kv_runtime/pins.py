"""Which prefixes of one tree are kept for good, whatever is not used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import KVCacheError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .node import Namespace, Node
    from .pool import BlockPool, Blocks, Int32Array


class Pins:
    """Prefixes by their tokens, each once. A node with `pins` lies on the way to so many of them.

    A pin owns a reference on every block of every node on its way, so that each evictable block can be reached without
    forgetting a pinned one. Of a new pin, nodes that end inside a block hold the block of the one that follows, so a
    prefix of T tokens adds at most ceil(T / block_size) blocks to `num_blocks`.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.num_blocks = 0  # that pins own, each counted once
        self._pool = pool
        self._block_size = block_size
        self._ends: dict[tuple[Namespace, bytes], Node] = {}
        self.counts: Int32Array = np.zeros(pool.num_blocks, np.int32)  # of references, per block

    def __len__(self) -> int:
        return len(self._ends)

    def __contains__(self, prefix: tuple[Namespace, bytes]) -> bool:
        return prefix in self._ends

    def add(self, prefix: tuple[Namespace, bytes], path: list[Node]) -> None:
        """Pin the prefix to which the path, from a child of the root on, leads; no node is shared by accident."""
        for node in path:
            node.pins += 1
            if node.pins == 1:
                self.own(node.blocks)
        self._ends[prefix] = path[-1]

    def remove(self, prefix: tuple[Namespace, bytes]) -> tuple[list[Node], list[Blocks]]:
        """Forget a pin. Return the nodes that no pin holds any more, the last one first, and blocks without owners."""
        node = self._ends.pop(prefix)
        freed, unowned = [], []
        while node.namespace is None:
            node.pins -= 1
            if not node.pins:
                freed.append(node)
                unowned.append(self._disown(node.blocks))
            node = node.parent
        return freed, unowned

    def own(self, blocks: Int32Array) -> None:
        """Take a reference on each block, none of which is free."""
        self._pool.retain(blocks)
        self.counts[blocks] += 1
        self.num_blocks += int(np.count_nonzero(self.counts[blocks] == 1))

    def _disown(self, blocks: Int32Array) -> Blocks:
        self.counts[blocks] -= 1
        self.num_blocks -= int(np.count_nonzero(self.counts[blocks] == 0))
        return self._pool.release(blocks)

    def clear(self) -> None:
        """Forget every pin."""
        held = np.flatnonzero(self.counts).astype(np.int32)
        self._pool.release(np.repeat(held, self.counts[held]))
        self.counts[:] = 0
        self.num_blocks = 0
        self._ends.clear()

    def check(self, nodes: Iterable[Node]) -> None:
        """Recount, from all nodes of the tree.

        Raises:
            KVCacheError: naming the node or block that is wrong.
        """
        counted = np.zeros_like(self.counts)
        pins: dict[Node, int] = {}
        for (_, tokens), end in self._ends.items():
            if 4 * end.end != len(tokens):
                raise KVCacheError(f"a pin of {len(tokens) // 4} tokens ends with tree node {end}")
            node = end
            while node.namespace is None:
                pins[node] = pins.get(node, 0) + 1
                node = node.parent
        for node in nodes:
            if node.pins != pins.pop(node, 0):
                raise KVCacheError(f"tree node {node} says that {node.pins} pins hold it, which is wrong")
            if node.pins:
                counted[node.blocks] += 1
        if pins:
            raise KVCacheError(f"tree node {next(iter(pins))} is pinned, but not in the tree")
        wrong = counted != self.counts
        if wrong.any() or self.num_blocks != np.count_nonzero(counted):
            raise KVCacheError(f"pins hold {np.count_nonzero(counted)} blocks, {self.num_blocks} are counted")
