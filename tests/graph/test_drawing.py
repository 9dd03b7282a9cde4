"""The drawings of a pipeline: text, dot, Mermaid, JSON."""

from __future__ import annotations

import json
import random
from typing import Any

import networkx
import pytest
import yaml

from sageLLM.graph import Pipeline, build_pipeline
from sageLLM.graph.drawing import draw_text, reading_order
from sageLLM.graph.render import render_dot, render_json, render_mermaid


@pytest.fixture
def pipeline(good: str) -> Pipeline:
    return build_pipeline(yaml.safe_load(good))


@pytest.fixture
def diamond(fake_operators: None) -> Pipeline:
    return build_pipeline(
        {
            "operators": {
                "read": {"path": "a", "on_error": "drop"},
                "tee": {},
                "left": {"type": "filter"},
                "right": {"type": "filter"},
                "merge": {},
                "tokenize": {"on_error": "drop"},
                "prefill": {},
                "decode": {"on_error": "drop"},
                "detokenize": {},
                "write": {"path": "b"},
            },
            "edges": [
                "read -> tee.left -> left -> merge.left",
                "tee.right -> right -> merge.right",
                "merge -> tokenize -> prefill -> decode -> detokenize -> write",
            ],
        }
    )


def test_a_chain_with_a_sink_for_errors(pipeline: Pipeline) -> None:
    assert (
        draw_text(pipeline)
        == """\
○ read
├─ error ────────────╮
│ request            │
● tokenize           │
├─ error ────────────┤
│ sequence           │
● prefill            │
│ sequence           │
● decode             │
├─ error ────────────┤
│ sequence or delta  │
● detokenize         │
│ completion         │
◆ write              │
                     │
◆ dead (write) ◀─────╯"""
    )


def test_branches_that_meet_again(diamond: Pipeline) -> None:
    assert draw_text(diamond).startswith("""\
○ read
│ request
● tee
├─ right: request ──────╮
│ left: request         │
● left (filter)         │
╰─ request to left ──╮  │
                     │  │
● right (filter) ◀───┼──╯
│ request to right   │
● merge left ◀───────╯
│ request
● tokenize
""")


def test_ascii_only(diamond: Pipeline) -> None:
    assert draw_text(diamond, unicode=False).isascii()


def test_the_order_of_rows_is_topological(diamond: Pipeline, pipeline: Pipeline) -> None:
    for each in (diamond, pipeline):
        order = {name: row for row, name in enumerate(reading_order(each))}
        assert sorted(order) == sorted(each.nodes)
        assert all(order[edge.source] < order[edge.target] for edge in each.edges)


@pytest.mark.parametrize("seed", range(20))
def test_every_rail_begins_and_ends_once(seed: int, fake_operators: None) -> None:
    """Random DAGs of filters: each arrow has its rail, and no rail is drawn over another's end."""
    chance = random.Random(seed)
    names = [f"f{i}" for i in range(chance.randint(1, 8))]
    operators: dict[str, Any] = {"read": {"path": "x"}, **{name: {"type": "filter"} for name in names}}
    operators["dead"] = {"type": "write", "path": "y"}
    edges = ["read.error -> dead"]
    for index, name in enumerate(names):
        edges.append(f"{chance.choice(['read', *names[:index]])} -> {name}")
    edges += [f"{name}.rejected -> {name}b" for name in names]
    operators |= {f"{name}b": {"type": "filter"} for name in names}
    operators |= {"tokenize": {"on_error": "drop"}, "prefill": {}, "decode": {"on_error": "drop"}, "detokenize": {}}
    operators["write"] = {"path": "z"}
    edges += [f"{name} -> tokenize" for name in [*names, *(f"{n}b" for n in names)]]
    edges.append("tokenize -> prefill -> decode -> detokenize -> write")
    pipeline = build_pipeline({"operators": operators, "edges": edges})
    text = draw_text(pipeline)
    assert text.count("╮") == text.count("╯") == text.count("◀")
    rows = text.splitlines()
    assert all(any(f" {name}" in row for row in rows) for name in pipeline.nodes)


def test_json_holds_the_graph_that_networkx_holds(pipeline: Pipeline) -> None:
    data = json.loads(render_json(pipeline))
    graph = pipeline.to_networkx()
    assert {node["name"]: node["type"] for node in data["nodes"]} == dict(graph.nodes(data="type"))
    assert [node["role"] for node in data["nodes"]] == ["source", *["stage"] * 4, "sink", "sink"]
    read = networkx.MultiDiGraph((edge["source"], edge["target"]) for edge in data["edges"])
    assert networkx.utils.graphs_equal(networkx.DiGraph(read), networkx.DiGraph(graph.edges()))


def test_dot(pipeline: Pipeline) -> None:
    text = render_dot(pipeline)
    assert text.startswith('digraph "good" {')
    assert '"dead" [label="dead\\nwrite", shape=house];' in text
    assert '"read" -> "tokenize" [label="request"];' in text
    assert '"read" -> "dead" [label="error", style=dashed];' in text
    assert text.count("->") == len(pipeline.edges)


def test_mermaid(pipeline: Pipeline) -> None:
    lines = render_mermaid(pipeline).splitlines()
    assert lines[0] == "flowchart LR"
    assert '  n0(["read"])' in lines
    assert '  n0 -->|"request"| n1' in lines
    assert '  n0 -.->|"error"| n6' in lines
