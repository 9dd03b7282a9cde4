"""A pipeline for other tools: Graphviz dot, Mermaid, JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .checks import words

if TYPE_CHECKING:
    from .pipeline import Edge, Node, Pipeline


def _role(node: Node) -> str:
    return "source" if node.spec.is_source else "sink" if node.spec.is_sink else "stage"


def _label(edge: Edge) -> str:
    if edge.source_port == "error":
        return "error"
    return words(edge.kinds) if edge.source_port == "out" else f"{edge.source_port}: {words(edge.kinds)}"


def render_dot(pipeline: Pipeline) -> str:
    """Graphviz source, left to right; error edges are dashed."""
    shapes = {"source": "invhouse", "stage": "box", "sink": "house"}
    lines = [f"digraph {json.dumps(pipeline.name)} {{", "  rankdir=LR;"]
    for node in pipeline.nodes.values():
        label = json.dumps(node.name if node.name == node.spec.name else f"{node.name}\n{node.spec.name}")
        lines.append(f"  {json.dumps(node.name)} [label={label}, shape={shapes[_role(node)]}];")
    for edge in pipeline.edges:
        style = ", style=dashed" if edge.source_port == "error" else ""
        ends = f"{json.dumps(edge.source)} -> {json.dumps(edge.target)}"
        lines.append(f"  {ends} [label={json.dumps(_label(edge))}{style}];")
    return "\n".join([*lines, "}"])


def render_mermaid(pipeline: Pipeline) -> str:
    """A Mermaid flowchart, as Markdown pages show it; error edges are dotted."""
    brackets = {"source": ("([", "])"), "stage": ("[", "]"), "sink": ("[(", ")]")}
    ids = {name: f"n{index}" for index, name in enumerate(pipeline.nodes)}
    lines = ["flowchart LR"]
    for node in pipeline.nodes.values():
        before, after = brackets[_role(node)]
        label = node.name if node.name == node.spec.name else f"{node.name}<br/>{node.spec.name}"
        lines.append(f'  {ids[node.name]}{before}"{label}"{after}')
    for edge in pipeline.edges:
        arrow = "-.->" if edge.source_port == "error" else "-->"
        lines.append(f'  {ids[edge.source]} {arrow}|"{_label(edge)}"| {ids[edge.target]}')
    return "\n".join(lines)


def render_json(pipeline: Pipeline) -> str:
    """Nodes and edges as JSON, with roles, ports and the kinds that each edge carries."""
    nodes: list[dict[str, Any]] = [
        {
            "name": node.name,
            "type": node.spec.name,
            "role": _role(node),
            "inputs": [port.name for port in node.spec.inputs],
            "outputs": [port.name for port in node.spec.outputs],
            "config": node.config.model_dump(mode="json", exclude_unset=True),
        }
        for node in pipeline.nodes.values()
    ]
    edges = [
        {
            "source": edge.source,
            "source_port": edge.source_port,
            "target": edge.target,
            "target_port": edge.target_port,
            "kinds": sorted(edge.kinds),
        }
        for edge in pipeline.edges
    ]
    return json.dumps({"name": pipeline.name, "nodes": nodes, "edges": edges}, indent=2, ensure_ascii=False)
