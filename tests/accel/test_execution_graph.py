"""The graph itself: order, paths, times, parts. networkx is the oracle."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sageLLM.accel.execution_graph import ExecutionGraph, Node, NodeKind

STREAMS = ("compute", "comm", "copy")


class Seconds:
    """Costs that a node carries with it."""

    def node_seconds(self, node):
        return node.flops


@st.composite
def graphs(draw):
    """Any acyclic graph: the nodes' order of adding is not that of their edges."""
    count = draw(st.integers(0, 14))
    order = draw(st.permutations(range(count)))
    graph = ExecutionGraph(
        Node(f"n{i}", NodeKind.FFN, stream=draw(st.sampled_from(STREAMS)), flops=float(draw(st.integers(0, 9))))
        for i in range(count)
    )
    pairs = [(order[a], order[b]) for a in range(count) for b in range(a + 1, count)]
    for source, target in draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []:
        graph.connect(f"n{source}", f"n{target}")
    return graph


def to_networkx(graph):
    other = nx.DiGraph()
    other.add_nodes_from(node.name for node in graph)
    other.add_edges_from((source, node.name) for node in graph for source in graph.inputs_of(node.name))
    return other


any_graph = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@any_graph
@given(graph=graphs())
def test_every_node_comes_after_its_inputs(graph):
    order = [node.name for node in graph.topological_sort()]
    assert sorted(order) == sorted(node.name for node in graph)
    other = to_networkx(graph)
    place = {name: index for index, name in enumerate(order)}
    assert all(place[source] < place[target] for source, target in other.edges)
    for name in order:
        assert graph.ancestors_of(name) == nx.ancestors(other, name)


@any_graph
@given(graph=graphs())
def test_the_critical_path_is_the_longest_and_bounds_the_estimate(graph):
    path = graph.get_critical_path(Seconds())
    for source, target in pairwise(path):
        assert source.name in graph.inputs_of(target.name)
    length = sum(node.flops for node in path)
    chains = nx.dag_longest_path_length(_weighted(graph), default_weight=0) if len(graph) else 0
    assert length == chains
    total = graph.estimate_total_time(Seconds())
    assert length <= total <= sum(node.flops for node in graph)


def _weighted(graph):
    """Costs of nodes as costs of the edges into them; one more node leads to all."""
    other = nx.DiGraph()
    for node in graph:
        for source in (*graph.inputs_of(node.name), "start"):
            other.add_edge(source, node.name, weight=node.flops)
    return other


@any_graph
@given(graph=graphs())
def test_no_two_nodes_of_a_stream_run_at_once_and_none_before_its_inputs(graph):
    times = graph.schedule(Seconds())
    for stream in STREAMS:
        spans = sorted(times[node.name] for node in graph if node.stream == stream and node.flops)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for node in graph:
        assert all(times[source][1] <= times[node.name][0] for source in graph.inputs_of(node.name))


@any_graph
@given(graph=graphs(), kept=st.sets(st.integers(0, 13)))
def test_a_part_has_the_edges_between_its_nodes(graph, kept):
    part = graph.get_subgraph(lambda node: int(node.name[1:]) in kept)
    expected = to_networkx(graph).subgraph(node.name for node in part)
    assert set(to_networkx(part).edges) == set(expected.edges)
    before = set(to_networkx(graph).edges)
    for node in list(part):
        part.remove(node.name)
    assert set(to_networkx(graph).edges) == before, "the whole is not changed through its part"


def test_a_cycle_is_named():
    graph = ExecutionGraph(Node(name, NodeKind.FFN) for name in "abc")
    graph.connect("a", "b")
    graph.connect("b", "c")
    graph.connect("c", "b")
    with pytest.raises(ValueError, match="cycle through b, c"):
        graph.topological_sort()


def test_names_are_unique_and_inputs_exist():
    graph = ExecutionGraph([Node("a", NodeKind.FFN)])
    with pytest.raises(ValueError, match="'a' already"):
        graph.add(Node("a", NodeKind.FFN))
    with pytest.raises(KeyError):
        graph.connect("z", "a")
    with pytest.raises(KeyError):
        graph.replace(Node("z", NodeKind.FFN))
