"""The passes: the same work in the same order, never longer; each shown where it helps."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sageLLM.accel.device_rates import DeviceRates, LinkRates, OperationRates
from sageLLM.accel.execution_graph import NodeKind
from sageLLM.accel.graph_builder import ExecutionGraphBuilder, KVMove
from sageLLM.accel.graph_passes import fuse_communication, optimize, overlap, prefetch_kv, reuse_memory
from sageLLM.accel.model_work import ModelDimensions, Parallelism

PASSES = {
    "fuse": fuse_communication,
    "prefetch": prefetch_kv,
    "overlap": overlap,
    "memory": lambda graph, cost: reuse_memory(graph),
    "all": optimize,
}
LINKS = ("ddr", "nvme", "handover", "interconnect")

moves = st.builds(
    KVMove,
    st.sampled_from((NodeKind.KV_LOAD, NodeKind.KV_STORE, NodeKind.KV_MIGRATE)),
    st.integers(1, 2000),
    st.sampled_from(LINKS[:3]),
)


@st.composite
def steps(draw):
    """A graph as built, for any parallelism, batch and moves."""
    dimensions = ModelDimensions(draw(st.integers(2, 5)), 8, 2, 16, 128, 352, 1000)
    builder = ExecutionGraphBuilder(dimensions, Parallelism(draw(st.sampled_from((1, 2, 4))), draw(st.integers(1, 2))))
    return builder.build_hybrid_graph(
        draw(st.lists(st.integers(1, 2000), max_size=5)),
        draw(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 500)), min_size=1, max_size=3)),
        moves=draw(st.lists(moves, max_size=3)),
    )


@st.composite
def devices(draw):
    """Any balance of computing, memory and links."""
    rate = st.sampled_from((1e8, 1e9, 1e10, 1e11))
    rates = OperationRates((1, 64), (draw(rate), 5 * draw(rate)), draw(rate), draw(st.sampled_from((0.0, 1e-6, 1e-4))))
    operations = dict.fromkeys((kind for kind in NodeKind if not kind.is_transfer), rates)
    links = {name: LinkRates(draw(st.sampled_from((0.0, 1e-5, 1e-3))), draw(rate)) for name in LINKS}
    return DeviceRates(operations, links)


any_step = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def base(name):
    return name.removesuffix(".a").removesuffix(".b")


def work(graph):
    flops, num_bytes = defaultdict(float), Counter()
    for node in graph:
        flops[node.kind] += node.flops
        if node.kind.is_transfer:
            num_bytes[node.kind, node.link, node.layer] += node.num_bytes
    return {**flops, **num_bytes}


@pytest.mark.parametrize("name", PASSES)
@any_step
@given(graph=steps(), device=devices())
def test_the_same_work_never_longer(name, graph, device):
    nodes = list(graph)
    changed = PASSES[name](graph, device)
    assert list(graph) == nodes, "the graph itself is not touched"
    assert changed.estimate_total_time(device) <= graph.estimate_total_time(device) * (1 + 1e-12)
    assert work(changed) == pytest.approx(work(graph))
    assert changed.memory_bytes() <= graph.memory_bytes()


@pytest.mark.parametrize("name", PASSES)
@any_step
@given(graph=steps(), device=devices())
def test_what_computes_keeps_its_order_and_reads_its_kv(name, graph, device):
    changed = PASSES[name](graph, device)
    changed.topological_sort()

    def order(of):
        return {
            (base(source), base(node.name))
            for node in of
            if not node.kind.is_transfer
            for source in of.ancestors_of(node.name)
            if not of[source].kind.is_transfer and base(source) != base(node.name)
        }

    assert order(changed) == order(graph)
    for node in changed:
        if node.kind is NodeKind.KV_LOAD:
            assert {changed[reader].layer for reader in changed.readers_of(node.name)} == {node.layer}
            readers = {kind for reader in changed.readers_of(node.name) if "attn" in (kind := changed[reader].kind)}
            assert readers
        if node.kind in (NodeKind.KV_MIGRATE, NodeKind.KV_STORE):
            assert any("attn" in changed[source].kind for source in changed.inputs_of(node.name))


class RandomSeconds:
    """Any node may take any time."""

    def __init__(self, seed):
        self._chance = random.Random(seed)
        self._seconds = defaultdict(lambda: self._chance.choice((0.001, 1, 2, 50)))

    def node_seconds(self, node):
        return self._seconds[node.name]


@any_step
@given(graph=steps(), device=devices(), seed=st.integers(0, 99))
def test_no_two_outputs_are_in_one_buffer_at_a_time_whatever_nodes_take(graph, device, seed):
    changed = optimize(graph, device)
    times = changed.schedule(RandomSeconds(seed))
    alive = defaultdict(list)
    for node in changed:
        if node.output_bytes:
            readers = changed.readers_of(node.name)
            end = max((times[reader][1] for reader in readers), default=float("inf"))
            alive[changed.buffers[node.name]].append((times[node.name][0], end))
    for spans in alive.values():
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_fusion_saves_a_latency_for_each_message_less(rates):
    builder = ExecutionGraphBuilder(ModelDimensions(4, 8, 2, 16, 128, 352, 1000), Parallelism(1, 2))
    sequences = [KVMove(NodeKind.KV_MIGRATE, tokens, "handover") for tokens in (100, 50, 7)]
    graph = builder.build_prefill_graph([(0, 157)], moves=sequences)
    fused = fuse_communication(graph, rates)
    kinds = Counter(node.kind for node in fused)
    assert kinds[NodeKind.COMM_SEND] == kinds[NodeKind.COMM_RECV] == 1, "hidden and residual"
    assert kinds[NodeKind.KV_MIGRATE] == 4, "one a layer"
    saved = graph.estimate_total_time(rates) - fused.estimate_total_time(rates)
    latency = rates.links["interconnect"].latency_s + 4 * 2 * rates.links["handover"].latency_s
    assert saved == pytest.approx(latency)


def test_a_layers_two_reductions_are_not_fused(shape, rates):
    graph = ExecutionGraphBuilder(shape, Parallelism(2)).build_decode_graph([5, 6])
    assert Counter(node.kind for node in fuse_communication(graph, rates)) == Counter(node.kind for node in graph)


def test_prefetched_kv_arrives_while_earlier_layers_compute(shape, rates):
    graph = ExecutionGraphBuilder(shape).build_prefill_graph([(500, 400)], moves=[KVMove(NodeKind.KV_LOAD, 500, "ddr")])
    changed = prefetch_kv(graph, rates)
    load_s = sum(rates.node_seconds(node) for node in graph if node.kind is NodeKind.KV_LOAD)
    saved = graph.estimate_total_time(rates) - changed.estimate_total_time(rates)
    assert saved > 0.7 * load_s, "all but the first layer's"
    times = changed.schedule(rates)
    for layer in range(shape.num_layers):
        ready = [times[f"{k}.kv_load_0_ddr"][1] for k in range(shape.num_layers)]
        read = [times[f"{k}.prefill_attn_0"][0] for k in range(shape.num_layers)]
        lying = sum(ready[k] <= read[layer] <= read[k] for k in range(shape.num_layers))
        assert lying <= 3


def test_handed_over_kv_leaves_while_later_layers_compute(shape, rates):
    """What mode strict does: only the last layer's transfer is left when the step ends."""
    move = KVMove(NodeKind.KV_MIGRATE, 400, "handover")
    graph = ExecutionGraphBuilder(shape).build_prefill_graph([(0, 400)], moves=[move])
    alone = ExecutionGraphBuilder(shape).build_prefill_graph([(0, 400)]).estimate_total_time(rates)
    assert graph.estimate_total_time(rates) > alone
    assert overlap(graph, rates).estimate_total_time(rates) == pytest.approx(alone)


