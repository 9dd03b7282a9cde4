"""Passes over an execution graph. Each returns a changed copy that does the same work, and never takes longer for it.

`optimize` runs them all in the order in which they help each other.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from .execution_graph import ExecutionGraph, Node, NodeKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .execution_graph import NodeCost


def optimize(graph: ExecutionGraph, cost: NodeCost) -> ExecutionGraph:
    """All passes: fusion, prefetch, overlap, and last the memory of what then lives at the same time."""
    return reuse_memory(overlap(prefetch_kv(fuse_communication(graph, cost), cost), cost))


def fuse_communication(graph: ExecutionGraph, cost: NodeCost) -> ExecutionGraph:
    """Send as one message what goes the same way at the same time: one latency instead of several.

    Transfers are fused if they are of the same kind, link, stage, stream and layer, and none waits for another; so are
    the receives of what is then one send. A fusion that makes the step longer, because somebody waits for the whole
    where a part would do, is left out.
    """
    best, best_s = graph.copy(), graph.estimate_total_time(cost)
    for group in _alike(graph):
        fused = _fuse(best, group)
        seconds = fused.estimate_total_time(cost)
        if seconds <= best_s:
            best, best_s = _fuse_receives(fused, group[0]), seconds
    return best


def _alike(graph: ExecutionGraph) -> list[list[str]]:
    groups: dict[object, list[str]] = defaultdict(list)
    for node in graph.topological_sort():
        if node.kind.is_transfer and node.kind is not NodeKind.COMM_RECV:
            names = groups[node.kind, node.link, node.stage, node.stream, node.layer]
            if not graph.ancestors_of(node.name) & set(names):
                names.append(node.name)
    return [names for names in groups.values() if len(names) > 1]


def _fuse(graph: ExecutionGraph, names: list[str]) -> ExecutionGraph:
    """The first of the nodes takes over what the others read and do; it stands where the last one stood."""
    first = graph[names[0]]
    parts = [graph[name] for name in names]
    whole = replace(
        first,
        rows=max(part.rows for part in parts) if first.kind.is_comm else sum(part.rows for part in parts),
        num_bytes=sum(part.num_bytes for part in parts),
        output_bytes=sum(part.output_bytes for part in parts),
    )
    fused = ExecutionGraph()
    for node in graph:
        if node.name not in names:
            fused.add(node)
        elif node.name == names[-1]:
            fused.add(whole)

    def name_of(name: str) -> str:
        return whole.name if name in names else name

    for node in graph:
        for source in graph.inputs_of(node.name):
            fused.connect(name_of(source), name_of(node.name))
    return fused


def _fuse_receives(graph: ExecutionGraph, send: str) -> ExecutionGraph:
    names = [node.name for node in graph if node.kind is NodeKind.COMM_RECV and graph.inputs_of(node.name) == {send}]
    return _fuse(graph, names) if len(names) > 1 else graph


def prefetch_kv(graph: ExecutionGraph, cost: NodeCost, ahead: int = 2) -> ExecutionGraph:
    """Load each layer's KV from a lower tier beside the computation, `ahead` layers before it is read.

    As built, a load is asked for when its layer begins and nothing runs meanwhile. Now loads have their link for a
    stream, and wait for the beginning of the layer `ahead` of theirs: no more than `ahead` + 1 layers' lie ready.
    """
    changed = graph.copy()
    began = {node.layer: node.name for node in graph if node.name == f"{node.layer}.norm"}
    for node in graph:
        if node.kind is NodeKind.KV_LOAD and node.layer is not None:
            changed.replace(replace(node, stream=node.link))
            for source in graph.inputs_of(node.name):
                changed.disconnect(source, node.name)
            if node.layer - ahead in began:
                changed.connect(began[node.layer - ahead], node.name)
    return _better(graph, changed, cost)


def overlap(graph: ExecutionGraph, cost: NodeCost) -> ExecutionGraph:
    """Let transfers run beside the computation that does not wait for them.

    Each link is a stream of its own. Where computation would wait for a message all the same, the node that makes it
    is cut in two by rows: the first half's message travels while the second half is computed (as in Wang et al.,
    "Overlap communication with dependent computation via decomposition", ASPLOS 2023). A cut that does not shorten the
    step, for each half reads the whole weight, is left out.
    """
    changed = graph.copy()
    for node in graph:
        if node.kind.is_transfer:
            changed.replace(replace(node, stream=node.link))
    best = _better(graph, changed, cost)
    best_s = best.estimate_total_time(cost)
    # One layer's cut tells whether it pays for all layers: they are alike.
    pays: dict[str, bool] = {}
    for producer, message in [*_cuttable(best)]:
        name = message.name.split(".", 1)[-1]
        if pays.get(name, True):
            cut = _cut(best, producer, message)
            seconds = cut.estimate_total_time(cost)
            pays[name] = seconds < best_s
            if pays[name]:
                best, best_s = cut, seconds
    return best


def _cuttable(graph: ExecutionGraph) -> Iterator[tuple[Node, Node]]:
    """All-reduces with the one node that makes what they send, which nobody else reads."""
    for node in graph:
        if node.kind is NodeKind.COMM_ALL_REDUCE and node.stream == node.link:
            (source,) = graph.inputs_of(node.name)
            if graph.readers_of(source) == {node.name} and graph[source].rows > 1:
                yield graph[source], node


def _cut(graph: ExecutionGraph, producer: Node, message: Node) -> ExecutionGraph:
    """Both nodes as two halves each, by rows, in the place of the whole."""
    halves: dict[str, list[tuple[Node, set[str]]]] = {producer.name: [], message.name: []}
    low = producer.rows // 2
    for label, rows in (("a", low), ("b", producer.rows - low)):
        share = rows / producer.rows
        half = replace(
            producer,
            name=f"{producer.name}.{label}",
            rows=rows,
            flops=producer.flops * share,
            output_bytes=round(producer.output_bytes * share),
        )
        sent = replace(
            message,
            name=f"{message.name}.{label}",
            rows=round(message.rows * share),
            num_bytes=message.num_bytes * share,
            output_bytes=round(message.output_bytes * share),
        )
        halves[producer.name].append((half, graph.inputs_of(producer.name)))
        halves[message.name].append((sent, {half.name}))
    changed = ExecutionGraph()
    for node in graph:
        for new, _ in halves.get(node.name, [(node, set())]):
            changed.add(new)
    for node in graph:
        if node.name in halves:
            for half, inputs in halves[node.name]:
                for source in inputs:
                    changed.connect(source, half.name)
            continue
        for source in graph.inputs_of(node.name):
            for name in [half.name for half, _ in halves[source]] if source in halves else [source]:
                changed.connect(name, node.name)
    return changed


def reuse_memory(graph: ExecutionGraph) -> ExecutionGraph:
    """Let outputs share memory when the last reader of one has run before the other is made.

    "Before" is by the edges, or by the order of one stream: it holds however long the nodes take. Of the buffers that
    are free the one that wastes least is taken, as a linear scan over registers does (Poletto and Sarkar, TOPLAS 1999).
    """
    changed = graph.copy()
    changed.buffers = {}
    order = graph.topological_sort()
    done_before = _finished_before(graph, order)
    sizes: dict[str, int] = {}
    newest: dict[str, str] = {}  # whose output is in a buffer
    for node in order:
        if not node.output_bytes:
            continue
        free = []
        for buffer, occupant in newest.items():
            readers = graph.readers_of(occupant)
            if readers and readers <= done_before[node.name]:
                # Bytes that would lie idle, or have to be added.
                free.append((abs(sizes[buffer] - node.output_bytes), buffer))
        buffer = min(free)[1] if free else node.name
        sizes[buffer] = max(sizes.get(buffer, 0), node.output_bytes)
        newest[buffer] = node.name
        changed.buffers[node.name] = buffer
    return changed


def _finished_before(graph: ExecutionGraph, order: list[Node]) -> dict[str, set[str]]:
    """For each node, those that have ended when it starts, whatever any of them takes."""
    before: dict[str, set[str]] = {}
    last: dict[tuple[int, str], str] = {}
    for node in order:
        found: set[str] = set()
        earlier = last.get((node.stage, node.stream))
        for source in graph.inputs_of(node.name) | ({earlier} if earlier else set()):
            found |= before[source] | {source}
        before[node.name] = found
        last[node.stage, node.stream] = node.name
    return before


def _better(graph: ExecutionGraph, changed: ExecutionGraph, cost: NodeCost) -> ExecutionGraph:
    return changed if changed.estimate_total_time(cost) <= graph.estimate_total_time(cost) else graph.copy()
