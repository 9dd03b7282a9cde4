"""Which cached prefix is given up first. The tree owns the structure; a policy ranks its leaves."""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from itertools import count
from typing import TYPE_CHECKING, Protocol

from ..config import KVEviction
from ..errors import KVCacheError

if TYPE_CHECKING:
    from collections.abc import Collection

    from .node import Node

ATTENTION_PARITY = 6 * 4096  # in tokens, for a hidden size of 4096, the usual one of 7 to 8 billion parameters


class EvictionPolicy(Protocol):
    """Ranks the nodes of one tree, which says what happens to them. Every leaf is listed, but those that are parked."""

    def touch(self, path: list[Node]) -> None:
        """List the nodes, a child of the root first, as just used."""

    def hit(self, path: list[Node]) -> None:
        """As `touch`, by a request that need not compute their tokens."""

    def relist(self, node: Node) -> None:
        """List a node that is a leaf now, or is no longer parked, with no better rank than its last use gave it."""

    def unlist(self, node: Node) -> None:
        """Forget a listed leaf."""

    def victim(self) -> Node | None:
        """Return the listed leaf to give up first, None if there is none; it stays listed."""

    def trim(self, node: Node) -> None:
        """The victim gives blocks; a victim that is parked instead gives none."""

    def clear(self) -> None:
        """Forget every node."""

    @property
    def listed(self) -> Collection[Node]:
        """Every leaf that is not parked; other nodes of the tree may be among them."""

    def check(self) -> None:
        """Verify the ranking, O(nodes).

        Raises:
            KVCacheError: naming the first node that is out of place.
        """


class LRUEviction:
    """Least recently used first, O(1) per node.

    Nodes are listed by last use, a node always before its parent. So the first one is a leaf, or has only children
    that are parked or have such children.
    """

    def __init__(self) -> None:
        self._recency: OrderedDict[Node, None] = OrderedDict()

    def touch(self, path: list[Node]) -> None:
        recency = self._recency
        for node in reversed(path):
            recency[node] = None
            recency.move_to_end(node)

    hit = touch

    def relist(self, node: Node) -> None:
        """Put the node, and those of its ancestors that are not listed, in front."""
        recency, chain = self._recency, []
        while node.namespace is None and node not in recency:
            chain.append(node)
            node = node.parent
        for unlisted in reversed(chain):
            recency[unlisted] = None
            recency.move_to_end(unlisted, last=False)

    def unlist(self, node: Node) -> None:
        del self._recency[node]

    def victim(self) -> Node | None:
        recency = self._recency
        while recency:
            node = next(iter(recency))
            if not node.children:
                return node
            del recency[node]
        return None

    def trim(self, node: Node) -> None:
        pass

    def clear(self) -> None:
        self._recency.clear()

    @property
    def listed(self) -> Collection[Node]:
        return self._recency.keys()

    def check(self) -> None:
        rank = {node: index for index, node in enumerate(self._recency)}
        for node, index in rank.items():
            if node.parent.namespace is None and rank.get(node.parent, -1) < index:
                raise KVCacheError(f"tree node {node} was used after its parent, which eviction relies on")


class GreedyDualEviction:
    """Lowest priority first: the clock at a leaf's last use + uses x cost per byte; O(log leaves) per evicted leaf.

    The clock is the highest priority that was given up so far, so that what was once used often ages. This is GDSF
    (Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HPL-98-69R1,
    1998), after GreedyDual-Size (Cao, Irani, "Cost-Aware WWW Proxy Caching Algorithms", USITS 1997). All blocks are
    of one size. To recompute the token at position p takes linear layers, the same for each, and attention to p
    tokens: 1 + p / attention_parity, where `attention_parity` is the position, in tokens, at which both take the same
    time, about 6 x hidden size. Where that is infinite, the cost is the same everywhere, which is LFU with dynamic
    aging (Arlitt et al., "Evaluating Content Management Techniques for Web Proxy Caches", 2000).

    A priority never falls, so the heap may keep an old one until its leaf comes out on top; a leaf that is unlisted
    elsewhere stays in it too, until most of the heap are such.
    """

    def __init__(self, attention_parity: float) -> None:
        self._attention_parity = attention_parity
        self._clock = 0.0
        self._heap: list[tuple[float, int, Node]] = []  # the number, by which no two entries are equal, is their age
        self._numbers = count()
        self._listed: set[Node] = set()

    def touch(self, path: list[Node]) -> None:
        for node in path:
            node.used_at = self._clock
        self.relist(path[-1])

    def hit(self, path: list[Node]) -> None:
        for node in path:
            node.hits += 1
        self.touch(path)

    def relist(self, node: Node) -> None:
        if not node.children and node not in self._listed:
            self._listed.add(node)
            heapq.heappush(self._heap, self._entry(node))

    def unlist(self, node: Node) -> None:
        heap, listed = self._heap, self._listed
        listed.remove(node)
        if heap[0][2] is node:
            heapq.heappop(heap)
        elif len(heap) > 2 * len(listed) + 64:
            self._heap = [entry for entry in heap if entry[2] in listed]
            heapq.heapify(self._heap)

    def victim(self) -> Node | None:
        heap = self._heap
        while heap:
            priority, _, node = heap[0]
            if node not in self._listed:
                heapq.heappop(heap)
            elif node.children:
                self.unlist(node)
            elif priority < self._priority(node):
                heapq.heapreplace(heap, self._entry(node))
            else:
                return node
        return None

    def trim(self, node: Node) -> None:
        self._clock = max(self._clock, self._priority(node))  # one that was parked meanwhile may be below the clock

    def clear(self) -> None:
        self._heap.clear()
        self._listed.clear()

    @property
    def listed(self) -> Collection[Node]:
        return self._listed

    def _priority(self, node: Node) -> float:
        return node.used_at + (1 + node.hits) * (1 + node.start / self._attention_parity)

    def _entry(self, node: Node) -> tuple[float, int, Node]:
        return self._priority(node), next(self._numbers), node

    def check(self) -> None:
        heap = self._heap
        entries = Counter(node for _, _, node in heap)
        for node in self._listed:
            if entries[node] != 1:
                raise KVCacheError(f"tree node {node} is listed for eviction, but the heap has {entries[node]} of it")
        for index, entry in enumerate(heap):
            priority, _, node = entry
            if index and heap[(index - 1) // 2] > entry:
                raise KVCacheError(f"tree node {node} is not where priority {priority} belongs in the eviction heap")
            if priority > self._priority(node) or node.used_at > self._clock:
                raise KVCacheError(f"tree node {node} has the eviction priority {priority}, its last use gave it less")


def make_eviction_policy(eviction: KVEviction, attention_parity: float = ATTENTION_PARITY) -> EvictionPolicy:
    """Return a new policy; `attention_parity` is what `GreedyDualEviction` says, for `cost`."""
    if eviction is KVEviction.LRU:
        return LRUEviction()
    return GreedyDualEviction(attention_parity if eviction is KVEviction.COST else math.inf)