def test_a_message_travels_while_the_other_half_is_computed():
    kinds = [kind for kind in NodeKind if not kind.is_transfer]
    device = DeviceRates(
        dict.fromkeys(kinds, OperationRates((1,), (1e10,), 1e12)), {"interconnect": LinkRates(1e-6, 1e8)}
    )
    shape = ModelDimensions(4, 8, 2, 16, 128, 352, 1000)
    graph = ExecutionGraphBuilder(shape, Parallelism(2)).build_prefill_graph([(0, 512)])
    changed = overlap(graph, device)
    halves = [node for node in changed if node.name.endswith((".a", ".b"))]
    assert {base(node.name) for node in halves} >= {"0.ffn", "0.all_reduce_ffn"}
    assert changed.estimate_total_time(device) < 0.95 * graph.estimate_total_time(device)
    times = changed.schedule(device)
    assert times["1.all_reduce_ffn.a"][0] < times["1.ffn.b"][1]


def test_a_cut_that_reads_weights_twice_for_nothing_is_left_out(shape):
    kinds = [kind for kind in NodeKind if not kind.is_transfer]
    device = DeviceRates(
        dict.fromkeys(kinds, OperationRates((1,), (1e15,), 1e9)), {"interconnect": LinkRates(0.0, 1e12)}
    )
    graph = ExecutionGraphBuilder(shape, Parallelism(2)).build_decode_graph([9] * 8)
    assert not [node for node in overlap(graph, device) if node.name.endswith(".a")]


def test_memory_of_a_step_is_that_of_a_few_layers_not_of_all():
    def memory(layers):
        shape = ModelDimensions(layers, 8, 2, 16, 128, 352, 1000)
        graph = ExecutionGraphBuilder(shape).build_hybrid_graph([9] * 4, [(0, 200)])
        return graph.memory_bytes(), reuse_memory(graph).memory_bytes()

    (small, few), (large, many) = memory(4), memory(40)
    assert large > 8 * small
    assert many == few
    assert few < small / 3
