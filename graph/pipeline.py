"""A validated pipeline: what the runtime runs and what the drawings show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import networkx

    from ..config import Config, SageLLMConfig
    from .operator_spec import OperatorSpec, RecordKind


@dataclass(frozen=True, slots=True)
class Node:
    """One operator of a pipeline: its name there, its type, and its validated configuration."""

    name: str
    spec: OperatorSpec
    config: Config


@dataclass(frozen=True, slots=True, order=True)
class Edge:
    """A channel from an output port to an input port, and the record kinds that travel on it."""

    source: str
    source_port: str
    target: str
    target_port: str
    kinds: frozenset[RecordKind] = field(default=frozenset(), compare=False)

    def __str__(self) -> str:
        return f"{self.source}.{self.source_port} -> {self.target}.{self.target_port}"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A checked pipeline: a DAG in which every node is configured and every edge carries what its target takes.

    Relative paths in the configuration start at `base_dir`. `max_error_ratio` is the share of failed records, 0 to 1,
    above which the run stops; None is no limit. `resolved` is the file's content with every reference replaced.
    """

    name: str
    engine: SageLLMConfig
    nodes: dict[str, Node]
    edges: list[Edge]
    base_dir: Path
    path: Path | None = None
    max_error_ratio: float | None = None
    resolved: dict[str, Any] = field(default_factory=dict)

    def edges_from(self, name: str, port: str | None = None) -> list[Edge]:
        """The edges that leave a node, or one of its output ports."""
        return [edge for edge in self.edges if edge.source == name and port in (None, edge.source_port)]

    def edges_into(self, name: str, port: str | None = None) -> list[Edge]:
        """The edges that enter a node, or one of its input ports."""
        return [edge for edge in self.edges if edge.target == name and port in (None, edge.target_port)]

    def to_networkx(self) -> networkx.MultiDiGraph[str]:
        """The pipeline as a graph: nodes carry `type` and `config`, edges `source_port`, `target_port` and `kinds`."""
        import networkx

        graph: networkx.MultiDiGraph[str] = networkx.MultiDiGraph(name=self.name)
        for node in self.nodes.values():
            graph.add_node(node.name, type=node.spec.name, config=node.config)
        for edge in self.edges:
            graph.add_edge(
                edge.source,
                edge.target,
                key=f"{edge.source_port} -> {edge.target_port}",
                source_port=edge.source_port,
                target_port=edge.target_port,
                kinds=edge.kinds,
            )
        return graph

    def to_dict(self, *, defaults: bool = False) -> dict[str, Any]:
        """Plain values that load back to an equal pipeline; `defaults` adds every field that was left out."""
        unset = not defaults
        operators: dict[str, Any] = {}
        for node in self.nodes.values():
            fields = node.config.model_dump(mode="json", exclude_unset=unset)
            operators[node.name] = fields if node.spec.name == node.name else {"type": node.spec.name, **fields}
        values: dict[str, Any] = {
            "name": self.name,
            "engine": self.engine.model_dump(mode="json", exclude_unset=unset),
            "operators": operators,
            "edges": [f"{e.source}.{e.source_port} -> {e.target}.{e.target_port}" for e in self.edges],
        }
        if "edges" in self.resolved:
            values["edges"] = self.resolved["edges"]
        if self.max_error_ratio is not None:
            values["max_error_ratio"] = self.max_error_ratio
        return values
