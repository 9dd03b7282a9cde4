"""One step of the model as a graph: what is computed, read and sent, and what each part waits for.

Times are in seconds, work in floating-point operations and bytes. A node runs on a *stream* of a pipeline stage, one
at a time and in the graph's order; nodes on different streams overlap as far as the edges allow.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class NodeKind(StrEnum):
    """What a node does. Projections are nodes of their own: their cost follows the step's tokens, attention's the
    contexts."""

    EMBEDDING = "embedding"
    LAYERNORM = "layernorm"
    QKV_PROJ = "qkv_proj"  # with biases, head norms and rotary encoding
    PREFILL_ATTN = "prefill_attn"  # of one prompt chunk; its K and V go to the pool
    DECODE_ATTN = "decode_attn"  # of all decoding rows
    OUT_PROJ = "out_proj"
    FFN = "ffn"
    LM_HEAD = "lm_head"
    SAMPLE = "sample"
    KV_LOAD = "kv_load"  # a layer's KV from a lower tier
    KV_STORE = "kv_store"  # to a lower tier
    KV_MIGRATE = "kv_migrate"  # to another worker
    COMM_ALL_REDUCE = "comm_all_reduce"
    COMM_ALL_GATHER = "comm_all_gather"
    COMM_SEND = "comm_send"
    COMM_RECV = "comm_recv"

    @property
    def is_comm(self) -> bool:
        return self.startswith("comm_")

    @property
    def is_transfer(self) -> bool:
        """Whether it moves bytes over a link rather than computes."""
        return self.startswith(("comm_", "kv_"))


@dataclass(frozen=True, slots=True)
class Node:
    """A part of a step. `rows` are the tokens it computes, `num_bytes` what it reads and writes, or what goes over
    `link`; `output_bytes` is what stays in memory until its last reader is done."""

    name: str
    kind: NodeKind
    layer: int | None = None
    stage: int = 0
    stream: str = "compute"
    rows: int = 0
    flops: float = 0.0
    num_bytes: float = 0.0
    output_bytes: int = 0
    link: str = ""


class NodeCost(Protocol):
    """How long nodes take."""

    def node_seconds(self, node: Node) -> float:
        """Seconds of one node, alone on its device."""
        ...


class ExecutionGraph:
    """Nodes by name, in the order in which they are issued, and edges by data between them.

    `buffers` says which piece of memory holds a node's output: each its own, until a pass lets them share.
    """

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self._nodes: dict[str, Node] = {}
        self._inputs: dict[str, set[str]] = {}
        self._readers: dict[str, set[str]] = {}
        self.buffers: dict[str, str] = {}
        for node in nodes:
            self.add(node)

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def __contains__(self, name: object) -> bool:
        return name in self._nodes

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    def add(self, node: Node, inputs: Iterable[str] = ()) -> Node:
        """Add a node that reads what `inputs` produce.

        Raises:
            ValueError: there is a node of that name.
            KeyError: there is no such input.
        """
        if node.name in self._nodes:
            raise ValueError(f"the graph has a node {node.name!r} already")
        self._nodes[node.name] = node
        self._inputs[node.name] = set()
        self._readers[node.name] = set()
        for source in inputs:
            self.connect(source, node.name)
        return node

    def connect(self, source: str, target: str) -> None:
        """Let `target` wait for `source`. `topological_sort` tells whether that closes a cycle.

        Raises:
            KeyError: there is no such node.
        """
        self._readers[source].add(target)
        self._inputs[target].add(source)

    def disconnect(self, source: str, target: str) -> None:
        """Take an edge away, if there is one."""
        self._readers[source].discard(target)
        self._inputs[target].discard(source)

    def replace(self, node: Node) -> None:
        """Put a node in the place of the one of the same name; edges stay."""
        if node.name not in self._nodes:
            raise KeyError(node.name)
        self._nodes[node.name] = node

    def remove(self, name: str) -> None:
        """Take a node and its edges away."""
        for source in self._inputs.pop(name):
            self._readers[source].discard(name)
        for target in self._readers.pop(name):
            self._inputs[target].discard(name)
        del self._nodes[name]
        self.buffers.pop(name, None)

    def inputs_of(self, name: str) -> set[str]:
        return set(self._inputs[name])

    def readers_of(self, name: str) -> set[str]:
        return set(self._readers[name])

    def copy(self) -> ExecutionGraph:
        """A graph that may be changed without changing this one."""
        return self.get_subgraph(lambda node: True)

    def get_subgraph(self, wanted: Callable[[Node], bool]) -> ExecutionGraph:
        """The nodes that are wanted and the edges between them, in the same order."""
        part = ExecutionGraph(node for node in self if wanted(node))
        for node in part:
            for source in self._inputs[node.name] & part._nodes.keys():
                part.connect(source, node.name)
        part.buffers = {name: buffer for name, buffer in self.buffers.items() if name in part}
        return part

    def topological_sort(self) -> list[Node]:
        """Every node after its inputs; of those that are ready, the one added first.

        Raises:
            ValueError: there is a cycle; it names the nodes that wait for each other.
        """
        place = {name: index for index, name in enumerate(self._nodes)}
        names = list(self._nodes)
        missing = {name: len(inputs) for name, inputs in self._inputs.items()}
        ready = [place[name] for name, count in missing.items() if not count]
        order: list[Node] = []
        while ready:
            name = names[heapq.heappop(ready)]
            order.append(self._nodes[name])
            for reader in self._readers[name]:
                missing[reader] -= 1
                if not missing[reader]:
                    heapq.heappush(ready, place[reader])
        if len(order) < len(self._nodes):
            stuck = sorted(name for name, count in missing.items() if count)
            raise ValueError(f"the graph has a cycle through {', '.join(stuck[:5])}")
        return order

    def ancestors_of(self, name: str) -> set[str]:
        """Every node whose output reaches this one."""
        found: set[str] = set()
        left = list(self._inputs[name])
        while left:
            source = left.pop()
            if source not in found:
                found.add(source)
                left += self._inputs[source]
        return found

    # -- time and memory ---------------------------------------------------------------------------------------------

    def schedule(self, cost: NodeCost) -> dict[str, tuple[float, float]]:
        """When each node starts and ends: in order on its stream, after all of its inputs."""
        free: dict[tuple[int, str], float] = defaultdict(float)
        times: dict[str, tuple[float, float]] = {}
        for node in self.topological_sort():
            ready = max((times[source][1] for source in self._inputs[node.name]), default=0.0)
            start = max(ready, free[node.stage, node.stream])
            end = free[node.stage, node.stream] = start + cost.node_seconds(node)
            times[node.name] = (start, end)
        return times

    def estimate_total_time(self, cost: NodeCost) -> float:
        """Seconds from the first node's start to the last one's end."""
        return max((end for _, end in self.schedule(cost).values()), default=0.0)

    def get_critical_path(self, cost: NodeCost) -> list[Node]:
        """The chain of nodes, by data, that takes longest: no number of streams makes the step shorter."""
        longest: dict[str, float] = {}
        before: dict[str, str | None] = {}
        for node in self.topological_sort():
            before[node.name] = max(sorted(self._inputs[node.name]), key=longest.__getitem__, default=None)
            source = before[node.name]
            longest[node.name] = (longest[source] if source else 0.0) + cost.node_seconds(node)
        path: list[Node] = []
        at = max(longest, key=longest.__getitem__, default=None)
        while at is not None:
            path.append(self._nodes[at])
            at = before[at]
        return path[::-1]

    def memory_bytes(self) -> int:
        """What all outputs take: the sum over buffers of the largest output that each holds."""
        sizes: dict[str, int] = defaultdict(int)
        for node in self:
            buffer = self.buffers.get(node.name, node.name)
            sizes[buffer] = max(sizes[buffer], node.output_bytes)
        return sum(sizes.values())
