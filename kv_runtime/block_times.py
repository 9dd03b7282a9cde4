"""How long cached KV blocks live, rest before they are given up, and wait for their next use."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..histogram import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .node import Node

# the bucket bounds of vLLM's metrics of the same names, in seconds
BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0,
            600.0, 1200.0, 1800.0)  # fmt: skip
SAMPLED = 8  # of so many runs of tokens that are stored one is watched


class BlockTimes(NamedTuple):
    """Seconds, each block counted once, of the runs that were watched."""

    lifetime: Histogram  # from its storing until it is removed
    idle_before_evict: Histogram  # from its last use, or its storing, until it is removed
    reuse_gap: Histogram  # from use to use, of requests that need not compute it

    @classmethod
    def empty(cls) -> BlockTimes:
        return cls(Histogram(BOUNDS_S), Histogram(BOUNDS_S), Histogram(BOUNDS_S))

    @classmethod
    def merged(cls, times: Iterable[BlockTimes]) -> BlockTimes:
        """The sum of several, as one more."""
        total = cls.empty()
        for each in times:
            for ours, theirs in zip(total, each, strict=True):
                ours.add(theirs)
        return total


class BlockWatch:
    """Watches one in `SAMPLED` of the runs of tokens that a tree stores, and what becomes of their blocks.

    A listener of the cache, which also tells it of uses and splits. The blocks of a leaf that grows are as old as its
    first ones. Costs a look into a dictionary for each node that is used.
    """

    def __init__(self, block_size: int, clock: Callable[[], float]) -> None:
        self.times = BlockTimes.empty()
        self._block_size = block_size
        self._clock = clock
        self._stored_and_used: dict[Node, tuple[float, float]] = {}
        self._until_next = 0

    def stored(self, node: Node, start: int) -> None:
        if node in self._stored_and_used:
            return
        if self._until_next:
            self._until_next -= 1
            return
        self._until_next = SAMPLED - 1
        now = self._clock()
        self._stored_and_used[node] = now, now

    def used(self, path: list[Node]) -> None:
        """A request needs not compute these nodes."""
        watched = self._stored_and_used
        for node in path:
            if node in watched:
                stored, used = watched[node]
                now = self._clock()
                self.times.reuse_gap.observe(now - used, node.blocks.size)
                watched[node] = stored, now

    def split(self, lower: Node, upper: Node) -> None:
        """Part of a node is one of its own now."""
        if lower in self._stored_and_used:
            self._stored_and_used[upper] = self._stored_and_used[lower]

    def removed(self, node: Node, start: int) -> None:
        found = self._stored_and_used.get(node)
        if found is None:
            return
        if start == node.start:
            del self._stored_and_used[node]
        size = self._block_size
        count = node.blocks.size - (start // size - node.start // size)
        now, (stored, used) = self._clock(), found
        self.times.lifetime.observe(now - stored, count)
        self.times.idle_before_evict.observe(now - used, count)

    def cleared(self) -> None:
        self._stored_and_used.clear()
